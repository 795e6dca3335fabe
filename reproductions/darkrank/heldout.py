"""Embeddings of classes that no training has seen: the data, the teacher, the students and how they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.kernels import cosines
from kdrefs.metrics import accuracy, retrieval
from kdrefs.training import (
    as_one,
    batches_as_one,
    fit,
    load_tensors,
    per_member,
    save_tensors,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    Pair,
    initialised,
    load_pair_data,
    load_weights,
    make_batches,
    representations,
    save_weights,
    sgd_schedule,
    train_supervised,
)
from reproductions.protocols.rows import Method

NEAREST = 4  # neighbours that are compared with the teacher's


@dataclass(frozen=True)
class Recipe:
    """Which classes are trained on, and how teacher and students are trained."""

    pair: Pair
    seen: int  # the first classes, by number
    unseen: tuple[int, int]  # the classes from the first of these numbers to before the second
    epochs: int
    rate: float
    batch_size: int
    views: int  # fixed augmented views, about which the teacher is asked once
    weight_decay: float = 5e-4
    precision: Literal["float32", "bf16"] = "float32"
    shared_teacher: bool = False  # one for all seeds: the page then says "given this teacher"


@dataclass(frozen=True)
class Parts:
    """The images of the seen classes, and those of the unseen ones that are searched and asked for."""

    training: Split
    seen: Split
    database: Split
    queries: Split


def parts_of(recipe: Recipe, context: Context) -> Parts:
    """Cut both sets by class: unseen images of the training set are the database, those of the test set queries."""
    train, test, _ = load_pair_data(recipe.pair, probe=context.max_steps is not None)
    return Parts(
        part(train, 0, recipe.seen),
        part(test, 0, recipe.seen),
        part(train, *recipe.unseen),
        part(test, *recipe.unseen),
    )


def part(split: Split, start: int, stop: int) -> Split:
    """The images of some consecutive classes."""
    return chosen(split, (split.labels >= start) & (split.labels < stop))


def chosen(split: Split, which: np.ndarray) -> Split:
    """Some images of a split."""
    return replace(split, images=split.images[which], labels=split.labels[which], extras={})


def teacher_of(recipe: Recipe, training: Split, seed: int, context: Context) -> nn.Module:
    """The teacher in eval mode, trained on the seen classes."""
    pair, seed = recipe.pair, 0 if recipe.shared_teacher else seed
    module = initialised(pair.teacher, recipe.seen, seed, context.device)

    def make(folder: Path) -> None:
        own = pair.teacher_recipe
        size = own.batch_size
        batches = make_batches(
            pair, training, device=context.device, training=True, seed=seed, batch_size=size
        )
        train_supervised(module, batches, own, folder=folder, max_steps=context.max_steps)
        save_weights(module, folder / "weights.safetensors")

    about = {"pair": asdict(pair), "seen": recipe.seen, "seed": seed, "max_steps": context.max_steps}
    folder = context.artifact("darkrank-teacher", about, make, source=source_digest(__name__))
    return load_weights(module, folder / "weights.safetensors")


def targets_of(recipe: Recipe, training: Split, seed: int, context: Context) -> dict[str, Tensor]:
    """The teacher's ``logits`` and ``embedding`` on every view of the seen classes, ``(views, images, width)``."""
    pair, seed = recipe.pair, 0 if recipe.shared_teacher else seed

    def make(folder: Path) -> None:
        module = teacher_of(recipe, training, seed, context)
        batches = make_batches(
            pair, training, device=context.device, training=True, batch_size=512, fixed_views=recipe.views
        )
        name = pair.teacher.feature
        found = [representations(module, batches, name, view=view) for view in range(recipe.views)]
        stacked = {
            "logits": torch.stack([one["logits"] for one in found]),
            "embedding": torch.stack([one[name] for one in found]),
        }
        save_tensors(folder / "targets.safetensors", stacked)

    about = {"pair": asdict(pair), "seen": recipe.seen, "seed": seed, "views": recipe.views,
             "max_steps": context.max_steps}  # fmt: skip
    folder = context.artifact("darkrank-targets", about, make, source=source_digest(__name__))
    tensors, _ = load_tensors(folder / "targets.safetensors")
    return {name: value.to(context.device) for name, value in tensors.items()}


