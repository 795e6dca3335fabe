r"""Jacobian matching (Srinivas and Fleuret, ICML 2018, arXiv:1803.00443), and the noise that it stands for.

The student's derivatives with respect to the input are matched beside its outputs. For one training step:

>>> images.requires_grad_()                                                            # doctest: +SKIP
>>> logits, guide = student(images), teacher(images)                                   # doctest: +SKIP
>>> directions = random_directions(guide, 2, generator)                                # doctest: +SKIP
>>> ours = output_jacobian(logits, images, directions)                                 # doctest: +SKIP
>>> theirs = output_jacobian(guide, images, directions, create_graph=False)            # doctest: +SKIP
>>> loss = task(logits) + sigma**2 * jacobian_loss(ours, theirs)                       # doctest: +SKIP

What is matched is chosen by ``directions``, for which one backward pass each is needed: all outputs (``None``), the
teacher's top class (:func:`top_class_directions`), a random projection of all (:func:`random_directions`), or all
classes weighted as the Kullback-Leibler divergence weighs them (:func:`fisher_directions`, on log-probabilities).

What the method is derived from, the expected loss under small Gaussian noise on the input, is in
:mod:`kdrefs.noise`.
"""

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_floating, check_same_shape, check_tensor
from kdrefs._typing import Float
from kdrefs.kernels import unit_rows


