"""Training of students with the alternating updates of discriminator and student, one or several seeds at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.methods.ksanc import LogitDiscriminator, ksanc_loss, logit_discriminator_loss, weight_penalty
from kdrefs.nets import Output
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import (
    as_one,
    batches_as_one,
    evaluation_mode,
    fit,
    load_tensors,
    per_member,
    save_tensors,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.ksanc.squeezing import (
    Reading,
    Squeezer,
    guides_of,
    layers_of,
    shapes_of,
    student_squeezer,
)
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    PAIRS,
    initialised,
    load_pair_data,
    load_weights,
    make_batches,
    save_weights,
    sgd_schedule,
    teacher_identity,
)

DISCRIMINATOR_RATE = 1e-3  # of Adam


@dataclass(frozen=True)
class Arm:
    """Terms of the loss and their weights; a term whose weight is 0 is not computed."""

    backbone: float
    adversarial: float = 0.0
    mu: float = 0.0
    intermediate: float = 0.0
    reading: Reading | None = None  # how layers are squeezed

    def __post_init__(self) -> None:
        if (self.reading is None) != (self.intermediate == 0):
            raise ValueError("reading: expected one exactly where intermediate is above 0")


@dataclass(frozen=True)
class Trained:
    """A student and what squeezes its layers, in eval mode."""

    student: nn.Module
    squeezer: Squeezer | None


def trained(arm: Arm, training: Training, seeds: Sequence[int], context: Context) -> list[Trained]:
    """The students of several seeds, trained once for each content of their configuration."""
    pair = PAIRS[training.pair]
    found = initial(arm, training, seeds, context)

    def make(folder: Path) -> None:
        train(found, arm, training, seeds, context, folder)
        for seed, one in zip(seeds, found, strict=True):
            save_weights(one.student, folder / f"weights{seed}.safetensors")
            if one.squeezer is not None:
                save_weights(one.squeezer, folder / f"squeezer{seed}.safetensors")

    about = {
        "arm": asdict(arm), "training": asdict(training), "pair": asdict(pair), "seeds": list(seeds),
        "teacher": [teacher_identity(pair, seed) for seed in seeds], "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("ksanc", about, make, source=source_digest(__name__))
    for seed, one in zip(seeds, found, strict=True):
        load_weights(one.student, folder / f"weights{seed}.safetensors")
        if one.squeezer is not None:
            load_weights(one.squeezer, folder / f"squeezer{seed}.safetensors")
    return found


def initial(arm: Arm, training: Training, seeds: Sequence[int], context: Context) -> list[Trained]:
    """Fresh students, each from the weights that every row of the shared table starts from with its seed."""
    pair = PAIRS[training.pair]
    split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    students = [
        initialised(training.student or pair.student, classes, seed, context.device) for seed in seeds
    ]
    if arm.reading is None:
        return [Trained(student, None) for student in students]
    batch = next(iter(make_batches(pair, split, device=context.device, training=False, batch_size=2)))
    assert batch.images is not None
    own, guide = layers_of(training)
    descriptor, channels = shapes_of(students[0], own, batch.images)
    network = initialised(pair.teacher, classes, 0, context.device)
    _, outputs = shapes_of(network, guide, batch.images)
    return [
        Trained(
            student,
            student_squeezer(arm.reading, descriptor, channels, outputs, seed).to(context.device),
        )
        for seed, student in zip(seeds, students, strict=True)
    ]


def train(
    found: Sequence[Trained],
    arm: Arm,
    training: Training,
    seeds: Sequence[int],
    context: Context,
    folder: Path,
    *,
    indices: Tensor | None = None,
) -> None:
    """Train students, one a seed, in place, with the recipe and the batches of the shared table.

    A step updates the discriminator with the student's logits as constants, then the student and its squeezer with
    the discriminator's weights as constants.

    Args:
        found: What :func:`initial` made.
        arm: The terms.
        training: The recipe.
        seeds: Of batch order, discriminator and, where it is trained, the teacher.
        context: What the harness gives.
        folder: Where the checkpoint goes.
        indices: Training images to use; None for all.
    """
    pair, device = PAIRS[training.pair], context.device
    split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    batches = _batches(arm, training, seeds, split, context)
    members = [one if indices is None else one.subset(indices) for one in batches]
    guides = None
    if training.views is None:
        guides = as_one(guides_of(arm.reading, training, seeds, context, fold_batchnorm))
    state = prepared(found, arm, training, seeds, len(members[0]), classes, device)
    fit(
        step_of(arm, training, guides),
        state,
        batches_as_one(members),
        epochs=training.epochs,
        checkpoint=folder / "training.safetensors",
        precision=training.precision,
        max_steps=context.max_steps,
        progress=context.progress,
    )
    for name in {"student", "squeezer"} & state.keys():
        write_back(state[name], [getattr(one, name) for one in found])


def prepared(
    found: Sequence[Trained],
    arm: Arm,
    training: Training,
    seeds: Sequence[int],
    steps_per_epoch: int,
    classes: int,
    device: torch.device,
) -> dict[str, Any]:
    """What a step changes: students, squeezers, discriminators, an optimiser and a schedule for either side."""
    state: dict[str, Any] = {"student": as_one([one.student.train() for one in found])}
    squeezers = [one.squeezer.train() for one in found if one.squeezer is not None]
    if squeezers:
        state["squeezer"] = as_one(squeezers)
    state["optimizer"] = torch.optim.SGD(
        [parameter for module in state.values() for parameter in module.parameters()],
        lr=training.rate,
        momentum=0.9,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        **fused(device),
    )
    if arm.adversarial:
        state["discriminator"] = as_one([_discriminator(classes, seed).to(device) for seed in seeds])
        state["discriminator_optimizer"] = torch.optim.Adam(
            state["discriminator"].parameters(), lr=DISCRIMINATOR_RATE, **fused(device)
        )
    for name in [name for name in state if name.endswith("optimizer")]:
        state[f"{name}_schedule"] = sgd_schedule(
            state[name], training.epochs, steps_per_epoch, milestones=training.milestones
        )
    return state


def step_of(
    arm: Arm, training: Training, guides: nn.Module | None
) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    """A step of :func:`~kdrefs.training.fit`; without ``guides`` the targets come with the batch."""
    own, _ = layers_of(training)

    def of_one(
        logits: Tensor, targets: Mapping[str, Tensor], labels: Tensor, further: Mapping[str, Tensor]
    ) -> Tensor:
        return ksanc_loss(
            logits,
            targets["logits"],
            further.get("answers"),
            labels,
            further.get("squeezed"),
            targets["squeezed"] if arm.reading else None,
            backbone=arm.backbone,
            adversarial=arm.adversarial,
            intermediate=arm.intermediate,
        )

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        targets: Mapping[str, Tensor] = batch.extras
        if guides is not None:
            with evaluation_mode(guides):
                targets = guides(batch.images)
        output: Output = state["student"](batch.images)
        further: dict[str, Tensor] = {}
        scalars = {}
        if arm.adversarial:
            judge = state["discriminator"]
            answers = judge(targets["logits"], output.logits.detach())
            judged = per_member(logit_discriminator_loss, judge)(*answers, batch.labels, mu=arm.mu)
            update(
                state["discriminator_optimizer"], judged.sum() + arm.mu * weight_penalty(judge.parameters())
            )
            scalars["discriminator"] = judged.detach().mean()
            further["answers"] = judge(targets["logits"], output.logits)[1]
        if arm.reading is not None:
            further["squeezed"] = state["squeezer"](*own.of(output))
        losses = per_member(of_one, state["student"])(output.logits, dict(targets), batch.labels, further)
        update(state["optimizer"], losses.sum())
        for name in [name for name in state if name.endswith("schedule")]:
            state[name].step()
        accuracy = (output.logits.argmax(-1) == batch.labels).float().mean()
        return {"loss": losses.detach().mean(), "accuracy": accuracy, **scalars}

    return step


def _batches(
    arm: Arm, training: Training, seeds: Sequence[int], split: Split, context: Context
) -> list[Batches]:
    """The training set in each seed's order, with the teacher's answers where views are fixed."""
    pair = PAIRS[training.pair]
    base = make_batches(
        pair,
        split,
        device=context.device,
        training=True,
        batch_size=training.batch_size,
        fixed_views=training.views,
    )
    if training.views is None:
        return [base.with_seed(seed) for seed in seeds]
    answers = _answers(base, arm, training, seeds, context)
    extended = {name: base.with_extras(view_extras=one) for name, one in answers.items()}
    return [extended[teacher_identity(pair, seed)].with_seed(seed) for seed in seeds]


def _answers(
    batches: Batches, arm: Arm, training: Training, seeds: Sequence[int], context: Context
) -> dict[str, dict[str, Tensor]]:
    """By teacher, the guide's targets on every fixed view, ``(views, N, ...)``; computed once and kept."""
    pair = PAIRS[training.pair]
    names = list(dict.fromkeys(teacher_identity(pair, seed) for seed in seeds))

    def make(folder: Path) -> None:
        guides = guides_of(arm.reading, training, seeds, context)[: len(names)]
        for number, guide in enumerate(guides):
            views = [_on_view(guide, batches, view) for view in range(batches.fixed_views or 0)]
            stacked = {name: torch.stack([one[name] for one in views]) for name in views[0]}
            save_tensors(folder / f"targets{number}.safetensors", stacked)

    about = {
        "reading": arm.reading, "training": asdict(training), "pair": asdict(pair), "max_steps": context.max_steps,
        "teachers": names,
    }  # fmt: skip
    folder = context.artifact("ksanc-targets", about, make, source=source_digest(__name__))
    found = {}
    for number, name in enumerate(names):
        tensors, _ = load_tensors(folder / f"targets{number}.safetensors")
        found[name] = {key: value.to(context.device) for key, value in tensors.items()}
    return found


def _on_view(guide: nn.Module, batches: Batches, view: int) -> dict[str, Tensor]:
    """The guide's targets of all images with the geometry of a fixed view."""
    parts: dict[str, list[Tensor]] = {}
    with evaluation_mode(guide):
        for batch in batches.view(view):
            for name, value in guide(batch.images).items():
                parts.setdefault(name, []).append(value.float())
    return {name: torch.cat(values) for name, values in parts.items()}


def _discriminator(classes: int, seed: int) -> LogitDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LogitDiscriminator(classes)
