"""Shared pairs: nets and data fit each other, and what is trained once is found again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdrefs.data.sets import is_cached
from kdrefs.metrics import accuracy
from kdrefs.training import CheckpointError
from reproductions.harness.runs import Context, RunStore
from reproductions.protocols import pairs
from reproductions.protocols.pairs import PAIRS, WEIGHTS
from reproductions.protocols.transfer import cached_targets, live_targets


@pytest.fixture
def context(tmp_path):
    return Context(store=RunStore(tmp_path), max_steps=3)


@pytest.mark.parametrize("name", PAIRS)
def test_nets_of_a_pair_have_the_feature_it_names(name):
    pair = PAIRS[name]
    shape = (2, 1, 8, 8) if pair.data == "digits" else (2, 3, 32, 32)
    for net in (pair.teacher, pair.student):
        module = pairs.initialised(net, 10, 0, torch.device("cpu")).eval()
        with torch.no_grad():
            output = module(torch.rand(shape))
        assert output.logits.shape == (2, 10)
        assert output.features[net.feature].ndim == 2


def test_initial_weights_depend_on_the_seed_alone():
    net = PAIRS["digits"].student
    torch.manual_seed(1)
    first = pairs.initialised(net, 10, 3, torch.device("cpu")).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = pairs.initialised(net, 10, 3, torch.device("cpu")).state_dict()
    other = pairs.initialised(net, 10, 4, torch.device("cpu")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 10), (0.5, 50), (0.001, 1)])
def test_labelled_subset_takes_the_same_share_of_every_class(fraction, count):
    labels = np.repeat(np.arange(7, dtype=np.uint8), 100)
    np.random.default_rng(0).shuffle(labels)
    chosen = pairs.labelled_subset(labels, fraction, seed=5)
    assert np.bincount(labels[chosen.numpy()]).tolist() == [count] * 7
    assert (chosen.diff() > 0).all()
    assert torch.equal(chosen, pairs.labelled_subset(labels, fraction, seed=5))
    assert not torch.equal(chosen, pairs.labelled_subset(labels, fraction, seed=6))


def test_a_student_is_trained_once_and_found_again(context, monkeypatch):
    pair = PAIRS["digits"]
    first = pairs.supervised(context, pair, "student", seed=0)
    assert not first.training

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(pairs, "train_supervised", fail)
    second = pairs.supervised(context, pair, "student", seed=0).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    for change in ({"seed": 1}, {"seed": 0, "fraction": 0.5}):
        with pytest.raises(AssertionError, match="trained again"):
            pairs.supervised(context, pair, "student", **change)
    with pytest.raises(AssertionError, match="trained again"):
        pairs.supervised(context, replace(pair, mean=(0.4,)), "student", seed=0)


def test_stages_train_further_with_other_batches(context, tmp_path):
    pair = PAIRS["digits"]
    train, _, _ = pairs.load_pair_data(pair, probe=True)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            seen.append(images[:, 0, 4, 4].clone())
            return self.net(images)

    net = Spy(pairs.initialised(pair.student, 10, 0, torch.device("cpu")))
    recipe = pairs.Recipe(((1, 1e-3), (1, 1e-4)))
    batches = pairs.make_batches(pair, train, device=torch.device("cpu"), training=True, seed=0)
    pairs.train_supervised(net, batches, recipe, folder=tmp_path)
    assert len(seen) == 2 * len(batches)
    assert not torch.equal(seen[0], seen[len(batches)])


def test_cached_views_are_what_the_teacher_says_of_the_same_batch(context):
    pair = replace(PAIRS["digits"], augment=pairs.Augment(crop=1))
    train, _, _ = pairs.load_pair_data(pair, probe=True)
    views = pairs.teacher_views(context, pair, seed=0, views=2)
    teacher = pairs.teacher(context, pair, seed=0)
    batches = pairs.make_batches(
        pair, train, device=torch.device("cpu"), training=True, seed=1, fixed_views=2, view_extras=views
    )
    live = live_targets(teacher, pair.teacher.feature)
    for epoch in (0, 1):
        batch = next(iter(batches.epoch(epoch)))
        for name, value in cached_targets(batch).items():
            torch.testing.assert_close(value, live(batch)[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(views["feature"][0], views["feature"][1])


def test_weights_survive_saving_and_a_damaged_file_is_named(tmp_path):
    net = pairs.initialised(PAIRS["digits"].student, 10, 0, torch.device("cpu"))
    path = tmp_path / "weights.safetensors"
    pairs.save_weights(net, path)
    other = pairs.load_weights(pairs.initialised(PAIRS["digits"].student, 10, 1, torch.device("cpu")), path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"weights\.safetensors"):
        pairs.load_weights(net, path)


@pytest.mark.parametrize("damage", ["pickle", "bit"])
def test_damaged_committed_weights_are_refused(tmp_path, context, monkeypatch, damage):
    pair = replace(PAIRS["digits"], teacher_weights="digits.safetensors")
    path = tmp_path / "digits.safetensors"
    monkeypatch.setattr(pairs, "WEIGHTS", tmp_path)
    module = pairs.initialised(pair.teacher, 10, 0, torch.device("cpu"))
    pairs.save_weights(module, path)
    assert pairs.teacher(context, pair, 0).training is False
    if damage == "pickle":
        torch.save(module.state_dict(), path)
    else:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"digits\.safetensors is damaged"):
        pairs.teacher(context, pair, 0)


def test_committed_teachers_are_small_and_classify():
    committed = {pair.teacher_weights for pair in PAIRS.values() if pair.teacher_weights}
    assert committed == {path.name for path in WEIGHTS.glob("*.safetensors")}
    assert all((WEIGHTS / name).stat().st_size <= 1_200_000 for name in committed)


@pytest.mark.skipif(not is_cached("cifar10"), reason="CIFAR-10 is not in the data cache")
def test_committed_cifar10_teacher_classifies_test_images():
    pair = PAIRS["cifar10-tiny"]
    teacher = pairs.teacher(Context(), pair, seed=0)
    _, test, _ = pairs.load_pair_data(pair, probe=True)
    batches = pairs.make_batches(pair, test, device=torch.device("cpu"), training=False)
    logits = pairs.representations(teacher, batches)["logits"]
    assert accuracy(logits, torch.from_numpy(test.labels).long()) > 0.8
