"""One training in two processes: the same as in one, on a processor; what cannot be shared is refused."""

import json
import re
import shutil

import pytest
import torch

from kdrefs.training import data_parallel, gather_rows, load_tensors, update, whole_batch
from kdrefs.training.parallel import agreed, leads, processes
from tests.torchrun import launch
from tests.training import together

# Relative to the largest value of a tensor, after nine or twelve steps.
TOLERANCE = {"single_precision": 1e-5}
DOUBLE = 1e-12


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Folders with what came of the trainings in one process and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    together.main(one)
    launch("-m", "tests.training.together", str(two))
    return one, two


def largest_difference(first, second):
    assert first.keys() == second.keys()
    gaps = {name: (first[name].double() - second[name].double()).abs().max() for name in first}
    return max(gap / first[name].abs().max().clamp(min=1e-6) for name, gap in gaps.items())


@pytest.mark.parametrize("name", together.NAMES)
def test_two_processes_train_as_one(outcomes, name):
    one, two = (load_tensors(folder / f"{name}.safetensors")[0] for folder in outcomes)
    assert largest_difference(one, two) < TOLERANCE.get(name, DOUBLE)
    if name not in ("alternating", "own_loop"):
        assert two["means"][:, 1].tolist() == [together.SAMPLES / 4] * together.EPOCHS


def test_a_training_of_two_processes_goes_on_with_its_bits_or_in_one(outcomes, tmp_path):
    _, two = outcomes
    whole = load_tensors(two / "cross_entropy.safetensors")[0]
    resumed = load_tensors(two / "broken_off.safetensors")[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    shutil.copyfile(two / "broken_off" / "half.safetensors", tmp_path / "checkpoint.safetensors")
    alone = together.train(torch.nn.functional.cross_entropy, together.network(), tmp_path)
    assert largest_difference(whole, alone) < DOUBLE


def test_what_cannot_be_shared_is_refused(outcomes):
    messages = json.loads((outcomes[1] / "refusals.json").read_text())
    assert re.match(r"RuntimeError: net\.0\.bias differs between the processes", messages["drift"])
    assert messages["members"] == (
        "ValueError: state['net'], of several members, needs a training in one process, this one has 2"
    )
    assert messages["graph"] == "ValueError: graph=True needs a training in one process, this one has 2"


def test_a_single_process_is_left_alone():
    rows = torch.randn(3, 2, requires_grad=True)
    with data_parallel():
        assert (processes(), leads(), agreed("answer")) == (1, True, "answer")
        assert whole_batch(rows) is rows
    assert gather_rows(rows) is rows
    net = torch.nn.Linear(2, 1)
    before = net.weight.detach().clone()
    update(torch.optim.SGD(net.parameters(), 0.1), net(rows).sum())
    assert not torch.equal(before, net.weight)
