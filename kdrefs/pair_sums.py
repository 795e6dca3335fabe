r"""Sums over all pairs of rows, tile by tile: the :math:`N \times N` matrix is never stored.

Memory grows with :math:`N d` instead of :math:`N^2`. The kernels are symmetric, so only the tiles on and above
the diagonal are computed, each for its pairs in both orders. Derivatives are written by hand; second ones do
not exist, and asking for them is an error.
"""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from kdrefs._checks import (
    at_least_float32,
    check_class_indices,
    check_matrix,
    check_positive,
    check_same_batch,
)
from kdrefs._typing import Float, Integer
from kdrefs.kernels import gaussian_kernel, unit_rows

# Rows and columns of a tile. Larger ones leave the cache; many more of them cost more calls than they save.
_TILE = 768


def cosine_neighbour_kl(
    student: Float[Tensor, "batch student_width"],
    teacher: Float[Tensor, "batch teacher_width"],
    *,
    diagonal: bool = True,
) -> Float[Tensor, ""]:
    r"""KL divergence between the neighbour distributions of teacher and student under the cosine kernel.

    .. math:: L = \frac1N \sum_{ij} p_{ij} \log \frac{p_{ij}}{q_{ij}}, \qquad
        p_{ij} = \frac{1 + \cos(t_i, t_j)}{\sum_k [1 + \cos(t_i, t_k)]}

    and :math:`q` likewise from the student: PKT (Passalis and Tefas, arXiv:1803.10837). Row sums have a closed
    form, so a single pass over the tiles gives the value and the gradient, which is kept until the backward
    asks for it. Recomputing the tiles there would cost the similarities and the logarithm a second time, to
    save one matrix of the features' size.

    Args:
        student: Features ``(batch, student_width)``.
        teacher: Features ``(batch, teacher_width)`` of the same samples; no gradient flows into them.
        diagonal: Whether a sample counts among its own neighbours.

    Returns:
        Scalar in nats: sum over the neighbours, mean over the samples. The kernel of opposite rows is held at
        the bound of :func:`kdrefs.kernels.log_kernel` and has no gradient there.

    Raises:
        ValueError: A shape or dtype does not fit, or ``diagonal=False`` with a single sample.

    Data-parallel training: rows compare a sample with the whole batch, so gather the features of all workers
    first (:func:`kdrefs.training.gather_rows`); the mean of the workers' losses is another loss.

    A compiler would unroll the tiles; :func:`kdrefs.methods.pkt.pkt_loss` is dense there.
    """
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)
    if not diagonal and student.shape[0] < 2:
        raise ValueError(f"student: diagonal=False needs at least 2 samples, got {student.shape[0]}")
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = unit_rows(student), unit_rows(teacher.detach())
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        loss: Tensor
        loss, _ = _CosineNeighbourKL.apply(
            student.to(dtype), teacher.to(dtype), diagonal, torch.is_grad_enabled()
        )
    return loss


def class_pair_sums(
    features: Float[Tensor, "batch width"],
    labels: Integer[Tensor, "batch"],
    classes: int,
    *,
    bandwidth: float,
) -> Float[Tensor, "classes classes"]:
    r"""Gaussian kernel summed over the pairs of every two classes.

    .. math:: S_{kl} = \sum_{i:\, y_i = k} \; \sum_{j:\, y_j = l} \exp(-\lVert x_i - x_j \rVert^2 / \sigma)

    A sample pairs with itself too (:math:`i = j`, kernel exactly 1). The backward computes the tiles again,
    weighted by the gradient that comes in.

    Args:
        features: ``(batch, width)``.
        labels: Class indices ``(batch,)`` in any order. They must lie between 0 and ``classes - 1``, which is
            not checked here.
        classes: Number of classes; the sums of an empty one are 0.
        bandwidth: :math:`\sigma`, a squared length as in :func:`kdrefs.kernels.gaussian_kernel`.

    Returns:
        Symmetric ``(classes, classes)``, a pure number per entry, in at least float32.

    Raises:
        ValueError: A shape or dtype does not fit, or ``classes`` or ``bandwidth`` is not positive.

    Data-parallel training: pairs run over the whole batch, so gather features and labels first
    (:func:`kdrefs.training.gather_rows`).
    """
    check_matrix("features", features)
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "features", features)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes: expected a whole number above 0, got {classes!r}")
    check_positive("bandwidth", bandwidth)
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        sums: Tensor
        if torch.compiler.is_compiling():  # which would unroll the tiles
            member = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).to(features.dtype)
            sums = member.mT @ gaussian_kernel(features, bandwidth=bandwidth) @ member
        else:
            # Distances stay, and their expanded squares do not cancel for features far from the origin.
            centred = (features - features.detach().mean(dim=0)) / bandwidth**0.5
            sums = _GaussianClassSums.apply(centred, labels.long(), classes)
    return sums


class _Tiled(torch.autograd.Function):
    """Under ``torch.vmap`` one sample after the other: its tiles keep the machine busy."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            cls.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


class _Gradient(_Tiled):
    """A gradient as a function of what it depends on, so that its own derivative is refused, not taken for 0."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise NotImplementedError("sums over pairs in tiles have first derivatives only")


