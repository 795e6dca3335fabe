"""Internal representations: soft labels, all internal losses at once, layer after layer, layer upon layer.

``reproduce run internal_representations`` (quick, a made-up task of counting) · with ``--profile standard`` (MiniLM on
sentences of film reviews, two CPU cores) · with ``--profile paper --device cuda`` (the same with all sentences and more
epochs).

Every student has the same number of steps, whatever they are spent on. In ``quick`` students start from random weights
and further arms from the teacher's layers; in the others all start from the teacher's layers but one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kdrefs.data import texts
from kdrefs.nets.transformer import Transformer
from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.internal_representations.students import Arm, Recipe, measure, students_of, teachers_of
from reproductions.internal_representations.tasks import Counting, Snippets

COLUMN = "internal_representations"
TITLE = "Knowledge Distillation from Internal Representations"
PAPER = "aguilar2020internal"
METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "agreement": Metric(unit="%", format=".1f", title="same prediction as the teacher's", delta=0.5),
    "attention_kl": Metric(
        unit="nat",
        format=".3f",
        title="divergence from the teacher's attention",
        higher_is_better=False,
        delta=0.05,
    ),
    "cls_cosine": Metric(
        format=".3f", title="1 - cosine to the teacher's token", higher_is_better=False, delta=0.02
    ),
}

RANDOM = {
    "student": Arm(labels=True),
    "kd": Arm(),
    "all": Arm("all"),
    "pid": Arm("progressive"),
    "sid": Arm("stacked"),
    "sid_kept": Arm("stacked_kept"),
    "kd_copied": Arm(copied=True),
    "sid_copied": Arm("stacked", copied=True),
}
COPIED = {
    "student": Arm(labels=True, copied=True),
    "kd": Arm(copied=True),
    "all": Arm("all", copied=True),
    "pid": Arm("progressive", copied=True),
    "sid": Arm("stacked", copied=True),
    "sid_kept": Arm("stacked_kept", copied=True),
    "kd_random": Arm(),
}


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile; the task's name is the third part of its keys."""

    recipe: Recipe
    arms: Mapping[str, Arm]
    teacher_seeds: tuple[int, ...]  # those that have teachers of their own; one is everybody's
    few: tuple[str, ...] = ()  # arms with the first three seeds
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # files with their digests


COUNTING = Recipe(
    Counting(),
    width=32,
    heads=2,
    feedforward=64,
    teacher_depth=4,
    matched=(2, 4),
    teacher_epochs=8,
    teacher_rate=3e-3,
    epochs=5,
    rate=3e-3,
    batch_size=32,
    internal_share=0.5,
    ask_once=True,
)
SNIPPETS = Recipe(
    Snippets(),
    width=384,
    heads=12,
    feedforward=1536,
    teacher_depth=6,
    matched=(2, 4, 6),
    teacher_epochs=2,
    teacher_rate=5e-5,
    epochs=2,
    rate=5e-5,
    batch_size=32,
    internal_share=0.5,
    pretrained=True,
    precision="bf16",
)

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        recipe=COUNTING,
        arms=RANDOM,
        teacher_seeds=(0, 1, 2, 3, 4),
        seeds=(0, 1, 2, 3, 4),
        few=("sid_kept", "kd_copied", "sid_copied"),
        data=(),
        budget_minutes=1,
    ),
    "standard": Config(
        profile="standard",
        recipe=SNIPPETS,
        arms=COPIED,
        teacher_seeds=(0,),
        seeds=(0, 1, 2),
        data=(),
        budget_minutes=40,
        texts={"minilm": texts.MINILM, "snippets": texts.SNIPPETS},
        download_mb=86,
        disk_mb=1800,
    ),
    "paper": Config(
        profile="paper",
        recipe=replace(SNIPPETS, task=Snippets(length=48, train=8467, test=2138), teacher_epochs=4, epochs=6),
        arms={name: COPIED[name] for name in ("student", "kd", "all", "pid", "sid")},
        teacher_seeds=(0, 1, 2, 3, 4),
        seeds=(0, 1, 2, 3, 4),
        data=(),
        budget_minutes=60,
        texts={"minilm": texts.MINILM, "snippets": texts.SNIPPETS},
        download_mb=86,
        disk_mb=2600,
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile: arm by arm, seed by seed; a teacher that all seeds share runs once."""
    counts: dict[str, int] = dict.fromkeys(config.few, 3)
    if len(config.teacher_seeds) == 1:
        counts["teacher"] = 1
    return [
        Run(COLUMN, config.profile, config.recipe.task.name, arm, seed)
        for arm in ("teacher", *config.arms)
        for seed in config.seeds[: counts.get(arm)]
    ]


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values."""
    arm = config.arms.get(run.arm)
    return {
        "recipe": asdict(config.recipe),
        "arm": None if arm is None else asdict(arm),
        "teacher_seeds": list(config.teacher_seeds),
    }


def inputs(config: Config) -> dict[str, str]:
    """Digests of the texts and of the pretrained weights."""
    return texts.digests_of(config.texts)


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training where nets are so small that calls cost most."""
    return None if config.recipe.pretrained else run.arm


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train and measure one network."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train the networks of several seeds of one arm and measure them on the test sequences."""
    pairs = zip(networks_of(runs, config, context), guides_of(runs, config, context), strict=True)
    return [measure(network, guide, config.recipe, context) for network, guide in pairs]


def guides_of(runs: Sequence[Run], config: Config, context: Context) -> list[Transformer]:
    """The teachers of the runs' seeds; those of all seeds of a profile are trained together."""
    found = dict(
        zip(config.teacher_seeds, teachers_of(config.recipe, config.teacher_seeds, context), strict=True)
    )
    (first, *others) = config.teacher_seeds
    return [found[run.seed if others else first] for run in runs]


def networks_of(runs: Sequence[Run], config: Config, context: Context) -> list[Transformer]:
    """The networks of several seeds of one arm in eval mode."""
    guides = guides_of(runs, config, context)
    if runs[0].arm == "teacher":
        return guides
    arm, seeds = config.arms[runs[0].arm], [run.seed for run in runs]
    return students_of(config.recipe, arm, seeds, guides, context)
