"""Neuron selectivity transfer: three kernels, with and without distillation.

``reproduce run nst`` (quick, digits) · ``reproduce run nst --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run nst --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdrefs.methods.nst import nst_loss
from kdrefs.nets import Output
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
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
    "quick": tables.quick(
        Setting("digits", DIGITS, ("teacher", "student", "kd", "nst", "nst_linear", "nst_gaussian", "nst_kd"))
    ),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", "student", "kd", "nst"),
            ("nst_linear", "nst_gaussian", "nst_kd"),
        )
    ),
    "paper": tables.paper(
        Setting(
            "cifar100",
            CIFAR100,
            ("teacher", "student", "kd", "nst"),
        ),
        minutes=120,
    ),
}

plan, execute, execute_together, relevant_config, together = classification.functions(
    COLUMN, methods, __name__
)
