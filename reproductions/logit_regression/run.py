"""Logit regression: its row in the shared table, shallow students of a deep teacher, and the rates that they survive.

``reproduce run logit_regression`` (quick, digits) · ``reproduce run logit_regression --profile standard`` (CIFAR-10,
two CPU cores) · ``reproduce run logit_regression --profile paper --device cuda`` (the rows, ResNet-56 to ResNet-20 on
CIFAR-100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kdrefs.methods.logit_regression import logit_regression_loss
from kdrefs.nets import Output
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.logit_regression.rates import Sweep, measures
from reproductions.logit_regression.shallow import ARMS, Rates, Recipe, evaluate, pair_of, teacher_of, trained
from reproductions.protocols import classification, pairs
from reproductions.protocols.pairs import PAIRS, Net, weights_digest
from reproductions.protocols.rows import Method, Phase, Targets, labels_and, logits_of
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

COLUMN = "logit_regression"
TITLE = "Do Deep Nets Really Need to be Deep?"
PAPER = "ba2014deep"
METRICS = classification.METRICS | {
    "explained": Metric(
        unit="%", format=".1f", title="variance of the teacher's logits that is explained", delta=1.0
    ),
    "parameters": Metric(
        unit="thousand", format=".0f", title="parameters", higher_is_better=False, delta=0.5
    ),
    "mflop": Metric(
        unit="MFLOP", format=".3g", title="operations an image", higher_is_better=False, delta=0.001
    ),
    "log2_rate": Metric(format=".1f", title="largest stable rate, log₂", delta=0.5),
    "best_loss": Metric(
        format=".3f", title="training loss at the best rate", higher_is_better=False, delta=0.01
    ),
}
ROWS = ("logit_regression",)  # of the shared table

LABELLED_WEIGHT = (
    0.1  # AberHu/Knowledge-Distillation-Zoo, example_train_script.sh, of the mean of the squares
)


def _alone(output: Output, given: Targets, labels: Tensor, _: float) -> Tensor:
    """The paper's loss over the number of classes: the limit of the row ``kd`` without labels for high temperatures."""
    return logit_regression_loss(output.logits, given["logits"]) / output.logits.shape[-1]


def _mean_of_squares(output: Output, given: Targets) -> Tensor:
    return logit_regression_loss(output.logits, given["logits"], variant="mean")


METHODS: dict[str, Method] = {
    "logit_regression": Method((Phase(_alone),), {"logits": logits_of}),
    "logit_regression_labels": labels_and(LABELLED_WEIGHT, _mean_of_squares, {"logits": logits_of}),
}


@dataclass(frozen=True)
class Shallow:
    """Shallow students of one teacher a seed; ``data`` is the third part of their keys."""

    data: str
    recipe: Recipe
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Swept:
    """The same students over learning rates, with the first of the profile's seeds."""

    data: str
    recipe: Recipe
    sweep: Sweep
    first: int


@dataclass(frozen=True)
class Config(classification.Config):
    """A profile: rows of the shared table, and the paper's experiment."""

    shallow: tuple[Shallow, ...] = field(kw_only=True)
    swept: tuple[Swept, ...] = field(kw_only=True)


_ARMS = tuple(name for name, arm in ARMS.items() if not arm.conv)
_SWEPT = (("full", ("mimic_more", 1.0)), ("bottleneck", ("mimic_more_bottleneck", 1.0)))

