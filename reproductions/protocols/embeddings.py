"""Students that take over a teacher's representation without labels: the networks of PKT's table.

A supervised student goes on from where it is by distillation of the outputs, by a hint or by PKT; another starts from
hand-crafted features. What they are is here; what is measured on them is a column's: the PKT column asks for retrieval,
the QMI column for information.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.data.cache import Split
from kdrefs.divergences import softened_cross_entropy
from kdrefs.methods.pkt import pkt_loss
from kdrefs.training import whole_batch
from reproductions.harness import profiles
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification, settings, tables
from reproductions.protocols.handcrafted import fixed_features
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    Pair,
    initialised,
    load_pair_data,
    load_weights,
    make_batches,
    representations,
    save_weights,
    supervised,
    teacher,
    teacher_identity,
    teacher_views,
    weights_digest,
)
from reproductions.protocols.transfer import (
    Loss,
    Targets,
    cached_targets,
    distil,
    live_targets,
    random_projection,
)

TRANSFER_ARMS = ("student", "kd", "hint_random", "hint", "pkt")
HOG_ARMS = ("pixels", "hog", "random", "hint", "pkt")
ARM_TITLES = {
    "pixels": "pixels, no network",
    "hog": "HoG, the teacher",
    "random": "untrained network",
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 2",
    "hint_random": "hint, fixed random projection",
    "hint": "hint, learned projection",
    "pkt": "PKT",
    "pkt_scratch": "PKT from scratch",
    "pkt_no_diagonal": "PKT, diagonal left out",
}


@dataclass(frozen=True)
class Setting:
    """One group of arms that are compared with each other; ``data`` is the third part of their keys."""

    data: str
    arms: tuple[str, ...]
    fraction: float = 1.0  # of the training labels that the student's own training saw
    student_stages: tuple[tuple[int, float], ...] | None = None  # None: the pair's recipe
    handcrafted: bool = False


@dataclass(frozen=True, kw_only=True)
class Config(profiles.Config):
    """A profile of the networks. Learning rates and T are the authors' (probabilistic_kt@a58fd1b), none was tuned."""

    pair: str
    settings: tuple[Setting, ...]
    transfer_stages: tuple[tuple[int, float], ...]
    scratch_stages: tuple[tuple[int, float], ...]  # PKT without a supervised start
    handcrafted_stages: tuple[tuple[int, float], ...]
    handcrafted_student: Net
    hog_cell: int  # pixels
    views: (
        int | None
    )  # fixed augmented views with cached teacher output; None runs the teacher on every batch
    temperature: float = 2.0
    batch_size: int = 128
    teacher_weights: str | None = None  # digest of the committed weights: other weights, other runs
    table: classification.Config | None = None


PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        pair="digits",
        settings=(
            Setting("digits-hog", (*HOG_ARMS, "pkt_no_diagonal"), handcrafted=True),
            Setting(
                "digits-10pct",
                ("teacher", "student", "kd", "hint", "pkt"),
                fraction=0.1,
                student_stages=((60, 3e-3), (15, 3e-4)),
            ),
            Setting("digits", (*TRANSFER_ARMS, "pkt_scratch")),
        ),
        seeds=tuple(range(10)),
        transfer_stages=((12, 1e-3),),
        scratch_stages=((12, 3e-3), (4, 3e-4)),
        handcrafted_stages=((12, 3e-3), (4, 3e-4)),
        handcrafted_student=Net("small_cnn", "embedding_pre", {"channels": (8, 16), "feature": 32}),
        hog_cell=2,
        views=1,
        budget_minutes=1,
        download_mb=0,
        disk_mb=20,
        data=("digits",),
        table=classification.Config(
            profile="quick",
            settings=(settings.Setting("digits-table", tables.DIGITS, ("pkt",)),),
            seeds=(),  # the profile's
            budget_minutes=0,
            data=("digits",),
        ),
    ),
    "standard": Config(
        profile="standard",
        pair="cifar10-tiny",
        settings=(
            Setting("cifar10", ("teacher", *TRANSFER_ARMS, "pkt_scratch")),
            Setting("cifar10-hog", HOG_ARMS, handcrafted=True),
            Setting(
                "cifar10-10pct",
                ("student", "kd", "hint", "pkt"),
                fraction=0.1,
                student_stages=((80, 1e-3), (20, 1e-4)),
            ),
        ),
        seeds=(0, 1, 2),
        transfer_stages=((10, 1e-4),),
        scratch_stages=((15, 1e-3), (5, 1e-4)),
        handcrafted_stages=((8, 1e-3), (2, 1e-4)),
        handcrafted_student=Net("tiny_cnn", "fc1"),
        hog_cell=8,
        views=4,
        teacher_weights=weights_digest(PAIRS["cifar10-tiny"]),
        budget_minutes=120,
        download_mb=170,
        disk_mb=700,
        data=("cifar10",),
        table=classification.Config(
            profile="standard",
            settings=(settings.Setting("cifar10-table", tables.CIFAR10, ("pkt",)),),
            seeds=(),  # the profile's
            budget_minutes=0,
            data=("cifar10",),
            teacher_weights=weights_digest(PAIRS["cifar10-small"]),
        ),
    ),
    "paper": Config(
        profile="paper",
        pair="cifar10-pkt",
        settings=(Setting("cifar10", ("teacher", *TRANSFER_ARMS, "pkt_scratch")),),
        seeds=(0, 1, 2, 3, 4),
        transfer_stages=((20, 1e-4),),
        scratch_stages=((50, 1e-3), (50, 1e-4)),
        handcrafted_stages=(),
        handcrafted_student=Net("tiny_cnn", "fc1"),
        hog_cell=8,
        views=None,
        budget_minutes=60,
        download_mb=170,
        disk_mb=700,
        data=("cifar10",),
    ),
}


def relevant_config(config: Config) -> dict[str, Any]:
    """What of a profile decides the networks."""
    return {name: value for name, value in asdict(config).items() if name != "table"}


def trained(run: Run, config: Config, context: Context) -> tuple[nn.Module, str]:
    """The run's network in eval mode and the name of the layer that is its representation."""
    setting, pair = setting_of(run, config), PAIRS[config.pair]
    if run.arm == "teacher":
        return teacher(context, pair, run.seed), pair.teacher.feature
    if setting.handcrafted:
        return _from_handcrafted(run, config, context), config.handcrafted_student.feature
    student = _supervised_student(run, setting, pair, context)
    if run.arm == "student":
        return student, pair.student.feature
    return _transferred(run, config, context, student), pair.student.feature


def setting_of(run: Run, config: Config) -> Setting:
    """The setting that a run belongs to."""
    return next(setting for setting in config.settings if setting.data == run.data)


def _supervised_student(run: Run, setting: Setting, pair: Pair, context: Context) -> nn.Module:
    recipe = pair.student_recipe
    if setting.student_stages is not None:
        recipe = replace(recipe, stages=setting.student_stages)
    return supervised(context, pair, "student", run.seed, recipe=recipe, fraction=setting.fraction)


