"""A shallow student of a deep teacher: from labels, from logits, with further inputs that have no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.methods.kd import kd_loss
from kdrefs.methods.logit_regression import LogitStatistics, logit_regression_loss, logit_statistics
from kdrefs.metrics import accuracy, agreement
from kdrefs.nets import Output
from kdrefs.training import (
    Members,
    as_one,
    as_several,
    batches_as_one,
    fit,
    load_tensors,
    one_cycle,
    per_member,
    save_tensors,
    update,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.logit_regression.students import ShallowNet, cost
from reproductions.protocols import pairs
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    Pair,
    labelled_subset,
    load_pair_data,
    load_weights,
    make_batches,
    representations,
    save_weights,
    supervised,
)


@dataclass(frozen=True)
class Arm:
    """What a student learns, from which inputs, and how it is built.

    Attributes:
        target: The labels, the teacher's logits, or its softened probabilities (T = 4), without labels.
        everything: All training inputs instead of the labelled ones; labels are read by ``"labels"`` only.
        bottleneck: Linear units before the hidden layer.
        standardised: Whether logits are standardised; of ``"logits"``.
        conv: A convolution and pooling before the hidden layer.
    """

    target: Literal["labels", "logits", "softened"]
    everything: bool = False
    bottleneck: bool = False
    standardised: bool = True
    conv: bool = False


ARMS: dict[str, Arm] = {
    "labels": Arm("labels"),
    "mimic": Arm("logits"),
    "mimic_more": Arm("logits", everything=True),
    "labels_more": Arm("labels", everything=True),
    "softened": Arm("softened"),
    "mimic_raw": Arm("logits", standardised=False),
    "labels_bottleneck": Arm("labels", bottleneck=True),
    "mimic_bottleneck": Arm("logits", bottleneck=True),
    "mimic_more_bottleneck": Arm("logits", everything=True, bottleneck=True),
    "labels_conv": Arm("labels", conv=True),
    "mimic_more_conv": Arm("logits", everything=True, conv=True),
}


@dataclass(frozen=True)
class Rates:
    """Highest rate of each target, chosen by :mod:`reproductions.logit_regression.choose`."""

    labels: float
    logits: float
    softened: float


@dataclass(frozen=True)
class Recipe:
    """What all arms on a data set have in common.

    Attributes:
        pair: Data and augmentation.
        teacher: The deep network; it sees the labelled images only.
        teacher_recipe: How it is trained.
        labelled: Share of the training images that have labels.
        hidden: Units of the student's hidden layer.
        rank: Linear units before it where there is a bottleneck.
        conv: Channels of the convolution where there is one.
        steps: Optimiser steps (Adam, one cycle), the same for all arms.
        rates: Learning rates by target.
        bottleneck_rates: The same with a bottleneck.
        views: Fixed augmented views on which the teacher is asked.
    """

    pair: str
    teacher: Net
    teacher_recipe: pairs.Recipe
    labelled: float
    hidden: int
    rank: int
    conv: int
    steps: int
    rates: Rates
    bottleneck_rates: Rates
    batch_size: int = 64
    views: int = 1
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class Inputs:
    """One seed's training set, and the mean and spread of its teacher's logits on it."""

    batches: Batches
    statistics: LogitStatistics


def pair_of(recipe: Recipe) -> Pair:
    """The recipe's data with its own teacher."""
    return replace(
        PAIRS[recipe.pair],
        teacher=recipe.teacher,
        teacher_recipe=recipe.teacher_recipe,
        teacher_weights=None,
    )


def teacher_of(recipe: Recipe, seed: int, context: Context) -> nn.Module:
    """The seed's teacher, trained on the images that have labels."""
    return supervised(context, pair_of(recipe), "teacher", seed, fraction=recipe.labelled)


def new_student(recipe: Recipe, arm: Arm, seed: int, context: Context) -> ShallowNet:
    """A student with the seed's initial weights."""
    split, _, classes = load_pair_data(pair_of(recipe), probe=True)
    _, size, _, channels = split.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ShallowNet(
            channels,
            size,
            classes,
            recipe.hidden,
            rank=recipe.rank if arm.bottleneck else None,
            conv=recipe.conv if arm.conv else None,
        )
    return student.to(context.device)


def inputs_of(recipe: Recipe, arm: Arm, seed: int, context: Context) -> Inputs:
    """The training set of one seed, its teacher's logits beside every image.

    Labelled images are repeated until an epoch is as long as one of all images, so that epochs are alike.

    Args:
        recipe: Says which images have labels.
        arm: Says which images are used.
        seed: Of the choice of labelled images, the teacher and the order.
        context: What the harness gives.
    """
    pair = pair_of(recipe)
    split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    chosen = labelled_subset(split.labels, recipe.labelled, seed).numpy()
    if arm.everything:
        chosen = np.arange(len(split))
    repeated = np.tile(chosen, max(1, round(len(split) / len(chosen))))
    batches = make_batches(
        pair,
        split,
        device=context.device,
        training=True,
        seed=seed,
        batch_size=min(recipe.batch_size, len(repeated)),
        drop_last=True,
        fixed_views=recipe.views,
        indices=repeated,
    )
    logits = _teacher_logits(recipe, split, seed, context)
    return Inputs(
        batches.with_extras(view_extras={"logits": logits}), logit_statistics(logits[:, chosen].flatten(0, 1))
    )