def students_of(
    recipe: Recipe,
    training: Split,
    method: Method,
    identity: Mapping[str, Any],
    seeds: Sequence[int],
    context: Context,
    source: str,
) -> list[nn.Module]:
    """The students of several seeds in eval mode, trained in one training.

    Args:
        recipe: How.
        training: Images of the seen classes.
        method: The arm's loss; its targets are ``logits`` and ``embedding`` of the teacher.
        identity: What tells the method from others: arm and weights.
        seeds: Of initial weights, order and, unless it is shared, the teacher.
        context: What the harness gives.
        source: Digest of the code that the method belongs to.
    """
    students = [initialised(recipe.pair.student, recipe.seen, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        train(students, recipe, training, method, seeds, context, folder)
        for seed, student in zip(seeds, students, strict=True):
            save_weights(student, folder / f"weights{seed}.safetensors")

    about = {**identity, "seeds": list(seeds), "recipe": asdict(recipe), "max_steps": context.max_steps}
    folder = context.artifact("darkrank-students", about, make, source=source)
    return [
        load_weights(student, folder / f"weights{seed}.safetensors")
        for seed, student in zip(seeds, students, strict=True)
    ]


def train(
    students: Sequence[nn.Module],
    recipe: Recipe,
    training: Split,
    method: Method,
    seeds: Sequence[int],
    context: Context,
    folder: Path,
) -> None:
    """Train ``students``, one a seed, in place; resumes from the checkpoint in ``folder``."""
    (phase,) = method.phases
    members = [_batches(recipe, training, seed, context) for seed in seeds]
    student = as_one(students)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=recipe.rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        **fused(context.device),
    )

    def of_one(output: Any, targets: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return phase.loss(output, targets, labels, 0.0)

    loss = per_member(of_one, student)

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        losses = loss(state["student"](batch.images), batch.extras, batch.labels)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        return {"loss": losses.detach().mean()}

    schedule = sgd_schedule(optimizer, recipe.epochs, len(members[0]), milestones=None)
    fit(
        step,
        {"student": student, "optimizer": optimizer, "schedule": schedule},
        batches_as_one(members),
        epochs=recipe.epochs,
        checkpoint=folder / "training.safetensors",
        precision=recipe.precision,
        max_steps=context.max_steps,
        progress=context.progress,
    )
    write_back(student, students)


def _batches(recipe: Recipe, training: Split, seed: int, context: Context) -> Batches:
    return make_batches(
        recipe.pair,
        training,
        device=context.device,
        training=True,
        seed=seed,
        batch_size=recipe.batch_size,
        drop_last=True,  # the last batch of a few images would rank among too few
        fixed_views=recipe.views,
        view_extras=targets_of(recipe, training, seed, context),
    )


def embedded(module: nn.Module, feature: str, recipe: Recipe, split: Split, context: Context) -> Tensor:
    """The embeddings of a split's images, on the CPU."""
    batches = make_batches(recipe.pair, split, device=context.device, training=False)
    return representations(module, batches, feature)[feature].cpu()


def measure(
    module: nn.Module, feature: str, guide: Tensor, parts: Parts, recipe: Recipe, context: Context
) -> dict[str, float]:
    """Retrieval among unseen classes, accuracy on seen ones, neighbours shared with the teacher; all in percent.

    Args:
        module: The network in eval mode.
        feature: Name of its embedding.
        guide: The teacher's embeddings of the queries.
        parts: The data.
        recipe: Its normalisation.
        context: What the harness gives.
    """
    database, queries = (
        embedded(module, feature, recipe, split, context) for split in (parts.database, parts.queries)
    )
    labels, wanted = (torch.from_numpy(split.labels).long() for split in (parts.database, parts.queries))
    found = retrieval(queries, database, wanted, labels, at=(1,))
    batches = make_batches(recipe.pair, parts.seen, device=context.device, training=False)
    logits = representations(module, batches)["logits"].cpu()
    return {
        "recall1": 100 * found.precision[1],
        "map": 100 * found.mean_average_precision,
        "neighbours": 100 * shared_neighbours(queries, guide),
        "accuracy": 100 * accuracy(logits, torch.from_numpy(parts.seen.labels).long()),
    }


def shared_neighbours(features: Tensor, guide: Tensor, count: int = NEAREST) -> float:
    """Share of each row's nearest others, by cosine, that are among those of the other space too."""
    nearest = []
    for rows in (features, guide):
        order = cosines(rows).fill_diagonal_(-torch.inf).topk(count, dim=1).indices
        nearest.append(torch.zeros(len(rows), len(rows), dtype=torch.bool).scatter(1, order, True))
    return float((nearest[0] & nearest[1]).double().sum() / (count * len(features)))
