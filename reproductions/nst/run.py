"""Neuron selectivity transfer: three kernels, with and without distillation.

``reproduce run nst`` (quick, digits) · ``reproduce run nst --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run nst --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdrefs.methods.nst import nst_loss
from kdrefs.nets import Output
from reproductions.protocols import classification
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, weights_digest
from reproductions.protocols.rows import Method, Targets, distilled_and, feature_of, labels_and
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS, STAGES

COLUMN = "nst"
TITLE = "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer"
PAPER = "huang2017nst"
METRICS = classification.METRICS
ROWS = ("nst",)  # of the shared table

WEIGHT = 50.0  # TuSimple/neuron-selectivity-transfer@50dee40 and HobbitLong/RepDistiller@b84f547


def methods(data: str) -> dict[str, Method]:
    """The column's arms on a data set: the last stage before its activation, as the authors have it."""
    student, guide = (f"{name}_pre" for name in STAGES[data][-1])
    targets = {guide: feature_of(guide)}

    def term(kernel: str) -> Any:
        def loss(output: Output, given: Targets) -> Tensor:
            return nst_loss(output.features[student], given[guide], kernel=kernel)

        return loss

    return {
        "nst": labels_and(WEIGHT, term("polynomial"), targets),
        "nst_linear": labels_and(WEIGHT, term("linear"), targets),
        "nst_gaussian": labels_and(WEIGHT, term("gaussian"), targets),
        "nst_kd": distilled_and(WEIGHT, term("polynomial"), targets),
    }


PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(
            Setting(
                "digits", DIGITS, ("teacher", "student", "kd", "nst", "nst_linear", "nst_gaussian", "nst_kd")
            ),
        ),
        seeds=tuple(range(10)),
        data=("digits",),
        budget_minutes=1,
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting(
                "cifar10",
                CIFAR10,
                ("teacher", "student", "kd", "nst"),
                ("nst_linear", "nst_gaussian", "nst_kd"),
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        data=("cifar10",),
        budget_minutes=40,
        download_mb=170,
        disk_mb=3000,
        teacher_weights=weights_digest(PAIRS["cifar10-small"]),
    ),
    "paper": Config(
        profile="paper",
        settings=(
            Setting(
                "cifar100",
                CIFAR100,
                ("teacher", "student", "kd", "nst"),
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        data=("cifar100",),
        budget_minutes=120,
        download_mb=170,
        disk_mb=700,
    ),
}

plan, execute, execute_together, relevant_config, together = classification.functions(
    COLUMN, methods, __name__
)
