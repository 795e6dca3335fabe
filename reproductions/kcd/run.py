"""KCD: distillation on fewer and fewer images, chosen by value, at random, or the wrong way round.

``reproduce run kcd`` (quick, digits) · ``reproduce run kcd --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run kcd --profile paper --device cuda`` (ResNet-32x4 to ResNet-8x4 on CIFAR-100, the authors' first pair).

Teacher, student and distillation are rows of the shared table, whose loss is the one that the authors condense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.methods.kcd import prediction_entropy
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.kcd.condensation import Trace, condensed
from reproductions.kcd.stages import ARMS, methods, passes_of, steps_of
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    load_pair_data,
    make_batches,
    representations,
    teacher,
)
from reproductions.protocols.settings import Setting, setting_of
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

COLUMN = "kcd"
TITLE = "Knowledge Condensation Distillation"
PAPER = "li2022kcd"


def _entropy(title: str) -> Metric:
    return Metric(unit="nat", format=".3f", title=title, higher_is_better=False, delta=0.02)


METRICS = classification.METRICS | {
    "passes": Metric(
        unit="%", format=".1f", title="images seen, all epochs", higher_is_better=False, delta=0.5
    ),
    "steps": Metric(format=".0f", title="steps", higher_is_better=False, delta=0.5),
    "entropy_test": _entropy("mean entropy, test set"),
    "entropy_train": _entropy("mean entropy, all training images"),
    "entropy_kept": _entropy("mean entropy, last set trained on"),
    "kept": Metric(unit="%", format=".1f", title="size of the last set", higher_is_better=False, delta=0.5),
    "readmitted": Metric(unit="%", format=".1f", title="dropped and trained on again", delta=1.0),
}

# The authors' first pair, on the table's recipe; their script takes RepDistiller's.
_PAPER = "cifar100-resnet32x4"
PAIRS[_PAPER] = replace(
    PAIRS["cifar100-resnet"],
    name=_PAPER,
    teacher=Net("resnet32x4", "pool"),
    student=Net("resnet8x4", "pool"),
)

_MAIN = ("teacher", "student", "kd", "kcd", "kcd_plain", "random", "kd_short")

PROFILES: dict[str, Config] = {
    "quick": tables.quick(Setting("digits", DIGITS, (*_MAIN, "anti", "pkt", "kc_pkt"))),
    "standard": tables.standard(Setting("cifar10", CIFAR10, _MAIN, ("anti", "pkt", "kc_pkt")), disk_mb=1000),
    "paper": tables.paper(
        Setting("cifar100", replace(CIFAR100, pair=_PAPER), _MAIN, ("anti", "pkt", "kc_pkt")),
        minutes=600,
        disk_mb=12000,
    ),
}


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train what the runs of one arm need; evaluate it, and say what it cost and what became of the points."""
    arm, training = runs[0].arm, setting_of(runs[0], config).recipe
    if arm == "teacher":
        return classification.execute_together(runs, config, context, {}, __name__)
    students, traces, best = students_of(runs, config, context)
    pair = PAIRS[training.pair]
    train, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    samples = len(train.labels)
    return [
        classification.evaluate(student, teacher(context, pair, run.seed), training, context)
        | entropies(student, trace, training, context)
        | _cost(arm, training, samples)
        | fate(trace, samples)
        | best.get(run.seed, {})
        for run, student, trace in zip(runs, students, traces, strict=True)
    ]


def students_of(
    runs: Sequence[Run], config: Config, context: Context
) -> tuple[list[nn.Module], list[Trace | None], dict[int, dict[str, float]]]:
    """The trained students of runs of one arm, what became of their points, and what the best epoch had."""
    arm, training = runs[0].arm, setting_of(runs[0], config).recipe
    if arm in ARMS:
        students, traces = condensed(arm, [run.seed for run in runs], training, context)
        return students, [*traces], {}
    own = {"pkt": methods(training)["pkt"]}
    students, best = classification.students_of(runs, config, context, own, __name__)
    return students, [None] * len(runs), best


def entropies(
    student: nn.Module, trace: Trace | None, training: Training, context: Context
) -> dict[str, float]:
    """Mean entropy of the student's predictions, in nats: on both fixed sets and on the last one trained on."""
    pair = PAIRS[training.pair]
    train, test, _ = load_pair_data(pair, probe=context.max_steps is not None)

    def each(split: Any) -> Tensor:
        batches = make_batches(pair, split, device=context.device, training=False)
        return prediction_entropy(representations(student, batches)["logits"]).double().cpu()

    of_train = each(train)
    of_kept = of_train if trace is None else of_train[trace.kept[-1]]
    return {
        "entropy_test": each(test).mean().item(),
        "entropy_train": of_train.mean().item(),
        "entropy_kept": of_kept.mean().item(),
    }


def fate(trace: Trace | None, samples: int) -> dict[str, float]:
    """Size of the last set, and how many of the points that were ever dropped came back, both in percent."""
    if trace is None or len(trace.kept) == 1:
        return {"kept": 100.0}
    inside = torch.zeros(len(trace.kept), samples, dtype=torch.bool)
    for row, points in zip(inside, trace.kept, strict=True):
        row[points] = True
    left = (~inside).cumsum(0) > 0  # from the first stage without it on
    dropped, back = left[-1], (left & inside).any(0)
    return {
        "kept": 100 * len(trace.kept[-1]) / samples,
        "readmitted": 100 * back.sum().item() / max(dropped.sum().item(), 1),
    }


def _cost(arm: str, training: Training, samples: int) -> dict[str, float]:
    full = training.epochs * samples
    if arm not in ARMS:
        return {"passes": 100.0, "steps": training.epochs * math.ceil(samples / training.batch_size)}
    return {
        "passes": 100 * passes_of(training, samples, ARMS[arm]) / full,
        "steps": steps_of(training, samples),
    }


plan = partial(classification.plan, COLUMN)
relevant_config = classification.relevant_config
together = classification.together
