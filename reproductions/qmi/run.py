"""Does training with PKT transfer quadratic mutual information?

``reproduce run qmi`` (quick, digits) · ``reproduce run qmi --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run qmi --profile paper --device cuda`` (the networks of the PKT paper's recipe).

Nothing is trained for this column: its networks are those of the PKT column
(:mod:`reproductions.protocols.embeddings`), found in the run store by content, and trained there if they are missing.
On the test images, which no network was trained on, each is asked for its information potentials under the cosine
kernel, which PKT is trained with, and under Gaussian kernels whose bandwidth is a fixed multiple of the feature space's
own mean squared distance, so that spaces of any width and scale compare. The arm ``across`` correlates the QMI of a
seed's students with their mAP.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from kdrefs.data.cache import Split
from kdrefs.methods.qmi import information_potentials, mean_squared_distance
from kdrefs.metrics import retrieval_map
from kdrefs.training import load_tensors, save_tensors
from reproductions.harness import profiles
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import embeddings
from reproductions.protocols.pairs import (
    PAIRS,
    load_pair_data,
    make_batches,
    representations,
    teacher_identity,
    weights_digest,
)
from reproductions.qmi.labellings import information_over_labellings

COLUMN = "qmi"
TITLE = "Quadratic Mutual Information"
PAPER = "passalis2018pkt"

# Bandwidths in mean squared distances; "wide" is what kdrefs takes where none is given.
FACTORS = {"narrow": 0.1, "medium": 0.3, "wide": 1.0}
KERNEL_TITLES = {"cosine": "cosine kernel"} | {
    name: f"Gaussian, {factor:g} mean squared distance{'s' if factor != 1 else ''}"
    for name, factor in FACTORS.items()
}
POTENTIALS = {"within": "V_IN", "all": "V_ALL", "between": "V_BTW"}

METRICS = {
    "map": Metric(unit="%", format=".1f", title="mAP", delta=1.0),
    **{f"qmi_{k}": Metric(format=".4f", title=f"QMI, {t}", delta=1e-3) for k, t in KERNEL_TITLES.items()},
    **{
        f"gap_{k}": Metric(
            unit="%",
            format=".1f",
            title=f"QMI apart from the teacher's, {t}",
            higher_is_better=False,
            delta=5.0,
        )
        for k, t in KERNEL_TITLES.items()
    },
    "gap_potentials": Metric(
        unit="%",
        format=".1f",
        title="largest gap of a potential, in teacher's QMI, cosine kernel",
        higher_is_better=False,
        delta=5.0,
    ),
    "gap_unknown": Metric(
        unit="%",
        format=".1f",
        title="QMI apart from the teacher's over all labellings, cosine kernel",
        higher_is_better=False,
        delta=5.0,
    ),
    **{
        f"{name}_{k}": Metric(format=".4f", title=f"{symbol}, {t}", delta=1e-3)
        for k, t in KERNEL_TITLES.items()
        for name, symbol in POTENTIALS.items()
    },
    **{
        f"rank_{k}": Metric(format=".2f", title=f"rank correlation with mAP, {t}", delta=0.2)
        for k, t in KERNEL_TITLES.items()
    },
    "rank_spread": Metric(format=".2f", title="rank correlation with mAP, spread without labels", delta=0.2),
}

STUDENTS = ("student", "kd", "hint_random", "hint", "pkt", "pkt_scratch")
FEW_STUDENTS = ("student", "kd", "hint", "pkt")


@dataclass(frozen=True)
class Setting:
    """One group of students of one teacher; ``data`` is the third part of their keys, as in the PKT column."""

    data: str
    arms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile of the column: the PKT column's profile of the same name with its pair and seeds."""

    pair: str
    settings: tuple[Setting, ...]
    teacher_weights: str | None = None  # digest of the committed weights: other weights, other runs


PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        pair="digits",
        settings=(
            Setting("digits-10pct", ("teacher", *FEW_STUDENTS)),
            Setting("digits", ("teacher", *STUDENTS, "across")),
        ),
        seeds=tuple(range(10)),
        budget_minutes=1,
        download_mb=0,
        disk_mb=20,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        pair="cifar10-tiny",
        settings=(
            Setting("cifar10", ("teacher", *STUDENTS, "across")),
            Setting("cifar10-10pct", ("teacher", *FEW_STUDENTS)),
        ),
        seeds=(0, 1, 2),
        budget_minutes=40,  # beside the trainings of the PKT column
        download_mb=170,
        disk_mb=700,
        data=("cifar10",),
        teacher_weights=weights_digest(PAIRS["cifar10-tiny"]),
    ),
    "paper": Config(
        profile="paper",
        pair="cifar10-pkt",
        settings=(Setting("cifar10", ("teacher", *STUDENTS, "across")),),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=20,  # beside the trainings of the PKT column
        download_mb=170,
        disk_mb=700,
        data=("cifar10",),
    ),
}


