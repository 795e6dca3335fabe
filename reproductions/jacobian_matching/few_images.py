"""Students from a few images a class, with the teacher's outputs, its Jacobians, both, or both by way of noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.divergences import softened_kl
from kdrefs.methods.jacobian_matching import (
    fisher_directions,
    jacobian_loss,
    output_jacobian,
    random_directions,
    top_class_directions,
)
from kdrefs.nets import Output
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import (
    Members,
    as_one,
    as_several,
    batches_as_one,
    evaluation_mode,
    fit,
    load_tensors,
    one_cycle,
    per_member,
    save_tensors,
    update,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    Pair,
    load_pair_data,
    load_weights,
    make_batches,
    save_weights,
    teacher,
    teacher_identity,
)

EPOCH = 32  # steps an epoch has at least: with few images each comes several times in one


class StridedNet(nn.Module):
    """Convolutions of 3x3 with stride 2 and ReLU, then a linear layer.

    Without batch normalisation each sample has a Jacobian of its own; without pooling all kinks are those of ReLU.

    Args:
        in_channels: Channels of the images.
        size: Height and width of the images, at least 2 to the number of layers.
        classes: Number of classes.
        channels: Channels of the convolutions.
    """

    def __init__(self, in_channels: int, size: int, classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in pairwise((in_channels, *channels))
        )
        side = size >> len(channels)
        self.fc = nn.Linear(channels[-1] * side * side, classes)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, size, size)``."""
        maps = images
        for conv in self.convs:
            maps = F.relu(conv(maps))
        return Output(self.fc(maps.flatten(1)), {})


@dataclass(frozen=True)
class Recipe:
    r"""What all arms have in common.

    Attributes:
        pair: Data, teacher and normalisation.
        channels: Of the student's layers, see :class:`StridedNet`.
        steps: Optimiser steps (Adam, one cycle), the same for every arm and every number of images.
        rate: Highest learning rate.
        batch_size: At most; fewer where there are fewer images.
        sigma: σ of the noise that the Jacobian term stands for, in units of the normalised images.
        test_sigma: σ of the noise on the test images.
        temperature: T of the softened outputs.
        alpha: Weight of what comes from the teacher; the labels have the rest.
        probes: Random directions a sample and step.
        gap_images: Test images on which Jacobians are compared.
    """

    pair: str
    channels: tuple[int, ...]
    steps: int
    rate: float
    batch_size: int
    sigma: float
    test_sigma: float
    temperature: float = 4.0
    alpha: float = 0.9
    probes: int = 1
    gap_images: int = 200


@dataclass(frozen=True)
class Arm:
    """What the teacher adds to the labels.

    Attributes:
        outputs: Whether its softened outputs are matched.
        jacobian: Which Jacobians are: ``"fisher"``, those of the softened log-probabilities, weighted as the
            divergence weighs them; ``"squared"``, those of the logits; ``"top"``, that of the logit of its top class,
            at unit norm; None.
        noise: Whether its outputs are matched at noisy images, where student and teacher see the same noise.
    """

    outputs: bool = False
    jacobian: str | None = None
    noise: bool = False


ARMS: Mapping[str, Arm] = {
    "student": Arm(),
    "kd": Arm(outputs=True),
    "jacobian": Arm(jacobian="fisher"),
    "both": Arm(outputs=True, jacobian="fisher"),
    "noise": Arm(outputs=True, noise=True),
    "jacobian_squared": Arm(jacobian="squared"),
    "jacobian_top": Arm(jacobian="top"),
}


def few(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of ``count`` images of each class, or of all there are; those of a smaller count are among them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count].numpy()])
    return np.sort(np.concatenate(chosen))


