r"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928).

Where a network looks is transferred rather than what it sees there: a feature map is reduced over its channels to
one non-negative map (*activation-based*, :func:`at_loss`), or the gradient of the loss with respect to the image is
taken (*gradient-based*, :func:`gradient_at_loss`). Channel numbers may differ.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import at_least_float32, check_choice, check_positive, check_same_shape, check_tensor
from kdrefs._maps import check_maps, matched_maps
from kdrefs._typing import Float, Integer
from kdrefs.kernels import unit_rows

_REDUCTIONS = ("sum", "max")


def attention_map(
    features: Float[Tensor, "batch channels h w"], *, power: float = 2.0, reduction: str = "sum"
) -> Float[Tensor, "batch positions"]:
    r"""Attention map of a layer, as a vector of unit Euclidean norm.

    .. math:: F_\mathrm{sum}^p(A) = \sum_c |A_c|^p, \qquad F_\mathrm{max}^p(A) = \max_c |A_c|^p

    Section 3.1 of the paper; ``power=1`` with ``"sum"`` is :math:`F_\mathrm{sum}`. A mean over the channels, which
    code often takes, gives the same unit vector.

    Args:
        features: Feature maps ``(batch, channels, height, width)``, before or after the activation.
        power: p, above 0.
        reduction: ``"sum"`` or ``"max"`` over the channels.

    Returns:
        ``(batch, height * width)`` in at least float32; a map that is zero everywhere stays zero.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
    """
    check_maps("features", features)
    check_choice("reduction", reduction, _REDUCTIONS)
    check_positive("power", power)
    features = at_least_float32(features)
    if power > 2:  # float32 has the range for squares, but not for higher powers of large or small features
        size = features.detach().abs().amax((1, 2, 3), keepdim=True)
        features = features / torch.where(size > 0, size, torch.ones_like(size))
    reduced = (
        _powers(features.abs().amax(1), power) if reduction == "max" else _powers(features, power).sum(1)
    )
    return unit_rows(reduced.flatten(1))


def at_loss(
    student: Float[Tensor, "batch student_channels hs ws"],
    teacher: Float[Tensor, "batch teacher_channels ht wt"],
    *,
    power: float = 2.0,
    reduction: str = "sum",
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Distance between the attention maps of one layer of student and teacher.

    .. math:: L = \frac1N \sum_n \lVert Q_s(x_n) - Q_t(x_n) \rVert_2

    with the unit vectors :math:`Q` of :func:`attention_map`. Equation 2 of the paper, of which this is one layer
    without the weight :math:`\beta / 2`: add the layers and weigh the sum.

    Args:
        student: Feature maps ``(batch, student_channels, hs, ws)``.
        teacher: Those of the teacher for the same samples; no gradient flows into them. Where sizes differ, the
            larger side is average-pooled.
        power: p of the attention map.
        reduction: ``"sum"`` or ``"max"`` over the channels.
        variant: None, the paper's equation, whose norm is not squared. ``"official"``: the authors' code
            (szagoruyko/attention-transfer@893df54, also RepDistiller and mdistiller) squares it and takes the mean
            over samples and positions, :math:`\frac{1}{N H W} \sum_n \lVert Q_s - Q_t \rVert_2^2`, with
            :math:`\beta = 1000`. The two have no constant ratio.

    Returns:
        Scalar, a pure number: at most :math:`\sqrt 2` (maps are non-negative).

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_choice("variant", variant, (None, "official"))
    student, teacher = matched_maps(student, teacher)
    gap = attention_map(student, power=power, reduction=reduction) - attention_map(
        teacher, power=power, reduction=reduction
    )
    if variant == "official":
        return gap.square().mean()
    return torch.linalg.vector_norm(gap, dim=1).mean()


def input_gradients(
    logits: Float[Tensor, "*members batch classes"],
    images: Float[Tensor, "*members batch channels h w"],
    labels: Integer[Tensor, "*members batch"],
    *,
    create_graph: bool = True,
) -> Float[Tensor, "*members batch channels h w"]:
    r"""Gradient of each sample's cross-entropy with respect to its image, :math:`J = \partial CE / \partial x`.

    Section 3.2 of the paper. With batch normalisation in training mode a sample's loss also depends on the other
    images of its batch; what is differentiated then is the sum of the batch's losses.

    Args:
        logits: ``(..., batch, classes)`` computed from ``images``.
        images: ``(..., batch, channels, h, w)`` with ``requires_grad``.
        labels: Class indices ``(..., batch)``.
        create_graph: Whether the result can be differentiated again, as the student's must be.

    Returns:
        The shape of ``images``.

    Raises:
        ValueError: A shape or a dtype does not fit, ``images`` does not require a gradient, or ``logits`` were
            not computed from it.
    """
    for name, value in (("logits", logits), ("images", images), ("labels", labels)):
        check_tensor(name, value)
    if logits.ndim < 2 or logits.shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected a floating tensor (..., batch, classes), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if not whole or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: expected class indices of shape {tuple(logits.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if images.shape[: labels.ndim] != labels.shape:
        raise ValueError(
            f"images: expected a shape that starts with {tuple(labels.shape)}, got {tuple(images.shape)}"
        )
    if not images.requires_grad:
        raise ValueError("images: expected requires_grad=True before the forward pass, got False")
    if not logits.requires_grad:
        raise ValueError("logits: expected logits computed from images with gradients enabled, got constants")
    logits = at_least_float32(logits)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise ValueError("logits: expected logits computed from images, got some that do not depend on them")
    return gradient


def gradient_at_loss(
    student: Float[Tensor, "batch channels h w"], teacher: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, ""]:
    r"""Distance between the input gradients of student and teacher.

    .. math:: L = \frac1N \sum_n \lVert J_s(x_n) - J_t(x_n) \rVert_2

    Equation 6 of the paper without its weight :math:`\beta / 2`.

    Args:
        student: Input gradients ``(batch, channels, h, w)``, see :func:`input_gradients`.
        teacher: The teacher's, same shape; no gradient flows into them.

    Returns:
        Scalar in nats per unit of the image.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    gap = at_least_float32(student) - at_least_float32(teacher.detach())
    return torch.linalg.vector_norm(gap.flatten(1), dim=1).mean()


def _powers(features: Tensor, power: float) -> Tensor:
    """``|x| ** power`` with the gradient 0 at 0, where that of a power below one is unbounded."""
    if power == 2:
        return features.square()
    size = features.abs()
    if power >= 1:
        return size if power == 1 else size**power
    positive = size > 0
    return torch.where(positive, torch.where(positive, size, torch.ones_like(size)) ** power, 0.0)
