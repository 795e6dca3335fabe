r"""Ensemble distribution distillation, EnD² (Malinin, Mlodozeniec and Gales, ICLR 2020, arXiv:1905.00076).

A single network learns the *distribution* of an ensemble's predictions, not only their mean. Its logits z are the
logarithms of a Dirichlet's concentrations, :math:`\alpha_c = e^{z_c}`, so that the mean of the Dirichlet is the softmax
of z as ever and the sum :math:`\alpha_0`, the precision, says how much the members agree. From both follows what the
ensemble's own predictions give: total uncertainty, and its parts by data and by knowledge.

Everything is computed from logarithms, without a difference of large terms: precisions of 1e-13 and of 1e20
have as many right digits as a precision of 1. Definitions follow the authors' code, KaosEngineer/PriorNetworks@d6f6ffb.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice, check_matrix, check_positive, check_same_batch
from kdrefs._typing import Float
from kdrefs.divergences import kl_divergence

_LARGEST = 50.0  # logarithm of the largest precision: float32 still holds it times 1e15
_SERIES = 8.0  # from here on five terms of the asymptotic series are exact to 1e-11


class Uncertainty(NamedTuple):
    """Uncertainty of predictions, one number each a sample.

    Attributes:
        total: Entropy of the mean prediction in nats.
        data: Mean entropy of the predictions in nats, what would be left if the model were known.
        knowledge: Mutual information of label and model in nats: total less data.
        epkl: Expected divergence of two independent predictions from each other in nats, at least ``knowledge``.
    """

    total: Tensor
    data: Tensor
    knowledge: Tensor
    epkl: Tensor


def end2_loss(
    student: Float[Tensor, "batch classes"],
    ensemble: Float[Tensor, "batch members classes"],
    *,
    temperature: float = 1.0,
    smoothing: float = 1e-3,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood of the members' predictions under the student's Dirichlet, times :math:`T^2`.

    .. math:: L = -T^2 \, \frac1M \sum_m \log \mathrm{Dir}(\pi_m; \alpha), \qquad
              \alpha = e^{z / T}, \quad \pi_m = (1 - \gamma) \, \mathrm{softmax}(v_m / T) + \gamma / K

    Equation 8 of the paper, mean over the samples. It is not bounded below: where all members agree, the density at
    their common prediction grows with the precision without end, smoothed or not. Smoothing keeps the members'
    logarithms finite, and a temperature that falls from 10 to 1 (:func:`temperature_schedule`) spreads out where the
    members agree too closely at the beginning.

    With :math:`g_c` the mean of the members' logarithms and :math:`p` the student's softmax, it is without its factor

    .. math:: \alpha_0 \sum_c p_c (\log p_c - g_c) + \sum_c h(\alpha_c) - h(\alpha_0) + \sum_c g_c, \qquad
              h(\alpha) = \log \Gamma(\alpha) - \alpha \log \alpha + \alpha,

    in which nothing of the size of :math:`\alpha_0 \log \alpha_0` has to cancel. This is how it is computed.

    Args:
        student: Logits z ``(batch, classes)``.
        ensemble: Logits v ``(batch, members, classes)`` of the members; no gradient flows into them.
        temperature: T, above 0; of the student and of the members.
        smoothing: :math:`\gamma`, from 0 to below 1.
        variant: None, the formula. ``"official"``: the authors' ``DirichletEnDDLoss``, which adds 1e-8 to the arguments
            of every logarithm and of the gamma functions; equal to the formula to about 1e-8 of the largest term.

    Returns:
        Scalar in nats. A precision above e^50 counts as e^50, so that value and gradient stay finite.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_sides(student, ensemble, temperature)
    if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number from 0 to below 1, got {smoothing!r}")
    if variant is not None:
        check_choice("variant", variant, ("official",))
    log_alpha = at_least_float32(student) / temperature
    log_pi = (at_least_float32(ensemble.detach()) / temperature).log_softmax(dim=-1)
    if variant == "official":
        return temperature**2 * _official(log_alpha, log_pi, smoothing).mean()
    mean_log = _smoothed(log_pi, smoothing).mean(dim=1)
    log_precision = log_alpha.logsumexp(dim=-1)
    log_p = log_alpha.log_softmax(dim=-1)
    gap = (log_p.exp() * (log_p - mean_log)).sum(dim=-1)
    shape = _rest(log_alpha).sum(dim=-1) - _rest(log_precision) + mean_log.sum(dim=-1)
    return temperature**2 * (log_precision.clamp(max=_LARGEST).exp() * gap + shape).mean()


def end_loss(
    student: Float[Tensor, "batch classes"],
    ensemble: Float[Tensor, "batch members classes"],
    *,
    temperature: float = 1.0,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Ensemble distillation (EnD), the baseline: the student matches the members' *mean* prediction.

    .. math:: L = T^2 \, KL(\bar\pi \,\|\, \mathrm{softmax}(z / T)), \qquad
              \bar\pi = \frac1M \sum_m \mathrm{softmax}(v_m / T)

    Knowledge distillation from a mean of probabilities; with one member it is :func:`kdrefs.divergences.softened_kl`.

    Args:
        student: Logits z ``(batch, classes)``.
        ensemble: Logits v ``(batch, members, classes)`` of the members; no gradient flows into them.
        temperature: T, above 0.
        variant: None, the formula. ``"official"``: the authors' ``EnDLoss``, the cross-entropy in place of the
            divergence (larger by the target's entropy, same gradient) and a mean over batch *and* classes: its gradient
            is ours divided by the number of classes.

    Returns:
        Scalar in nats: sum over classes, mean over samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_sides(student, ensemble, temperature)
    if variant is not None:
        check_choice("variant", variant, ("official",))
    log_q = (at_least_float32(student) / temperature).log_softmax(dim=-1)
    log_pi = (at_least_float32(ensemble.detach()) / temperature).log_softmax(dim=-1)
    log_mean = log_pi.logsumexp(dim=1) - math.log(ensemble.shape[1])
    if variant == "official":
        return -(temperature**2) * (log_mean.exp() * log_q).mean()
    return temperature**2 * kl_divergence(log_mean, log_q)


def dirichlet_uncertainty(logits: Float[Tensor, "*samples classes"]) -> Uncertainty:
    r"""Uncertainty of a Dirichlet with concentrations :math:`\alpha = e^z` (equations 10 and 11 of the paper).

    .. math:: total = H[\alpha / \alpha_0], \qquad
              data = -\sum_c \frac{\alpha_c}{\alpha_0} \big(\psi(\alpha_c + 1) - \psi(\alpha_0 + 1)\big), \qquad
              knowledge = total - data, \qquad EPKL = \frac{K - 1}{\alpha_0}

    Args:
        logits: z ``(..., classes)``, at temperature 1. Gradients flow.

    Returns:
        Four tensors ``(...)``. The small difference ``knowledge`` is computed without subtracting ``data`` from
        ``total``, so that it has all its digits at high precisions too.

    Raises:
        ValueError: The logits are not floating, or have no classes.
    """
    z = at_least_float32(_checked(logits, "logits", ("classes",)))
    log_p, log_precision = z.log_softmax(dim=-1), z.logsumexp(dim=-1)
    p = log_p.exp()
    alpha, precision = (x.clamp(max=_LARGEST).exp() for x in (z, log_precision))
    return Uncertainty(
        total=-(p * log_p).sum(dim=-1),
        data=-(p * (torch.digamma(1 + alpha) - torch.digamma(1 + precision).unsqueeze(-1))).sum(dim=-1),
        knowledge=(p * _log_gap(z)).sum(dim=-1) - _log_gap(log_precision),
        epkl=(logits.shape[-1] - 1) * (-log_precision).exp(),
    )


def ensemble_uncertainty(logits: Float[Tensor, "*samples members classes"]) -> Uncertainty:
    r"""The same four numbers of an ensemble's own predictions :math:`\pi_m`, with equal weights.

    .. math:: total = H[\bar\pi], \quad data = \frac1M \sum_m H[\pi_m], \quad
              knowledge = \frac1M \sum_m KL(\pi_m \| \bar\pi), \quad
              EPKL = \frac1{M^2} \sum_{m, n} KL(\pi_m \| \pi_n)

    The double sum is taken in one pass over the members,
    :math:`EPKL = knowledge + \frac1M \sum_m KL(\bar\pi \| \pi_m)`. Pairs of a member with itself are in it; without
    them it is larger by the factor M / (M - 1). The authors' code does not divide by M² at all.

    Args:
        logits: ``(..., members, classes)``. Gradients flow.

    Returns:
        Four tensors ``(...)``.

    Raises:
        ValueError: The logits are not floating, or have no members or no classes.
    """
    _checked(logits, "logits", ("members", "classes"))
    log_pi = at_least_float32(logits).log_softmax(dim=-1)
    log_mean = log_pi.logsumexp(dim=-2) - math.log(logits.shape[-2])
    mean, gap = log_mean.exp(), log_pi - log_mean.unsqueeze(-2)
    knowledge = (log_pi.exp() * gap).sum(dim=-1).mean(dim=-1)
    return Uncertainty(
        total=-(mean * log_mean).sum(dim=-1),
        data=-(log_pi.exp() * log_pi).sum(dim=-1).mean(dim=-1),
        knowledge=knowledge,
        epkl=knowledge - (mean * gap.mean(dim=-2)).sum(dim=-1),
    )


def temperature_schedule(
    epoch: float, *, initial: float = 10.0, final: float = 1.0, hold: float = 20, decay: float = 30
) -> float:
    """Temperature at a moment of training: constant, then linear, then constant.

    ``LRTempScheduler`` of the authors' code; the defaults are those of its golden vector, for 60 epochs or more.

    Args:
        epoch: From 0 on; any unit of time (epochs, steps, share of the training) if the others have it too.
        initial: Temperature up to ``hold``, above 0.
        final: Temperature from ``hold + decay`` on, above 0.
        hold: How long it stays at ``initial``, from 0 on.
        decay: How long it takes to reach ``final``, above 0.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value in (("initial", initial), ("final", final), ("decay", decay)):
        check_positive(name, value)
    for name, value in (("epoch", epoch), ("hold", hold)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number from 0 on, got {value!r}")
    done = min(max((epoch - hold) / decay, 0.0), 1.0)
    return initial + (final - initial) * done


def _official(log_alpha: Tensor, log_pi: Tensor, smoothing: float, epsilon: float = 1e-8) -> Tensor:
    alpha, share = log_alpha.exp(), 1 / log_pi.shape[-1]
    pi = (1 - smoothing) * (log_pi.exp() - share) + share
    mean_log = (pi + epsilon).log().mean(dim=1)
    constant = torch.lgamma(alpha + epsilon).sum(dim=-1) - torch.lgamma(alpha.sum(dim=-1) + epsilon)
    return constant - ((alpha - 1) * mean_log).sum(dim=-1)


def _smoothed(log_pi: Tensor, smoothing: float) -> Tensor:
    if smoothing == 0:
        return log_pi
    floor = torch.full_like(log_pi, math.log(smoothing / log_pi.shape[-1]))
    return torch.logaddexp(log_pi + math.log1p(-smoothing), floor)


def _rest(log_alpha: Tensor) -> Tensor:
    r"""What Stirling's two largest terms leave: :math:`\log\Gamma(\alpha) - \alpha \log\alpha + \alpha`."""
    low, high = _branches(log_alpha)
    x = high.reciprocal()
    series = x * (1 / 12 - x**2 * (1 / 360 - x**2 * (1 / 1260 - x**2 * (1 / 1680 - x**2 / 1188))))
    small = torch.lgamma(1 + low) - log_alpha - low * log_alpha.clamp(max=math.log(_SERIES)) + low
    large = (math.log(2 * math.pi) - log_alpha) / 2 + series
    return torch.where(log_alpha < math.log(_SERIES), small, large)


def _log_gap(log_alpha: Tensor) -> Tensor:
    r""":math:`\psi(\alpha + 1) - \log\alpha`, which tends to :math:`1 / 2\alpha`."""
    low, high = _branches(log_alpha)
    x = high.reciprocal()
    tail = 1 / 12 - x**2 * (1 / 120 - x**2 * (1 / 252 - x**2 * (1 / 240 - x**2 / 132)))
    return torch.where(log_alpha < math.log(_SERIES), torch.digamma(1 + low) - log_alpha, x / 2 - x**2 * tail)


def _branches(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Concentrations cut off so that each side of a ``where`` is finite, value and gradient, beyond its own range."""
    return (
        log_alpha.clamp(max=math.log(_SERIES)).exp(),
        log_alpha.clamp(min=math.log(_SERIES), max=_LARGEST).exp(),
    )


def _check_sides(student: Tensor, ensemble: Tensor, temperature: float) -> None:
    check_matrix("student", student)
    _checked(ensemble, "ensemble", ("batch", "members", "classes"), exact=True)
    check_same_batch("ensemble", ensemble, "student", student)
    if ensemble.shape[2] != student.shape[1]:
        raise ValueError(
            f"ensemble: expected as many classes as student ({student.shape[1]}), got {ensemble.shape[2]}"
        )
    check_positive("temperature", temperature)


def _checked(value: Tensor, name: str, last: tuple[str, ...], *, exact: bool = False) -> Tensor:
    """Return ``value`` if it is floating and its last dimensions, or all of them, are there and not empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    wrong = value.ndim != len(last) if exact else value.ndim < len(last)
    if wrong or min(value.shape[value.ndim - len(last) :]) < 1 or not value.is_floating_point():
        expected = ", ".join(last if exact else ("...", *last))
        raise ValueError(
            f"{name}: expected a floating tensor ({expected}), all at least 1, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
    return value