def train(
    arm: Arm, count: int, seeds: Sequence[int], recipe: Recipe, context: Context, *, name: str
) -> list[nn.Module]:
    """Students of ``seeds``, trained together on ``count`` images a class, or as they were kept; in eval mode."""
    pair = PAIRS[recipe.pair]
    train_split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    students = [_initialised(train_split, classes, seed, recipe, context) for seed in seeds]

    def make(folder: Path) -> None:
        batches = [_batches(arm, count, seed, train_split, recipe, context) for seed in seeds]
        state: dict[str, Any] = {"student": as_one(students)}
        state["optimizer"] = torch.optim.Adam(
            state["student"].parameters(), lr=recipe.rate, **fused(context.device)
        )
        state["schedule"] = one_cycle(state["optimizer"], recipe.steps, warmup_steps=recipe.steps // 8)
        for seed in seeds:
            state[f"draws_{seed}"] = torch.Generator(context.device).manual_seed(seed)
        guides = None
        if arm.noise:
            guides = as_one([fold_batchnorm(teacher(context, pair, seed)) for seed in seeds])
        fit(
            _step(arm, recipe, guides),
            state,
            batches_as_one(batches),
            epochs=math.ceil(recipe.steps / len(batches[0])),
            checkpoint=folder / "training.safetensors",
            max_steps=min(recipe.steps, context.max_steps or recipe.steps),
            progress=context.progress,
        )
        for seed, student in zip(seeds, as_several(state["student"]), strict=True):
            save_weights(student, folder / f"weights{seed}.safetensors")

    about = {
        "arm": name, "terms": asdict(arm), "count": count, "seeds": list(seeds), "recipe": asdict(recipe),
        "pair": asdict(pair), "teacher": [teacher_identity(pair, seed) for seed in seeds],
    }  # fmt: skip
    folder = context.artifact("few_images", about, make)
    return [
        load_weights(student, folder / f"weights{seed}.safetensors")
        for seed, student in zip(seeds, students, strict=True)
    ]


def evaluate(student: nn.Module, seed: int, recipe: Recipe, context: Context) -> dict[str, float]:
    """Accuracy on test images without and with noise, and the distance of the Jacobians on some of them."""
    pair = PAIRS[recipe.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    batches = make_batches(pair, test, device=context.device, training=False)
    generator = torch.Generator(context.device).manual_seed(seed)
    hits = torch.zeros(2, dtype=torch.float64, device=context.device)
    with evaluation_mode(student):
        for batch in batches:
            assert batch.images is not None
            noise = torch.randn(batch.images.shape, generator=generator, device=context.device)
            for place, images in enumerate((batch.images, batch.images + recipe.test_sigma * noise)):
                hits[place] += (student(images).logits.argmax(1) == batch.labels).sum()
    clean, noisy = (100 * hits / batches.num_samples).tolist()
    return {
        "accuracy": clean,
        "noisy_accuracy": noisy,
        "jacobian_gap": jacobian_gap(student, seed, recipe, context),
    }


def jacobian_gap(student: nn.Module, seed: int, recipe: Recipe, context: Context) -> float:
    r""":math:`\sum T \lVert \nabla\log T - \nabla\log S \rVert^2` over what it is without any student's Jacobian."""
    pair = PAIRS[recipe.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    some = _part(test, np.arange(min(recipe.gap_images, len(test))))
    known = _known(context, pair, seed, some, {"test": len(some)})
    far = size = 0.0
    for batch in _ordered(pair, some, context).with_extras(known).epoch(0):
        assert batch.images is not None
        images = batch.images.requires_grad_()
        logits = student(images).logits
        guide = batch.extras["logits"]
        directions = fisher_directions(guide / recipe.temperature)
        ours = output_jacobian(_outputs("fisher", logits, recipe), images, directions, create_graph=False)
        theirs = _teacher_rows("fisher", directions, guide, batch.extras["jacobian"], recipe)
        far += len(images) * jacobian_loss(ours, theirs).item()
        size += len(images) * jacobian_loss(torch.zeros_like(ours), theirs).item()
    return far / size


def _initialised(split: Split, classes: int, seed: int, recipe: Recipe, context: Context) -> nn.Module:
    """A student with the seed's weights, whatever was drawn before."""
    _, size, _, channels = split.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = StridedNet(channels, size, classes, recipe.channels)
    return student.to(memory_format=torch.channels_last).to(context.device)


def _part(split: Split, indices: np.ndarray) -> Split:
    return replace(split, images=split.images[indices], labels=split.labels[indices], extras={})


def _ordered(pair: Pair, split: Split, context: Context) -> Batches:
    return make_batches(pair, split, device=context.device, training=False, batch_size=64)


def _batches(arm: Arm, count: int, seed: int, split: Split, recipe: Recipe, context: Context) -> Batches:
    """The seed's images, with what the arm needs to know of the teacher."""
    pair = PAIRS[recipe.pair]
    part = _part(split, few(split.labels, count, seed))
    batch_size = min(recipe.batch_size, len(part))
    copies = math.ceil(EPOCH * batch_size / len(part))
    batches = make_batches(
        pair,
        part,
        device=context.device,
        training=True,
        augment=None,
        batch_size=batch_size,
        drop_last=True,
        indices=np.tile(np.arange(len(part)), copies),
        seed=seed,
    )
    if arm.jacobian is None and (arm.noise or not arm.outputs):
        return batches
    known = _known(context, pair, seed, part, {"count": count, "subset": seed})
    if arm.jacobian is None:
        del known["jacobian"]
    return batches.with_extras(known)


def _known(
    context: Context, pair: Pair, seed: int, split: Split, images: Mapping[str, int]
) -> dict[str, Tensor]:
    """The teacher's logits ``(N, K)`` for images in order and their Jacobians ``(N, K, C, H, W)``, made once."""

    def make(folder: Path) -> None:
        guide = fold_batchnorm(teacher(context, pair, seed)).requires_grad_(False)
        parts: dict[str, list[Tensor]] = {"logits": [], "jacobian": []}
        for batch in _ordered(pair, split, context):
            assert batch.images is not None
            given = batch.images.requires_grad_()
            logits = guide(given).logits
            parts["jacobian"].append(output_jacobian(logits, given, create_graph=False).half())
            parts["logits"].append(logits.detach())
        save_tensors(folder / "known.safetensors", {name: torch.cat(found) for name, found in parts.items()})

    about = {"teacher": teacher_identity(pair, seed), "pair": asdict(pair), **images}
    folder = context.artifact("jacobians", about, make)
    tensors, _ = load_tensors(folder / "known.safetensors")
    return {name: value.to(context.device) for name, value in tensors.items()}


def _step(
    arm: Arm, recipe: Recipe, guides: nn.Module | None
) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        assert batch.labels is not None
        student = state["student"]
        together = isinstance(student, Members)
        generators = [value for name, value in state.items() if name.startswith("draws_")]

        def drawn(function: Callable[[torch.Generator], Tensor]) -> Tensor:
            """Each member draws from its own generator, as it would alone."""
            found = [function(generator) for generator in generators]
            return torch.stack(found) if together else found[0]

        images = batch.images.detach().requires_grad_(arm.jacobian is not None)
        logits = student(images).logits
        losses = per_member(F.cross_entropy, student)(logits, batch.labels)
        soft: Tensor | None = None
        if arm.outputs:
            ours, guide = logits, batch.extras.get("logits")
            if guides is not None:
                shape = images.shape[int(together) :]
                noise = drawn(lambda g: torch.randn(shape, generator=g, device=images.device))
                noisy = images + recipe.sigma * noise
                ours = student(noisy).logits
                with evaluation_mode(guides):
                    guide = guides(noisy).logits
            assert guide is not None
            soft = per_member(lambda s, t: softened_kl(s, t, recipe.temperature), student)(ours, guide)
        if arm.jacobian is not None:
            guide = batch.extras["logits"]
            one = guide[0] if together else guide
            probes = drawn(lambda g: random_directions(one, recipe.probes, g))
            term = _jacobian_term(
                arm.jacobian, logits, images, guide, batch.extras["jacobian"], probes, recipe, student
            )
            soft = term if soft is None else soft + term
        if soft is not None:
            losses = (1 - recipe.alpha) * losses + recipe.alpha * soft
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        return {"loss": losses.detach().mean()}

    return step


def _jacobian_term(
    form: str,
    logits: Tensor,
    images: Tensor,
    guide: Tensor,
    jacobian: Tensor,
    probes: Tensor,
    recipe: Recipe,
    student: nn.Module,
) -> Tensor:
    """The part of σ² in T² KL: exactly so where outputs agree (``fisher``), for T to infinity (``squared``)."""
    directions = {
        "fisher": lambda: fisher_directions(guide / recipe.temperature, probes),
        "squared": lambda: probes,
        "top": lambda: top_class_directions(guide),
    }[form]()
    ours = output_jacobian(_outputs(form, logits, recipe), images, directions)
    theirs = _teacher_rows(form, directions, guide, jacobian, recipe)
    distance = per_member(lambda s, t: jacobian_loss(s, t, normalize=form == "top"), student)(ours, theirs)
    weight = {
        "fisher": recipe.temperature**2 * recipe.sigma**2 / 2,
        "squared": recipe.sigma**2 / (2 * logits.shape[-1]),
        "top": 1.0,
    }[form]
    return weight * distance


def _outputs(form: str, logits: Tensor, recipe: Recipe) -> Tensor:
    return (logits / recipe.temperature).log_softmax(-1) if form == "fisher" else logits


def _teacher_rows(form: str, directions: Tensor, guide: Tensor, jacobian: Tensor, recipe: Recipe) -> Tensor:
    """Rows of the teacher's Jacobian in the directions asked of the student, from those of its logits."""
    if form == "fisher":  # the gradient of log p_i is that of the logit t_i / T less the mean under p
        p = (guide / recipe.temperature).softmax(-1).unsqueeze(-2)
        directions = (directions - directions.sum(-1, keepdim=True) * p) / recipe.temperature
    rows = directions @ jacobian.to(directions.dtype).flatten(-3)
    return rows.unflatten(-1, jacobian.shape[-3:])
