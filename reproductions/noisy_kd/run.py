"""Noisy collaboration: teachers with active dropout, students that see noise, labels that are partly wrong.

``reproduce run noisy_kd`` (quick, digits) · ``reproduce run noisy_kd --profile standard`` (a part of CIFAR-10, two CPU
cores) · ``reproduce run noisy_kd --profile paper --device cuda`` (all of CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from kdrefs.metrics import agreement
from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.noisy_kd.collaboration import ARMS, GUIDES, Guide, Recipe, splits, students, teachers
from reproductions.protocols.pairs import PAIRS
from reproductions.protocols.robustness import (
    Pixels,
    accuracy_on,
    noisy_accuracy,
    projected_gradient_descent,
)

COLUMN = "noisy_kd"
TITLE = "Improving Generalization and Robustness with Noisy Collaboration in Knowledge Distillation"
PAPER = "arani2019noisy"
METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "noisy_accuracy": Metric(unit="%", format=".1f", title="test accuracy with noise", delta=1.0),
    "attacked_accuracy": Metric(unit="%", format=".1f", title="test accuracy under attack", delta=1.0),
    "agreement": Metric(unit="%", format=".1f", title="same prediction as the teacher's", delta=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile: one recipe, all arms."""

    recipe: Recipe
    arms: tuple[str, ...]


def _cnn(channels: tuple[int, ...], feature: int, *, colour: bool) -> dict[str, Any]:
    return {
        "in_channels": 3 if colour else 1,
        "channels": channels,
        "feature": feature,
        "size": 32 if colour else 8,
    }


EVERY = (*GUIDES, *ARMS)
# Batch, epochs and rate: of three of about equal cost those with which the arms `student` and `kd` were best on a tenth
# of the training images, held out.
DIGITS = Recipe(
    pair="digits",
    teacher=_cnn((8, 16), 32, colour=False),
    student=_cnn((4, 8), 16, colour=False),
    teacher_epochs=8,
    student_epochs=8,
    rate=0.05,
    test_sigma=0.2,
    radius=0.1,
    attacked=250,
    passes=4,
    batch_size=64,
)
CIFAR10 = Recipe(
    pair="cifar10-small",
    teacher=_cnn((32, 64, 128), 128, colour=True),
    student=_cnn((8, 16, 32), 64, colour=True),
    teacher_epochs=8,
    student_epochs=8,
    rate=0.1,
    test_sigma=0.1,
    radius=2 / 255,
    attacked=500,
    passes=4,
    fraction=0.25,
    precision="bf16",
)

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        recipe=DIGITS,
        arms=EVERY,
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        recipe=CIFAR10,
        arms=EVERY,
        seeds=(0, 1, 2),
        budget_minutes=40,
        data=("cifar10",),
        download_mb=170,
        disk_mb=200,
    ),
    "paper": Config(
        profile="paper",
        recipe=replace(
            CIFAR10, teacher_epochs=60, student_epochs=60, fraction=1.0, attacked=10_000, precision="float32"
        ),
        arms=EVERY,
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=240,
        data=("cifar10",),
        download_mb=170,
        disk_mb=500,
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: arm by arm, seed by seed, teachers first."""
    (data,) = config.data
    return [Run(COLUMN, config.profile, data, arm, seed) for arm in config.arms for seed in config.seeds]


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train what the runs of one arm need; test it on clean, noisy and attacked images."""
    recipe, arm, seeds = config.recipe, runs[0].arm, [run.seed for run in runs]
    networks = networks_of(arm, seeds, recipe, context)
    guide = ARMS[arm].guide if arm in ARMS else GUIDES[arm]
    beside = teachers(Guide() if guide is None else guide, seeds, recipe, context)
    return [
        measure(network, teacher, seed, recipe, context)
        for network, teacher, seed in zip(networks, beside, seeds, strict=True)
    ]


def networks_of(arm: str, seeds: Sequence[int], recipe: Recipe, context: Context) -> list[nn.Module]:
    """The trained networks of an arm in eval mode."""
    if arm in GUIDES:
        return teachers(GUIDES[arm], seeds, recipe, context)
    return students(arm, seeds, recipe, context)


def measure(
    network: nn.Module, teacher: nn.Module, seed: int, recipe: Recipe, context: Context
) -> dict[str, float]:
    """Accuracies in percent; noise and the beginning of the attack are drawn by the seed, the same for all arms."""
    pair, (_, test, _) = PAIRS[recipe.pair], splits(recipe, context)
    pixels = Pixels.of(test, pair.mean, pair.std, context.device)
    few = Pixels.of(test, pair.mean, pair.std, context.device, count=recipe.attacked)

    def generator() -> torch.Generator:
        return torch.Generator(context.device).manual_seed(seed)

    attacked = projected_gradient_descent(network, few, radius=recipe.radius, generator=generator())
    with torch.no_grad():  # networks of an arm are in eval mode
        logits = [pixels.logits(one, pixels.images) for one in (network, teacher)]
    return {
        "accuracy": 100 * accuracy_on(network, pixels, pixels.images),
        "noisy_accuracy": 100 * noisy_accuracy(network, pixels, recipe.test_sigma, generator()),
        "attacked_accuracy": 100 * accuracy_on(network, few, attacked),
        "agreement": 100 * agreement(*logits),
    }


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values; what its arm is, is part of the code."""
    return {"profile": config.profile, "recipe": asdict(config.recipe), "data": config.data}


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of a student's arm share a training on CUDA, and on the CPU where nets are very small."""
    tiny = PAIRS[config.recipe.pair].data == "digits"
    return f"{run.data}/{run.arm}" if run.arm in ARMS and (tiny or device == "cuda") else None
