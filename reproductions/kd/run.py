"""Knowledge distillation: temperature and weight on the shared table, and the cell that every table copies.

``reproduce run kd`` (quick, digits) · ``reproduce run kd --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run kd --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100 as in RepDistiller).
"""

from __future__ import annotations

from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.rows import Method, distillation
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

COLUMN = "kd"
TITLE = "Distilling the Knowledge in a Neural Network"
PAPER = "hinton2015kd"
METRICS = classification.METRICS
ROWS = ("student", "kd")

# T = 4 and weight 0.9 are the row `kd`; the others change one of the two, or leave out the factor T².
METHODS: dict[str, Method] = {
    "kd_t1": distillation(temperature=1.0),
    "kd_t2": distillation(temperature=2.0),
    "kd_t20": distillation(temperature=20.0),
    "kd_unscaled": distillation(scale=False),
}


def methods(data: str) -> dict[str, Method]:
    """The column's arms, the same on every data set."""
    return METHODS


PROFILES: dict[str, Config] = {
    "quick": tables.quick(Setting("digits", DIGITS, ("teacher", "student", "kd", *METHODS))),
    "standard": tables.standard(
        Setting("cifar10", CIFAR10, ("teacher", "student", "kd"), tuple(METHODS)), disk_mb=400
    ),
    "paper": tables.paper(
        Setting(
            "cifar100",
            CIFAR100,
            ("teacher", "student", "kd"),
        ),
        minutes=120,
    ),
}

plan, execute, execute_together, relevant_config, together = classification.functions(
    COLUMN, methods, __name__
)
