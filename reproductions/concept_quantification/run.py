"""Concept quantification: what a layer knows while a network learns from labels, from features, from predictions.

``reproduce run concept_quantification`` (quick, digits on photographs) · ``--profile garments`` (garments instead,
where Fashion-MNIST is to be had) · ``--profile standard`` (Tiny ImageNet with boxes, two CPU cores) · ``--profile paper
--device cuda`` (VGG-16 on CUB-200-2011, brought into the cache by ``python -m kdrefs.data.folders cub224``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kdrefs.methods.concept_quantification import ConceptMetrics, concept_metrics
from reproductions.concept_quantification.agreement import WAYS, compared
from reproductions.concept_quantification.sources import Source
from reproductions.concept_quantification.studies import ARMS, Recipe, Study, studied
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import settings
from reproductions.protocols.pairs import CIFAR_MEAN, CIFAR_STD, Net
from reproductions.protocols.settings import setting_of

COLUMN = "concept_quantification"
TITLE = "Explaining Knowledge Distillation by Quantifying the Knowledge"
PAPER = "cheng2020concepts"
METRICS = {
    "ratio": Metric(format=".3f", title="λ, share of concepts on the object", delta=0.02),
    "d_mean": Metric(format=".2f", title="D_mean, by epochs", higher_is_better=False, delta=0.1),
    "rho": Metric(format=".3f", title="ρ, share of concepts kept", delta=0.02),
    "foreground": Metric(format=".1f", title="concepts on the object", delta=0.5),
    "background": Metric(format=".1f", title="concepts off the object", higher_is_better=False, delta=0.5),
    "chance": Metric(format=".3f", title="λ by chance", delta=0.02),
    "d_std": Metric(format=".2f", title="D_std, by epochs", higher_is_better=False, delta=0.1),
    "d_variance": Metric(
        format=".2f", title="variance that the authors print", higher_is_better=False, delta=0.1
    ),
    "d_mean_steps": Metric(format=".2f", title="D_mean, by steps", higher_is_better=False, delta=0.1),
    "path_ratio": Metric(
        format=".2f", title="path by steps over path by epochs", higher_is_better=False, delta=0.1
    ),
    "undefined": Metric(
        unit="%", format=".1f", title="images without a concept", higher_is_better=False, delta=1.0
    ),
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "kept": Metric(unit="%", format=".1f", title="images not rejected", delta=1.0),
    "concepts": Metric(format=".1f", title="concepts", delta=0.5),
    "rank_gap": Metric(
        format=".3f", title="1 - rank correlation with the closed form", higher_is_better=False, delta=0.01
    ),
    "count_gap": Metric(
        format=".3f",
        title="relative difference of the count from the closed form's",
        higher_is_better=False,
        delta=0.01,
    ),
    "mean_entropy": Metric(unit="nats", format=".3f", title="mean entropy", delta=0.02),
    "passes": Metric(format=".0f", title="passes an image", higher_is_better=False, delta=0.5),
}
_SWEPT = ("ratio", "d_mean", "rho", "foreground", "background", "d_std")


@dataclass(frozen=True)
class Setting:
    """Runs on one kind of images with one threshold; ``data`` is the third part of their keys.

    Attributes:
        data: Name.
        recipe: Of the trainings, which settings share.
        threshold: b, nats.
        kind: "all": every metric; "sweep": those of the concepts; "rejected": with the authors' selection of images;
            "ways": ways of making an entropy map.
        arms: Trainings, or ways.
        images: Of "ways".
        first: How many of the profile's seeds; None: all.
    """

    data: str
    recipe: Recipe
    threshold: float
    kind: Literal["all", "sweep", "rejected", "ways"] = "all"
    arms: tuple[str, ...] = ARMS
    images: int = 8
    few: tuple[str, ...] = ()
    first: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config(settings.Config[Setting]):
    """A profile."""

    disk_mb: float = 50


def studies_on(
    data: str, recipe: Recipe, threshold: float, sweep: tuple[float, ...], *, ways: bool = True
) -> tuple[Setting, ...]:
    """The headline, the other thresholds, the authors' selection of images, and ways of making a map."""
    return (
        Setting(data, recipe, threshold),
        *(Setting(f"{data}-b{b:g}", recipe, b, "sweep", ("baseline", "student", "kd")) for b in sweep),
        Setting(f"{data}-rejected", recipe, threshold, "rejected", ("baseline", "student")),
        *((Setting(f"{data}-ways", recipe, threshold, "ways", tuple(WAYS), first=3),) if ways else ()),
    )


