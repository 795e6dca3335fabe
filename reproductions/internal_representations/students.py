"""Teachers and students of the internal-representations column: what they are, how they are trained and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.texts import load_minilm
from kdrefs.divergences import softened_kl
from kdrefs.methods.internal_representations import InternalDistillation, attention_kl, cls_cosine_loss
from kdrefs.metrics import accuracy, agreement
from kdrefs.nets import Output
from kdrefs.nets.transformer import Transformer, from_bert
from kdrefs.training import (
    as_one,
    batches_as_one,
    evaluation_mode,
    fit,
    one_cycle,
    per_member,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.internal_representations.tasks import PADDING, Counting, Sequences, Task, load_task
from reproductions.protocols.pairs import load_weights, save_weights

Answers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """What a student learns from.

    Attributes:
        schedule: Of :class:`~kdrefs.methods.internal_representations.InternalDistillation`; None: classification alone.
        labels: Whether it classifies by the labels instead of the teacher's probabilities.
        copied: Whether it starts from the teacher's embeddings, matched layers and classifier.
    """

    schedule: str | None = None
    labels: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Recipe:
    """One task, one teacher, one shape of student, and how both are trained, by Adam in one cycle."""

    task: Task
    width: int
    heads: int
    feedforward: int
    teacher_depth: int
    matched: tuple[int, ...]  # layers of the teacher, from 1, that the student's face
    teacher_epochs: int
    teacher_rate: float
    epochs: int
    rate: float
    batch_size: int
    internal_share: float  # of the steps of a schedule before its last phase, the same for each phase
    ask_once: bool = (
        False  # the teacher's answers on the training set are kept, instead of asking it every batch
    )
    pretrained: bool = False  # the teacher starts from MiniLM
    precision: Literal["float32", "bf16"] = "float32"


def parts(recipe: Recipe, context: Context) -> tuple[Sequences, Sequences]:
    """Training and test sequences."""
    return load_task(recipe.task, probe=context.max_steps is not None)


def initial(recipe: Recipe, depth: int, seed: int, device: torch.device) -> Transformer:
    """A fresh network of some depth: the same seed gives the same weights whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if recipe.pretrained:
            encoder = load_minilm()
            whole = from_bert(encoder.weights, encoder.heads, recipe.task.classes, length=recipe.task.length)
            if depth == recipe.teacher_depth:
                return whole.to(device)
            vocabulary = whole.tokens.num_embeddings
        else:
            assert isinstance(recipe.task, Counting)
            vocabulary = recipe.task.vocabulary
        sizes = (vocabulary, recipe.task.classes, recipe.width, recipe.heads, depth, recipe.feedforward)
        network = Transformer(*sizes, length=recipe.task.length)
        if recipe.pretrained:  # a student of random layers has the pretrained embeddings
            for name in ("tokens", "positions", "norm"):
                getattr(network, name).load_state_dict(getattr(whole, name).state_dict())
        return network.to(device)


