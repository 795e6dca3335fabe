"""Jacobian matching with few images a class: labels, outputs, Jacobians, both, and the noise that both stand for.

``reproduce run jacobian_matching`` (quick, digits) · ``reproduce run jacobian_matching --profile standard`` (CIFAR-10,
two CPU cores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.jacobian_matching.few_images import ARMS, Recipe, evaluate, train
from reproductions.protocols.pairs import PAIRS, teacher, weights_digest

COLUMN = "jacobian_matching"
TITLE = "Knowledge Transfer with Jacobian Matching"
PAPER = "srinivas2018jacobian"
METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "noisy_accuracy": Metric(unit="%", format=".1f", title="test accuracy with noise", delta=0.5),
    "jacobian_gap": Metric(
        format=".3f", title="distance of the Jacobians", higher_is_better=False, delta=0.02
    ),
}
MAIN = ("student", "kd", "jacobian", "both", "noise")
FORMS = ("jacobian_squared", "jacobian_top")  # the Jacobian term as Proposition 1 has it, and as code has it


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile: the main arms for every number of images, the other forms of the term for one of them."""

    recipe: Recipe
    sizes: tuple[int, ...]  # images a class
    forms_at: int
    teacher_weights: str | None = None


PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        recipe=Recipe(
            pair="digits",
            channels=(8, 16),
            steps=150,
            rate=0.01,
            batch_size=16,
            sigma=0.3,
            test_sigma=0.6,
        ),
        sizes=(1, 5, 10, 50, 100),
        forms_at=10,
        seeds=tuple(range(10)),
        budget_minutes=1,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        recipe=Recipe(
            pair="cifar10-small",
            channels=(16, 32, 64),
            steps=1500,
            rate=0.003,
            batch_size=32,
            sigma=0.1,
            test_sigma=0.2,
        ),
        sizes=(1, 5, 10, 50, 500),
        forms_at=10,
        seeds=(0, 1, 2),
        budget_minutes=40,
        data=("cifar10",),
        download_mb=170,
        disk_mb=1500,
        teacher_weights=weights_digest(PAIRS["cifar10-small"]),
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: the teacher, then by number of images arm by arm; a committed teacher runs once."""
    (data,) = config.data
    guides = config.seeds[: 1 if config.teacher_weights is not None else None]
    runs = [Run(COLUMN, config.profile, data, "teacher", seed) for seed in guides]
    for size in config.sizes:
        for arm in (*MAIN, *(FORMS if size == config.forms_at else ())):
            runs += [Run(COLUMN, config.profile, f"{data}-{size}", arm, seed) for seed in config.seeds]
    return runs


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train what the run needs and evaluate it, see :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the students of runs of one arm in one training, and evaluate each on the test set."""
    recipe, arm, seeds = config.recipe, runs[0].arm, [run.seed for run in runs]
    if arm == "teacher":
        networks = [teacher(context, PAIRS[recipe.pair], seed) for seed in seeds]
    else:
        networks = train(ARMS[arm], images_of(runs[0]), seeds, recipe, context, name=arm)
    return [evaluate(net, seed, recipe, context) for net, seed in zip(networks, seeds, strict=True)]


def images_of(run: Run) -> int:
    """Images a class that a student's run trains on: the number behind the data set's name."""
    return int(run.data.rpartition("-")[2])


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values; the number of images is part of its key."""
    return {
        "profile": config.profile,
        "recipe": asdict(config.recipe),
        "data": config.data,
        "teacher_weights": config.teacher_weights,
    }


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    tiny = PAIRS[config.recipe.pair].data == "digits"
    return f"{run.data}/{run.arm}" if run.arm != "teacher" and (tiny or device == "cuda") else None
