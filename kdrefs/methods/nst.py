r"""Neuron selectivity transfer (Huang and Wang, arXiv:1707.01219).

Each channel of a layer is a sample from a distribution over spatial patterns, and the student matches the teacher's
distribution in maximum mean discrepancy. Channel numbers may differ and no regressor is needed.

No kernel is evaluated by broadcasting pairs of channels over positions. With the linear kernel the discrepancy *is*
the squared distance of two mean maps, with the polynomial kernel of degree 2 that of two Gram matrices over
positions; the others, and degree 2 where that is fewer multiplications, need inner products of channels only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import check_choice, check_positive
from kdrefs._maps import matched_maps, unit_channels
from kdrefs._typing import Float

KERNELS = ("linear", "polynomial", "gaussian")


def nst_loss(
    student: Float[Tensor, "batch student_channels hs ws"],
    teacher: Float[Tensor, "batch teacher_channels ht wt"],
    *,
    kernel: str = "polynomial",
    degree: int = 2,
    offset: float = 0.0,
    bandwidth: float | None = None,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Squared maximum mean discrepancy between the channels of student and teacher.

    .. math:: L = \frac1N \sum_n \Big[ \tfrac{1}{C_t^2} \sum_{i,i'} k(t_i, t_{i'})
              + \tfrac{1}{C_s^2} \sum_{j,j'} k(s_j, s_{j'}) - \tfrac{2}{C_t C_s} \sum_{i,j} k(t_i, s_j) \Big]

    Equation 6 of the paper without its weight :math:`\lambda / 2`; every channel is first divided by its Euclidean
    norm over the positions. The sums include equal pairs: a biased estimate, never negative but for rounding.

    Args:
        student: Feature maps ``(batch, student_channels, hs, ws)``; the authors take the last block before its ReLU.
        teacher: Those of the teacher for the same samples; no gradient flows into them. Where sizes differ, the
            larger side is average-pooled, as in RepDistiller.
        kernel: ``"linear"`` :math:`x^\top y`; ``"polynomial"`` :math:`(x^\top y + c)^d`, the authors' choice with
            d = 2 and c = 0; ``"gaussian"`` :math:`\exp(-\lVert x - y\rVert^2 / 2\sigma^2)`.
        degree: d of the polynomial kernel, at least 1.
        offset: c of the polynomial kernel, at least 0.
        bandwidth: :math:`\sigma^2` of the Gaussian kernel. None: the mean squared distance over all pairs of a
            student's and a teacher's channel in the batch, as a constant without gradient, held above the rounding
            error of a distance. (The paper says "mean squared distance of the pairs" and leaves open which.)
        variant: ``"official"``: the authors' code (TuSimple/neuron-selectivity-transfer@50dee40) leaves the
            teacher's own term out: same gradient, and a value that may be negative. RepDistiller, mdistiller and
            KDZoo compute ours. Their weight of 50 is :math:`\lambda / 2`.

    Returns:
        Scalar, a pure number.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples (but for ``bandwidth=None``, which is over the worker's samples).
    """
    check_choice("kernel", kernel, KERNELS)
    check_choice("variant", variant, (None, "official"))
    _check_options(kernel, degree, offset, bandwidth)
    student, teacher = matched_maps(student, teacher)
    s, t = unit_channels(student), unit_channels(teacher)
    if offset:  # x'y + c is the product of (x, sqrt c) and (y, sqrt c)
        s, t = F.pad(s, (0, 1), value=math.sqrt(offset)), F.pad(t, (0, 1), value=math.sqrt(offset))
    if kernel == "linear" or (kernel == "polynomial" and degree == 1):
        return _squared_distance(s.mean(1) - t.mean(1), t.mean(1), variant)
    if kernel == "gaussian":
        width = _mean_squared_distance(s, t) if bandwidth is None else bandwidth
        return _discrepancy(lambda x, y: _gaussian(x, y, width), s, t, variant)
    if degree == 2 and _positions_are_cheaper(s, t):
        teachers = _products(t.mT, t.mT) / t.shape[1]
        with torch.autocast(s.device.type, enabled=False):
            gap = torch.baddbmm(teachers, s.mT, s, beta=-1, alpha=1 / s.shape[1])
        return _squared_distance(gap, teachers, variant)
    return _discrepancy(lambda x, y: _products(x, y) ** degree, s, t, variant)


def _check_options(kernel: str, degree: int, offset: float, bandwidth: float | None) -> None:
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree: expected an integer from 1 on, got {degree!r}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not 0 <= offset < math.inf:
        raise ValueError(f"offset: expected a finite number from 0 on, got {offset!r}")
    if kernel != "polynomial" and (degree, offset) != (2, 0):
        raise ValueError(f"degree and offset: the {kernel} kernel has neither, got {degree} and {offset}")
    if bandwidth is not None:
        if kernel != "gaussian":
            raise ValueError(f"bandwidth: the {kernel} kernel has none, got {bandwidth}")
        check_positive("bandwidth", bandwidth)


def _discrepancy(
    kernel: Callable[[Tensor, Tensor], Tensor], s: Tensor, t: Tensor, variant: str | None
) -> Tensor:
    """The definition, from the kernel's matrices (batch, channels, channels)."""
    loss = kernel(s, s).mean() - 2 * kernel(t, s).mean()
    return loss if variant == "official" else loss + kernel(t, t).mean()


def _squared_distance(gap: Tensor, teacher: Tensor, variant: str | None) -> Tensor:
    """Mean over samples of the gap's square, without the teacher's own square if ``"official"``."""
    squares = gap.square() - teacher.square() if variant == "official" else gap.square()
    return squares.sum() / gap.shape[0]


def _positions_are_cheaper(s: Tensor, t: Tensor) -> bool:
    """Whether the Gram matrices over positions take fewer multiplications than those over channels.

    Forward and backward, each product of the student with itself counts three times, with the teacher twice.
    """
    students, teachers, positions = s.shape[1], t.shape[1], s.shape[2]
    return positions * (3 * students + teachers) <= 3 * students**2 + 2 * students * teachers + teachers**2


def _gaussian(x: Tensor, y: Tensor, width: float | Tensor) -> Tensor:
    squares = _squares(x).unsqueeze(2) + _squares(y).unsqueeze(1)
    return ((2 * _products(x, y) - squares).clamp(max=0) / (2 * width)).exp()


def _mean_squared_distance(s: Tensor, t: Tensor) -> Tensor:
    """Over all pairs and samples, as a constant, held above the rounding error of a distance."""
    s = s.detach()
    products = (s.mean(1) * t.mean(1)).sum(1)
    mean = (_squares(s).mean(1) + _squares(t).mean(1) - 2 * products).mean()
    return mean.clamp(min=1000 * torch.finfo(mean.dtype).eps)


def _squares(channels: Tensor) -> Tensor:
    """1, or 0 for a channel of zeros; without a gradient, as unit vectors have none to give."""
    return channels.detach().square().sum(2)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows, in their own precision under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT
