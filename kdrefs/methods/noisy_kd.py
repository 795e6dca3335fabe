r"""Noisy collaboration in knowledge distillation (Arani, Sarfraz and Zonooz, arXiv:1910.05057).

Three ways to put noise into distillation, each a small function around the ordinary loss:

- *fickle teacher*: the teacher's dropout stays active while it is asked (:func:`fickle_teacher`), so that it answers
  differently each time; :func:`averaged_logits` of many answers is the control, the mean without the noise;
- *soft randomisation*: the student sees the input with noise (:func:`add_noise`), the teacher without
  (:func:`soft_randomization_loss`);
- *messy collaboration*: labels are corrupted (:func:`corrupt_labels`) while teacher, student or both are trained.

No code of the authors was found. ``variant="kd_lib"`` is the port in SforAiDl/KD_Lib@a94d236, which does something
else.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_class_indices,
    check_floating,
    check_matrix,
    check_positive,
    check_same_batch,
    check_same_shape,
    check_tensor,
)
from kdrefs._typing import Float, Integer
from kdrefs.divergences import kl_divergence, softened_kl


@contextmanager
def fickle_teacher(teacher: nn.Module, rate: float | None = None) -> Iterator[nn.Module]:
    """Keep the dropout of a network active while all else in it is in eval mode.

    Batch normalisation uses its running statistics and does not change them. Every training flag and every rate is put
    back afterwards, also after an error. Gradients are not turned off: ask within ``torch.no_grad()``, or give the
    answers to a loss that detaches its teacher.

        with fickle_teacher(teacher), torch.no_grad():
            answer = teacher(images)

    Masks are drawn from torch's global generator, whose state :func:`kdrefs.training.fit` checkpoints.

    Args:
        teacher: Network with layers of dropout (``nn.Dropout``, its spatial and alpha forms).
        rate: Probability of dropping a unit, from 0 to below 1, in all of them; None for each layer's own.

    Yields:
        The network.

    Raises:
        ValueError: It has no dropout, or ``rate`` is out of range.
    """
    layers = [part for part in teacher.modules() if isinstance(part, _DropoutNd)]
    if not layers:
        raise ValueError(f"teacher: expected a network with dropout, found none in {type(teacher).__name__}")
    if rate is not None:
        _check_share("rate", rate, below=True)
    flags = {part: part.training for part in teacher.modules()}
    rates = [layer.p for layer in layers]
    try:
        teacher.eval()
        for layer in layers:
            layer.training = True
            layer.p = layer.p if rate is None else rate
        yield teacher
    finally:
        for part, training in flags.items():
            part.training = training
        for layer, before in zip(layers, rates, strict=True):
            layer.p = before


def averaged_logits(
    answers: Float[Tensor, "answers *samples classes"], temperature: float = 1.0
) -> Float[Tensor, "*samples classes"]:
    r"""Logits whose softened prediction is the mean of several softened predictions.

    .. math:: T \log \frac1A \sum_a \mathrm{softmax}(v_a / T)

    Args:
        answers: Logits ``(answers, ..., classes)`` of a fickle teacher, or of an ensemble.
        temperature: T of the distillation that they are for, above 0.

    Raises:
        ValueError: Not a floating tensor with at least one answer, or ``temperature`` is not above 0.
    """
    check_tensor("answers", answers)
    if answers.ndim < 2 or answers.shape[0] < 1 or not answers.is_floating_point():
        raise ValueError(
            "answers: expected a floating tensor (answers, ..., classes), at least one answer, "
            f"got {answers.dtype} of shape {tuple(answers.shape)}"
        )
    check_positive("temperature", temperature)
    log_p = (at_least_float32(answers) / temperature).log_softmax(dim=-1)
    return temperature * (log_p.logsumexp(dim=0) - math.log(answers.shape[0]))


def soft_randomization_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, "batch"],
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    divergence: str = "forward",
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Loss of a student that saw the input with noise, whose teacher saw it without.

    .. math:: L = (1 - a) \, CE\big(y, S(x + \delta)\big)
              + a \, \tau^2 \, KL\big(T^\tau(x) \,\|\, S^\tau(x + \delta)\big), \qquad \delta \sim N(0, \sigma^2)

    The picture in the literature note has the arguments of the divergence the other way round. Distillation needs the
    form above, which is the default; ``"reverse"`` is the printed one. With the same input for both it is
    :func:`kdrefs.methods.kd.kd_loss`. Sum over classes, mean over samples.

    Args:
        student: Logits ``(batch, classes)`` on :math:`x + \delta`.
        teacher: Logits on x, same shape; no gradient flows into them.
        labels: Class indices ``(batch,)``.
        temperature: :math:`\tau`, above 0.
        alpha: a, weight of the divergence, from 0 to 1; the labels have the rest.
        divergence: ``"forward"``, :math:`KL(T \| S)`, or ``"reverse"``, :math:`KL(S \| T)`.
        variant: None, ours. ``"kd_lib"``: the divergence averaged over batch *and* classes, ours divided by the number
            of classes (its defaults are a = 0.5 and :math:`\tau = 20`).

    Returns:
        Scalar in nats.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "student", student)
    check_positive("temperature", temperature)
    _check_share("alpha", alpha)
    check_choice("divergence", divergence, ("forward", "reverse"))
    if variant is not None:
        check_choice("variant", variant, ("kd_lib",))
    if divergence == "forward":
        soft = softened_kl(student, teacher, temperature)
    else:
        log_q, log_p = (
            (at_least_float32(x) / temperature).log_softmax(dim=1) for x in (student, teacher.detach())
        )
        soft = temperature**2 * kl_divergence(log_q, log_p)
    if variant == "kd_lib":
        soft = soft / student.shape[1]
    hard = F.cross_entropy(at_least_float32(student), labels.long())
    return torch.lerp(hard.to(soft.dtype), soft, alpha)


def add_noise(
    images: Float[Tensor, "*shape"],
    sigma: float,
    *,
    generator: torch.Generator | None = None,
    variant: str | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Add Gaussian noise of deviation :math:`\sigma` to every number; nothing is cut off.

    Args:
        images: Any shape, in the units of ``sigma`` (with [0, 1] images, a share of the whole range).
        sigma: From 0 on.
        generator: On the device of the images; None for torch's global one.
        variant: None, :math:`x + \sigma \epsilon`. ``"kd_lib"``: :math:`x (1 + \sigma \epsilon)`, which leaves black
            pixels as they are (its argument is the variance, 0.1 by default).

    Raises:
        ValueError: The images are not floating, or ``sigma`` is out of range.
    """
    check_floating("images", images)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise ValueError(f"sigma: expected a finite number from 0 on, got {sigma!r}")
    if variant is not None:
        check_choice("variant", variant, ("kd_lib",))
    noise = sigma * torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return images + (images * noise if variant == "kd_lib" else noise)


