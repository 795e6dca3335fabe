"""Activation boundaries: an initialisation by the teacher's signs, beside one by its values and none at all.

``reproduce run ab`` (quick, digits) · ``reproduce run ab --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run ab --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.methods.ab import Connector, ab_layer_weights, ab_loss
from kdrefs.methods.fitnets import hint_loss
from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output
from reproductions.ab.similarity import similarities
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, teacher
from reproductions.protocols.rows import (
    Method,
    Phase,
    PhaseLoss,
    Shapes,
    Targets,
    cross_entropy,
    feature_of,
    logits_of,
)
from reproductions.protocols.settings import Setting, setting_of
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS, STAGES

COLUMN = "ab"
TITLE = "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons"
PAPER = "heo2019ab"
METRICS = classification.METRICS | {
    "activation_similarity": Metric(unit="%", format=".1f", title="signs read from the stages", delta=0.5),
    "middle_similarity": Metric(unit="%", format=".1f", title="signs read from the middle stage", delta=0.5),
}
ROWS = (
    "ab",
    "ab_kd",
)  # of the shared table

TEMPERATURE = 3.0  # bhheo/AB_distillation@a7701d3: no factor T², no labels
SHARE = 0.25  # of the epochs for the first stage, as in the column fitnets
LONG_SHARE = 0.6  # where epochs or images are few: 60 of 100 in the authors' script for MIT scenes
FRACTION = 0.1  # of the training images, where they are few
PACKED = 8  # signs in a number: a half holds them exactly


def methods(data: str) -> dict[str, Method]:
    """The column's arms in a setting; boundaries and hints are read before the activation.

    What follows the data set's name is the regime: ``short``, few epochs; ``second``, as many epochs as it has labels
    in; ``few``, a part of the images; ``first``, nothing but the first stage.
    """
    regime = data.partition("-")[2]
    stages = stages_of(data)
    middle = middle_of(data)
    share = {"": SHARE, "first": 1.0}.get(regime, LONG_SHARE)

    def initialised(
        pairs: Sequence[tuple[str, str]], boundaries: bool, second: PhaseLoss, logits: bool = False
    ) -> Method:
        """Some stages' boundaries or values through connectors, then what ``second`` says of the logits."""
        first = _transfer(pairs, boundaries)
        asked: dict[str, Callable[[Output], Tensor]] = {
            f"{guide}_signs" if boundaries else guide: _signs_of(guide) if boundaries else feature_of(guide)
            for _, guide in pairs
        }
        if share == 1:
            return Method((Phase(first),), asked, _connectors(pairs, boundaries))
        phases = Phase(first, share), Phase(second, 1 - share)
        return Method(
            phases, asked | ({"logits": logits_of} if logits else {}), _connectors(pairs, boundaries)
        )

    return {
        "hint": initialised([middle], False, _labels),
        "ab_middle": initialised([middle], True, _labels),
        "ab": initialised(stages, True, _labels),
        "ab_kd": initialised(stages, True, _teacher_alone, logits=True),
        "kd_only": Method((Phase(_teacher_alone),), {"logits": logits_of}),
    }


def stages_of(data: str) -> list[tuple[str, str]]:
    """Features before the activation that face each other, student's and teacher's, from the image upwards."""
    return [(f"{student}_pre", f"{guide}_pre") for student, guide in STAGES[data.partition("-")[0]]]


def middle_of(data: str) -> tuple[str, str]:
    """The stage that a FitNets hint is on."""
    stages = stages_of(data)
    return stages[1 if len(stages) > 2 else 0]


def pack(maps: Tensor) -> Tensor:
    """Which values of ``maps`` ``(B, C, H, W)`` are above 0, eight channels in a number from 0 to 255.

    Kept for a whole training set, the signs of all stages then take an eighth of the room of their values.
    """
    bits = (maps > 0).unflatten(1, (-1, PACKED))
    return (bits * _places(maps)).sum(2).to(maps.dtype)


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """What :func:`pack` was given, as 1 where it was above 0 and 0 elsewhere.

    Its type and layout in memory are those of ``like``: two layouts in one product cost several times the product.
    """
    bits = packed.to(torch.uint8).unsqueeze(2) & _places(packed)
    return torch.empty_like(like, requires_grad=False).copy_((bits > 0).flatten(1, 2))


