"""EnD²: one network in place of an ensemble, its mean or its distribution, with and without foreign inputs.

``reproduce run end2`` (quick, spirals and digits) · ``reproduce run end2 --profile standard`` (CIFAR-10 against
CIFAR-100, two CPU cores) · ``reproduce run end2 --profile paper --device cuda`` (the same with residual networks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.methods.end2 import Uncertainty, dirichlet_uncertainty, ensemble_uncertainty
from kdrefs.metrics import accuracy
from reproductions.end2 import sets
from reproductions.end2.distillation import (
    ARMS,
    Setting,
    answers,
    ensemble,
    in_one_go,
    relevant,
    students,
)
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import settings
from reproductions.protocols.detection import auroc, rank_correlation
from reproductions.protocols.pairs import Net
from reproductions.protocols.settings import setting_of

COLUMN = "end2"
TITLE = "Ensemble Distribution Distillation"
PAPER = "malinin2020end2"
METRICS = {
    "accuracy": Metric(unit="%", format=".1f", title="test accuracy", delta=0.5),
    "cross_entropy": Metric(
        unit="nat", format=".3f", title="test cross-entropy", higher_is_better=False, delta=0.02
    ),
    "auroc_total": Metric(unit="%", format=".1f", title="AUROC by total uncertainty", delta=1.0),
    "auroc_knowledge": Metric(unit="%", format=".1f", title="AUROC by knowledge uncertainty", delta=1.0),
    "knowledge_rank": Metric(
        format=".3f", title="rank correlation with the ensemble's knowledge uncertainty", delta=0.05
    ),
    "knowledge_gap": Metric(
        unit="nat",
        format=".4f",
        title="distance from the ensemble's knowledge uncertainty",
        higher_is_better=False,
        delta=0.01,
    ),
    "knowledge_inside": Metric(
        unit="nat", format=".4f", title="mean knowledge uncertainty, test set", delta=0.01
    ),
    "knowledge_outside": Metric(
        unit="nat", format=".4f", title="mean knowledge uncertainty, outside", delta=0.01
    ),
    "log_precision": Metric(unit="nat", format=".2f", title="mean log-precision, test set", delta=0.1),
}


@dataclass(frozen=True, kw_only=True)
class Config(settings.Config[Setting]):
    """A profile: settings whose arms are compared with each other."""


_BOTH = ("single", "ensemble", "end", "end_aux", "end2", "end2_aux")
_WITHOUT = ("end2_unsmoothed", "end2_unannealed", "end2_bare")
_PLAIN = {"in_channels": 3, "channels": (8, 16, 32), "feature": 64, "size": 32}

PROFILES: dict[str, Config] = {
    "quick": Config(
        profile="quick",
        settings=(
            Setting(
                "spirals",
                Net("point_net", "", {"width": 64}),
                members=10,
                member_epochs=50,
                student_epochs=110,
                rate=0.02,
                arms=_BOTH,
                batch_size=100,
            ),
            Setting(
                "digits",
                Net("small_cnn", "embedding_pre", {"channels": (4, 8), "feature": 16}),
                members=8,
                member_epochs=12,
                student_epochs=20,
                rate=0.01,
                arms=_BOTH,
                few=_WITHOUT,
                batch_size=64,
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=1,
        data=("digits",),
    ),
    "standard": Config(
        profile="standard",
        settings=(
            Setting(
                "cifar10",
                Net("small_cnn", "embedding_pre", _PLAIN),
                members=5,
                member_epochs=5,
                student_epochs=8,
                rate=0.005,
                arms=(*_BOTH, "end2_unannealed"),
                views=2,
                precision="bf16",
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=35,
        data=("cifar10", "cifar100"),
        download_mb=340,
        disk_mb=1000,
    ),
    "paper": Config(
        profile="paper",
        settings=(
            Setting(
                "cifar10",
                Net("resnet20", "pool"),
                members=10,  # default of ensembles/run/train_endd.py; the paper has a hundred
                member_epochs=45,
                student_epochs=90,
                rate=0.005,
                arms=_BOTH,
                few=_WITHOUT,
                views=4,
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        budget_minutes=300,
        data=("cifar10", "cifar100"),
        download_mb=340,
        disk_mb=4000,
    ),
}


plan = partial(settings.plan, COLUMN)


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Make the ensembles and students of some seeds of an arm; measure each beside its own ensemble."""
    setting = setting_of(runs[0], config)
    found = networks_of(runs, config, context)
    return [
        measure(setting, networks, ensemble(setting, run.seed, context), context)
        for run, networks in zip(runs, found, strict=True)
    ]


def networks_of(runs: Sequence[Run], config: Config, context: Context) -> list[list[nn.Module]]:
    """Run by run, the trained networks in eval mode: one, or the members of the ensemble."""
    setting, arm = setting_of(runs[0], config), runs[0].arm
    if arm in ARMS:
        return [[one] for one in students(setting, arm, [run.seed for run in runs], context)]
    members = [ensemble(setting, run.seed, context) for run in runs]
    return members if arm == "ensemble" else [one[:1] for one in members]


def measure(
    setting: Setting, networks: Sequence[nn.Module], members: Sequence[nn.Module], context: Context
) -> dict[str, float]:
    """What the predictions of a network, or of an ensemble, and their uncertainties are worth."""
    parts = sets.load(setting.data, probe=context.max_steps is not None)
    labels = torch.from_numpy(parts.test_labels).to(context.device)
    known, foreign = (logits_of(networks, setting, part, context) for part in (parts.test, parts.outside))
    (log_p, inside), (_, outside) = judged(known), judged(foreign)
    theirs = [
        judged(logits_of(members, setting, part, context))[1].knowledge
        for part in (parts.test, parts.outside)
    ]
    ours = torch.cat([inside.knowledge, outside.knowledge])
    values = {
        "accuracy": 100 * accuracy(log_p, labels),
        "cross_entropy": nn.functional.nll_loss(log_p.double(), labels).item(),
        "auroc_total": 100 * auroc(inside.total, outside.total),
        "auroc_knowledge": 100 * auroc(inside.knowledge, outside.knowledge),
        "knowledge_rank": rank_correlation(ours, torch.cat(theirs)),
        "knowledge_gap": (ours - torch.cat(theirs)).abs().mean().item(),
        "knowledge_inside": inside.knowledge.mean().item(),
        "knowledge_outside": outside.knowledge.mean().item(),
    }
    if len(networks) == 1:
        values["log_precision"] = known[:, 0].logsumexp(1).mean().item()
    return values


def judged(logits: Tensor) -> tuple[Tensor, Uncertainty]:
    """Log-probabilities ``(N, K)`` of the mean prediction, and its uncertainty, of logits ``(N, M, K)``.

    One network is read as a Dirichlet whether or not it was trained for it, which is the control.
    """
    if logits.shape[1] == 1:
        return logits[:, 0].log_softmax(1), dirichlet_uncertainty(logits[:, 0])
    return logits.softmax(2).mean(1).log(), ensemble_uncertainty(logits)


def logits_of(networks: Sequence[nn.Module], setting: Setting, inputs: Any, context: Context) -> Tensor:
    """What networks say of inputs, ``(N, M, K)``, in eval mode."""
    parts = sets.load(setting.data, probe=context.max_steps is not None)
    return answers(networks, sets.batches(parts, inputs, training=False, device=context.device))


def relevant_config(run: Run, config: Config) -> dict[str, Any]:
    """What of a profile decides a run's values."""
    return {"profile": config.profile, "data": config.data} | relevant(setting_of(run, config), run.arm)


def together(run: Run, config: Config, device: str) -> str | None:
    """Seeds of one arm share a training where their networks may; ensembles are a training each."""
    shared = run.arm in ARMS and in_one_go(setting_of(run, config), device)
    return f"{run.data}/{run.arm}" if shared else None