def trained(recipe: Recipe, name: str, seeds: Sequence[int], context: Context) -> list[ShallowNet]:
    """Students of an arm in eval mode, several seeds in one training, or as they were kept.

    Args:
        recipe: How they are trained.
        name: Of the arm, in :data:`ARMS`.
        seeds: Of initial weights, labelled images, teacher and order.
        context: What the harness gives.
    """
    arm = ARMS[name]
    students = [new_student(recipe, arm, seed, context) for seed in seeds]

    def make(folder: Path) -> None:
        inputs = [inputs_of(recipe, arm, seed, context) for seed in seeds]
        if arm.target == "logits" and arm.standardised:
            for student, one in zip(students, inputs, strict=True):
                student.standardise(one.statistics)
        kinds = recipe.bottleneck_rates if arm.bottleneck else recipe.rates
        whole = as_one(students)
        optimizer = torch.optim.Adam(
            whole.parameters(), lr=getattr(kinds, arm.target), **fused(context.device)
        )
        schedule = one_cycle(optimizer, recipe.steps, warmup_steps=recipe.steps // 8)
        batches = [one.batches for one in inputs]
        fit(
            _step(arm),
            {"student": whole, "optimizer": optimizer, "schedule": schedule},
            batches_as_one(batches),
            epochs=-(-recipe.steps // len(batches[0])),
            checkpoint=folder / "training.safetensors",
            precision=recipe.precision,
            max_steps=min(recipe.steps, context.max_steps or recipe.steps),
            progress=context.progress,
        )
        for seed, part in zip(seeds, as_several(whole), strict=True):
            save_weights(part, folder / f"weights{seed}.safetensors")

    about = {
        "arm": asdict(arm), "recipe": asdict(recipe), "pair": asdict(pair_of(recipe)), "seeds": list(seeds),
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("shallow", about, make, source=source_digest(__name__))
    for seed, student in zip(seeds, students, strict=True):
        load_weights(student, folder / f"weights{seed}.safetensors")
    return students


def evaluate(network: nn.Module, recipe: Recipe, seed: int, context: Context) -> dict[str, float]:
    """Metrics on the test set, and what the network costs."""
    _, test, _ = load_pair_data(pair_of(recipe), probe=context.max_steps is not None)
    return scores(network, recipe, test, seed, context)


def scores(network: nn.Module, recipe: Recipe, split: Split, seed: int, context: Context) -> dict[str, float]:
    """Metrics on the images of ``split``."""
    batches = make_batches(pair_of(recipe), split, device=context.device, training=False)
    logits = representations(network, batches)["logits"]
    guide = representations(teacher_of(recipe, seed, context), batches)["logits"]
    labels = torch.from_numpy(split.labels).long().to(logits.device)
    first = next(iter(batches)).images
    assert first is not None
    return {
        "accuracy": 100 * accuracy(logits, labels),
        "agreement": 100 * agreement(logits, guide),
        "cross_entropy": F.cross_entropy(logits.double(), labels).item(),
        "explained": explained(logits, guide),
    } | cost(network, first)


def explained(logits: Tensor, guide: Tensor) -> float:
    """Share of the variance of the teacher's logits that the student's have, in percent; at least -100."""
    gap, spread = (logits - guide).double().square().sum(), (guide - guide.mean(0)).double().square().sum()
    return max(-100.0, 100 * (1 - gap / spread).item())


def _step(arm: Arm) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    def loss(output: Output, guide: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if arm.target == "labels":
            return F.cross_entropy(output.logits.float(), labels)
        if arm.target == "softened":
            return kd_loss(output.logits, guide, temperature=4.0)
        return logit_regression_loss(output.features["outputs"], guide, statistics=LogitStatistics(mean, std))

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        student = state["student"]
        network: Any = student.network if isinstance(student, Members) else student
        assert batch.images is not None
        assert batch.labels is not None
        given = batch.extras["logits"], batch.labels, network.mean, network.std
        losses = per_member(loss, student)(student(batch.images), *given)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        return {"loss": losses.detach().mean()}

    return step


def _teacher_logits(recipe: Recipe, split: Split, seed: int, context: Context) -> Tensor:
    """The teacher's logits on every fixed view of the training images, ``(views, N, classes)``; made once."""
    pair = pair_of(recipe)

    def make(folder: Path) -> None:
        batches = make_batches(
            pair, split, device=context.device, training=True, batch_size=512, fixed_views=recipe.views
        )
        guide = teacher_of(recipe, seed, context)
        found = [representations(guide, batches, view=view)["logits"] for view in range(recipe.views)]
        save_tensors(folder / "logits.safetensors", {"logits": torch.stack(found)})

    about = {
        "pair": asdict(pair), "labelled": recipe.labelled, "views": recipe.views, "seed": seed,
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("shallow-teacher", about, make, source=source_digest(__name__))
    return load_tensors(folder / "logits.safetensors")[0]["logits"].to(context.device)
