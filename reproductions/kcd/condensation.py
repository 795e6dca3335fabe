"""Trainings whose set of images shrinks from stage to stage, and what happens to the points in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from kdrefs.data.batches import Batch
from kdrefs.data.cache import Split
from kdrefs.methods.kcd import KnowledgeValue, Partition, partition, prediction_entropy
from kdrefs.nets import Output
from kdrefs.training import (
    Members,
    as_one,
    evaluation_mode,
    fit,
    load_tensors,
    per_member,
    save_tensors,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from kdrefs.training.schedules import one_cycle
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.kcd.sets import StartingAt, TrainingSets
from reproductions.kcd.stages import ALPHA, ARMS, Arm, Stage, methods, stages_of, steps_of
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    PAIRS,
    Pair,
    initialised,
    load_pair_data,
    load_weights,
    make_batches,
    save_weights,
    teacher_identity,
)
from reproductions.protocols.rows import Method, Targets


@dataclass(frozen=True)
class Trace:
    """What happened to the points of one training.

    Attributes:
        kept: Stage by stage, the points that were trained on, int64.
        low: Stage by stage, which of them were blended.
        dropped: Stage by stage, what they were blended with.
        total: ``(stages, N)``, sums of the entropies recorded up to the end of each stage, in nats.
        frequency: ``(stages, N)``, how many there were.
        watched: ``(stages, 2)``, test accuracy in % and mean entropy on the test set in nats after each stage.
    """

    kept: tuple[Tensor, ...]
    low: tuple[Tensor, ...]
    dropped: tuple[Tensor, ...]
    total: Tensor
    frequency: Tensor
    watched: Tensor


def condensed(
    arm: str, seeds: Sequence[int], training: Training, context: Context
) -> tuple[list[nn.Module], list[Trace]]:
    """Students of an arm, one a seed, in eval mode, and what happened to their points; trained once."""
    pair = PAIRS[training.pair]
    _, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    net = training.student or pair.student
    students = [initialised(net, classes, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        traces = train(students, seeds, ARMS[arm], training, context, folder)
        for seed, student, trace in zip(seeds, students, traces, strict=True):
            save_weights(student, folder / f"weights{seed}.safetensors")
            save_tensors(folder / f"trace{seed}.safetensors", _flat(trace))

    about = {
        "arm": asdict(ARMS[arm]), "seeds": list(seeds), "pair": asdict(pair), "training": asdict(training),
        "teacher": [teacher_identity(pair, seed) for seed in seeds], "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("kcd", about, make, source=source_digest(__name__))
    for seed, student in zip(seeds, students, strict=True):
        load_weights(student, folder / f"weights{seed}.safetensors")
    return students, [_unflat(load_tensors(folder / f"trace{seed}.safetensors")[0]) for seed in seeds]


def train(
    students: Sequence[nn.Module],
    seeds: Sequence[int],
    arm: Arm,
    training: Training,
    context: Context,
    folder: Path,
) -> list[Trace]:
    """Train ``students``, one a seed, in place; several share a training, each with a set of its own.

    A stage is a training with a checkpoint of its own in ``folder``. What follows from it, the next set, is computed
    anew when a killed training goes on, from the same values and so with the same result.

    Args:
        students: Networks of one architecture.
        seeds: Of batch order, augmentation, random ranking and, where it is trained, the teacher.
        arm: What is kept.
        training: The recipe, which stands in :mod:`reproductions.protocols.tables`.
        context: What the harness gives.
        folder: Where checkpoints go.

    Returns:
        What happened to the points, seed by seed.

    Raises:
        ValueError: The recipe's optimiser is not SGD, or it has fewer epochs than there are stages.
    """
    pair = PAIRS[training.pair]
    split, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    samples, together = len(split.labels), len(seeds) > 1
    stages, method = stages_of(training, samples, arm), methods(training)[arm.method]
    source = TrainingSets(pair, split, seeds, method, training, context)
    student = as_one(students)
    optimizer = _optimizer(student, training)
    value = KnowledgeValue(samples, members=len(seeds) if together else None, device=context.device)
    state: dict[str, Any] = {"student": student, "optimizer": optimizer, "value": value}
    total = steps_of(training, samples)
    state["schedule"] = _schedule(optimizer, training, stages, total)
    left = min(total, context.max_steps or total)
    members = list(range(len(seeds)))
    kept = [torch.arange(samples, device=context.device) for _ in members]
    parts: list[Partition] | None = None
    history: list[dict[str, list[Tensor]]] = []
    for number, stage in enumerate(stages):
        batches = source.stage(kept, parts if arm.blend else None)
        steps = min(left, stage.epochs * len(batches))
        if steps == 0:  # of a probe
            break
        found = fit(
            _step(method, source.guides),
            state,
            StartingAt(batches, stage.first),
            epochs=stage.epochs,
            checkpoint=folder / f"stage{number}.safetensors",
            precision=training.precision,
            max_steps=steps,
            evaluate=_evaluation(pair, test, len(seeds), context),
            evaluate_every=stage.epochs,
            progress=context.progress,
        )
        left -= steps
        history.append(
            {
                "kept": kept,
                "low": [kept[m][:0] if parts is None else parts[m].low for m in members],
                "dropped": [kept[m][:0] if parts is None else parts[m].dropped for m in members],
                "total": list(value.total.clone().view(len(seeds), -1)),
                "frequency": list(value.frequency.clone().view(len(seeds), -1)),
                "watched": [
                    torch.tensor([found.last[f"{name}{m}"] for name in ("accuracy", "entropy")])
                    for m in members
                ],
            }
        )
        if number + 1 < len(stages):
            keep = stages[number + 1].size
            scores = _scores(value, seeds, arm)
            parts = [partition(score, keep, stage.size - keep) for score in scores]
            kept = [part.kept for part in parts]
    write_back(student, students)
    return [_trace(history, m) for m in members]


def _step(method: Method, guides: nn.Module | None) -> Any:
    (phase,) = method.phases

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        student = state["student"]
        targets: Targets = batch.extras
        if guides is not None:
            with evaluation_mode(guides):
                answer = guides(batch.images)
            targets = {name: ask(answer).detach() for name, ask in method.targets.items()}
        output = student(batch.images)

        def loss(output: Output, targets: Targets, labels: Tensor) -> Tensor:
            return phase.loss(output, targets, labels, 0.0)

        of_all = per_member(loss, student)
        losses = of_all(output, targets, batch.labels)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        state["value"].record(batch.indices, output.logits)
        return {"loss": losses.detach().mean()}

    return step


def _scores(value: KnowledgeValue, seeds: Sequence[int], arm: Arm) -> list[Tensor]:
    """What each seed's points are ranked by."""
    scores = list(value.score(ALPHA).view(len(seeds), -1))
    if arm.ranking == "lowest":
        return [-score for score in scores]
    if arm.ranking == "random":  # one draw for all stages: what is dropped stays so, as values would have it
        return [
            torch.rand(len(score), generator=torch.Generator().manual_seed(seed)).to(score.device)
            for seed, score in zip(seeds, scores, strict=True)
        ]
    return scores