COMPOSITES = Recipe(
    source=Source("composites", size=24, train=2000, measured=64, grid=8, mean=(0.3,), std=(0.25,)),
    net=Net("small_cnn", "embedding", {"channels": (8, 16, 32), "feature": 16, "size": 24}),
    weight="embedding.weight",
    head="classifier",
    epochs=8,
    rate=3e-3,  # chosen by `reproductions.concept_quantification.choose`, like the thresholds below
)
GARMENTS = replace(COMPOSITES, source=replace(COMPOSITES.source, kind="garments"))
TINY_IMAGENET = Recipe(
    source=Source(
        "tinyimagenet32",
        size=32,
        every=10,
        measured=100,
        grid=8,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        flip=True,
        crop=4,
    ),
    net=Net("cifar_resnet", "pool", {"depth": 8, "widths": (8, 8, 16, 32)}),
    weight="layer3.0.conv2.weight",
    head="fc",
    epochs=10,
    rate=1e-2,
)
# The authors' settings: rates log-spaced over one decade, those of the student a tenth of the baseline's.
CUB = Recipe(
    source=Source(
        "cub224",
        size=224,
        measured=50,
        grid=16,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip=True,
    ),
    net=Net("vgg16", "fc2"),
    weight="model.classifier.3.weight",
    head="model.classifier.6",
    epochs=150,
    rate=1e-2,
    feature_rate=1e-3,
    head_epochs=100,
    optimizer="sgd",
    weight_decay=1e-4,
    every=10,
    probes=64,
)
THRESHOLDS = {"composites": 0.9, "tinyimagenet": 0.4, "cub": 0.2}

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=studies_on("composites", COMPOSITES, THRESHOLDS["composites"], (0.2, 0.5, 1.3)),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1.5,
        data=("digits", "photos"),
    ),
    "garments": Config(
        profile="garments",
        settings=studies_on("garments", GARMENTS, THRESHOLDS["composites"], (0.2, 0.5, 1.3)),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1.5,
        data=("fashion_mnist", "photos"),
        download_mb=31,
    ),
    "standard": Config(
        profile="standard",
        settings=studies_on("tinyimagenet", TINY_IMAGENET, THRESHOLDS["tinyimagenet"], (0.2, 0.8, 1.2)),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=30,
        data=("tinyimagenet32",),
        disk_mb=400,
    ),
    "paper": Config(
        profile="paper",
        settings=(
            *studies_on("cub", CUB, THRESHOLDS["cub"], (0.5, 1.0), ways=False),
            *studies_on(
                "cub-equal-rates", replace(CUB, feature_rate=None), THRESHOLDS["cub"], (), ways=False
            ),
        ),
        seeds=(0, 1, 2),
        budget_minutes=600,
        data=("cub224",),
        disk_mb=20000,
    ),
}


plan = partial(settings.plan, COLUMN)


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values: its setting, but not which other arms there are."""
    setting = asdict(setting_of(run, config))
    return {name: value for name, value in setting.items() if name not in ("arms", "few", "first")} | {
        "data": config.data
    }


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train what the run needs, find its concepts and measure them."""
    setting = setting_of(run, config)
    if setting.kind == "ways":
        return compared(setting.recipe, run.arm, run.seed, setting.threshold, setting.images, context)
    study = studied(setting.recipe, run.arm, run.seed, context)
    if setting.kind == "rejected":
        kept = effective(setting.recipe, run.seed, context)
        found = measured(study, setting.threshold, kept) if kept.any() else {}
        values = {"kept": 100 * kept.double().mean().item()} | _some(found)
    else:
        found = measured(study, setting.threshold)
        values = found if setting.kind == "all" else _some(found)
    # Where no image has a concept there is no share of them.
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _some(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in _SWEPT}


def measured(study: Study, threshold: float, kept: Tensor | None = None) -> dict[str, float]:
    """The metrics of a study, those of concepts at the last checkpoint; of some of the images only, if given."""
    chosen = torch.ones(len(study.foreground), dtype=torch.bool) if kept is None else kept
    arguments = study.entropy[chosen].double(), study.foreground[chosen]
    found: ConceptMetrics = concept_metrics(*arguments, study.by_epoch, threshold)
    return {
        "ratio": found.ratio[-1].item(),
        "d_mean": found.d_mean,
        "rho": found.rho,
        "foreground": found.foreground[-1].item(),
        "background": found.background[-1].item(),
        "chance": found.chance,
        "d_std": found.d_std,
        "d_variance": found.d_variance,
        "d_mean_steps": concept_metrics(*arguments, study.by_step, threshold).d_mean,
        "path_ratio": (study.by_step[-1] / study.by_epoch[-1]).item(),
        "undefined": 100 * found.undefined[-1].item(),
        "accuracy": study.accuracy,
    }


def effective(recipe: Recipe, seed: int, context: Context) -> Tensor:
    """The images that the authors keep: of both networks, the object's mean entropy is never above the background's.

    Looked at are the checkpoints after 40 of 150 epochs, here after as large a part of the training.
    """
    kept = []
    for arm in ("baseline", "student"):
        study = studied(recipe, arm, seed, context)
        inside = study.foreground[:, None].double()
        on, off = ((study.entropy * part).sum((2, 3)) / part.sum((2, 3)) for part in (inside, 1 - inside))
        late = math.ceil(study.entropy.shape[1] * 40 / 150) - 1
        kept.append((on <= off)[:, late:].all(1))
    return kept[0] & kept[1]
