"""Knowledge distillation: temperature and weight on the shared table, and the cell that every table copies.

``reproduce run kd`` (quick, digits) · ``reproduce run kd --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run kd --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100 as in RepDistiller).
"""

from __future__ import annotations

from reproductions.protocols import classification
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, weights_digest
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
    "quick": Config(
        profile="quick",
        settings=(Setting("digits", DIGITS, ("teacher", "student", "kd", *METHODS)),),
        seeds=tuple(range(10)),
        data=("digits",),
        budget_minutes=1,
    ),
    "standard": Config(
        profile="standard",
        settings=(Setting("cifar10", CIFAR10, ("teacher", "student", "kd"), tuple(METHODS)),),
        seeds=(0, 1, 2, 3, 4),
        data=("cifar10",),
        budget_minutes=40,
        download_mb=170,
        disk_mb=400,
        teacher_weights=weights_digest(PAIRS["cifar10-small"]),
    ),
    "paper": Config(
        profile="paper",
        settings=(
            Setting(
                "cifar100",
                CIFAR100,
                ("teacher", "student", "kd"),
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
