"""Divergences between discrete distributions: one reduction convention for every loss.

Distributions run along the last dimension. The sum is over the distribution, the mean over everything before
it (the samples): a loss does not change its scale with the batch size. Values are in nats unless stated.
The functions on log-probabilities take a probability of zero as ``-inf``; an outcome that neither side can
have counts nothing.
"""

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_positive
from kdrefs._typing import Float


def kl_divergence(
    log_p: Float[Tensor, "*samples outcomes"], log_q: Float[Tensor, "*samples outcomes"]
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence :math:`\sum_j p_j (\log p_j - \log q_j)`, mean over samples.

    Args:
        log_p: Log-probabilities ``(..., outcomes)`` of the reference distribution, usually the teacher's.
        log_q: Log-probabilities of the approximation, same shape.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: Shapes differ or a dtype is not floating.
    """
    return _kl(*_distributions(log_p, log_q))


def jeffreys_divergence(
    log_p: Float[Tensor, "*samples outcomes"], log_q: Float[Tensor, "*samples outcomes"]
) -> Float[Tensor, ""]:
    r"""Jeffreys divergence :math:`\sum_j (p_j - q_j)(\log p_j - \log q_j)`, mean over samples.

    The sum of both Kullback-Leibler divergences. Arguments, result and errors as in :func:`kl_divergence`.
    """
    log_p, log_q = _distributions(log_p, log_q)
    # Where the logarithms are equal both factors vanish, so cutting the gradient there is exact; the same
    # test keeps -inf - (-inf) out.
    gap = torch.where(log_p == log_q, 0.0, log_p - log_q)
    return ((log_p.exp() - log_q.exp()) * gap).sum(dim=-1).mean()


def quadratic_divergence(
    log_p: Float[Tensor, "*samples outcomes"], log_q: Float[Tensor, "*samples outcomes"]
) -> Float[Tensor, ""]:
    r"""Quadratic divergence :math:`\sum_j (p_j - q_j)^2`, mean over samples; a pure number, at most 2.

    Arguments and errors as in :func:`kl_divergence`.
    """
    log_p, log_q = _distributions(log_p, log_q)
    return (log_p.exp() - log_q.exp()).square().sum(dim=-1).mean()


def softened_kl(
    student: Float[Tensor, "*samples classes"],
    teacher: Float[Tensor, "*samples classes"],
    temperature: float,
    *,
    scale: bool = True,
) -> Float[Tensor, ""]:
    r"""KL divergence of softened predictions, times the squared temperature.

    .. math:: T^2 \, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    The factor keeps the gradient's size when the temperature changes (Hinton et al. 2015, section 2.1).

    Args:
        student: Logits ``(..., classes)``.
        teacher: Logits, same shape; no gradient flows into them.
        temperature: Above 0.
        scale: Multiply by :math:`T^2`.

    Returns:
        Scalar in nats: sum over classes, mean over samples.

    Raises:
        ValueError: Shapes differ, a dtype is not floating, or ``temperature`` is not positive.
    """
    log_q, log_p = _softened(student, teacher, temperature)
    return _kl(log_p, log_q, temperature**2 if scale else 1)


def softened_cross_entropy(
    student: Float[Tensor, "*samples classes"],
    teacher: Float[Tensor, "*samples classes"],
    temperature: float,
    *,
    scale: bool = False,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of softened predictions.

    .. math:: -\sum_k \mathrm{softmax}(t / T)_k \log \mathrm{softmax}(s / T)_k

    Same gradient as :func:`softened_kl` without the factor; the value is larger by the teacher's entropy.
    Arguments, result and errors as there, but the factor :math:`T^2` is off by default, as in the baselines
    of the PKT repository.
    """
    log_q, log_p = _softened(student, teacher, temperature)
    terms = log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_q)
    return -terms.sum(dim=-1).mean() * (temperature**2 if scale else 1)


def _kl(log_p: Tensor, log_q: Tensor, weight: float = 1.0) -> Tensor:
    # As few passes over the matrix as can be: in place, one sum, and the sign taken from that sum. The mask keeps
    # 0 (-inf - (-inf)) out, and 0 inf where a probability is too small for its type.
    p = log_p.exp()
    gap = (log_q - log_p).masked_fill_(p == 0, 0.0)
    samples = log_p.numel() // log_p.shape[-1]
    return torch.rsub((p * gap).sum(), 0.0, alpha=weight / samples)


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_positive("temperature", temperature)
    student, teacher = _distributions(student, teacher, names=("student", "teacher"))
    return (student / temperature).log_softmax(dim=-1), (teacher.detach() / temperature).log_softmax(dim=-1)


def _distributions(
    first: Tensor, second: Tensor, names: tuple[str, str] = ("log_p", "log_q")
) -> tuple[Tensor, Tensor]:
    for name, value in zip(names, (first, second), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.ndim < 1 or value.numel() < 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating tensor (..., outcomes) with at least one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    if first.shape != second.shape:
        raise ValueError(
            f"{names[1]}: expected the shape of {names[0]} {tuple(first.shape)}, got {tuple(second.shape)}"
        )
    return at_least_float32(first), at_least_float32(second)
