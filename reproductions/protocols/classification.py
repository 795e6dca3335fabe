"""The table that all methods share: one student, one teacher, one recipe; a row is a method.

A column that follows this protocol has its methods by arm and takes what the harness asks for from :func:`functions`;
the arms ``teacher``, ``student`` and ``kd`` are the same for all columns and are trained once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kdrefs.metrics import accuracy, agreement
from kdrefs.training import load_tensors, save_tensors
from reproductions.harness.profiles import Metric
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context, Run
from reproductions.protocols import settings
from reproductions.protocols.joint import Training, train
from reproductions.protocols.pairs import (
    PAIRS,
    initialised,
    labelled_subset,
    load_pair_data,
    load_weights,
    make_batches,
    representations,
    save_weights,
    teacher,
    teacher_identity,
)
from reproductions.protocols.rows import BASELINES, Method
from reproductions.protocols.settings import Setting, setting_of

METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "agreement": Metric(unit="%", format=".1f", title="same prediction as the teacher's", delta=0.5),
    "cross_entropy": Metric(
        unit="nat", format=".3f", title="test cross-entropy", higher_is_better=False, delta=0.02
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(settings.Config[Setting[Training]]):
    """A profile of a column that follows this protocol."""

    teacher_weights: str | None = None  # digest of committed weights: other weights, other runs


def plan(column: str, config: Config) -> list[Run]:
    """Every run of a profile, see :func:`reproductions.protocols.settings.plan`; a committed teacher runs once."""

    def again(run: Run) -> bool:
        committed = PAIRS[setting_of(run, config).recipe.pair].teacher_weights is not None
        return run.arm == "teacher" and committed and run.seed != config.seeds[0]

    return [run for run in settings.plan(column, config) if not again(run)]


class Functions(NamedTuple):
    """What the harness asks a column for, see ``load_column`` of the harness."""

    plan: Callable[[Config], list[Run]]
    execute: Callable[[Run, Config, Context], dict[str, float]]
    execute_together: Callable[[Sequence[Run], Config, Context], list[dict[str, float]]]
    relevant_config: Callable[[Run, Config], dict[str, Any]]
    together: Callable[[Run, Config, str], str | None]


def functions(column: str, methods: Callable[[str], Mapping[str, Method]], module: str) -> Functions:
    """The functions of a column that has nothing but rows of the table.

    Args:
        column: Its name.
        methods: From the name of a setting to the column's own methods by arm.
        module: Name of the column's module, whose source the trained networks belong to.
    """

    def several(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
        return execute_together(runs, config, context, methods(runs[0].data), module)

    def one(run: Run, config: Config, context: Context) -> dict[str, float]:
        return several([run], config, context)[0]

    return Functions(partial(plan, column), one, several, relevant_config, together)


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its setting's training, so that another arm changes nothing."""
    return {
        "profile": config.profile,
        "training": asdict(setting_of(run, config).recipe),
        "data": config.data,
        "teacher_weights": config.teacher_weights,
    }


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    tiny = PAIRS[setting_of(run, config).recipe.pair].data == "digits"
    return f"{run.data}/{run.arm}" if run.arm != "teacher" and (tiny or device == "cuda") else None


def execute_together(
    runs: Sequence[Run], config: Config, context: Context, methods: Mapping[str, Method], module: str
) -> list[dict[str, float]]:
    """Train what the runs of one arm need and evaluate it on the test set.

    Args:
        runs: Runs that differ in their seed only.
        config: The column's profile.
        context: What the harness gives.
        methods: The column's own methods by arm.
        module: Name of the column's module, whose source the trained networks belong to.

    Returns:
        The metrics of each run.
    """
    training = setting_of(runs[0], config).recipe
    students, best = students_of(runs, config, context, methods, module)
    return [
        evaluate(student, teacher(context, PAIRS[training.pair], run.seed), training, context)
        | best.get(run.seed, {})
        for run, student in zip(runs, students, strict=True)
    ]


def evaluate(student: nn.Module, guide: nn.Module, training: Training, context: Context) -> dict[str, float]:
    """Accuracy, agreement with the teacher and cross-entropy on the test set."""
    pair = PAIRS[training.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    batches = make_batches(pair, test, device=context.device, training=False)
    logits = representations(student, batches)["logits"]
    labels = torch.from_numpy(test.labels).long().to(logits.device)
    return {
        "accuracy": 100 * accuracy(logits, labels),
        "agreement": 100 * agreement(logits, representations(guide, batches)["logits"]),
        "cross_entropy": F.cross_entropy(logits.double(), labels).item(),
    }


def students_of(
    runs: Sequence[Run],
    config: Config,
    context: Context,
    methods: Mapping[str, Method],
    module: str,
    *,
    fraction: float | None = None,
) -> tuple[list[nn.Module], dict[int, dict[str, float]]]:
    """The trained networks of runs of one arm in eval mode, and by seed what the best epoch had.

    Args:
        runs: As for :func:`execute_together`.
        config: Likewise.
        context: Likewise.
        methods: Likewise.
        module: Likewise.
        fraction: Share of the images of each class that a student sees, each seed a part of its own, below a teacher
            that has seen all; see :func:`reproductions.protocols.pairs.labelled_subset`.
    """
    arm, seeds = runs[0].arm, tuple(run.seed for run in runs)
    training = setting_of(runs[0], config).recipe
    pair = PAIRS[training.pair]
    if arm == "teacher":
        return [teacher(context, pair, seed) for seed in seeds], {}
    source = source_digest(__name__ if arm in BASELINES else module)
    split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    net = training.student or pair.student
    students = [initialised(net, classes, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        method = BASELINES[arm] if arm in BASELINES else methods[arm]
        parts = None
        if fraction is not None:
            parts = [labelled_subset(split.labels, fraction, seed) for seed in seeds]
        best = train(students, seeds, method, training, context, folder, source=source, parts=parts)
        for seed, student in zip(seeds, students, strict=True):
            save_weights(student, folder / f"weights{seed}.safetensors")
        rates = torch.tensor([best[seed] for seed in seeds] if best else [], dtype=torch.float64)
        save_tensors(folder / "best.safetensors", {"accuracy": rates})

    about: dict[str, Any] = {
        "arm": arm, "seeds": seeds, "pair": asdict(pair), "training": asdict(training), "max_steps": context.max_steps,
        "teacher": [teacher_identity(pair, seed) for seed in seeds],
    }  # fmt: skip
    if fraction is not None:
        about["fraction"] = fraction
    folder = context.artifact("classification", about, make, source=source)
    rates = load_tensors(folder / "best.safetensors")[0]["accuracy"].tolist()
    best = {seed: {"accuracy@best": 100 * rate} for seed, rate in zip(seeds, rates, strict=False)}
    for seed, student in zip(seeds, students, strict=True):
        load_weights(student, folder / f"weights{seed}.safetensors")
    return students, best
