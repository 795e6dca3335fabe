"""What a row of the shared table is: a method beside the labels, and the two rows that every column compares with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.at import input_gradients
from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output

INPUT_GRADIENT = "input_gradient"  # name of the cross-entropy's gradient with respect to the image

Targets = Mapping[str, Tensor]
# loss(student's output, targets, labels, share of the phase that is done) of one network: a scalar
PhaseLoss = Callable[[Output, Targets, Tensor, float], Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Phase:
    """A part of the training with a loss and an optimiser of its own."""

    loss: PhaseLoss
    share: float = 1.0  # of the epochs


@dataclass(frozen=True)
class Method:
    """What a row of the table adds to the labels.

    Attributes:
        phases: Their shares add up to 1, so that every method sees every image equally often.
        targets: What is asked of the teacher, by name: a function of its output. The answers are kept by name, so
            that within a column one name stands for one function.
        regressors: From the shapes ``(channels, ...)`` of the student's features and of the targets to modules by
            the name of the feature that they read; what they return is the feature ``<name>_regressed``.
        input_gradient: Whether losses or targets read the feature :data:`INPUT_GRADIENT`.
    """

    phases: tuple[Phase, ...]
    targets: Mapping[str, Callable[[Output], Tensor]] = field(default_factory=dict)
    regressors: Callable[[Shapes, Shapes], Mapping[str, nn.Module]] | None = None
    input_gradient: bool = False

    def __post_init__(self) -> None:
        total = sum(phase.share for phase in self.phases)
        if not math.isclose(total, 1):
            raise ValueError(f"phases: expected shares that add up to 1, got {total}")


def cross_entropy(output: Output, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels, in float32 under autocast too."""
    return F.cross_entropy(output.logits.float(), labels)


def logits_of(output: Output) -> Tensor:
    """The logits, as a target."""
    return output.logits


def feature_of(name: str) -> Callable[[Output], Tensor]:
    """The feature of that name, as a target."""
    return lambda output: output.features[name]


def distillation(temperature: float = 4.0, alpha: float = 0.9, **options: Any) -> Method:
    """Knowledge distillation, see :func:`kdrefs.methods.kd.kd_loss`."""

    def loss(output: Output, targets: Targets, labels: Tensor, _: float) -> Tensor:
        return kd_loss(
            output.logits, targets["logits"], labels, temperature=temperature, alpha=alpha, **options
        )

    return Method((Phase(loss),), {"logits": logits_of})


def labels_and(
    weight: float,
    term: Callable[[Output, Targets], Tensor],
    targets: Mapping[str, Callable[[Output], Tensor]],
    **options: Any,
) -> Method:
    """Cross-entropy of the labels plus ``weight`` times a term that reads features and targets."""

    def loss(output: Output, given: Targets, labels: Tensor, _: float) -> Tensor:
        return cross_entropy(output, labels) + weight * term(output, given)

    return Method((Phase(loss),), targets, **options)


def distilled_and(
    weight: float,
    term: Callable[[Output, Targets], Tensor],
    targets: Mapping[str, Callable[[Output], Tensor]],
    **options: Any,
) -> Method:
    """The row ``kd`` plus ``weight`` times a term."""
    (phase,) = BASELINES["kd"].phases

    def loss(output: Output, given: Targets, labels: Tensor, progress: float) -> Tensor:
        return phase.loss(output, given, labels, progress) + weight * term(output, given)

    return Method((Phase(loss),), {"logits": logits_of, **targets}, **options)


def forward(
    module: nn.Module, images: Tensor, labels: Tensor, method: Method, *, create_graph: bool
) -> Output:
    """The output of a network or of :class:`~kdrefs.training.seeds.Members`, with the input gradient if needed."""
    if not method.input_gradient:
        return module(images)
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        output = module(images)
        gradient = input_gradients(output.logits.float(), images, labels, create_graph=create_graph)
    return Output(output.logits, {**output.features, INPUT_GRADIENT: gradient})


# Trained once for all columns.
BASELINES: dict[str, Method] = {
    "student": Method((Phase(lambda output, targets, labels, progress: cross_entropy(output, labels)),)),
    "kd": distillation(),
}
