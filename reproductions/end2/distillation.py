"""Ensembles, and the students that one network's worth of parameters makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.methods.end2 import end2_loss, end_loss, temperature_schedule
from kdrefs.nets import Output, build
from kdrefs.training import (
    as_one,
    batches_as_one,
    evaluation_mode,
    fit,
    load_tensors,
    one_cycle,
    per_member,
    save_tensors,
    update,
    write_back,
)
from kdrefs.training.clipping import clip_gradients
from kdrefs.training.optimizers import fused
from reproductions.end2 import sets
from reproductions.end2.sets import Sets, inputs_of
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import Net, load_weights, save_weights

ZOOM = 5.0  # of points: at the usual initial weights networks are too smooth for three turns in a unit disc
CLIP = 10.0  # KaosEngineer/PriorNetworks@d6f6ffb: ensembles/training.py
# Golden vector of its schedule: 20 of 60 epochs at the initial temperature, 30 down to 1.
HOLD, DECAY = 1 / 3, 1 / 2

# loss(float32 logits, batch, share of the training that is done) of one network, or (members,) of several
BatchLoss = Callable[[nn.Module, Tensor, Batch, float], Tensor]


class PointNet(nn.Module):
    """Two hidden layers with ReLU on points of the plane."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, points: Tensor) -> Output:
        """Classify points ``(B, 2)``."""
        return Output(self.layers(ZOOM * points), {})


@dataclass(frozen=True)
class Setting:
    """A task, an ensemble and the recipe of members and students, which are of one architecture.

    Attributes:
        data: Name in :func:`reproductions.end2.sets.load`.
        net: Of :func:`kdrefs.nets.build`, or ``"point_net"``.
        members: M.
        member_epochs: Adam, one cycle to 0.
        student_epochs: Likewise; of the set that an arm sees.
        rate: Highest learning rate of both.
        arms: Names in :data:`ARMS`, and ``"single"`` and ``"ensemble"``.
        few: Further arms, with the first three seeds.
        first: How many of the profile's seeds the arms get; None: all.
        initial: Temperature at the beginning of a student's training.
        views: Fixed views of the training images, on which the members are asked once.
    """

    data: str
    net: Net
    members: int
    member_epochs: int
    student_epochs: int
    rate: float
    arms: tuple[str, ...]
    few: tuple[str, ...] = ()
    first: int | None = None
    batch_size: int = 128
    initial: float = 10.0
    views: int = 1
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class Arm:
    """How a student is made.

    Attributes:
        distribution: Whether it learns the members' distribution (EnD²) or their mean (EnD).
        foreign: Whether foreign inputs are in its training set.
        smoothing: Of the members' probabilities.
        annealed: Whether the temperature falls from its initial value to 1; else it is 1 from the beginning.
    """

    distribution: bool
    foreign: bool = False
    smoothing: float = 1e-3
    annealed: bool = True


ARMS: Mapping[str, Arm] = {
    "end": Arm(False),
    "end_aux": Arm(False, foreign=True),
    "end2": Arm(True),
    "end2_aux": Arm(True, foreign=True),
    "end2_unsmoothed": Arm(True, smoothing=0.0),
    "end2_unannealed": Arm(True, annealed=False),
    "end2_bare": Arm(True, smoothing=0.0, annealed=False),
}