def _optimizer(student: nn.Module, training: Training) -> torch.optim.Optimizer:
    if training.optimizer != "sgd":
        raise ValueError(f"optimizer: expected 'sgd', got {training.optimizer!r}")
    parameters = list(student.parameters())
    return torch.optim.SGD(
        parameters,
        lr=training.rate,
        momentum=0.9,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        **fused(parameters[0].device),
    )


def _schedule(
    optimizer: torch.optim.Optimizer, training: Training, stages: Sequence[Stage], total: int
) -> LRScheduler:
    """The recipe's schedule over the steps that are taken; milestones at the beginning of their epochs."""
    if training.milestones is None:
        return one_cycle(optimizer, total, warmup_steps=total // 8)
    steps = [math.ceil(stage.size / training.batch_size) for stage in stages for _ in range(stage.epochs)]
    shrunk = total / sum(steps)  # below 1 where the whole set is given fewer steps
    return MultiStepLR(optimizer, [round(shrunk * sum(steps[:epoch])) for epoch in training.milestones])


def _evaluation(pair: Pair, test: Split, count: int, context: Context) -> Any:
    batches = make_batches(pair, test, device=context.device, training=False)

    def evaluate(state: dict[str, Any], epoch: int) -> dict[str, float]:
        student = state["student"]
        shared = {"shared": True} if isinstance(student, Members) else {}
        hits, entropies = torch.zeros(2, count, dtype=torch.float64, device=context.device)
        with evaluation_mode(student):
            for batch in batches:
                logits = student(batch.images, **shared).logits
                hits += (logits.argmax(-1) == batch.labels).double().sum(-1)
                entropies += prediction_entropy(logits).double().sum(-1)
        rates = {"accuracy": 100 * hits / batches.num_samples, "entropy": entropies / batches.num_samples}
        return {f"{name}{m}": x for name, values in rates.items() for m, x in enumerate(values.tolist())}

    return evaluate


def _trace(history: Sequence[Mapping[str, Sequence[Tensor]]], member: int) -> Trace:
    def points(name: str) -> tuple[Tensor, ...]:
        return tuple(stage[name][member].cpu() for stage in history)

    total, frequency, watched = (torch.stack(points(name)) for name in ("total", "frequency", "watched"))
    return Trace(points("kept"), points("low"), points("dropped"), total, frequency, watched)


def _flat(trace: Trace) -> dict[str, Tensor]:
    """What a file of tensors can hold, see :func:`_unflat`."""
    sets = {
        f"{name}{k}": points.clone()
        for name in ("kept", "low", "dropped")
        for k, points in enumerate(getattr(trace, name))
    }
    return sets | {name: getattr(trace, name) for name in ("total", "frequency", "watched")}


def _unflat(tensors: Mapping[str, Tensor]) -> Trace:
    kept, low, dropped = (
        tuple(tensors[f"{name}{k}"] for k in range(len(tensors["total"])))
        for name in ("kept", "low", "dropped")
    )
    return Trace(kept, low, dropped, tensors["total"], tensors["frequency"], tensors["watched"])
