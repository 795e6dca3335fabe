r"""Regression of logits (Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NIPS 2014, arXiv:1312.6184).

A shallow student learns a deep teacher's logits by least squares, without labels and without a softmax. Its wide
hidden layer is made affordable by a layer of few linear units before it, :class:`FactorizedLinear`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_floating,
    check_matrix,
    check_same_batch,
    check_same_shape,
    check_weight_dtype,
)
from kdrefs._typing import Float


class LogitStatistics(NamedTuple):
    """Mean and standard deviation of each logit over the inputs that a student learns from, each ``(classes,)``."""

    mean: Tensor
    std: Tensor

    def standardised(self, logits: Float[Tensor, "*samples classes"]) -> Float[Tensor, "*samples classes"]:
        """Logits on the scale on which the student is trained: mean 0 and variance 1 for each class."""
        return (logits - self.mean) / self.std

    def restored(self, outputs: Float[Tensor, "*samples classes"]) -> Float[Tensor, "*samples classes"]:
        """A student's outputs on the teacher's scale again; classes can be compared there only."""
        return outputs * self.std + self.mean


def logit_statistics(logits: Float[Tensor, "samples classes"]) -> LogitStatistics:
    """Mean and standard deviation of a teacher's logits, class by class.

    Args:
        logits: ``(samples, classes)``, of all inputs that the student learns from, not of a batch. A class whose
            logit is the same for all has standard deviation 1 here.

    Raises:
        ValueError: ``logits`` is not a floating matrix.
    """
    check_matrix("logits", logits)
    logits = at_least_float32(logits.detach())
    std, mean = torch.std_mean(logits, dim=0, correction=0)
    return LogitStatistics(mean, torch.where(std > 0, std, 1.0))


def logit_regression_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    *,
    statistics: LogitStatistics | None = None,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Half the squared distance between the logits of student and teacher.

    .. math:: L = \frac1B \sum_b \tfrac12 \sum_k (s_{bk} - t_{bk})^2

    The sum runs over the classes, the mean over the samples. There are neither labels nor a temperature: one would
    multiply the loss by :math:`1/T^2` and change nothing else. For centred logits K times
    :math:`T^2` :func:`~kdrefs.divergences.softened_kl` tends to it as T grows.

    Args:
        student: Logits ``(batch, classes)``; with ``statistics`` on the standardised scale.
        teacher: Logits of the same samples, same shape, as the teacher gives them; no gradient flows into them.
        statistics: Of the teacher's logits over the training inputs, see :func:`logit_statistics`: the student then
            learns the standardised logits. None regresses the logits as they are.
        variant: None, the paper's. ``"mean"``: the mean of the squares over samples *and* classes without the half
            (AberHu/Knowledge-Distillation-Zoo@65470c8): ours times 2 / classes.

    Returns:
        Scalar, in squared units of the logits, or of their standard deviations.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's. Statistics have
    to be those of the whole set on every worker.
    """
    check_choice("variant", variant, (None, "mean"))
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)
    check_same_shape("teacher", teacher, "student", student)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if statistics is not None:
        for name, value in zip(("mean", "std"), statistics, strict=True):
            check_floating(f"statistics: {name}", value)
            if value.shape != student.shape[1:]:
                raise ValueError(
                    f"statistics: expected a {name} of shape {tuple(student.shape[1:])}, got {tuple(value.shape)}"
                )
        teacher = statistics.standardised(teacher)
    squares = (student - teacher).square().sum()
    return squares / (student.numel() if variant == "mean" else 2 * student.shape[0])


class FactorizedLinear(nn.Module):
    r"""A linear layer whose weight is a product: :math:`y = U (V x) + b`, with k linear units in between.

    The paper puts it between the input and the wide non-linear layer and trains both factors from scratch. Instead of
    :math:`HD` weights there are :math:`k(H + D)`, fewer where :math:`k < HD/(H + D)`. Since :math:`W = UV` could be
    multiplied out, no function is gained by it; what changes is the cost and the path of gradient descent.

    Both factors are drawn so that the outputs have the variance that ``torch.nn.Linear`` would give them, whatever k:
    :math:`V_{ij}` with variance :math:`1/D`, :math:`U_{ij}` and b as in a linear layer with k inputs.

    Args:
        in_features: D.
        out_features: H.
        rank: k, the number of linear units.
        bias: Whether there is b; V needs none.

    Raises:
        ValueError: A size is not a positive integer.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors anew from torch's global generator."""
        bound = math.sqrt(3 / self.in_features)  # of a uniform distribution with variance 1 / D
        nn.init.uniform_(self.reduce.weight, -bound, bound)
        self.expand.reset_parameters()

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """Map ``(..., in_features)`` to ``(..., out_features)``.

        Raises:
            ValueError: The last dimension is not ``in_features``, or the dtype, outside autocast, not the weights'.
        """
        check_floating("inputs", inputs, f"(..., {self.in_features})")
        if inputs.ndim < 1 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs: expected (..., {self.in_features}), got {tuple(inputs.shape)}")
        check_weight_dtype("inputs", inputs, self.reduce.weight)
        return self.expand(self.reduce(inputs))

    @property
    def weight(self) -> Tensor:
        """The product W = UV, ``(out_features, in_features)``, differentiable."""
        return self.expand.weight @ self.reduce.weight

    @property
    def weight_count(self) -> int:
        """Number of weights in both factors, k (H + D); H D would be the matrix's."""
        return self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def multiplied_out(self) -> nn.Linear:
        """The same function as one linear layer, a copy."""
        factor, bias = self.expand.weight, self.expand.bias
        layer = nn.Linear(
            self.in_features, self.out_features, bias is not None, device=factor.device, dtype=factor.dtype
        )
        layer.weight.copy_(self.weight)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    def extra_repr(self) -> str:
        """What the factors do not say."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
