r"""Quadratic mutual information between features and class labels (Torkkola, JMLR 3, 2003).

Passalis and Tefas (ECCV 2018, arXiv:1803.10837) motivate PKT by it. The Kullback-Leibler divergence in the mutual
information becomes a squared difference, and with Gaussian kernel densities every integral becomes a sum over pairs of
samples. It is the biased HSIC between features and labels, :func:`biased_hsic`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_class_indices,
    check_matrix,
    check_positive,
    check_same_batch,
)
from kdrefs._typing import Float, Integer
from kdrefs.kernels import inner_products, unit_rows
from kdrefs.pair_sums import class_pair_sums


class InformationPotentials(NamedTuple):
    """The three terms of the quadratic mutual information, scalars; see :func:`information_potentials`.

    Attributes:
        within: Pairs of one class.
        all: All pairs.
        between: Pairs of a class with all samples, its own included.
    """

    within: Float[Tensor, ""]
    all: Float[Tensor, ""]
    between: Float[Tensor, ""]


def information_potentials(
    features: Float[Tensor, "batch width"],
    labels: Integer[Tensor, "batch"],
    bandwidth: float | None = None,
    *,
    classes: int | None = None,
    kernel: str = "gaussian",
    density: bool = False,
) -> InformationPotentials:
    r"""Information potentials of features with class labels, exact, without a matrix of all pairs.

    .. math:: V_{IN} = \frac{1}{N^2} \sum_p \sum_{k, l \in p} K_{kl}, \qquad
        V_{ALL} = \frac{1}{N^2} \Big( \sum_p \pi_p^2 \Big) \sum_{k, l} K_{kl}, \qquad
        V_{BTW} = \frac{1}{N^2} \sum_p \pi_p \sum_{k \in p} \sum_l K_{kl}

    with the share :math:`\pi_p` of class p among the N samples. These are the integrals
    :math:`\sum_c \int p(x, c)^2`, :math:`\sum_c \int (p(x) P(c))^2` and :math:`\sum_c \int p(x, c) p(x) P(c)` of
    kernel densities :math:`p(x, c) = \frac1N \sum_{k \in c} g_v(x - x_k)` with Gaussians of variance :math:`v` in each
    direction: :math:`K_{kl} = \int g_v(x - x_k) g_v(x - x_l) dx = g_{2v}(x_k - x_l)`. In the units of
    :func:`kdrefs.kernels.gaussian_kernel`, whose ``bandwidth`` is :math:`\sigma`, that is

    .. math:: \sigma = 4 v, \qquad g_{2v}(d) = (\pi \sigma)^{-D/2} \, e^{-\lVert d \rVert^2 / \sigma}.

    Args:
        features: ``(batch, width)``.
        labels: Class of each sample ``(batch,)`` in any order.
        bandwidth: :math:`\sigma`, a squared length. None for the Gaussian: the mean squared distance over all pairs
            (:func:`mean_squared_distance`), as a constant without gradient, so that the scale of the features has
            no influence. The cosine kernel has none.
        classes: Number of classes; labels must then lie between 0 and ``classes - 1``, which is not checked. None:
            whatever numbers occur are classes, which are looked up in the labels and so waits for the device; give
            the number under ``torch.compile`` and ``torch.vmap``.
        kernel: ``"gaussian"``, or ``"cosine"``: :math:`K_{kl} = \frac12 (1 + \cos(x_k, x_l))`, which PKT is trained
            with. No density has it for its integral.
        density: With the factor :math:`(\pi\sigma)^{-D/2}`, the integrals themselves. Without, :math:`K_{kk} = 1`:
            the same up to that factor, which depends on width and bandwidth (so that two feature spaces compare
            without it only) and in hundreds of dimensions leaves the range of floating-point numbers.

    Returns:
        Three scalars in at least float32: pure numbers, or 1 / length :sup:`D` with ``density=True``.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Time grows with :math:`N^2 D` for the Gaussian (first derivatives only) and with :math:`N D` for the cosine, memory
    with :math:`N D` and the square of the number of classes. Data-parallel training: pairs run over the whole batch,
    so gather features and labels first (:func:`kdrefs.training.gather_rows`).
    """
    features, labels, classes = _checked(features, labels, classes, kernel, bandwidth, density)
    samples = features.shape[0]
    counts = _class_sums(torch.ones_like(features[:, :1]), labels, classes)
    if kernel == "cosine":
        directions = _class_sums(unit_rows(features), labels, classes)
        sums = (inner_products(counts, counts) + inner_products(directions, directions)) / 2
    else:
        sums = _gaussian_sums(features, labels, classes, bandwidth, density)
    prior, sums = counts.squeeze(1) / samples, sums / samples**2
    return InformationPotentials(
        within=sums.diagonal().sum(),
        all=prior.square().sum() * sums.sum(),
        between=(prior * sums.sum(dim=1)).sum(),
    )


def quadratic_mutual_information(
    features: Float[Tensor, "batch width"],
    labels: Integer[Tensor, "batch"],
    bandwidth: float | None = None,
    *,
    classes: int | None = None,
    kernel: str = "gaussian",
    density: bool = False,
) -> Float[Tensor, ""]:
    r"""Quadratic mutual information of features with class labels.

    .. math:: I = \sum_c \int \big( p(x, c) - p(x) P(c) \big)^2 dx = V_{IN} + V_{ALL} - 2 V_{BTW}
        = \frac{1}{N^2} \operatorname{tr}(K H L H), \qquad L_{kl} = [c_k = c_l], \quad H = I - \tfrac1N 1 1^\top

    It is 0 for a single class or equal features and never negative. With classes of equal size it is
    :math:`V_{IN} - V_{ALL}`. A constant, or a term of the row or of the column, added to the kernel changes nothing.

    For the cosine kernel it is :math:`\frac12 \sum_c \pi_c^2 \lVert m_c - m \rVert^2` with the means of the unit rows
    of a class and of all. The Gaussian's potentials all but cancel where classes hardly differ: float32 then leaves an
    error near :math:`10^{-7} V_{IN}`.

    Arguments, errors and costs are those of :func:`information_potentials`.

    Returns:
        Scalar in at least float32, a pure number (1 / length :sup:`D` with ``density=True``).
    """
    if kernel == "cosine":
        features, labels, classes = _checked(features, labels, classes, kernel, bandwidth, density)
        units = unit_rows(features)
        centred = _class_sums(units - units.mean(dim=0), labels, classes)
        return centred.square().sum() / (2 * features.shape[0] ** 2)
    within, everything, between = information_potentials(
        features, labels, bandwidth, classes=classes, kernel=kernel, density=density
    )
    return within + everything - 2 * between


def biased_hsic(
    kernel: Float[Tensor, "batch batch"], other: Float[Tensor, "batch batch"]
) -> Float[Tensor, ""]:
    r"""Biased Hilbert-Schmidt independence criterion of two kernel matrices (Gretton et al., ALT 2005).

    .. math:: \frac{1}{N^2} \operatorname{tr}(K H L H), \qquad H = I - \tfrac1N 1 1^\top

    Gretton et al. divide by :math:`(N - 1)^2`; with :math:`N^2` and the matrix of equal labels for one of the two it is
    the :func:`quadratic_mutual_information`.

    Args:
        kernel: Symmetric kernel matrix K, ``(batch, batch)``.
        other: L, of the same shape.

    Returns:
        Scalar in the product of the kernels' units.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    check_matrix("kernel", kernel)
    check_matrix("other", other)
    samples = kernel.shape[0]
    for name, value in (("kernel", kernel), ("other", other)):
        if value.shape != (samples, samples):
            raise ValueError(f"{name}: expected shape ({samples}, {samples}), got {tuple(value.shape)}")
    kernel, other = at_least_float32(kernel), at_least_float32(other)
    centred = kernel - kernel.mean(dim=0, keepdim=True)
    centred = centred - centred.mean(dim=1, keepdim=True)
    return (centred * other).sum() / samples**2


def mean_squared_distance(features: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    r"""Mean of :math:`\lVert x_k - x_l \rVert^2` over all pairs, a sample with itself included.

    .. math:: \frac{1}{N^2} \sum_{k, l} \lVert x_k - x_l \rVert^2 = \frac2N \sum_k \lVert x_k - \bar x \rVert^2
    """
    check_matrix("features", features)
    features = at_least_float32(features)
    return 2 * (features - features.mean(dim=0)).square().sum(dim=1).mean()


def _gaussian_sums(
    features: Tensor, labels: Tensor, classes: int, bandwidth: float | None, density: bool
) -> Tensor:
    """Kernel sums over the pairs of every two classes; their scale is a tensor, so that nothing waits for it."""
    if bandwidth is None:
        mean = mean_squared_distance(features.detach())
        sigma = torch.where(mean > 0, mean, torch.ones_like(mean))
        sums = class_pair_sums(features / sigma.sqrt(), labels, classes, bandwidth=1.0)
    else:
        sigma = features.new_full((), bandwidth)
        sums = class_pair_sums(features, labels, classes, bandwidth=bandwidth)
    return sums * (math.pi * sigma) ** (-features.shape[1] / 2) if density else sums


def _class_sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    return rows.new_zeros(classes, rows.shape[1]).index_add(0, labels, rows)


def _checked(
    features: Any, labels: Any, classes: Any, kernel: Any, bandwidth: Any, density: Any
) -> tuple[Tensor, Tensor, int]:
    """Features in at least float32, labels from 0 on and their number."""
    check_matrix("features", features)
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "features", features)
    check_choice("kernel", kernel, ("cosine", "gaussian"))
    if kernel == "cosine" and bandwidth is not None:
        raise ValueError(f"bandwidth: the cosine kernel has none, expected None, got {bandwidth}")
    if kernel == "cosine" and density:
        raise ValueError("density: the cosine kernel is no integral of densities, expected False, got True")
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    if classes is None:
        found, labels = labels.unique(return_inverse=True)
        classes = found.shape[0]
    elif isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes: expected a whole number above 0, got {classes!r}")
    return at_least_float32(features), labels.long(), classes