# Rates of the digits: chosen by `reproductions.logit_regression.choose` on held-out training images.
DIGITS_SHALLOW = Recipe(
    "digits",
    teacher=PAIRS["digits"].teacher,
    teacher_recipe=pairs.Recipe(((12, 3e-3), (4, 3e-4)), batch_size=32),
    labelled=0.1,
    hidden=512,
    rank=16,
    conv=16,
    steps=250,
    rates=Rates(labels=3e-3, logits=3e-3, softened=1e-2),
    bottleneck_rates=Rates(labels=1e-2, logits=1e-2, softened=1e-2),
)
# On CIFAR-10 every target has the rate that Adam has by default.
CIFAR10_SHALLOW = Recipe(
    "cifar10-small",
    teacher=Net("cifar_resnet", "pool", {"depth": 14}),
    teacher_recipe=pairs.Recipe(((16, 0.1),), optimizer="sgd", weight_decay=5e-4, precision="bf16"),
    labelled=0.2,
    hidden=1024,
    rank=256,
    conv=16,
    steps=2000,
    rates=Rates(labels=1e-3, logits=1e-3, softened=1e-3),
    bottleneck_rates=Rates(labels=1e-3, logits=1e-3, softened=1e-3),
    batch_size=128,
    views=2,
    precision="bf16",
)
_RATES = tuple(2.0**power for power in range(-9, 1))

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(Setting("digits", DIGITS, ("teacher", "student", "kd", *METHODS)),),
        seeds=tuple(range(10)),
        budget_minutes=1,
        data=("digits",),
        shallow=(Shallow("digits-shallow", DIGITS_SHALLOW, _ARMS),),
        swept=(Swept("digits-rates", DIGITS_SHALLOW, Sweep(_RATES, 150, _SWEPT), first=5),),
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting(
                "cifar10",
                CIFAR10,
                ("teacher", "student", "kd", "logit_regression"),
                ("logit_regression_labels",),
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=40,
        data=("cifar10",),
        download_mb=170,
        disk_mb=1000,
        teacher_weights=weights_digest(PAIRS["cifar10-small"]),
        shallow=(Shallow("cifar10-shallow", CIFAR10_SHALLOW, tuple(ARMS)),),
        swept=(Swept("cifar10-rates", CIFAR10_SHALLOW, Sweep(_RATES, 200, _SWEPT), first=3),),
    ),
    "paper": Config(
        profile="paper",
        settings=(Setting("cifar100", CIFAR100, ("teacher", "student", "kd", *METHODS)),),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=150,
        data=("cifar100",),
        download_mb=170,
        disk_mb=700,
        shallow=(),
        swept=(),
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: the table, the shallow students with their teachers, the learning rates."""
    runs = classification.plan(COLUMN, config)
    for one in config.shallow:
        arms = ("teacher", *one.arms)
        runs += [Run(COLUMN, config.profile, one.data, arm, seed) for arm in arms for seed in config.seeds]
    for each in config.swept:
        seeds = config.seeds[: each.first]
        runs += [
            Run(COLUMN, config.profile, each.data, arm, seed) for arm, _ in each.sweep.arms for seed in seeds
        ]
    return runs


def part_of(run: Run, config: Config) -> Setting | Shallow | Swept:
    """The part of a profile that a run belongs to."""
    parts: list[Setting | Shallow | Swept] = [*config.settings, *config.shallow, *config.swept]
    return next(part for part in parts if part.data == run.data)


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train what the runs of one arm need and evaluate it on the test set."""
    part, arm, seeds = part_of(runs[0], config), runs[0].arm, [run.seed for run in runs]
    if isinstance(part, Setting):
        return classification.execute_together(runs, config, context, METHODS, __name__)
    if isinstance(part, Swept):
        return measures(part.recipe, part.sweep, arm, seeds, context)
    if arm == "teacher":
        networks = [teacher_of(part.recipe, seed, context) for seed in seeds]
    else:
        networks = [*trained(part.recipe, arm, seeds, context)]
    found = [
        evaluate(network, part.recipe, seed, context) for network, seed in zip(networks, seeds, strict=True)
    ]
    if arm not in ARMS or ARMS[arm].target != "logits":
        for values in found:  # others are not made to have the teacher's scale
            del values["explained"]
    return found


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its own part's recipe and arm."""
    part = part_of(run, config)
    if isinstance(part, Setting):
        return classification.relevant_config(run, config)
    about = {"recipe": asdict(part.recipe), "pair": asdict(pair_of(part.recipe)), "data": config.data}
    if isinstance(part, Swept):
        return about | {"sweep": asdict(part.sweep) | {"arms": part.sweep.arm(run.arm)}}
    return about | {"arm": asdict(ARMS[run.arm]) if run.arm in ARMS else run.arm}


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    part = part_of(run, config)
    if isinstance(part, Setting):
        return classification.together(run, config, device)
    small = "digits" in config.data or isinstance(part, Swept)
    return f"{run.data}/{run.arm}" if run.arm != "teacher" and (small or device == "cuda") else None
