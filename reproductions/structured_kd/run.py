"""Structured distillation: pixels, pairs and whole maps, one after the other, with a control for each.

``reproduce run structured_kd`` (quick, shapes on photographs) · ``reproduce run structured_kd --profile standard``
(larger ones, and 200 photographs of COCO, two CPU cores).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import settings
from reproductions.protocols.dense import Scenes, scene_digests
from reproductions.protocols.settings import Setting, setting_of
from reproductions.structured_kd.training import ARMS, Recipe, evaluate, student_of, teacher_of

COLUMN = "structured_kd"
TITLE = "Structured Knowledge Distillation for Dense Prediction"
PAPER = "liu2020structured"
METRICS = {
    "miou": Metric(unit="%", format=".1f", title="mean intersection over union", delta=0.5),
    "pixel_accuracy": Metric(unit="%", format=".1f", title="accuracy of the pixels", delta=0.5),
    "agreement": Metric(unit="%", format=".1f", title="same class as the teacher's", delta=0.5),
    "cross_entropy": Metric(
        unit="nat", format=".3f", title="cross-entropy of the pixels", higher_is_better=False, delta=0.02
    ),
    "divergence": Metric(
        unit="nat", format=".3f", title="pixel-wise loss on test images", higher_is_better=False, delta=0.02
    ),
    "affinity_error": Metric(
        format=".2f", title="100 times the pair-wise loss on test images", higher_is_better=False, delta=0.1
    ),
}


class Config(settings.Config[Setting[Recipe]]):
    """A profile."""


_MAIN = ("teacher", "student", "pi", "pi_pa", "pi_pa_ho", "pi_double")
_GRAPHS = ("pi_pa_near", "pi_pa_coarse", "pi_pa_official")

# Rate: the best of 0.005, 0.01, 0.02 and 0.04 for the small student alone, on further training images (seed 1).
SMALL = Recipe(
    Scenes("shapes", size=24, train=400, test=300),
    teacher=(16, 32, 64),
    student=(8, 16, 16),
    teacher_epochs=7,
    epochs=5,
    rate=0.01,
    discriminator_width=4,
)
LARGE = Recipe(
    Scenes("shapes", size=48, train=2400, test=1000, flip=True),
    teacher=(16, 32, 64),
    student=(8, 16, 16),
    teacher_epochs=12,
    epochs=8,
    rate=0.01,
    beta=16,
    discriminator_width=16,
    discriminator_blocks=3,
    discriminator_attention=2,
)
PHOTOGRAPHS = Recipe(
    Scenes("coco128seg", size=64, flip=True, crop=8),
    teacher=(16, 32, 64, 64),
    student=(8, 16, 16, 16),
    teacher_epochs=80,
    epochs=50,
    rate=0.01,
    beta=16,
    discriminator_width=16,
    discriminator_blocks=4,
    discriminator_attention=2,
)

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(Setting("shapes", SMALL, _MAIN, ("pi_pa_coarse",)),),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1,
        data=("photos",),
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting("shapes", LARGE, _MAIN, ("pi_pa_ho_plain", *_GRAPHS, "pi_printed")),
            Setting("coco", PHOTOGRAPHS, _MAIN),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=40,
        data=("photos",),
        disk_mb=100,
    ),
}


plan = partial(settings.plan, COLUMN)


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its arm, and what of the recipe takes part."""
    arm = None if run.arm == "teacher" else ARMS[run.arm]
    recipe = {
        name: value
        for name, value in asdict(setting_of(run, config).recipe).items()
        if (arm and arm.holistic) or not name.startswith("discriminator_")
    }
    return {"recipe": recipe, "arm": arm and asdict(arm), "data": config.data}


def inputs(config: Config) -> dict[str, str]:
    """Digests of the photographs of COCO, which are no set of their own in the data cache."""
    return scene_digests([setting.recipe.scenes for setting in config.settings])


def network_of(run: Run, config: Config, context: Context) -> nn.Module:
    """The trained network of a run, in eval mode."""
    recipe = setting_of(run, config).recipe
    if run.arm == "teacher":
        return teacher_of(recipe, run.seed, context)
    return student_of(run.arm, recipe, run.seed, context)


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train a network and measure it on the test images, beside its seed's teacher."""
    recipe = setting_of(run, config).recipe
    guide = teacher_of(recipe, run.seed, context)
    return evaluate(network_of(run, config, context), guide, recipe, context)
