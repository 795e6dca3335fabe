"""The arms of the column, and the stages that each goes through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kdrefs.methods.kcd import condensed_size
from kdrefs.methods.pkt import pkt_loss
from kdrefs.training import whole_batch
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS
from reproductions.protocols.rows import BASELINES, Method, feature_of, labels_and

STAGES, TAU, ALPHA, STRENGTH = 6, 0.7, 0.03, 0.3  # dzy3/KCD@8974b6c: README and dataset/cifar100.py


@dataclass(frozen=True)
class Arm:
    """What points are ranked by at the end of a stage, and what is done with those at the border."""

    ranking: Literal["value", "random", "lowest"] | None = (
        "value"  # None: all points, as many steps as the others
    )
    blend: bool = False
    method: str = "kd"  # in :func:`methods`


ARMS = {
    "kcd": Arm(blend=True),
    "kcd_plain": Arm(),
    "random": Arm("random"),
    "anti": Arm("lowest"),
    "kd_short": Arm(None),
    "kc_pkt": Arm(blend=True, method="pkt"),
}


@dataclass(frozen=True)
class Stage:
    """Epochs of one training set: the number of the first, how many, and the size of the set."""

    first: int
    epochs: int
    size: int


def methods(training: Training) -> dict[str, Method]:
    """The losses that are condensed: distillation as in every table, and PKT beside the labels as in RepDistiller."""
    pair = PAIRS[training.pair]
    student, guide = (training.student or pair.student).feature, pair.teacher.feature
    pkt = labels_and(
        30_000.0,  # HobbitLong/RepDistiller@b84f547
        lambda output, targets: pkt_loss(
            whole_batch(output.features[student]), whole_batch(targets[guide]), variant="official"
        ),
        {guide: feature_of(guide)},
    )
    return {"kd": BASELINES["kd"], "pkt": pkt}


def stages_of(training: Training, samples: int, arm: Arm) -> list[Stage]:
    """The stages of a training, in whole epochs that differ by one at most; a single one where nothing is dropped.

    Sizes are the authors', but for sets whose last batch would be less than half full: those are cut to whole batches.
    The statistics of a batch of four images, and a loss over their pairs, would move the student at the end of every
    epoch, just before it is looked at.

    Raises:
        ValueError: There are fewer epochs than stages.
    """
    if training.epochs < STAGES:
        raise ValueError(f"epochs: expected at least {STAGES}, one a stage, got {training.epochs}")
    if arm.ranking is None:
        return [Stage(0, training.epochs, samples)]
    ends = [round(training.epochs * k / STAGES) for k in range(STAGES + 1)]
    sizes = [samples]
    for k in range(1, STAGES):
        size = condensed_size(k, samples, tau=TAU, stages=STAGES, variant="official")
        last = size % training.batch_size
        sizes.append(size - last if 2 * last < training.batch_size < size else size)
    return [
        Stage(first, last - first, size) for (first, last), size in zip(pairwise(ends), sizes, strict=True)
    ]


def steps_of(training: Training, samples: int) -> int:
    """Optimisation steps of every arm."""
    stages = stages_of(training, samples, ARMS["kcd"])
    return sum(stage.epochs * math.ceil(stage.size / training.batch_size) for stage in stages)


def passes_of(training: Training, samples: int, arm: Arm) -> int:
    """How many images an arm sees, one counted as often as it is seen."""
    if arm.ranking is not None:
        return sum(stage.epochs * stage.size for stage in stages_of(training, samples, arm))
    epochs, rest = divmod(steps_of(training, samples), math.ceil(samples / training.batch_size))
    return epochs * samples + rest * training.batch_size
