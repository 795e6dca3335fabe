"""The shared table's trainings on a part of the training set, below teachers that have seen all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from kdrefs.training import fit
from kdrefs.training.seeds import as_one, batches_as_one, write_back
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols import joint
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    PAIRS,
    initialised,
    labelled_subset,
    load_pair_data,
    load_weights,
    save_weights,
    sgd_schedule,
    teacher_identity,
)
from reproductions.protocols.rows import BASELINES, Method


def students_of(
    arm: str,
    seeds: Sequence[int],
    fraction: float,
    training: Training,
    context: Context,
    methods: Mapping[str, Method],
    module: str,
) -> list[nn.Module]:
    """Students of an arm, one a seed, each trained on its own part of the training set; in eval mode.

    Args:
        arm: One of the table's baselines or of ``methods``.
        seeds: Of weights, part, batch order, regressors and, where it is trained, the teacher.
        fraction: Share of the images of each class, see :func:`reproductions.protocols.pairs.labelled_subset`.
        training: The recipe; an epoch is one pass over the part. It has fixed views.
        context: What the harness gives.
        methods: The column's own methods by arm.
        module: Name of the column's module, whose source the trained networks belong to.
    """
    pair = PAIRS[training.pair]
    split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    source = source_digest(__name__ if arm in BASELINES else module)
    students = [
        initialised(training.student or pair.student, classes, seed, context.device) for seed in seeds
    ]

    def make(folder: Path) -> None:
        parts = [labelled_subset(split.labels, fraction, seed) for seed in seeds]
        method = BASELINES[arm] if arm in BASELINES else methods[arm]
        train(students, seeds, parts, method, training, context, folder, source=source)
        for seed, student in zip(seeds, students, strict=True):
            save_weights(student, folder / f"weights{seed}.safetensors")

    about = {
        "arm": arm, "seeds": list(seeds), "fraction": fraction, "pair": asdict(pair), "training": asdict(training),
        "teacher": [teacher_identity(pair, seed) for seed in seeds], "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("classification-part", about, make, source=source)
    return [
        load_weights(student, folder / f"weights{seed}.safetensors")
        for seed, student in zip(seeds, students, strict=True)
    ]


def train(
    students: Sequence[nn.Module],
    seeds: Sequence[int],
    parts: Sequence[Any],
    method: Method,
    training: Training,
    context: Context,
    folder: Path,
    *,
    source: str,
) -> None:
    """What :func:`reproductions.protocols.joint.train` does, each student on the samples of its part.

    Raises:
        ValueError: The recipe has no fixed views, so that the teacher's answers are not at hand.
    """
    if training.views is None:
        raise ValueError("training: expected fixed views, whose answers of the teacher are kept; got None")
    pair = PAIRS[training.pair]
    split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    whole = joint._member_batches(pair, split, seeds, method, training, context, source)
    batches = [one.subset(part) for one, part in zip(whole, parts, strict=True)]
    state: dict[str, Any] = {"student": as_one(students)}
    if method.regressors is not None:
        shapes = joint._shapes(students[0], None, whole[0], method)
        made = [joint._regressors(method, shapes, seed, context) for seed in seeds]
        state |= {f"regressor_{name}": as_one([one[name] for one in made]) for name in made[0]}
    for number, (phase, epochs) in enumerate(
        zip(method.phases, joint._epochs(method, training.epochs), strict=True)
    ):
        steps = epochs * len(batches[0])
        state |= {"optimizer": joint._optimizer(state, training), "done": 0}
        state["schedule"] = sgd_schedule(
            state["optimizer"], epochs, len(batches[0]), milestones=training.milestones
        )
        order = [one.with_seed(one.seed + 1000 * number) for one in batches]
        fit(
            joint._step(phase.loss, method, None, steps),
            state,
            batches_as_one(order),
            epochs=epochs,
            checkpoint=folder / f"phase{number}.safetensors",
            precision=training.precision,
            max_steps=context.max_steps,
            progress=context.progress,
        )
    write_back(state["student"], students)
