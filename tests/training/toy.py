"""A training of a few hundred milliseconds that uses every kind of state, also as a process that can be killed.

    python -m tests.training.toy CHECKPOINT EVERY [KILL]

trains to the end (or until it kills itself, see :func:`arm`) and prints a digest of everything.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kdrefs.training import cosine, evaluation_mode, fit, update
from kdrefs.training.checkpoint import flatten

EPOCHS, STEPS, BATCH = 3, 5, 8


class ToyBatches:
    """The interface that fit asks for: reproducible epochs that can be entered anywhere."""

    def __init__(self, steps=STEPS, device="cpu"):
        self.steps, self.device = steps, device

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        generator = torch.Generator().manual_seed(1000 + epoch)
        images = torch.randn(self.steps, BATCH, 2, 6, 6, generator=generator).to(self.device)
        labels = torch.randint(3, (self.steps, BATCH), generator=generator).to(self.device)
        for k in range(start, self.steps):
            yield images[k], labels[k]


def toy_net():
    # Before a normalisation a bias has no gradient but rounding, which Adam would blow up.
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 3),
    )


def toy_state(device="cpu"):
    """Network with buffers and dropout, optimiser with moments, schedule, generator, tensor, numbers."""
    torch.manual_seed(0)
    net = toy_net().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    return {
        "net": net,
        "optimizer": optimizer,
        "schedule": cosine(optimizer, EPOCHS * STEPS, warmup_steps=2),
        "generator": torch.Generator(device).manual_seed(5),
        "centre": torch.zeros(3, device=device),
        "weight": 1.0,
        "seen": 0,
    }


def toy_step(state, batch):
    images, labels = batch
    noise = torch.randn(images.shape, generator=state["generator"], device=images.device)
    logits = state["net"](images + 0.1 * noise).float()
    loss = state["weight"] * F.cross_entropy(logits - state["centre"], labels)
    update(state["optimizer"], loss)
    state["schedule"].step()
    state["centre"].lerp_(logits.detach().mean(0), 0.1)
    state["weight"] *= 0.99
    state["seen"] += len(labels)
    return {"loss": loss, "largest": logits.max()}


def toy_evaluate(state, epoch):
    with evaluation_mode(state["net"]):
        images, labels = next(ToyBatches(device=state["centre"].device).epoch(99))
        return {"accuracy": (state["net"](images).argmax(1) == labels).float().mean().item()}


def contents(state):
    """Every bit of a state, and of the global generator, as tensors and JSON."""
    tensors = {}
    plain = {
        key: value.get_state() if isinstance(value, torch.Generator)
        else value.state_dict() if hasattr(value, "state_dict")
        else value
        for key, value in state.items()
    }  # fmt: skip
    return tensors, json.dumps(flatten({**plain, "global": torch.get_rng_state()}, "state", tensors))


def digest(state, history):
    """One hash of a finished training."""
    tensors, structure = contents(state)
    sha = hashlib.sha256((structure + repr(history)).encode())
    for name in sorted(tensors):
        sha.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def toy_fit(state, step=toy_step, **options):
    options = {"epochs": EPOCHS, "evaluate": toy_evaluate, "monitor": "accuracy", **options}
    return fit(step, state, ToyBatches(device=state["centre"].device), **options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where):
    """Make this process kill itself at one place in the second epoch; returns the step to use."""
    place, count = where.split(":")
    left = [int(count)]

    def now():
        left[0] -= 1
        return left[0] == 0

    if place == "step":

        def step(state, batch):
            scalars = toy_step(state, batch)
            if now():
                die()
            return scalars

        return step
    if place == "write":
        # The disk has half of the new file when the process goes.
        original = os.fsync

        def fsync(descriptor):
            if now():
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                original(descriptor)
                die()
            original(descriptor)

        os.fsync = fsync
    if place == "rename":
        rename = os.replace

        def replace(source, target):
            if now():
                die()
            rename(source, target)

        os.replace = replace
    return toy_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = toy_state()
    step_to_use = arm(sys.argv[3]) if len(sys.argv) > 3 else toy_step
    measured = toy_fit(
        trained, step_to_use, checkpoint=Path(sys.argv[1]), checkpoint_every=float(sys.argv[2])
    )
    print(digest(trained, measured))
