"""Data distillation: labels from one view and from several transforms, against labelled images alone and all labels.

``reproduce run data_distillation`` (quick, shapes on photographs) · ``reproduce run data_distillation --profile
standard`` (larger ones, and the boxes of Tiny ImageNet, two CPU cores).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from reproductions.data_distillation.tasks import Task
from reproductions.data_distillation.training import ARMS, Recipe, evaluate
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import settings
from reproductions.protocols.settings import Setting, setting_of

COLUMN = "data_distillation"
TITLE = "Data Distillation: Towards Omni-Supervised Learning"
PAPER = "radosavovic2018data"
METRICS = {
    "ap": Metric(unit="%", format=".1f", title="average precision", delta=1.0),
    "ap_ensemble": Metric(unit="%", format=".1f", title="average precision under transforms", delta=1.0),
    "label_precision": Metric(unit="%", format=".1f", title="labels that are right", delta=1.0),
    "label_recall": Metric(unit="%", format=".1f", title="landmarks that are labelled", delta=1.0),
    "labels": Metric(format=".2f", title="labels an unlabelled image", delta=0.1),
    "threshold": Metric(format=".3f", title="threshold of the score", delta=0.02),
}


class Config(settings.Config[Setting[Recipe]]):
    """A profile."""


_MAIN = ("teacher", "labelled", "single", "multi", "finetune", "all")
_RATIOS = ("multi_half", "multi_double")

# Rate: the best of 0.005, 0.01, 0.02 and 0.04 for a small network on labelled images alone, on further training images.
SMALL = Recipe(
    Task("shapes", size=24, labelled=100, unlabelled=400, test=200),
    widths=(8, 16, 32),
    teacher_steps=120,
    steps=170,
    batch_size=12,
    labelled=6,
)
LARGE = Recipe(
    Task("shapes", size=48, labelled=200, unlabelled=2000, test=1000, radius=3.0),
    widths=(16, 32, 64),
    teacher_steps=500,
    steps=1000,
    scales=(0.75, 1.0, 1.25),
)
BOXES = Recipe(
    Task("tinyimagenet32", size=32, labelled=1000, unlabelled=9000, test=2000, radius=3.0),
    widths=(16, 32, 64, 64),
    teacher_steps=600,
    steps=1200,
    batch_size=32,
    labelled=16,
    scales=(0.75, 1.0, 1.25),
)

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(Setting("shapes", SMALL, _MAIN, _RATIOS),),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1,
        data=("photos",),
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting("shapes", LARGE, _MAIN, _RATIOS),
            Setting("boxes", BOXES, _MAIN, first=3),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=40,
        data=("photos", "tinyimagenet32"),
        disk_mb=150,
    ),
}


plan = partial(settings.plan, COLUMN)


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its recipe and its arm."""
    arm = None if run.arm == "teacher" else asdict(ARMS[run.arm])
    return {"recipe": asdict(setting_of(run, config).recipe), "arm": arm, "data": config.data}


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train a network and measure it on the test images."""
    return evaluate(run.arm, setting_of(run, config).recipe, run.seed, context)
