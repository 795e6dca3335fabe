"""The DarkRank column: its classes are held out, its arms are what they say, and its choice is by held-out classes."""

from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from kdrefs.methods.darkrank import hard_darkrank_loss, soft_darkrank_loss
from kdrefs.nets import Output
from reproductions.darkrank import choose, figures, heldout
from reproductions.darkrank import run as darkrank
from reproductions.darkrank.run import Weights
from reproductions.harness.runs import Context, Result, Run, RunStore

QUICK = darkrank.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", darkrank.PROFILES)
def test_plan_has_every_arm(profile):
    config = darkrank.PROFILES[profile]
    plan = darkrank.plan(config)
    arms = {*config.arms, *config.few}
    assert {run.arm for run in plan} == arms
    assert arms <= {"teacher", *darkrank.methods(config.recipe, config.weights)}
    teachers = [run.seed for run in plan if run.arm == "teacher"]
    assert teachers == ([0] if config.recipe.shared_teacher else list(config.seeds))


@pytest.mark.parametrize("profile", darkrank.PROFILES)
def test_no_class_is_on_both_sides(profile, shared):
    recipe = darkrank.PROFILES[profile].recipe
    if recipe.pair.data != "digits":
        assert recipe.unseen[0] >= recipe.seen
        return
    parts = heldout.parts_of(recipe, shared)
    known = set(parts.training.labels) | set(parts.seen.labels)
    asked = set(parts.database.labels)
    assert asked == set(parts.queries.labels)
    assert known == set(range(recipe.seen))
    assert not known & asked


@pytest.mark.parametrize("arm", [*QUICK.arms, *QUICK.few])
def test_every_quick_arm_gives_its_metrics(arm, shared):
    scores = darkrank.execute(Run("darkrank", "quick", "digits", arm, 0), QUICK, shared)
    assert scores.keys() == darkrank.METRICS.keys()
    assert all(0 <= value <= 100 for value in scores.values())
    assert (scores["neighbours"] == 100) == (arm == "teacher")


def test_seeds_may_share_a_training(shared):
    runs = [Run("darkrank", "quick", "digits", "soft", seed) for seed in (0, 1)]
    nets = darkrank.networks_of(runs, QUICK, shared)
    images = torch.rand(3, 1, 8, 8)
    assert darkrank.together(runs[0], QUICK, "cpu") == darkrank.together(runs[1], QUICK, "cpu")
    for run, net in zip(runs, nets, strict=True):
        (alone,) = darkrank.networks_of([run], QUICK, shared)
        torch.testing.assert_close(net(images).logits, alone(images).logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(nets[0](images).logits, nets[1](images).logits)


def test_arms_add_their_terms():
    generator = torch.Generator().manual_seed(0)
    logits, guides = (torch.randn(8, 5, generator=generator) for _ in range(2))
    name = QUICK.recipe.pair.student.feature
    student, embedding = (torch.randn(8, width, generator=generator) for width in (16, 64))
    labels = torch.arange(8) % 5
    weights = Weights(soft=2.0, hard=3.0, kd=0.4)
    output, targets = Output(logits, {name: student}), {"logits": guides, "embedding": embedding}
    hard_labels = F.cross_entropy(logits, labels)
    kl = 16 * F.kl_div((logits / 4).log_softmax(1), (guides / 4).softmax(1), reduction="batchmean")
    soft = soft_darkrank_loss(student, embedding)
    authors = soft_darkrank_loss(student, embedding, alpha=12.25, beta=4.0, variant="official")
    expected = {
        "student": hard_labels,
        "kd": 0.6 * hard_labels + 0.4 * kl,
        "soft": hard_labels + 2 * soft,
        "hard": hard_labels + 3 * hard_darkrank_loss(student, embedding, list_length=4),
        "soft_kd": 0.6 * hard_labels + 0.4 * kl + 2 * soft,
        "soft_alone": soft,
        "soft_official": hard_labels + 16 * authors,
    }
    methods = darkrank.methods(QUICK.recipe, weights)
    assert methods.keys() == expected.keys()
    for arm, value in expected.items():
        (phase,) = methods[arm].phases
        found = phase.loss(output, targets, labels, 0.0)
        assert found.item() == pytest.approx(value.item(), rel=1e-5), arm


def test_neighbours_are_counted_without_the_sample_itself():
    guide = torch.eye(6) + 0.01 * torch.arange(36.0).view(6, 6)
    assert heldout.shared_neighbours(guide, guide, 2) == 1
    line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [1.0, 0.7]])
    other = line[[3, 1, 2, 0]]
    # One neighbour each: 0-1, 1-0, 2-1, 3-2 against 0-2, 1-3, 2-1, 3-1.
    assert heldout.shared_neighbours(line, other, 1) == pytest.approx(1 / 4)


def test_the_choice_is_the_best_of_each_arm():
    assert len({len(values) for values in choose.TRIALS.values()}) == 1
    best = {"soft": choose.TRIALS["soft"][2], "hard": choose.TRIALS["hard"][0], "kd": choose.TRIALS["kd"][1]}
    asked = []

    def trial(arm: str, weights: Weights) -> float:
        asked.append((arm, getattr(weights, arm)))
        return -abs(getattr(weights, arm) - best[arm])

    assert choose.choose(Weights(9.0, 9.0, 0.9), trial) == Weights(**best)
    assert asked == [(arm, value) for arm, values in choose.TRIALS.items() for value in values]


def test_the_choice_sees_training_images_of_seen_classes_alone(shared):
    recipe, parts = choose.held_out(darkrank.DIGITS)
    whole = heldout.parts_of(darkrank.DIGITS, Context(store=shared.store))
    images = {image.tobytes() for image in whole.training.images}
    assert recipe.seen == choose.TRAINED
    assert set(parts.training.labels) == set(range(choose.TRAINED))
    assert set(parts.queries.labels) == set(range(choose.TRAINED, darkrank.DIGITS.seen))
    for part in (parts.training, parts.database, parts.queries):
        assert {image.tobytes() for image in part.images} <= images
    assert len(parts.database) + len(parts.queries) + len(parts.training) == len(whole.training)
    trial = choose.trial_on(darkrank.DIGITS, (0,), shared)
    assert 0 <= trial("soft", darkrank.WEIGHTS) <= 100


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {arm for config in darkrank.PROFILES.values() for arm in (*config.arms, *config.few)}
    assert arms == figures.ARM_TITLES.keys()


def test_the_figure_shows_the_nearest_images(closed, monkeypatch, shared):
    parts = heldout.parts_of(QUICK.recipe, shared)
    spaces = {"teacher": torch.rand(len(parts.queries), 4), "soft": torch.rand(len(parts.queries), 4)}
    database = torch.rand(len(parts.database), 4)
    monkeypatch.setattr(
        figures, "_embeddings", lambda result, config, context: (database, spaces[result.run.arm])
    )

    class Given:
        def __init__(self, arm: str) -> None:
            self.run = Run("darkrank", "quick", "digits", arm, 0)

    monkeypatch.setattr(Context, "of", lambda result: shared)
    results: list[Result] = [Given("soft"), Given("teacher")]
    figure = figures.neighbours_figure(results, QUICK, ("teacher", "soft"), queries=(0, 3), count=5)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 2 * 2 * 6
    scores = F.normalize(spaces["teacher"][:1]) @ F.normalize(database).T
    nearest = parts.database.images[scores.topk(5).indices[0].numpy()]
    assert (shown[0] == parts.queries.images[0].squeeze()).all()
    for image, expected in zip(shown[1:6], nearest, strict=True):
        assert (image == expected.squeeze()).all()
