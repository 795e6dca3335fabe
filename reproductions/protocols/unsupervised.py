"""Modules trained without labels on what a frozen teacher says of the training set, before there is a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch
from kdrefs.nets import Output
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import fit, update
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.joint import Training, member_batches, targets_of
from reproductions.protocols.pairs import (
    PAIRS,
    load_pair_data,
    load_weights,
    save_weights,
    sgd_schedule,
    teacher,
    teacher_identity,
)
from reproductions.protocols.rows import Method, Phase, cross_entropy

OWN_SEED = 20_000  # added to a run's seed: weights and order are not those of the student's


def trained_on_teacher(
    task: str,
    make: Callable[[tuple[int, ...]], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    target: tuple[str, Callable[[Output], Tensor]],
    training: Training,
    seed: int,
    epochs: int,
    rate: float,
    context: Context,
    *,
    module: str,
    about: Mapping[str, Any],
) -> nn.Module:
    """A module fitted to the teacher's answers by SGD with one cycle of the rate; frozen, in eval mode.

    It sees the images as the students do, augmented and in the recipe's batches; where their views are fixed, the
    answers are those that are kept for the students. Trained once for each content of its configuration.

    Args:
        task: Kind of artifact.
        make: From the shape of one answer, without the batch, to the module.
        loss: Of the module and a batch of answers, to a scalar.
        target: Name and function of the teacher's output, as in the students' method.
        training: The students' recipe, whose batch size, momentum, weight decay and precision are taken.
        seed: The run's; of the teacher where that is trained.
        epochs: Passes over the training set; 0 leaves the module as it was made.
        rate: Highest learning rate.
        context: What the harness gives.
        module: Name of the column's module, whose source the answers belong to.
        about: What else the fitted module depends on.
    """
    pair, (name, ask) = PAIRS[training.pair], target
    split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    source = source_digest(module)
    # Only its target is asked for: there is neither a student nor a label here.
    method = Method(
        (Phase(lambda output, given, labels, progress: cross_entropy(output, labels)),), {name: ask}
    )
    (batches,) = member_batches(pair, split, [seed], method, training, context, source)
    guide = None if training.views is not None else fold_batchnorm(teacher(context, pair, seed))

    def answers(batch: Batch) -> Tensor:
        if guide is None:
            return batch.extras[name].float()
        assert batch.images is not None
        assert batch.labels is not None
        return targets_of(guide, batch.images, batch.labels, method)[name].float()

    one = next(iter(batches.subset([0])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(OWN_SEED + seed)
        fitted = make(tuple(answers(one).shape[1:]))
    fitted = fitted.to(context.device)

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        value = loss(state["module"], answers(batch))
        update(state["optimizer"], value)
        state["schedule"].step()
        return {"loss": value.detach()}

    def fill(folder: Path) -> None:
        optimizer = torch.optim.SGD(
            fitted.parameters(),
            lr=rate,
            momentum=0.9,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
            **fused(context.device),
        )
        schedule = sgd_schedule(optimizer, max(epochs, 1), len(batches), milestones=None)
        if epochs:
            fit(
                step,
                {"module": fitted, "optimizer": optimizer, "schedule": schedule},
                batches.with_seed(OWN_SEED + seed),
                epochs=epochs,
                checkpoint=folder / "training.safetensors",
                precision=training.precision,
                max_steps=context.max_steps,
                progress=context.progress,
            )
        save_weights(fitted, folder / "weights.safetensors")

    depends = {
        "about": dict(about), "epochs": epochs, "rate": rate, "seed": seed, "target": name,
        "training": asdict(training), "pair": asdict(pair), "teacher": teacher_identity(pair, seed),
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact(task, depends, fill, source=source)
    return load_weights(fitted, folder / "weights.safetensors").requires_grad_(False)
