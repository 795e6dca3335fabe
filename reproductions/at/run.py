"""Attention transfer: which map, with and without distillation, and the gradient-based form.

``reproduce run at`` (quick, digits) · ``reproduce run at --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run at --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdrefs.methods.at import at_loss, attention_map, gradient_at_loss
from kdrefs.nets import Output
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.rows import (
    INPUT_GRADIENT,
    Method,
    Targets,
    distilled_and,
    feature_of,
    labels_and,
)
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS, STAGES

COLUMN = "at"
TITLE = "Paying More Attention to Attention"
PAPER = "zagoruyko2017at"
METRICS = classification.METRICS
ROWS = ("at",)  # of the shared table

# Weight of the sum over the stages. 1000 is the authors' (szagoruyko/attention-transfer@893df54); since their loss is a
# mean over positions, it means 1, 4 and 16 for the squared distance on maps of 32, 16 and 8 pixels. On the digits' maps
# of 8 and 4 pixels 64 gives the same 1 and 4.
BETA = {"digits": 64.0, "cifar10": 1000.0, "cifar100": 1000.0}
GRADIENT_WEIGHT = 1.0  # no source gives one that could be read; none was tried beside it


def methods(data: str) -> dict[str, Method]:
    """The column's arms on a data set."""
    return {
        "at": _activation(data),
        "at_p1": _activation(data, power=1.0),
        "at_max": _activation(data, reduction="max"),
        "at_kd": _activation(data, combine=distilled_and),
        "at_gradient": labels_and(
            GRADIENT_WEIGHT,
            lambda output, targets: gradient_at_loss(
                output.features[INPUT_GRADIENT], targets[INPUT_GRADIENT]
            ),
            {INPUT_GRADIENT: feature_of(INPUT_GRADIENT)},
            input_gradient=True,
        ),
    }


def _activation(
    data: str, *, power: float = 2.0, reduction: str = "sum", combine: Any = labels_and
) -> Method:
    """The authors' loss on every stage.

    What is kept of the teacher is one channel a stage whose attention map is that of all its channels.
    """

    names = {guide: f"{guide}_{reduction}_{power:g}" for _, guide in STAGES[data]}

    def kept(name: str) -> Any:
        def target(output: Output) -> Tensor:
            maps = output.features[name]
            attention = attention_map(maps, power=power, reduction=reduction)
            return attention.pow(1 / power).view(len(maps), 1, *maps.shape[2:])

        return target

    def term(output: Output, targets: Targets) -> Tensor:
        losses = [
            at_loss(
                output.features[student],
                targets[names[guide]],
                power=power,
                reduction=reduction,
                variant="official",
            )
            for student, guide in STAGES[data]
        ]
        return sum(losses[1:], losses[0])

    return combine(BETA[data], term, {name: kept(guide) for guide, name in names.items()})


PROFILES: dict[str, Config] = {
    "quick": tables.quick(
        Setting(
            "digits",
            DIGITS,
            ("teacher", "student", "kd", "at", "at_p1", "at_max", "at_kd", "at_gradient"),
        )
    ),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", "student", "kd", "at"),
            ("at_p1", "at_max", "at_kd", "at_gradient"),
        )
    ),
    "paper": tables.paper(
        Setting(
            "cifar100",
            CIFAR100,
            ("teacher", "student", "kd", "at"),
        ),
        minutes=120,
    ),
}

plan, execute, execute_together, relevant_config, together = classification.functions(
    COLUMN, methods, __name__
)