def _places(maps: Tensor) -> Tensor:
    return (2 ** torch.arange(PACKED, device=maps.device)).to(torch.uint8).view(-1, 1, 1)


def _signs_of(guide: str) -> Callable[[Output], Tensor]:
    return lambda output: pack(output.features[guide])


def _connectors(pairs: Sequence[tuple[str, str]], boundaries: bool) -> Any:
    def make(features: Shapes, targets: Shapes) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        for student, guide in pairs:
            channels = PACKED * targets[f"{guide}_signs"][0] if boundaries else targets[guide][0]
            made[student] = Connector(features[student][0], channels)
        return made

    return make


def _transfer(pairs: Sequence[tuple[str, str]], boundaries: bool) -> PhaseLoss:
    """The first stage: layers weighed as the authors weigh them; a hint has the same sum of squares, unhinged."""
    weights = ab_layer_weights(len(pairs))

    def loss(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
        total = torch.zeros((), device=labels.device)
        for weight, (student, guide) in zip(weights, pairs, strict=True):
            ours = output.features[f"{student}_regressed"]
            if boundaries:
                signs = unpack(targets[f"{guide}_signs"], ours.detach())
                total = total + weight * ab_loss(ours, signs)
            else:
                total = total + weight * 2 * hint_loss(ours, targets[guide])
        return total

    return loss


def _labels(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
    return cross_entropy(output, labels)


def _teacher_alone(output: Output, targets: Targets, labels: Tensor, progress: float) -> Tensor:
    return kd_loss(output.logits, targets["logits"], temperature=TEMPERATURE, scale=False)


_COMPARED = ("student", "hint", "ab_middle", "ab")
PROFILES: dict[str, Config] = {
    "quick": tables.quick(
        Setting(
            "digits",
            DIGITS,
            ("teacher", "student", "kd", "hint", "ab_middle", "ab"),
            ("ab_kd", "kd_only"),
        ),
        Setting("digits-short", replace(DIGITS, epochs=8), _COMPARED),
        Setting("digits-second", replace(DIGITS, epochs=3), ("student",)),
        Setting("digits-few", replace(DIGITS, epochs=40, batch_size=32, evaluate_every=None), _COMPARED),
        Setting("digits-first", replace(DIGITS, epochs=5), _COMPARED),
        seeds=5,
    ),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", "student", "kd", "hint", "ab"),
            ("ab_middle", "ab_kd", "kd_only"),
        ),
        Setting("cifar10-short", replace(CIFAR10, epochs=4), (), _COMPARED),
        Setting("cifar10-second", replace(CIFAR10, epochs=2), (), ("student",)),
        Setting("cifar10-few", replace(CIFAR10, epochs=16), _COMPARED),
        Setting("cifar10-first", replace(CIFAR10, epochs=2), (), _COMPARED),
        disk_mb=3500,
    ),
    "paper": tables.paper(
        Setting(
            "cifar100", CIFAR100, ("teacher", "student", "kd", "hint", "ab_middle", "ab", "ab_kd", "kd_only")
        ),
        minutes=150,
    ),
}


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train what the runs of one arm need, evaluate it, and read the teacher's boundaries from it.

    After a first stage alone there is nothing but boundaries to look at.
    """
    data, arm = runs[0].data, runs[0].arm
    training = setting_of(runs[0], config).recipe
    pair = PAIRS[training.pair]
    given = methods(data)
    fraction = FRACTION if data.endswith("-few") else None
    students, best = classification.students_of(runs, config, context, given, __name__, fraction=fraction)
    found = []
    for run, student in zip(runs, students, strict=True):
        guide = teacher(context, pair, run.seed)
        scores: dict[str, float] = {}
        if not data.endswith("-first"):
            scores = classification.evaluate(student, guide, training, context) | best.get(run.seed, {})
        names = [(theirs if arm == "teacher" else ours, theirs) for ours, theirs in stages_of(data)]
        read = similarities(student, guide, pair, names, context)
        scores["activation_similarity"] = sum(read) / len(read)
        scores["middle_similarity"] = read[stages_of(data).index(middle_of(data))]
        found.append(scores)
    return found


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


plan = partial(classification.plan, COLUMN)
relevant_config = classification.relevant_config
together = classification.together
