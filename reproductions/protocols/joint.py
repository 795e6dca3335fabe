"""Train students on labels and teacher together, one or several seeds at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.nets import Output
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import evaluation_mode, fit, load_tensors, save_tensors, update
from kdrefs.training.optimizers import fused
from kdrefs.training.seeds import Members, as_one, as_several, batches_as_one, per_member, write_back
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    Pair,
    load_pair_data,
    make_batches,
    sgd_schedule,
    teacher,
    teacher_identity,
)
from reproductions.protocols.rows import INPUT_GRADIENT, Method, Targets, forward, logits_of


@dataclass(frozen=True)
class Training:
    """What the rows of one table have in common."""

    pair: str
    epochs: int
    rate: float
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"  # momentum 0.9; Adam with torch's other defaults
    weight_decay: float = 5e-4
    nesterov: bool = True
    milestones: tuple[int, ...] | None = None  # epochs where the rate falls to a tenth; None: one cycle to 0
    views: int | None = None  # fixed augmented views, teacher asked once; None: asked on every batch
    precision: Literal["float32", "bf16"] = "float32"
    student: Net | None = None  # instead of the pair's
    evaluate_every: int | None = None  # epochs between looks at the test set, for the best beside the last


def train(
    students: Sequence[nn.Module],
    seeds: Sequence[int],
    method: Method,
    training: Training,
    context: Context,
    folder: Path,
    *,
    source: str,
    parts: Sequence[Tensor] | None = None,
) -> dict[int, float]:
    """Train ``students``, one a seed, in place; resumes from the checkpoints in ``folder``.

    Args:
        students: Networks of one architecture.
        seeds: Of batch order, augmentation, regressors and, where it is trained, the teacher.
        method: The row's losses.
        training: The table's recipe.
        context: What the harness gives.
        folder: Where checkpoints go.
        source: Digest of the code that the method's targets belong to.
        parts: By student, the training images that it sees, an epoch being one pass over them; None: all.

    Returns:
        By seed, the test accuracy (0 to 1) of the best epoch; empty without ``evaluate_every``.
    """
    pair = PAIRS[training.pair]
    train_split, test_split, _ = load_pair_data(pair, probe=context.max_steps is not None)
    batches = member_batches(pair, train_split, seeds, method, training, context, source)
    if parts is not None:
        batches = [one.subset(part) for one, part in zip(batches, parts, strict=True)]
    guides = None
    if method.targets and training.views is None:
        guides = as_one([fold_batchnorm(teacher(context, pair, seed)) for seed in seeds])
    state: dict[str, Any] = {"student": as_one(students)}
    if method.regressors is not None:
        shapes = _shapes(students[0], guides, batches[0], method)
        made = [_regressors(method, shapes, seed, context) for seed in seeds]
        state |= {f"regressor_{name}": as_one([one[name] for one in made]) for name in made[0]}
    best: dict[int, float] = {}
    for number, (phase, epochs) in enumerate(
        zip(method.phases, _epochs(method, training.epochs), strict=True)
    ):
        total = epochs * len(batches[0])
        state |= {"optimizer": _optimizer(state, training), "done": 0}
        milestones = training.milestones
        if milestones is not None:  # every phase goes through the whole schedule
            milestones = tuple(round(epoch * epochs / training.epochs) for epoch in milestones)
        state["schedule"] = sgd_schedule(state["optimizer"], epochs, len(batches[0]), milestones=milestones)
        order = [one.with_seed(one.seed + 1000 * number) for one in batches]
        look = _evaluation(pair, test_split, seeds, context)
        history = fit(
            _step(phase.loss, method, guides, total),
            state,
            batches_as_one(order),
            epochs=epochs,
            checkpoint=folder / f"phase{number}.safetensors",
            precision=training.precision,
            max_steps=context.max_steps,
            evaluate=look if training.evaluate_every else None,
            evaluate_every=training.evaluate_every or 1,
            progress=context.progress,
        )
        for seed in seeds if training.evaluate_every else ():
            best[seed] = max(values[str(seed)] for values in history.evaluations)
    write_back(state["student"], students)
    return best


def _epochs(method: Method, total: int) -> list[int]:
    """Whole epochs of each phase, at least one, that together are the table's."""
    ends = [round(total * sum(p.share for p in method.phases[: k + 1])) for k in range(len(method.phases))]
    epochs = [end - start for start, end in pairwise([0, *ends])]
    if min(epochs) < 1:
        raise ValueError(f"epochs: {total} leave a phase none of its share")
    return epochs


def _optimizer(state: Mapping[str, Any], training: Training) -> torch.optim.Optimizer:
    trained = [
        parameter
        for value in state.values()
        if isinstance(value, nn.Module)
        for parameter in value.parameters()
    ]
    if training.optimizer == "adam":
        return torch.optim.Adam(
            trained, lr=training.rate, weight_decay=training.weight_decay, **fused(trained[0].device)
        )
    return torch.optim.SGD(
        trained,
        lr=training.rate,
        momentum=0.9,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        **fused(trained[0].device),
    )