class _CosineNeighbourKL(_Tiled):
    r"""KL divergence between the rows of :math:`T = 1 + v v^\top` and :math:`S = 1 + u u^\top`, over their sums.

    Its derivative with respect to :math:`u_i \cdot u_j`, both orders together, is
    :math:`[(1/s_i + 1/s_j) - (1/t_i + 1/t_j) T_{ij} / S_{ij}] / N` with the row sums :math:`s` and :math:`t`.
    """

    @staticmethod
    def forward(u: Tensor, v: Tensor, diagonal: bool, with_gradient: bool) -> tuple[Tensor, Tensor]:
        n, floor = u.shape[0], 2 * torch.finfo(u.dtype).eps
        u_scale, v_scale = (1 / _cosine_row_sums(x, diagonal, floor) for x in (u, v))
        terms = [(v_scale / u_scale).log().sum()]
        gradient = torch.zeros_like(u)
        for rows, columns, (s, t, w) in _tiles(u, 3):
            torch.mm(u[rows], u[columns].mT, out=s).add_(1).clamp_(min=floor)
            torch.mm(v[rows], v[columns].mT, out=t).add_(1).clamp_(min=floor)
            torch.add(v_scale[rows].unsqueeze(1), v_scale[columns], out=w).mul_(t)
            share = 0.5 if rows == columns else 1.0  # tiles on the diagonal hold both orders of their pairs
            if rows == columns and not diagonal:
                w.fill_diagonal_(0)
            terms.append(share * t.div_(s).log_().mul_(w).sum())
            if not with_gradient:
                continue
            # The two parts all but cancel, so they meet entry by entry, before the product with u.
            torch.add(u_scale[rows].unsqueeze(1), u_scale[columns], out=t).mul_(s).sub_(w)
            t.div_(torch.threshold_(s, floor, torch.inf))  # 0 where the clamp holds
            if rows == columns:
                t.fill_diagonal_(0)  # the product of a unit row with itself is constant
            gradient[rows].addmm_(t, u[columns], alpha=share)
            gradient[columns].addmm_(t.mT, u[rows], alpha=share)
        return torch.stack(terms).sum() / n, gradient.div_(n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _CosineNeighbourKLGradient.apply(*ctx.saved_tensors, grad_loss), None, None, None


class _CosineNeighbourKLGradient(_Gradient):
    @staticmethod
    def forward(u: Tensor, gradient: Tensor, grad_loss: Tensor) -> Tensor:
        return grad_loss * gradient


class _GaussianClassSums(_Tiled):
    r"""Sums of :math:`\exp(-\lVert x_i - x_j \rVert^2)` over the pairs of every two classes."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, classes: int) -> Tensor:
        # Up to N^2 terms meet in one entry. Apple's GPUs have nothing wider than float32.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        half = torch.zeros(classes, classes, dtype=wide, device=x.device)
        for rows, columns, (k,) in _gaussian_tiles(x, 1):
            by_class = x.new_zeros(classes, k.shape[1]).index_add_(0, labels[rows], k)
            half.index_add_(0, labels[columns], by_class.mT.to(wide))
        return (half + half.mT).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _GaussianClassSumsGradient.apply(*ctx.saved_tensors, grad_sums + grad_sums.mT), None, None


class _GaussianClassSumsGradient(_Gradient):
    r""":math:`-2 \sum_j w_{y_i y_j} k_{ij} (x_i - x_j)` with the weights of both orders of the classes together."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        gradient, degree = torch.zeros_like(x), x.new_zeros(x.shape[0])
        for rows, columns, (k, w) in _gaussian_tiles(x, 2):
            torch.index_select(weights[:, labels[columns]], 0, labels[rows], out=w).mul_(k)
            gradient[rows].addmm_(w, x[columns])
            gradient[columns].addmm_(w.mT, x[rows])
            degree[rows] += w.sum(dim=1)
            degree[columns] += w.sum(dim=0)
        return gradient.sub_(degree.unsqueeze(1) * x).mul_(2)


def _gaussian_tiles(x: Tensor, buffers: int) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """The tiles with the kernel in their first buffer, halved on the diagonal, where pairs come in both orders."""
    negative_squares = -x.square().sum(dim=1)
    for rows, columns, (k, *free) in _tiles(x, buffers):
        torch.add(negative_squares[rows].unsqueeze(1), negative_squares[columns], out=k)
        k.addmm_(x[rows], x[columns].mT, alpha=2).clamp_(max=0).exp_()
        if rows == columns:
            k.fill_diagonal_(1).div_(2)
        yield rows, columns, [k, *free]


def _tiles(x: Tensor, buffers: int) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Rows and columns of each tile on and above the diagonal, with buffers of its shape.

    All tiles share the buffers' memory: allocating temporaries would take longer than filling them.
    """
    n = x.shape[0]
    memory = x.new_empty(buffers, min(n, _TILE) ** 2)
    blocks = [slice(start, min(start + _TILE, n)) for start in range(0, n, _TILE)]
    for rows, columns in combinations_with_replacement(blocks, 2):
        shape = rows.stop - rows.start, columns.stop - columns.start
        yield rows, columns, [flat[: shape[0] * shape[1]].view(shape) for flat in memory]


def _cosine_row_sums(unit: Tensor, diagonal: bool, floor: float) -> Tensor:
    r""":math:`\sum_j (1 + u_i \cdot u_j)`, at least what is left of rows that are all opposite."""
    n = unit.shape[0]
    sums = n + unit @ unit.sum(dim=0)
    if not diagonal:
        sums = sums - (1 + unit.square().sum(dim=1))
    return sums.clamp(min=(n if diagonal else n - 1) * floor)
