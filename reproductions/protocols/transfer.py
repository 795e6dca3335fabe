"""One way of distilling, for every method whose step is "forward, loss, update".

The teacher is either run on each batch or replaced by what it said of fixed augmented views, computed once
(:func:`reproductions.protocols.pairs.teacher_views`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.nets import Output
from kdrefs.training import History, evaluation_mode, fit, update
from kdrefs.training.optimizers import fused

Targets = Mapping[str, Tensor]
Loss = Callable[[Output, Targets], Tensor]


def live_targets(teacher: nn.Module, feature: str) -> Callable[[Batch], Targets]:
    """Targets from running ``teacher`` in eval mode on the student's own batch."""

    def targets(batch: Batch) -> Targets:
        with evaluation_mode(teacher):
            output = teacher(batch.images)
        return {"logits": output.logits.float(), "feature": output.features[feature].float()}

    return targets


def cached_targets(batch: Batch) -> Targets:
    """Targets that came with the batch: ``view_extras`` or ``extras`` of the batches."""
    return batch.extras


def distil(
    student: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    stages: Iterable[tuple[int, float]],
    targets: Callable[[Batch], Targets] = cached_targets,
    modules: Mapping[str, nn.Module] | None = None,
    folder: Path,
    precision: Literal["float32", "bf16"] = "float32",
    max_steps: int | None = None,
) -> History:
    """Train ``student`` to match the targets with Adam; resumes from the checkpoints in ``folder``.

    Args:
        student: Network returning :class:`kdrefs.nets.Output`; trained in place.
        batches: Training batches; labels are not used.
        loss: ``loss(output, targets)`` to a scalar.
        stages: ``(epochs, learning rate)``, each with a fresh optimiser.
        targets: What the student is matched to, for a batch.
        modules: Modules that the loss owns; their parameters are trained and checkpointed with the student's.
        folder: Where checkpoints go.
        precision: As for :func:`kdrefs.training.fit.fit`.
        max_steps: Stop each stage after so many steps.

    Returns:
        The history of the last stage.
    """
    modules = dict(modules or {})
    trained = [*student.parameters(), *(p for module in modules.values() for p in module.parameters())]

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        target = targets(batch)
        value = loss(state["student"](batch.images), target)
        update(state["optimizer"], value)
        return {"loss": value.detach()}

    history = None
    for number, (epochs, rate) in enumerate(stages):
        state: dict[str, Any] = {
            "student": student,
            **modules,
            "optimizer": torch.optim.Adam(trained, lr=rate, **fused(batches.device)),
        }
        history = fit(
            step,
            state,
            batches.with_seed(batches.seed + 1000 * number),
            epochs=epochs,
            checkpoint=folder / f"transfer{number}.safetensors",
            precision=precision,
            max_steps=max_steps,
        )
    if history is None:
        raise ValueError("stages: got none, expected at least one (epochs, learning rate)")
    return history


def random_projection(inputs: int, outputs: int, generator: torch.Generator) -> Tensor:
    """A fixed random projection ``(inputs, outputs)``, uniform in ±1/√inputs (a linear layer's own initialisation)."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(inputs, outputs).uniform_(-bound, bound, generator=generator)
