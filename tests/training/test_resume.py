"""Killed at any moment and started again: the same bits as an unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdrefs.training import fit, multistep, update
from kdrefs.training.checkpoint import previous
from tests.training.toy import (
    EPOCHS,
    STEPS,
    ToyBatches,
    contents,
    digest,
    toy_evaluate,
    toy_fit,
    toy_net,
    toy_state,
    toy_step,
)

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for the end of the process: nothing in kdrefs catches it."""


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Hundreds of checkpoints: what dies within this process needs no wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def dying_step(last):
    """A step that works ``last`` times, but the last time its result is lost."""
    taken = []

    def step(state, batch):
        scalars = toy_step(state, batch)
        taken.append(1)
        if len(taken) == last:
            raise Killed
        return scalars

    return step


@pytest.fixture(scope="module")
def unbroken():
    state = toy_state()
    return digest(state, toy_fit(state))


def process(checkpoint, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.training.toy", str(checkpoint), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def resumed(checkpoint, **options):
    state = toy_state()
    if checkpoint.exists():
        torch.manual_seed(77)  # the checkpoint brings torch's global generator back
    return digest(state, toy_fit(state, checkpoint=checkpoint, **options))


# Checkpoints are written after every step, so that the counts lie in the second of three epochs. Each write
# synchronises twice (file, folder) and renames twice (old to previous, new to its place).
@pytest.mark.parametrize("where", ["step:8", "write:15", "rename:15"])
def test_killed_process_resumes_with_the_same_bits(tmp_path, unbroken, where):
    checkpoint = tmp_path / "run.safetensors"
    killed = process(checkpoint, "0", where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout == ""
    assert previous(checkpoint).exists()
    assert checkpoint.exists() != (where == "rename:15")
    assert (tmp_path / ".run.safetensors.partial").exists() == (where != "step:8")
    assert resumed(checkpoint, checkpoint_every=0) == unbroken


def test_new_process_resumes_with_the_same_bits(tmp_path, unbroken):
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        toy_fit(toy_state(), dying_step(8), checkpoint=checkpoint, checkpoint_every=0)
    finished = process(checkpoint, "0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == unbroken


@pytest.mark.parametrize("every", [0, 1e9])
def test_killed_after_any_step(tmp_path, unbroken, every):
    for last in range(1, EPOCHS * STEPS + 1):
        checkpoint = tmp_path / f"{last}.safetensors"
        with pytest.raises(Killed):
            toy_fit(toy_state(), dying_step(last), checkpoint=checkpoint, checkpoint_every=every)
        assert resumed(checkpoint, checkpoint_every=every) == unbroken


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_call_of_a_checkpoint(tmp_path, monkeypatch, unbroken, call):
    """Each write has two fsyncs and two renames (the first write one), so a few counts cover every position."""
    original = getattr(os, call)
    for last in [1, 2, 3, 4, 5, 10, 11]:
        checkpoint = tmp_path / f"{last}.safetensors"
        calls = []

        def broken(*arguments, calls=calls, last=last):
            calls.append(1)
            if len(calls) == last:
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, broken)
            with pytest.raises(Killed):
                toy_fit(toy_state(), checkpoint=checkpoint, checkpoint_every=0)
        assert resumed(checkpoint) == unbroken


def test_killed_again_and_again(tmp_path, unbroken):
    checkpoint = tmp_path / "run.safetensors"
    for _ in range(EPOCHS * STEPS // 2):
        with pytest.raises(Killed):
            toy_fit(toy_state(), dying_step(3), checkpoint=checkpoint, checkpoint_every=0)
    assert resumed(checkpoint) == unbroken


def test_killed_during_evaluation(tmp_path, unbroken):
    calls = []

    def evaluate(state, epoch):
        calls.append(epoch)
        if len(calls) == 2:
            raise Killed
        return toy_evaluate(state, epoch)

    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        toy_fit(toy_state(), checkpoint=checkpoint, checkpoint_every=0, evaluate=evaluate)
    assert resumed(checkpoint) == unbroken


def test_how_often_checkpoints_are_written_does_not_matter(tmp_path, unbroken):
    for number, every in enumerate([0, 0.005, 1e9]):
        assert resumed(tmp_path / f"{number}.safetensors", checkpoint_every=every) == unbroken


def test_finished_training_returns_at_once(tmp_path, unbroken):
    checkpoint = tmp_path / "run.safetensors"
    assert resumed(checkpoint) == unbroken
    content = checkpoint.read_bytes()
    state = toy_state()

    def never(state, batch):
        raise AssertionError("a finished training must not be trained")

    assert digest(state, toy_fit(state, never, checkpoint=checkpoint)) == unbroken
    assert checkpoint.read_bytes() == content


# ---------------------------------------------------------------- every kind of state


def simple(optimizer_of, schedule_of=None, extra=None):
    """A state of one network with the optimiser and schedule under test."""

    def make():
        torch.manual_seed(0)
        net = toy_net()
        optimizer = optimizer_of(net)
        state = {"net": net, "optimizer": optimizer, "schedule": schedule_of(optimizer) if schedule_of else 0}
        return {**state, **(extra(net) if extra else {})}

    return make


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def groups(net):
    parts = [
        {"params": net[0].parameters(), "lr": 1e-3},
        {"params": net[5].parameters(), "betas": (0.8, 0.9)},
    ]
    return torch.optim.AdamW(parts, amsgrad=True)


def average(net):
    return {"average": AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)}


def tied(net):
    other = nn.Linear(64, 3)
    other.weight = net[5].weight
    return {
        "pair": nn.ModuleList([net[5], other]),
        "free": nn.Parameter(torch.ones(2)),
        "none": torch.zeros(0),
    }


KINDS = {
    "sgd-multistep": simple(sgd, lambda optimizer: multistep(optimizer, [1, 2], steps_per_epoch=STEPS)),
    "sgd-onecycle": simple(sgd, lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, EPOCHS * STEPS)),
    "sgd-sequential": simple(
        sgd,
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.CosineAnnealingLR(optimizer, 9)],
            [4],
        ),
    ),
    "sgd-plateau": simple(sgd, lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)),
    "adamw-groups": simple(groups),
    "rmsprop": simple(lambda net: torch.optim.RMSprop(net.parameters(), 1e-3, centered=True)),
    "average": simple(sgd, extra=average),
    "tied": simple(sgd, extra=tied),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_resumes_with_the_same_bits(tmp_path, kind):
    def step(state, batch, stop=None):
        images, labels = batch
        loss = F.cross_entropy(state["net"](images), labels)
        update(state["optimizer"], loss)
        if isinstance(state["schedule"], lr_scheduler.ReduceLROnPlateau):
            state["schedule"].step(loss.item())
        elif state["schedule"]:
            state["schedule"].step()
        if "average" in state:
            state["average"].update_parameters(state["net"])
        if stop is not None:
            stop.pop()
            if not stop:
                raise Killed
        return {"loss": loss}

    make, batches = KINDS[kind], ToyBatches()
    whole = make()
    expected = fit(step, whole, batches, epochs=EPOCHS)
    whole_contents = contents(whole)
    broken, countdown = make(), [1] * 8
    with pytest.raises(Killed):
        fit(
            lambda state, batch: step(state, batch, countdown), broken, batches, epochs=EPOCHS,
            checkpoint=tmp_path / "run.safetensors", checkpoint_every=0,
        )  # fmt: skip
    again = make()
    start = contents(again)[0]
    history = fit(step, again, batches, epochs=EPOCHS, checkpoint=tmp_path / "run.safetensors")
    assert history == expected
    tensors, structure = contents(again)
    assert structure == whole_contents[1]
    assert tensors.keys() == whole_contents[0].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, whole_contents[0][name]), name
    assert any(not torch.equal(tensors[name], start[name]) for name in start)
