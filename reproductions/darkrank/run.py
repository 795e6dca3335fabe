"""DarkRank: does a student that learns the teacher's rankings retrieve classes better that neither has seen?

``reproduce run darkrank`` (quick, digits) · ``reproduce run darkrank --profile standard`` (CIFAR-100, two CPU cores) ·
``reproduce run darkrank --profile paper --device cuda`` (CIFAR-100 with a long schedule).

Teacher and students are trained on the first half of the classes. On the other half, each test image looks for its
class among the training images. The authors' own sets of pedestrians cannot be redistributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from kdrefs.methods.darkrank import hard_darkrank_loss, soft_darkrank_loss
from kdrefs.nets import Output
from kdrefs.training import whole_batch
from reproductions.darkrank import heldout
from reproductions.darkrank.heldout import Recipe
from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context, Run
from reproductions.protocols import rows
from reproductions.protocols.pairs import PAIRS, Net
from reproductions.protocols.rows import Method, Phase, Targets

COLUMN = "darkrank"
TITLE = "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer"
PAPER = "chen2018darkrank"
METRICS = {
    "recall1": Metric(unit="%", format=".1f", title="recall at 1, unseen classes", delta=1.0),
    "map": Metric(unit="%", format=".1f", title="mAP, unseen classes", delta=1.0),
    "neighbours": Metric(unit="%", format=".1f", title="nearest four shared with the teacher", delta=2.0),
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy, seen classes", delta=0.5),
}


@dataclass(frozen=True)
class Weights:
    """How much the losses count, chosen by :mod:`reproductions.darkrank.choose` on held-out training classes."""

    soft: float
    hard: float
    kd: float  # share of the distillation beside the labels


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile; ``name`` is the third part of its keys."""

    name: str
    recipe: Recipe
    weights: Weights
    arms: tuple[str, ...]
    few: tuple[str, ...]  # further arms, with the first three seeds


WEIGHTS = Weights(soft=10.0, hard=1.0, kd=0.9)
# TuSimple/DarkRank@5e6a74f, README: power 2, scale 3.5, four candidates, weight 16.
AUTHORS = {"alpha": 3.5**2, "beta": 4.0, "list_length": 4, "variant": "official"}
AUTHORS_WEIGHT = 16.0
LIST_LENGTH = 4

_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_SMALLEST = Net("small_cnn", "embedding_pre", {"channels": (4, 8), "feature": 16})
DIGITS = Recipe(
    replace(PAIRS["digits"], name="digits-seen", student=_SMALLEST),
    seen=5,
    unseen=(5, 10),
    epochs=20,
    rate=0.03,
    batch_size=32,
    views=1,
)
CIFAR100 = Recipe(
    replace(
        PAIRS["cifar10-small"],
        name="cifar100-seen",
        data="cifar100",
        mean=_CIFAR100_MEAN,
        std=_CIFAR100_STD,
        teacher_weights=None,
    ),
    seen=50,
    unseen=(50, 100),
    epochs=12,
    rate=0.05,
    batch_size=64,
    views=2,
    precision="bf16",
    shared_teacher=True,
)
LONG = replace(
    CIFAR100,
    pair=replace(
        CIFAR100.pair,
        teacher=Net("resnet56", "pool"),
        student=Net("resnet20", "pool"),
        teacher_recipe=replace(CIFAR100.pair.teacher_recipe, stages=((60, 0.2),)),
    ),
    epochs=60,
    views=16,
    shared_teacher=False,
)