def plan(config: Config) -> list[Run]:
    """Every run of a profile in order of execution; a committed teacher, which nothing random enters, runs once."""
    once = {"teacher"} if PAIRS[config.pair].teacher_weights else set()
    return [
        Run(column=COLUMN, profile=config.profile, data=setting.data, arm=arm, seed=seed)
        for setting in config.settings
        for arm in setting.arms
        for seed in (config.seeds[:1] if arm in once else config.seeds)
    ]


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What decides a run's values: the networks' own recipe, the bandwidths, and for ``across`` the students."""
    found = {
        "pair": config.pair,
        "teacher_weights": config.teacher_weights,
        "factors": FACTORS,
        "networks": embeddings.relevant_config(embeddings.PROFILES[run.profile]),
    }
    return found | ({"students": _students(run, config)} if run.arm == "across" else {})


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Measure one network, or correlate the measurements of a seed's students."""
    if run.arm != "across":
        return measured(run, config, context)
    students = [measured(replace(run, arm=arm), config, context) for arm in _students(run, config)]
    ranked = {f"rank_{kernel}": [values[f"qmi_{kernel}"] for values in students] for kernel in KERNEL_TITLES}
    # All pairs together weigh the same whatever the labels are: the less they resemble, the larger the spread.
    ranked["rank_spread"] = [-values["all_cosine"] for values in students]
    quality = [values["map"] for values in students]
    return {name: float(spearmanr(values, quality).statistic) for name, values in ranked.items()}


def measured(run: Run, config: Config, context: Context) -> dict[str, float]:
    """All values of one network, computed once; ``across`` finds them again."""

    def make(folder: Path) -> None:
        (folder / "values.json").write_text(json.dumps(_measure(run, config, context)))

    depends = {"run": asdict(run), "config": relevant_config(run, config)}
    folder = context.artifact("qmi-values", depends, make)
    values: dict[str, float] = json.loads((folder / "values.json").read_text())
    return values


def features_of(run: Run, config: Config, context: Context, *splits: Split) -> tuple[Tensor, ...]:
    """A network's representation of each of the splits, on the CPU."""
    pair = PAIRS[config.pair]
    module, feature = embeddings.trained(run, embeddings.PROFILES[run.profile], context)
    batches = [make_batches(pair, split, device=context.device, training=False) for split in splits]
    return tuple(representations(module, each, feature)[feature].cpu() for each in batches)


def potentials_by_kernel(features: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """The three potentials and ``"qmi"`` under every kernel of the column, in float64."""
    features = features.double()
    scale = float(mean_squared_distance(features)) or 1.0
    kernels: dict[str, dict[str, Any]] = {"cosine": {"kernel": "cosine"}}
    kernels |= {name: {"bandwidth": factor * scale} for name, factor in FACTORS.items()}
    found = {}
    for name, options in kernels.items():
        values = {
            term: float(value)
            for term, value in information_potentials(features, labels, **options)._asdict().items()
        }
        found[name] = values | {"qmi": values["within"] + values["all"] - 2 * values["between"]}
    return found


def _measure(run: Run, config: Config, context: Context) -> dict[str, float]:
    train, test, _ = load_pair_data(PAIRS[config.pair], probe=context.max_steps is not None)
    labels, wanted = (torch.from_numpy(split.labels).long() for split in (train, test))
    database, queries = features_of(run, config, context, train, test)
    found = potentials_by_kernel(queries, wanted)
    values = {"map": 100 * retrieval_map(queries, database, wanted, labels)}
    values |= {f"{term}_{kernel}": value for kernel, terms in found.items() for term, value in terms.items()}
    if run.arm == "teacher":
        return values
    guide = _teacher_features(replace(run, arm="teacher"), config, context, test)
    aims = potentials_by_kernel(guide, wanted)
    values |= {
        f"gap_{kernel}": 100 * abs(terms["qmi"] / aims[kernel]["qmi"] - 1) for kernel, terms in found.items()
    }
    apart = [abs(found["cosine"][term] - aims["cosine"][term]) for term in POTENTIALS]
    values["gap_potentials"] = 100 * max(apart) / aims["cosine"]["qmi"]
    values["gap_unknown"] = (
        100 * information_over_labellings(queries, guide) / information_over_labellings(guide)
    )
    return values


def _teacher_features(run: Run, config: Config, context: Context, test: Split) -> Tensor:
    """The teacher's test features, computed once for all students of one teacher."""

    def make(folder: Path) -> None:
        (features,) = features_of(run, config, context, test)
        save_tensors(folder / "features.safetensors", {"features": features})

    pair = PAIRS[config.pair]
    depends = {"pair": asdict(pair), "teacher": teacher_identity(pair, run.seed)}
    folder = context.artifact("qmi-teacher", depends, make)
    tensors, _ = load_tensors(folder / "features.safetensors")
    return tensors["features"]


def _students(run: Run, config: Config) -> tuple[str, ...]:
    arms = next(setting.arms for setting in config.settings if setting.data == run.data)
    return tuple(arm for arm in arms if arm not in ("teacher", "across"))