def _transferred(run: Run, config: Config, context: Context, student: nn.Module) -> nn.Module:
    """The student after transfer from the teacher, without labels, from its supervised start (erratum P5)."""
    pair, setting = PAIRS[config.pair], setting_of(run, config)
    scratch = run.arm == "pkt_scratch"
    stages = config.scratch_stages if scratch else config.transfer_stages
    train, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    if scratch:
        student = initialised(pair.student, classes, run.seed, context.device)
    generator = torch.Generator().manual_seed(run.seed)

    def make(folder: Path) -> None:
        if config.views is None:
            source = teacher(context, pair, run.seed)
            targets: Callable[..., Targets] = live_targets(source, pair.teacher.feature)
            views, width = {}, _width(source, pair.teacher, train, pair, context)
        else:
            targets = cached_targets
            views = teacher_views(context, pair, run.seed, config.views)
            width = views["feature"].shape[-1]
        batches = make_batches(
            pair,
            train,
            device=context.device,
            training=True,
            seed=run.seed,
            batch_size=config.batch_size,
            fixed_views=config.views,
            view_extras=views or None,
        )
        inner = _width(student, pair.student, train, pair, context)
        loss, modules = _loss(run.arm, pair.student.feature, inner, width, config, generator, context.device)
        distil(
            student.train(),
            batches,
            loss,
            stages=stages,
            targets=targets,
            modules=modules,
            folder=folder,
            max_steps=context.max_steps,
        )
        save_weights(student, folder / "weights.safetensors")

    config_of_run = {
        "arm": run.arm, "seed": run.seed, "pair": asdict(pair), "setting": asdict(setting), "stages": stages,
        "teacher": teacher_identity(pair, run.seed), "views": config.views, "temperature": config.temperature,
        "batch_size": config.batch_size, "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("pkt-transfer", config_of_run, make, source=source_digest(__name__))
    return load_weights(student, folder / "weights.safetensors")


def _loss(
    arm: str,
    feature: str,
    inner: int,
    width: int,
    config: Config,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Loss, dict[str, nn.Module]]:
    """The arm's loss and the modules that it trains beside the student.

    Hints are the authors' two: the teacher's feature through a fixed random projection, or the student's through a
    learned one; squared distances, summed over the dimensions and averaged over the batch.
    """
    if arm == "kd":
        temperature = config.temperature
        return lambda out, to: softened_cross_entropy(out.logits, to["logits"], temperature), {}
    if arm in ("pkt", "pkt_scratch"):
        return lambda out, to: pkt_loss(whole_batch(out.features[feature]), whole_batch(to["feature"])), {}
    if arm == "pkt_no_diagonal":
        return lambda out, to: pkt_loss(
            whole_batch(out.features[feature]), whole_batch(to["feature"]), diagonal=False
        ), {}
    if arm == "hint_random":
        fixed = random_projection(width, inner, generator).to(device)
        return lambda out, to: _squared_distance(out.features[feature], to["feature"] @ fixed), {}
    if arm == "hint":
        projection = nn.Linear(inner, width, bias=False)
        with torch.no_grad():
            projection.weight.copy_(random_projection(inner, width, generator).T)
        projection.to(device)
        return lambda out, to: _squared_distance(projection(out.features[feature]), to["feature"]), {
            "projection": projection
        }
    raise ValueError(
        f"arm: got {arm!r}, expected one of kd, hint_random, hint, pkt, pkt_scratch, pkt_no_diagonal"
    )


def _squared_distance(student: Tensor, target: Tensor) -> Tensor:
    return (student - target).square().sum(1).mean()


def _width(module: nn.Module, net: Net, split: Split, pair: Pair, context: Context) -> int:
    one = replace(split, images=split.images[:1], labels=split.labels[:1], extras={})
    batches = make_batches(pair, one, device=context.device, training=False)
    return representations(module, batches, net.feature)[net.feature].shape[1]


def _from_handcrafted(run: Run, config: Config, context: Context) -> nn.Module:
    """A network taught by HoG features alone; the arm ``random`` is the same network untrained."""
    pair, net = PAIRS[config.pair], config.handcrafted_student
    train, test, classes = load_pair_data(pair, probe=context.max_steps is not None)
    student = initialised(net, classes, run.seed, context.device)
    if run.arm == "random":
        return student.eval()
    generator = torch.Generator().manual_seed(run.seed)

    def make(folder: Path) -> None:
        target, _ = fixed_features("hog", config.hog_cell, pair, context, train, test)
        batches = make_batches(
            pair, train, device=context.device, training=True, seed=run.seed, batch_size=config.batch_size,
            augment=None, extras={"feature": target.to(context.device)},
        )  # fmt: skip
        inner = _width(student, net, train, pair, context)
        loss, modules = _loss(run.arm, net.feature, inner, target.shape[1], config, generator, context.device)
        distil(
            student.train(),
            batches,
            loss,
            stages=config.handcrafted_stages,
            modules=modules,
            folder=folder,
            max_steps=context.max_steps,
        )
        save_weights(student, folder / "weights.safetensors")

    config_of_run = {
        "arm": run.arm, "seed": run.seed, "data": pair.data, "net": asdict(net), "cell": config.hog_cell,
        "stages": config.handcrafted_stages, "batch_size": config.batch_size, "mean": pair.mean, "std": pair.std,
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("pkt-handcrafted", config_of_run, make, source=source_digest(__name__))
    return load_weights(student, folder / "weights.safetensors")