ARMS = ("teacher", "student", "kd", "soft", "hard", "soft_kd")
FEW = ("soft_alone", "soft_official")
PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        name="digits",
        recipe=DIGITS,
        weights=WEIGHTS,
        arms=(*ARMS, *FEW),
        few=(),
        seeds=tuple(range(10)),
        budget_minutes=1,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        name="cifar100",
        recipe=CIFAR100,
        weights=WEIGHTS,
        arms=ARMS,
        few=FEW,
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=35,
        data=("cifar100",),
        download_mb=170,
        disk_mb=500,
    ),
    "paper": Config(
        profile="paper",
        name="cifar100",
        recipe=LONG,
        weights=WEIGHTS,
        arms=ARMS,
        few=(),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=180,
        data=("cifar100",),
        download_mb=170,
        disk_mb=2000,
    ),
}


def methods(recipe: Recipe, weights: Weights) -> Mapping[str, Method]:
    """The arms that train a student."""
    name = recipe.pair.student.feature

    def soft(output: Output, targets: Targets, **options: Any) -> Tensor:
        options = {"list_length": LIST_LENGTH} | options
        return soft_darkrank_loss(
            whole_batch(output.features[name]), whole_batch(targets["embedding"]), **options
        )

    def hard(output: Output, targets: Targets) -> Tensor:
        rows_of_all = whole_batch(output.features[name]), whole_batch(targets["embedding"])
        return hard_darkrank_loss(*rows_of_all, list_length=LIST_LENGTH)

    def official(output: Output, targets: Targets) -> Tensor:
        return soft(output, targets, **AUTHORS)

    kd = rows.distillation(alpha=weights.kd)

    def both(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
        return kd.phases[0].loss(output, targets, labels, progress) + weights.soft * soft(output, targets)

    return {
        "student": rows.BASELINES["student"],
        "kd": kd,
        "soft": rows.labels_and(weights.soft, soft, {}),
        "hard": rows.labels_and(weights.hard, hard, {}),
        "soft_kd": Method((Phase(both),)),
        "soft_alone": Method((Phase(lambda output, targets, labels, progress: soft(output, targets)),)),
        "soft_official": rows.labels_and(AUTHORS_WEIGHT, official, {}),
    }


def plan(config: Config) -> list[Run]:
    """Every run of a profile: arm by arm, seed by seed; a teacher that all seeds share runs once."""
    counts = dict.fromkeys(config.few, 3)
    if config.recipe.shared_teacher:
        counts["teacher"] = 1
    return [
        Run(COLUMN, config.profile, config.name, arm, seed)
        for arm in (*config.arms, *config.few)
        for seed in config.seeds[: counts.get(arm)]
    ]


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values."""
    return {"recipe": asdict(config.recipe), "weights": asdict(config.weights), "data": config.data}


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training on CUDA, and on the CPU where nets are so small that calls cost most."""
    alone = run.arm == "teacher" or ("digits" not in config.data and device != "cuda")
    return None if alone else run.arm


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train and measure one network."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the networks of several seeds of one arm and measure them on the unseen classes."""
    recipe = config.recipe
    parts = heldout.parts_of(recipe, context)
    nets = networks_of(runs, config, context)
    feature = (recipe.pair.teacher if runs[0].arm == "teacher" else recipe.pair.student).feature
    scores = []
    for run, network in zip(runs, nets, strict=True):
        guide = heldout.teacher_of(recipe, parts.training, run.seed, context)
        aims = heldout.embedded(guide, recipe.pair.teacher.feature, recipe, parts.queries, context)
        scores.append(heldout.measure(network, feature, aims, parts, recipe, context))
    return scores


def networks_of(runs: Sequence[Run], config: Config, context: Context) -> list[Any]:
    """The networks of several seeds of one arm in eval mode."""
    recipe, arm = config.recipe, runs[0].arm
    training = heldout.parts_of(recipe, context).training
    seeds = [run.seed for run in runs]
    if arm == "teacher":
        return [heldout.teacher_of(recipe, training, seed, context) for seed in seeds]
    method = methods(recipe, config.weights)[arm]
    source = source_digest(__name__)
    identity = {"arm": arm, "weights": asdict(config.weights)}
    return heldout.students_of(recipe, training, method, identity, seeds, context, source)
