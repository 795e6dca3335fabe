"""FitNets: hints before distillation, for a usual student and for a thin deep one.

``reproduce run fitnets`` (quick, digits) · ``reproduce run fitnets --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run fitnets --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdrefs.methods.fitnets import HintRegressor, hint_loss, teacher_weight
from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.rows import (
    Method,
    Phase,
    Shapes,
    Targets,
    cross_entropy,
    feature_of,
    labels_and,
    logits_of,
)
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS, DIGITS_DEEP, DIGITS_DEEP_HE, STAGES

COLUMN = "fitnets"
TITLE = "FitNets: Hints for Thin Deep Nets"
PAPER = "romero2015fitnets"
METRICS = classification.METRICS
ROWS = (
    "hint",
    "fitnets",
)  # of the shared table

HINT_WEIGHT = 100.0  # of the mean square, HobbitLong/RepDistiller@b84f547
TEMPERATURE = 3.0  # adri-romsor/FitNets@0f633b1, which has no factor T²
HINT_SHARE = 0.25  # of the epochs; the authors train the hint until it stops improving


def methods(data: str) -> dict[str, Method]:
    """The column's arms on a data set; the hint is a middle stage after its activation."""
    student, guide = STAGES[data][1 if len(STAGES[data]) > 2 or "deep" in data else 0]
    regressed = f"{student}_regressed"
    hints = {guide: feature_of(guide)}

    def regressors(variant: str | None) -> Any:
        def make(features: Shapes, targets: Shapes) -> dict[str, nn.Module]:
            (channels, height, width), (outputs, rows, columns) = features[student], targets[guide]
            shapes = (channels, height, width), (outputs, rows, columns)
            return {student: HintRegressor(*shapes, variant=variant)}

        return make

    def mismatch(output: Output, targets: Targets) -> Tensor:
        return hint_loss(output.features[regressed], targets[guide], variant="mean")

    def hint(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
        return HINT_WEIGHT * mismatch(output, targets)

    def labels_alone(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
        return cross_entropy(output, labels)

    def distilled(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
        soft = kd_loss(output.logits, targets["logits"], temperature=TEMPERATURE, scale=False)
        return cross_entropy(output, labels) + teacher_weight(progress) * soft

    first = Phase(hint, HINT_SHARE)
    logits = {"logits": logits_of}
    return {
        "hint": Method((first, Phase(labels_alone, 1 - HINT_SHARE)), hints, regressors(None)),
        "fitnets": Method((first, Phase(distilled, 1 - HINT_SHARE)), hints | logits, regressors(None)),
        "second_stage": Method((Phase(distilled),), logits),
        "joint": labels_and(HINT_WEIGHT, mismatch, hints, regressors=regressors("repdistiller")),
    }


PROFILES: dict[str, Config] = {
    "quick": tables.quick(
        Setting("digits", DIGITS, ("teacher", "student", "kd", "hint", "fitnets", "second_stage", "joint")),
        Setting("digits-deep", DIGITS_DEEP, ("student", "hint", "fitnets"), first=5),
        Setting("digits-deep-he", DIGITS_DEEP_HE, ("student", "fitnets"), first=5),
    ),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", "student", "kd", "hint", "fitnets"),
            ("second_stage", "joint"),
        )
    ),
    "paper": tables.paper(
        Setting(
            "cifar100",
            CIFAR100,
            ("teacher", "student", "kd", "hint", "fitnets", "joint"),
        ),
        minutes=120,
    ),
}

plan, execute, execute_together, relevant_config, together = classification.functions(
    COLUMN, methods, __name__
)