def corrupt_labels(
    labels: Integer[Tensor, "samples"],
    rate: float,
    classes: int,
    *,
    generator: torch.Generator,
    other: bool = True,
) -> Integer[Tensor, "samples"]:
    """Give a random part of the samples another class, to be done once before training.

    Args:
        labels: Class indices ``(samples,)`` on the CPU.
        rate: Share of the samples, from 0 to 1; their number is rounded.
        classes: Number of classes; at least two with ``other``.
        generator: On the CPU. The samples of a lower rate are among those of a higher one with an equal generator.
        other: Whether the new class is one of the *other* classes, each as likely. Else it is one of all, so that a
            share of ``1 / classes`` keeps its label by accident.

    Returns:
        A new tensor of the same type.

    Raises:
        ValueError: An argument is out of range.
    """
    check_class_indices("labels", labels)
    _check_share("rate", rate)
    least = 2 if other else 1
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < least:
        raise ValueError(f"classes: expected a whole number from {least} on, got {classes!r}")
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(classes - 1 if other else classes, (len(labels),), generator=generator)
    chosen = order[: round(rate * len(labels))]
    changed = labels.clone()
    new = drawn[chosen]
    if other:  # a step of 1 to classes - 1 from the true class, in int64, where small types cannot overflow
        new = (labels[chosen].long() + 1 + new) % classes
    changed[chosen] = new.to(labels.dtype)
    return changed


def _check_share(name: str, value: float, *, below: bool = False) -> None:
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value >= 0
        and (value < 1 if below else value <= 1)
    )
    if not inside:
        raise ValueError(f"{name}: expected a number from 0 to {'below ' if below else ''}1, got {value!r}")