def made(net: Net, classes: int, seed: int, device: torch.device) -> nn.Module:
    """A freshly initialised network: the same seed gives the same weights whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net.name == "point_net":
            return PointNet(classes=classes, **net.options).to(device)
        module = build(net.name, classes=classes, **net.options)
    return module.to(memory_format=torch.channels_last).to(device)


def ensemble(setting: Setting, seed: int, context: Context) -> list[nn.Module]:
    """The members of a seed in eval mode: one architecture, other initial weights, another order of the batches."""
    probe = context.max_steps is not None
    parts = sets.load(setting.data, probe=probe)
    numbers = [1000 * (seed + 1) + m for m in range(setting.members)]
    networks = [made(setting.net, parts.classes, number, context.device) for number in numbers]

    def make(folder: Path) -> None:
        options = {"batch_size": setting.batch_size, "device": context.device}
        base = sets.batches(parts, parts.train, parts.train_labels, training=True, **options)
        group = setting.members if in_one_go(setting, context.device.type) else 1
        for first in range(0, setting.members, group):
            some = networks[first : first + group]
            order = [base.with_seed(number) for number in numbers[first : first + group]]
            checkpoint = folder / f"members{first}.safetensors"
            _train(some, order, _labels_loss, setting.member_epochs, setting, context, checkpoint)
        for m, network in enumerate(networks):
            save_weights(network, folder / f"member{m}.safetensors")

    about = {
        "net": asdict(setting.net), "data": setting.data, "members": setting.members, "epochs": setting.member_epochs,
        "rate": setting.rate, "batch_size": setting.batch_size, "precision": setting.precision, "seed": seed,
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("ensemble", about, make, source=source_digest(__name__))
    return [load_weights(one, folder / f"member{m}.safetensors") for m, one in enumerate(networks)]


def students(setting: Setting, arm: str, seeds: Sequence[int], context: Context) -> list[nn.Module]:
    """The students of an arm in eval mode, each of its own seed's ensemble."""
    parts = sets.load(setting.data, probe=context.max_steps is not None)
    networks = [made(setting.net, parts.classes, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        chosen = ARMS[arm]
        order = [_with_answers(setting, chosen, parts, seed, context).with_seed(seed) for seed in seeds]
        _train(
            networks,
            order,
            _loss(setting, chosen),
            setting.student_epochs,
            setting,
            context,
            folder / "training.safetensors",
        )
        for seed, network in zip(seeds, networks, strict=True):
            save_weights(network, folder / f"student{seed}.safetensors")

    about = {**relevant(setting, arm), "seeds": list(seeds), "max_steps": context.max_steps}
    folder = context.artifact("end2", about, make, source=source_digest(__name__))
    return [
        load_weights(one, folder / f"student{seed}.safetensors")
        for seed, one in zip(seeds, networks, strict=True)
    ]


def relevant(setting: Setting, arm: str) -> dict[str, Any]:
    """What of a setting decides a run's values."""
    of_setting = {
        name: value for name, value in asdict(setting).items() if name not in ("arms", "few", "first")
    }
    return of_setting | {"arm": asdict(ARMS[arm]) if arm in ARMS else arm}


def predictions(module: nn.Module, batches: Batches, *, view: int | None = None) -> Tensor:
    """Logits ``(N, K)`` of every sample in order, in eval mode, as float32."""
    with evaluation_mode(module):
        parts = [
            module(inputs_of(batch)).logits for batch in (batches if view is None else batches.view(view))
        ]
    return torch.cat(parts).float()


def answers(members: Sequence[nn.Module], batches: Batches, *, view: int | None = None) -> Tensor:
    """Logits ``(N, M, K)`` of all members on every sample in order."""
    return torch.stack([predictions(member, batches, view=view) for member in members], dim=1)


def in_one_go(setting: Setting, device: str) -> bool:
    """Whether several networks share a training: on CUDA, and on the CPU where they are very small."""
    return device == "cuda" or setting.data != "cifar10"


def _labels_loss(network: nn.Module, logits: Tensor, batch: Batch, done: float) -> Tensor:
    return per_member(F.cross_entropy, network)(logits, batch.labels)


def _loss(setting: Setting, arm: Arm) -> BatchLoss:
    def loss(network: nn.Module, logits: Tensor, batch: Batch, done: float) -> Tensor:
        schedule = {"initial": setting.initial if arm.annealed else 1.0, "hold": HOLD, "decay": DECAY}
        temperature = temperature_schedule(done, **schedule)

        def of_one(student: Tensor, members: Tensor) -> Tensor:
            if arm.distribution:
                return end2_loss(student, members, temperature=temperature, smoothing=arm.smoothing)
            return end_loss(student, members, temperature=temperature)

        return per_member(of_one, network)(logits, batch.extras["members"])

    return loss


def _with_answers(setting: Setting, arm: Arm, parts: Sets, seed: int, context: Context) -> Batches:
    """What an arm is distilled on, with what the seed's members say of each view."""
    inputs = np.concatenate([parts.train, parts.foreign]) if arm.foreign else parts.train
    options: dict[str, Any] = {"batch_size": setting.batch_size, "device": context.device}
    options["fixed_views"] = setting.views
    base = sets.batches(parts, inputs, training=True, **options)

    def make(folder: Path) -> None:
        members = ensemble(setting, seed, context)
        views = torch.stack([answers(members, base, view=view) for view in range(setting.views)])
        save_tensors(folder / "answers.safetensors", {"members": views})

    about = {
        **relevant(setting, "ensemble"),
        "foreign": arm.foreign,
        "seed": seed,
        "max_steps": context.max_steps,
    }
    folder = context.artifact("end2-answers", about, make, source=source_digest(__name__))
    views = load_tensors(folder / "answers.safetensors")[0]["members"].to(context.device)
    return base.with_extras(view_extras={"members": views})


def _train(
    networks: Sequence[nn.Module],
    order: Sequence[Batches],
    loss: BatchLoss,
    epochs: int,
    setting: Setting,
    context: Context,
    checkpoint: Path,
) -> None:
    """Train ``networks`` in place, in one training if they are several."""
    one = as_one(networks)
    total = epochs * len(order[0])
    optimizer = torch.optim.Adam(one.parameters(), lr=setting.rate, **fused(context.device))
    state: dict[str, Any] = {
        "network": one.train(),
        "optimizer": optimizer,
        "schedule": one_cycle(optimizer, total, warmup_steps=total // 8),
        "done": 0,
    }

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        network = state["network"]
        losses = loss(network, network(inputs_of(batch)).logits.float(), batch, state["done"] / total)
        _clipped_update(state["optimizer"], losses.sum(), network)
        state["schedule"].step()
        state["done"] += 1
        return {"loss": losses.detach().mean()}

    fit(
        step,
        state,
        batches_as_one(order),
        epochs=epochs,
        checkpoint=checkpoint,
        precision=setting.precision,
        max_steps=context.max_steps,
        progress=context.progress,
    )
    write_back(one, networks)


def _clipped_update(optimizer: torch.optim.Optimizer, loss: Tensor, network: nn.Module) -> None:
    hook = optimizer.register_step_pre_hook(lambda *_: clip_gradients(network, CLIP))
    try:
        update(optimizer, loss)
    finally:
        hook.remove()
