"""PKT as its authors' two repositories compute it, with gradients that stay finite.

``official_*`` follow passalis/probabilistic_kt@a58fd1b (``nn/pkt.py``; RepDistiller's copy is bit-identical),
``pkth_loss`` follows passalis/pkth@5766e63 (``nn/pkt_transfer.py``). All are means over the :math:`N^2`
entries. They are here so that published loss weights can be carried over; the definitions to build on are in
:mod:`kdrefs.methods.pkt`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice
from kdrefs.kernels import inner_products


def official_pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """``cosine_similarity_loss`` of the PKT repository."""
    p = _normalised(_cosine(teacher, eps))
    q = _normalised(_cosine(student, eps))
    return (p * ((p + eps) / (q + eps)).log()).mean()


def official_supervised_loss(student: Tensor, labels: Tensor, eps: float = 1e-7) -> Tensor:
    """``supervised_loss`` of the PKT repository, whose targets are float32 whatever the features are."""
    same = (labels.unsqueeze(1) == labels.unsqueeze(0)).float()
    p = _normalised(same)
    q = _normalised(_cosine(student, eps))
    return (p * ((p + eps) / (q + eps)).log()).mean()


def pkth_loss(student: Tensor, teacher: Tensor, kernel: str, divergence: str) -> Tensor:
    """``prob_loss`` of the PKT-H repository with its default scales and the same kernel on both sides."""
    check_choice("kernel", kernel, {*_PKTH_KERNELS, "combined"})
    check_choice("divergence", divergence, {*_PKTH_DIVERGENCES, "combined"})
    if (kernel == "combined") != (divergence == "combined"):
        raise ValueError(
            f"divergence: 'combined' goes with kernel 'combined' only, got {kernel!r}, {divergence!r}"
        )
    if kernel == "combined":
        return pkth_loss(student, teacher, "cosine", "jeffreys") + pkth_loss(
            student, teacher, "student_t", "jeffreys"
        )
    of = _PKTH_KERNELS[kernel]
    return _PKTH_DIVERGENCES[divergence](_normalised(of(teacher)), _normalised(of(student))).mean()


def _cosine(features: Tensor, eps: float) -> Tensor:
    features = at_least_float32(features)
    square = features.square().sum(dim=1, keepdim=True)
    # Norm 0 for zero rows without the infinite slope of the square root there: eps then divides nothing.
    positive = square > 0
    norm = torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0.0)
    unit = features / (norm + eps)
    return (inner_products(unit, unit) + 1.0) / 2.0


def _distances(features: Tensor, eps: float = 1e-6) -> Tensor:
    features = at_least_float32(features)
    square = features.square().sum(dim=1)
    squared = square.unsqueeze(1) + square.unsqueeze(0) - 2 * inner_products(features, features)
    # The diagonal is zero, not the rounding error of the expanded square, which the root would magnify.
    squared = squared.clamp(min=0).masked_fill(
        torch.eye(len(squared), dtype=torch.bool, device=squared.device), 0
    )
    return (squared + eps).sqrt()


def _normalised(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(dim=1, keepdim=True)


def _adaptive_rbf(features: Tensor) -> Tensor:
    distances = _distances(features)
    return (-distances / distances.mean().detach()).exp()


_PKTH_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda x: (-_distances(x)).exp(),  # the distance is not squared: a Laplacian by another name
    "adaptive_rbf": _adaptive_rbf,
    "cosine": lambda x: _cosine(x, 1e-6),
    "student_t": lambda x: 1 / (1 + _distances(x)),
    "cauchy": lambda x: 1 / (1 + _distances(x) ** 2),
}
_PKTH_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda p, q: p * (1e-6 + p / (1e-6 + q)).log(),
    "abs": lambda p, q: (p - q).abs(),
    "squared": lambda p, q: (p - q) ** 2,
    "jeffreys": lambda p, q: (p - q) * (p.log() - q.log()),
    "exponential": lambda p, q: p * (p.log() - q.log()) ** 2,
    "kagan": lambda p, q: (p - q) ** 2 / p,
}
