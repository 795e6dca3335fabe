"""Cross quality distillation: the authors' seven rows and controls, for images that lost resolution and otherwise.

``reproduce run cqd`` (quick, digits) · ``reproduce run cqd --profile standard`` (CIFAR-10 and digits on photographs,
two CPU cores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from kdrefs.data.batches import Augment
from reproductions.cqd.training import ALONE, ARMS, Recipe, evaluate, trained
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification, settings
from reproductions.protocols.pairs import CIFAR_MEAN, CIFAR_STD, Net
from reproductions.protocols.settings import Setting, setting_of

COLUMN = "cqd"
TITLE = "Adapting Models to Signal Degradation using Distillation"
PAPER = "su2017cqd"
METRICS = classification.METRICS | {
    "agreement": Metric(unit="%", format=".1f", title="same prediction as A's on the clean image", delta=0.5)
}


@dataclass(frozen=True, kw_only=True)
class Config(settings.Config[Setting[Recipe]]):
    """A profile."""

    disk_mb: float = 60


# Rates of the digits: chosen by `reproductions.cqd.choose` on held-out training images; the others keep their ratio.
DIGITS = Recipe(
    Net("small_cnn", "embedding_pre", {"channels": (8, 16), "feature": 16}),
    Augment(crop=1),
    mean=(0.5,),
    std=(0.5,),
    epochs=15,
    rate=0.03,
    answers_rate=0.01,
)
COMPOSITES = Recipe(
    Net("small_cnn", "embedding_pre", {"channels": (8, 16, 32), "feature": 64, "size": 32}),
    Augment(crop=2),
    mean=(0.5,),
    std=(0.5,),
    epochs=20,
    rate=0.05,
    answers_rate=0.05 / 3,
    precision="bf16",
)
CIFAR10 = Recipe(
    Net(
        "small_cnn",
        "embedding_pre",
        {"in_channels": 3, "channels": (8, 16, 32), "feature": 64, "size": 32},
    ),
    Augment(flip=True, crop=4),
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    epochs=6,
    rate=0.05,
    answers_rate=0.05 / 3,
    precision="bf16",
)

SEVEN = ("a", "b", "a_on_b", "tuned", "cqd", "a_cqd", "mixed")
CONTROLS = ("b_long", "a_self", "a_cqd_50", "a_cqd_other", "a_cqd_still")
SHORT = ("a_on_b", "b", "tuned", "a_cqd")

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(
            Setting("digits-lowres", DIGITS, SEVEN, CONTROLS),
            Setting("digits-edges", DIGITS, SHORT, first=5),
            Setting("digits-distorted", DIGITS, SHORT, first=5),
        ),
        seeds=tuple(range(10)),
        budget_minutes=1,
        data=("digits",),
        few_seeds=5,
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting(
                "cifar10-lowres", CIFAR10, ("a", "b", "a_on_b", "tuned", "cqd", "a_cqd"), ("mixed", *CONTROLS)
            ),
            Setting("cifar10-edges", CIFAR10, SHORT, first=3),
            Setting("cifar10-distorted", CIFAR10, SHORT, first=3),
            Setting("composites-localised", COMPOSITES, ("a", *SHORT)),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=40,
        data=("cifar10", "digits", "photos"),
        download_mb=170,
        disk_mb=1500,
    ),
}


plan = partial(settings.plan, COLUMN)


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the networks of one arm in one training, and evaluate each on the test set; row A on clean images."""
    kind, arm, recipe = runs[0].data, runs[0].arm, setting_of(runs[0], config).recipe
    networks = trained(kind, arm, [run.seed for run in runs], recipe, context)
    return [
        evaluate(network, kind, run.seed, recipe, context, clean=arm == "a")
        for network, run in zip(networks, runs, strict=True)
    ]


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its arm and recipe."""
    recipe = setting_of(run, config).recipe
    return {"arm": asdict(ARMS[run.arm]), "recipe": asdict(recipe), "data": config.data}


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    small = run.data.startswith("digits")
    return f"{run.data}/{run.arm}" if run.arm not in ALONE and (small or device == "cuda") else None