def _step(
    loss: Callable[..., Tensor], method: Method, guides: nn.Module | None, total: int
) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        assert batch.labels is not None
        targets: Targets = batch.extras
        if guides is not None:
            targets = targets_of(guides, batch.images, batch.labels, method)
        student = state["student"]
        output = forward(student, batch.images, batch.labels, method, create_graph=True)
        features = dict(output.features)
        for name, module in state.items():
            if name.startswith("regressor_"):
                read = name.removeprefix("regressor_")
                features[f"{read}_regressed"] = module(features[read])
        progress = state["done"] / total

        def of_one(output: Output, targets: Targets, labels: Tensor) -> Tensor:
            return loss(output, targets, labels, progress)

        losses = per_member(of_one, student)(Output(output.logits, features), targets, batch.labels)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        state["done"] += 1
        correct = (output.logits.argmax(-1) == batch.labels).float().mean()
        return {"loss": losses.detach().mean(), "accuracy": correct}

    return step


def targets_of(guides: nn.Module, images: Tensor, labels: Tensor, method: Method) -> dict[str, Tensor]:
    """The method's targets of a batch, from the teacher or one teacher a member."""
    with evaluation_mode(guides):
        output = forward(guides, images, labels, method, create_graph=False)
        return {name: per_member(target, guides)(output).detach() for name, target in method.targets.items()}


def member_batches(
    pair: Pair,
    split: Split,
    seeds: Sequence[int],
    method: Method,
    training: Training,
    context: Context,
    source: str,
) -> list[Batches]:
    """The training set in each seed's order, with the teacher's cached answers where views are fixed."""
    base = make_batches(
        pair,
        split,
        device=context.device,
        training=True,
        batch_size=training.batch_size,
        fixed_views=training.views,
    )
    if training.views is None:
        return [base.with_seed(seed) for seed in seeds]
    extended: dict[str, Batches] = {}
    for seed in seeds:
        identity = teacher_identity(pair, seed)
        if identity not in extended:
            cached = {
                name: _cached_target(base, pair, seed, name, method, training.views, context, source)
                for name in method.targets
            }
            extended[identity] = base.with_extras(view_extras=cached)
    return [extended[teacher_identity(pair, seed)].with_seed(seed) for seed in seeds]


def _cached_target(
    batches: Batches,
    pair: Pair,
    seed: int,
    name: str,
    method: Method,
    views: int,
    context: Context,
    source: str,
) -> Tensor:
    """One target on every fixed view, ``(views, N, ...)``; computed once and kept, maps in half precision.

    Input gradients stay in single precision: they are too small for the exponents of half.
    """
    target = method.targets[name]
    one = replace(method, targets={name: target})

    def make(folder: Path) -> None:
        module = teacher(context, pair, seed)
        half = name != INPUT_GRADIENT
        stacked = []
        for view in range(views):
            parts = []
            for batch in batches.view(view):
                assert batch.images is not None
                assert batch.labels is not None
                values = targets_of(module, batch.images, batch.labels, one)[name]
                parts.append(values.half() if half and values.ndim > 2 else values.float())
            stacked.append(torch.cat(parts))
        save_tensors(folder / "target.safetensors", {"target": torch.stack(stacked)})

    about = {
        "teacher": teacher_identity(pair, seed), "data": pair.data, "augment": asdict(pair.augment), "mean": pair.mean,
        "std": pair.std, "views": views, "target": name, "max_steps": context.max_steps,
    }  # fmt: skip
    if target is logits_of:
        source = source_digest(__name__)
    folder = context.artifact("target", about, make, source=source)
    return load_tensors(folder / "target.safetensors")[0]["target"].to(context.device)


def _shapes(
    student: nn.Module, guides: nn.Module | None, batches: Batches, method: Method
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes without the batch, of the student's features and of the targets."""
    one = batches.subset([0])
    batch = next(iter(one))
    assert batch.images is not None
    assert batch.labels is not None
    targets: Targets = batch.extras
    if guides is not None:
        targets = targets_of(as_several(guides)[0], batch.images, batch.labels, method)
    with evaluation_mode(student):
        features = student(batch.images).features
    return (
        {name: tuple(value.shape[1:]) for name, value in features.items()},
        {name: tuple(value.shape[1:]) for name, value in targets.items()},
    )


def _regressors(
    method: Method,
    shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]],
    seed: int,
    context: Context,
) -> dict[str, nn.Module]:
    assert method.regressors is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = method.regressors(*shapes)
    return {name: module.to(context.device).train() for name, module in made.items()}


def _evaluation(
    pair: Pair, test: Split, seeds: Sequence[int], context: Context
) -> Callable[[dict[str, Any], int], dict[str, float]]:
    """Test accuracy of each member by its seed."""
    batches = make_batches(pair, test, device=context.device, training=False)

    def evaluate(state: dict[str, Any], epoch: int) -> dict[str, float]:
        student = state["student"]
        shared = {"shared": True} if isinstance(student, Members) else {}
        hits: Tensor | float = 0.0
        with evaluation_mode(student):
            for batch in batches:
                assert batch.labels is not None
                found = student(batch.images, **shared).logits.argmax(-1) == batch.labels
                hits = hits + found.double().sum(-1)
        rates = torch.as_tensor(hits).reshape(-1) / batches.num_samples
        return {str(seed): rate for seed, rate in zip(seeds, rates.tolist(), strict=True)}

    return evaluate