def teachers_of(recipe: Recipe, seeds: Sequence[int], context: Context) -> list[Transformer]:
    """The teachers of several seeds in eval mode, trained on labels in one training."""
    networks = [initial(recipe, recipe.teacher_depth, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        train, _ = parts(recipe, context)
        members = [_batches(recipe, train, seed, context) for seed in seeds]

        def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
            network = state["network"]
            logits = network(batch.tokens, _mask(batch)).logits
            losses = per_member(lambda z, y: F.cross_entropy(z.float(), y), network)(logits, batch.labels)
            return _stepped(state, losses)

        _fit(networks, step, members, recipe, recipe.teacher_epochs, recipe.teacher_rate, context, folder, {})
        _keep_weights(networks, seeds, folder)

    about = {"recipe": asdict(recipe), "seeds": list(seeds), "max_steps": context.max_steps}
    folder = context.artifact("internal-teachers", about, make, source=source_digest(__name__))
    for seed, network in zip(seeds, networks, strict=True):
        load_weights(network, folder / f"weights{seed}.safetensors")
    return networks


def students_of(
    recipe: Recipe, arm: Arm, seeds: Sequence[int], guides: Sequence[Transformer], context: Context
) -> list[Transformer]:
    """The students of several seeds in eval mode, trained in one training; ``guides`` are their teachers."""
    students = []
    for seed, guide in zip(seeds, guides, strict=True):
        student = initial(recipe, len(recipe.matched), 1000 + seed, context.device)
        if arm.copied:
            student.copy_layers(guide, recipe.matched)
        students.append(student)

    def make(folder: Path) -> None:
        _train(students, guides, recipe, arm, seeds, context, folder)
        _keep_weights(students, seeds, folder)

    about = {
        "recipe": asdict(recipe),
        "arm": asdict(arm),
        "seeds": list(seeds),
        "max_steps": context.max_steps,
    }
    folder = context.artifact("internal-students", about, make)
    for seed, student in zip(seeds, students, strict=True):
        load_weights(student, folder / f"weights{seed}.safetensors")
    return students


def schedule_of(arm: Arm, layers: int, steps: int, share: float) -> InternalDistillation | None:
    """The arm's schedule over so many steps."""
    if arm.schedule is None:
        return None
    return InternalDistillation(arm.schedule, layers, max_steps=max(1, round(share * steps / layers)))


def _train(
    students: Sequence[nn.Module],
    guides: Sequence[Transformer],
    recipe: Recipe,
    arm: Arm,
    seeds: Sequence[int],
    context: Context,
    folder: Path,
) -> None:
    train, _ = parts(recipe, context)
    members = [_batches(recipe, train, seed, context) for seed in seeds]
    if recipe.ask_once:
        members = [
            one.with_extras(_all_answers(guide, recipe, train, context))
            for one, guide in zip(members, guides, strict=True)
        ]
    guide, matched = as_one(guides), recipe.matched
    distillation = schedule_of(arm, len(matched), recipe.epochs * len(members[0]), recipe.internal_share)

    def of_one(own: Answers, aims: Answers, labels: Tensor, mask: Tensor) -> Tensor:
        logits = own["logits"]
        loss = torch.zeros((), device=logits.device)
        if distillation is not None:
            loss = loss + distillation.internal_loss(layers_of(own), layers_of(aims), mask, scores=True)
        if distillation is None or distillation.phase.classify:
            hard = F.cross_entropy(logits.float(), labels)
            loss = loss + (hard if arm.labels else softened_kl(logits, aims["logits"], 1.0))
        return loss

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        mask = _mask(batch)
        taught: Answers = batch.extras
        if not recipe.ask_once:
            with evaluation_mode(guide):
                taught = per_member(partial(answers, layers=matched), guide)(guide(batch.tokens, mask))
        network, layers = state["network"], range(1, 1 + len(matched))
        own = per_member(partial(answers, layers=layers), network)(network(batch.tokens, mask))
        found = _stepped(state, per_member(of_one, network)(own, taught, batch.labels, mask))
        if distillation is not None:
            distillation.advance()
        return found

    more = {} if distillation is None else {"distillation": distillation}
    _fit(students, step, members, recipe, recipe.epochs, recipe.rate, context, folder, more)


def answers(output: Output, layers: Sequence[int]) -> dict[str, Tensor]:
    """What is compared: the logits, and of some layers, counted from 1, attention scores and classification token."""
    found = {"logits": output.logits}
    for place, number in enumerate(layers):
        found[f"scores{place}"] = output.features[f"scores{number}"]
        found[f"token{place}"] = output.features[f"layer{number}"][:, 0]
    return found


def layers_of(given: Answers) -> list[tuple[Tensor, Tensor]]:
    """Attention scores and classification token of each matched layer, from the bottom."""
    count = sum(name.startswith("scores") for name in given)
    return [(given[f"scores{place}"], given[f"token{place}"]) for place in range(count)]


def _all_answers(guide: Transformer, recipe: Recipe, train: Sequences, context: Context) -> dict[str, Tensor]:
    """The teacher's answers on the whole training set, in its order."""
    found: dict[str, list[Tensor]] = {}
    batches = Batches(
        None, labels=train.labels, tokens=train.tokens, batch_size=256, shuffle=False, device=context.device
    )
    with evaluation_mode(guide):
        for batch in batches:
            for name, value in answers(guide(batch.tokens, _mask(batch)), recipe.matched).items():
                found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def measure(student: Transformer, guide: Transformer, recipe: Recipe, context: Context) -> dict[str, float]:
    """Accuracy and agreement in percent, and how far attention and classification token are from the teacher's.

    The latter are means over the matched layers; a teacher is compared with itself.
    """
    _, test = parts(recipe, context)
    layers = (
        range(1, 1 + len(recipe.matched)) if len(student.layers) == len(recipe.matched) else recipe.matched
    )
    logits: list[Tensor] = []
    wanted: list[Tensor] = []
    sums = torch.zeros(2, dtype=torch.float64)
    batches = Batches(
        None, labels=test.labels, tokens=test.tokens, batch_size=256, shuffle=False, device=context.device
    )
    with evaluation_mode(student), evaluation_mode(guide):
        for batch in batches:
            mask = _mask(batch)
            own, aim = student(batch.tokens, mask), guide(batch.tokens, mask)
            logits.append(own.logits.float().cpu())
            wanted.append(aim.logits.float().cpu())
            sides = (layers_of(answers(own, layers)), layers_of(answers(aim, recipe.matched)))
            for (scores, token), (aims, target) in zip(*sides, strict=True):
                gaps = attention_kl(scores, aims, mask, scores=True), cls_cosine_loss(token, target)
                sums += len(batch) * torch.stack(gaps).double().cpu()
    sums /= len(test.labels) * len(recipe.matched)
    return {
        "accuracy": 100 * accuracy(torch.cat(logits), test.labels),
        "agreement": 100 * agreement(torch.cat(logits), torch.cat(wanted)),
        "attention_kl": sums[0].item(),
        "cls_cosine": sums[1].item(),
    }


def _fit(
    networks: Sequence[nn.Module],
    step: Any,
    members: Sequence[Batches],
    recipe: Recipe,
    epochs: int,
    rate: float,
    context: Context,
    folder: Path,
    more: Mapping[str, Any],
) -> None:
    network = as_one(networks)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, **fused(context.device))
    total = epochs * len(members[0])
    fit(
        step,
        {
            "network": network,
            "optimizer": optimizer,
            "schedule": one_cycle(optimizer, total, warmup_steps=total // 10),
            **more,
        },
        batches_as_one(members),
        epochs=epochs,
        checkpoint=folder / "training.safetensors",
        precision=recipe.precision,
        max_steps=context.max_steps,
        progress=context.progress,
    )
    write_back(network, networks)


def _keep_weights(networks: Sequence[nn.Module], seeds: Sequence[int], folder: Path) -> None:
    """Save the trained networks and remove the checkpoints, which are six times as large."""
    for seed, network in zip(seeds, networks, strict=True):
        save_weights(network, folder / f"weights{seed}.safetensors")
    for checkpoint in folder.glob("training.safetensors*"):
        checkpoint.unlink(missing_ok=True)


def _stepped(state: dict[str, Any], losses: Tensor) -> dict[str, Tensor]:
    update(state["optimizer"], losses.sum())
    state["schedule"].step()
    return {"loss": losses.detach().mean()}


def _batches(recipe: Recipe, train: Sequences, seed: int, context: Context) -> Batches:
    return Batches(
        None,
        labels=train.labels,
        tokens=train.tokens,
        batch_size=recipe.batch_size,
        seed=seed,
        drop_last=True,
        device=context.device,
    )


def _mask(batch: Batch) -> Tensor:
    assert batch.tokens is not None
    return batch.tokens != PADDING
