"""Cross quality distillation: the authors' seven rows and controls, for images that lost resolution and otherwise.

``reproduce run cqd`` (quick, digits) · ``reproduce run cqd --profile standard`` (CIFAR-10 and digits on photographs,
two CPU cores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdrefs.data.batches import Augment
from reproductions.cqd.training import ALONE, ARMS, Recipe, evaluate, trained
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification
from reproductions.protocols.pairs import CIFAR_MEAN, CIFAR_STD, Net

COLUMN = "cqd"
TITLE = "Adapting Models to Signal Degradation using Distillation"
PAPER = "su2017cqd"
METRICS = classification.METRICS | {
    "agreement": Metric(unit="%", format=".1f", title="same prediction as A's on the clean image", delta=0.5)
}


@dataclass(frozen=True)
class Part:
    """Arms on one kind of degradation, which is the third part of their keys."""

    kind: str
    recipe: Recipe
    arms: tuple[str, ...]
    few: tuple[str, ...] = ()  # further arms, with the first seeds only
    first: int | None = None  # how many of the profile's seeds the arms get; None: all


@dataclass(frozen=True)
class Config:
    """A profile."""

    profile: str
    parts: tuple[Part, ...]
    seeds: tuple[int, ...]
    budget_minutes: float
    data: tuple[str, ...]
    download_mb: float = 0
    disk_mb: float = 60
    few: int = 3


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
        parts=(
            Part("digits-lowres", DIGITS, SEVEN, CONTROLS),
            Part("digits-edges", DIGITS, SHORT, first=5),
            Part("digits-distorted", DIGITS, SHORT, first=5),
        ),
        seeds=tuple(range(10)),
        budget_minutes=1,
        data=("digits",),
        few=5,
    ),
    "standard": Config(
        profile="standard",
        parts=(
            Part(
                "cifar10-lowres", CIFAR10, ("a", "b", "a_on_b", "tuned", "cqd", "a_cqd"), ("mixed", *CONTROLS)
            ),
            Part("cifar10-edges", CIFAR10, SHORT, first=3),
            Part("cifar10-distorted", CIFAR10, SHORT, first=3),
            Part("composites-localised", COMPOSITES, ("a", *SHORT)),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=40,
        data=("cifar10", "digits", "photos"),
        download_mb=170,
        disk_mb=1500,
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: kind by kind, arm by arm, seed by seed."""
    return [
        Run(COLUMN, config.profile, part.kind, arm, seed)
        for part in config.parts
        for arm in (*part.arms, *part.few)
        for seed in config.seeds[: config.few if arm in part.few else part.first]
    ]


def part_of(run: Run, config: Config) -> Part:
    """The part of a profile that a run belongs to."""
    return next(part for part in config.parts if part.kind == run.data)


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the networks of one arm in one training, and evaluate each on the test set; row A on clean images."""
    kind, arm, recipe = runs[0].data, runs[0].arm, part_of(runs[0], config).recipe
    networks = trained(kind, arm, [run.seed for run in runs], recipe, context)
    return [
        evaluate(network, kind, run.seed, recipe, context, clean=arm == "a")
        for network, run in zip(networks, runs, strict=True)
    ]


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its arm and recipe."""
    recipe = part_of(run, config).recipe
    return {"arm": asdict(ARMS[run.arm]), "recipe": asdict(recipe), "data": config.data}


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    small = run.data.startswith("digits")
    return f"{run.data}/{run.arm}" if run.arm not in ALONE and (small or device == "cuda") else None