def jacobian_loss(
    student: Float[Tensor, "batch rows *pixels"],
    teacher: Float[Tensor, "batch rows *pixels"],
    *,
    normalize: bool = False,
    squared: bool = True,
) -> Float[Tensor, ""]:
    r"""Squared distance of two Jacobians, row by row.

    .. math:: L = \frac1N \sum_n \sum_i \lVert \nabla_x S_i(x_n) - \nabla_x T_i(x_n) \rVert_2^2

    Proposition 1 of the paper without its factor :math:`\sigma^2`, for the rows that :func:`output_jacobian` was asked
    for. With rows from :func:`fisher_directions`, *half* of it is the coefficient of :math:`\sigma^2` of
    :math:`KL(T \,\|\, S)` where the outputs agree.

    Args:
        student: Jacobians ``(batch, rows, *input)``, made with ``create_graph=True``.
        teacher: The teacher's, same shape; no gradient flows into them.
        normalize: Divide each sample's Jacobian, all rows together, by its Euclidean norm first, as public
            re-implementations do: direction counts and size does not. Each sample then adds
            :math:`2 - 2 \cos(J_s, J_t)`; a Jacobian that is zero stays zero.
        squared: Whether the distance is squared. The code that matches the label's logit takes the *mean* over
            the input's D dimensions as well, ours divided by D (AberHu/Knowledge-Distillation-Zoo@65470c8,
            ``kd_losses/sobolev.py``); other code does not square (``squared=False``).

    Returns:
        Scalar in squared units of output per unit of input; a pure number with ``normalize``.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        check_tensor(name, value)
        if value.ndim < 3 or value.numel() < 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating tensor (batch, rows, *input) with at least one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    check_same_shape("teacher", teacher, "student", student)
    ours, theirs = (at_least_float32(value).flatten(1) for value in (student, teacher.detach()))
    if normalize:
        ours, theirs = unit_rows(ours), unit_rows(theirs)
    gap = ours - theirs
    return (gap.square().sum(dim=1) if squared else torch.linalg.vector_norm(gap, dim=1)).mean()


def output_jacobian(
    outputs: Float[Tensor, "*members batch classes"],
    inputs: Float[Tensor, "..."],
    directions: Float[Tensor, "*members batch rows classes"] | None = None,
    *,
    create_graph: bool = True,
) -> Float[Tensor, "..."]:
    r"""Rows :math:`\nabla_x \, v_i^\top f(x)` of a Jacobian, one backward pass each.

    Each sample must have its own outputs only: with batch normalisation in training mode they depend on the whole
    batch, and what is differentiated then is the batch's sum.

    Args:
        outputs: ``(..., batch, classes)`` computed from ``inputs``: logits, or log-probabilities.
        inputs: ``(..., batch, *input)`` with ``requires_grad``.
        directions: :math:`v` ``(..., batch, rows, classes)``, taken as constants; None for the unit vectors, that is
            for the whole Jacobian.
        create_graph: Whether the result can be differentiated again, as the student's must be. The teacher's need
            not: without it no graph is kept.

    Returns:
        ``(..., batch, rows, *input)``.

    Raises:
        ValueError: A shape or a dtype does not fit, ``inputs`` does not require a gradient, or ``outputs`` were
            not computed from it.
    """
    check_tensor("outputs", outputs)
    check_tensor("inputs", inputs)
    if outputs.ndim < 2 or not outputs.is_floating_point():
        raise ValueError(
            f"outputs: expected a floating tensor (..., batch, classes), got {outputs.dtype} of shape "
            f"{tuple(outputs.shape)}"
        )
    before = outputs.shape[:-1]
    if inputs.shape[: len(before)] != before:
        raise ValueError(
            f"inputs: expected a shape that starts with {tuple(before)}, got {tuple(inputs.shape)}"
        )
    if not inputs.requires_grad:
        raise ValueError("inputs: expected requires_grad=True before the forward pass, got False")
    if not outputs.requires_grad:
        raise ValueError(
            "outputs: expected outputs computed from inputs with gradients enabled, got constants"
        )
    if directions is None:
        classes = outputs.shape[-1]
        directions = torch.eye(classes, dtype=outputs.dtype, device=outputs.device).expand(*before, -1, -1)
    check_floating("directions", directions, "(..., batch, rows, classes)")
    if directions.ndim < 2 or _shape_of_rows(directions) != outputs.shape or directions.shape[-2] < 1:
        raise ValueError(
            f"directions: expected ({', '.join(map(str, before))}, rows, {outputs.shape[-1]}), "
            f"got {tuple(directions.shape)}"
        )
    rows = [
        torch.autograd.grad(
            outputs, inputs, v, retain_graph=True, create_graph=create_graph, allow_unused=True
        )[0]
        for v in directions.detach().to(outputs.dtype).unbind(dim=-2)
    ]
    if rows[0] is None:
        raise ValueError(
            "outputs: expected outputs computed from inputs, got some that do not depend on them"
        )
    return torch.stack(rows, dim=len(before))


def top_class_directions(
    logits: Float[Tensor, "*members batch classes"],
) -> Float[Tensor, "*members batch 1 classes"]:
    """One row a sample: the unit vector of the class with the largest logit (the teacher's, usually).

    Args:
        logits: ``(..., batch, classes)``.

    Returns:
        ``(..., batch, 1, classes)``.

    Raises:
        ValueError: The dtype or the shape does not fit.
    """
    _check_logits("logits", logits)
    chosen = logits.detach().argmax(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, chosen, 1.0).unsqueeze(-2)


def random_directions(
    logits: Float[Tensor, "*members batch classes"], count: int, generator: torch.Generator
) -> Float[Tensor, "*members batch count classes"]:
    r"""Random signs over :math:`\sqrt{\mathrm{count}}`: the projected loss is the whole one on average.

    .. math:: \mathbb{E} \sum_k \lVert v_k^\top (J_s - J_t) \rVert^2 = \lVert J_s - J_t \rVert_F^2
              \qquad\text{for}\qquad \mathbb{E} \sum_k v_k v_k^\top = I

    Student and teacher must be given the *same* directions.

    Args:
        logits: ``(..., batch, classes)``, for shape, dtype and device; values are not read.
        count: Number of probes k, at least 1.
        generator: Where the signs come from, on the device of ``logits``.

    Returns:
        ``(..., batch, count, classes)``.

    Raises:
        ValueError: ``count``, the dtype or the shape does not fit.
    """
    _check_logits("logits", logits)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected a whole number from 1 on, got {count!r}")
    shape = (*logits.shape[:-1], count, logits.shape[-1])
    signs = torch.randint(0, 2, shape, generator=generator, device=logits.device)
    return (2 * signs - 1).to(logits.dtype) / count**0.5


def fisher_directions(
    teacher: Float[Tensor, "*members batch classes"],
    directions: Float[Tensor, "*members batch rows classes"] | None = None,
) -> Float[Tensor, "*members batch rows classes"]:
    r"""Directions with which the distance of log-probabilities' Jacobians is weighted by the teacher.

    .. math:: \tfrac12 \sum_i T_i \lVert \nabla \log T_i - \nabla \log S_i \rVert^2

    is the coefficient of :math:`\sigma^2` of :math:`\mathbb{E}\, KL(T(x + \xi) \,\|\, S(x + \xi))` for any smooth
    networks whose outputs agree at x. It is half of :func:`jacobian_loss` of the Jacobians, in these directions, of
    ``student.log_softmax(-1)`` and ``teacher.log_softmax(-1)``.

    Args:
        teacher: Logits ``(..., batch, classes)``, divided by the temperature where there is one.
        directions: To be weighted, such as those of :func:`random_directions`; None for the unit vectors.

    Returns:
        ``(..., batch, rows, classes)``: ``directions`` times :math:`\sqrt{T_i}`; a constant.

    Raises:
        ValueError: A dtype or a shape does not fit.
    """
    _check_logits("teacher", teacher)
    # Half of the logarithm: the root of a probability too small for its type is still there.
    roots = (at_least_float32(teacher.detach()).log_softmax(dim=-1) / 2).exp()
    if directions is None:
        return torch.diag_embed(roots)
    check_floating("directions", directions, "(..., batch, rows, classes)")
    if directions.ndim < 2 or _shape_of_rows(directions) != teacher.shape:
        raise ValueError(
            f"directions: expected ({', '.join(map(str, teacher.shape[:-1]))}, rows, {teacher.shape[-1]}), "
            f"got {tuple(directions.shape)}"
        )
    return directions * roots.unsqueeze(-2)


def _shape_of_rows(directions: Tensor) -> tuple[int, ...]:
    """The shape of what the directions are for."""
    return (*directions.shape[:-2], directions.shape[-1])


def _check_logits(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.ndim < 2 or value.numel() < 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (..., batch, classes) with at least one element, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
