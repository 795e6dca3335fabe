"""AFD: networks that train together, with and without discriminators between their feature maps.

``reproduce run afd`` (quick, digits) · ``reproduce run afd --profile standard`` (CIFAR-10, one CPU core).

A run is a group of networks: two equal ones, a small and a large one, or three in a cycle. All arms of a group share
initial weights and batch order, seed by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reproductions.afd.groups import ARMS, Group, Recipe, Trained, cost, evaluate, trained
from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols.pairs import Net

COLUMN = "afd"
TITLE = "Feature-map-level Online Adversarial Knowledge Distillation"
PAPER = "chung2020afd"
METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy, mean of the networks", delta=0.5),
    "ensemble": Metric(unit="%", format=".1f", title="test accuracy of the ensemble", delta=0.5),
    "accuracy1": Metric(unit="%", format=".1f", title="test accuracy, network 1", delta=0.5),
    "accuracy2": Metric(unit="%", format=".1f", title="test accuracy, network 2", delta=0.5),
    "accuracy3": Metric(unit="%", format=".1f", title="test accuracy, network 3", delta=0.5),
    "discriminator": Metric(format=".3f", title="discriminators' loss (0.5: fooled)", delta=0.02),
    "adversarial": Metric(
        format=".3f", title="adversarial loss (0.25: fooled)", higher_is_better=False, delta=0.02
    ),
    "channel_gap": Metric(
        format=".3f", title="gap of the channels' statistics", higher_is_better=False, delta=0.02
    ),
    "cka": Metric(format=".3f", title="CKA of the maps", delta=0.02),
    "cosine": Metric(format=".3f", title="cosine of the maps", delta=0.02),
    "mflop": Metric(
        unit="MFLOP", format=".2f", title="operations a step and image", higher_is_better=False, delta=0.01
    ),
    "discriminators": Metric(format=".0f", title="discriminators", higher_is_better=False, delta=0.5),
}
PAIR_ARMS = ("independent", "dml", "l1", "afd")


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile: groups of networks under one recipe."""

    recipe: Recipe
    groups: tuple[Group, ...]


def _digits(channels: tuple[int, int], feature: int) -> Net:
    return Net("small_cnn", "block2", {"channels": channels, "feature": feature})


_SMALL, _LARGE = _digits((4, 8), 16), _digits((8, 16), 32)
_RESNET8 = Net("cifar_resnet", "layer3", {"depth": 8, "widths": (8, 8, 16, 32)})


def _plain(channels: tuple[int, int, int], feature: int) -> Net:
    options = {"in_channels": 3, "channels": channels, "feature": feature, "size": 32}
    return Net("small_cnn", "block3", options)


_SMALL_PLAIN, _PLAIN = _plain((4, 8, 16), 32), _plain((8, 16, 32), 64)

# Rates, epochs and ramp of the digits: chosen by `reproductions.afd.choose` on held-out training images.
DIGITS = Recipe("digits", epochs=12, rate=0.1, ramp=1.0, adversarial_rate=5e-4, l1_rate=5e-4)
CIFAR10 = Recipe(
    "cifar10-small",
    epochs=3,
    rate=DIGITS.rate,
    ramp=DIGITS.ramp,
    adversarial_rate=DIGITS.adversarial_rate,
    l1_rate=DIGITS.l1_rate,
    batch_size=64,
    fraction=0.2,
    precision="bf16",
)

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        recipe=DIGITS,
        groups=(
            Group("digits-equal", (_SMALL, _SMALL), PAIR_ARMS),
            Group("digits-mixed", (_SMALL, _LARGE), ("independent", "dml", "afd")),
            Group("digits-three", (_SMALL,) * 3, ("dml", "afd", "afd_pairwise"), first=3),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        recipe=CIFAR10,
        groups=(
            Group("cifar10-equal", (_RESNET8, _RESNET8), (*PAIR_ARMS, "afd_simultaneous")),
            Group("cifar10-mixed", (_SMALL_PLAIN, _RESNET8), PAIR_ARMS),
            Group("cifar10-three", (_PLAIN,) * 3, (*PAIR_ARMS, "afd_pairwise")),
        ),
        seeds=(0, 1, 2),
        budget_minutes=45,
        data=("cifar10",),
        download_mb=170,
        disk_mb=500,
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: group by group, arm by arm, seed by seed.

    Groups of many networks come first, so that processes which share the work end at about the same time.
    """
    return [
        Run(COLUMN, config.profile, group.data, arm, seed)
        for group in sorted(config.groups, key=lambda group: -len(group.nets))
        for arm in group.arms
        for seed in config.seeds[: group.first]
    ]


def group_of(run: Run, config: Config) -> Group:
    """The group that a run belongs to."""
    return next(group for group in config.groups if group.data == run.data)


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its networks, its arm and the recipe."""
    return {
        "nets": [asdict(net) for net in group_of(run, config).nets],
        "arm": asdict(ARMS[run.arm]),
        "recipe": asdict(config.recipe),
        "data": config.data,
    }


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    return f"{run.data}/{run.arm}" if "digits" in config.data or device == "cuda" else None


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train and measure one group."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train and measure the groups of several seeds of one arm."""
    group, arm = group_of(runs[0], config), runs[0].arm
    found = trained_of(runs, config, context)
    price = cost(group, config.recipe, arm)
    return [
        evaluate([network[m] for network in found.networks], config.recipe, context)
        | {name: curve[-1] for name, curve in found.history[run.seed].items() if name in METRICS}
        | price
        for m, run in enumerate(runs)
    ]


def trained_of(runs: Sequence[Run], config: Config, context: Context) -> Trained:
    """The trained networks of several seeds of one arm, and what was watched."""
    seeds = [run.seed for run in runs]
    return trained(group_of(runs[0], config), config.recipe, runs[0].arm, seeds, context)
