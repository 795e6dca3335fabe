"""Pairwise kernels between the rows of one or two matrices.

Every kernel is a function ``k(x, y=None, ...)`` of features ``(n, d)`` and ``(m, d)`` that returns
``(n, m)``; ``y=None`` means ``y = x``. :func:`log_kernel` gives the logarithm of any of them by name, the
right start for a normalisation over rows. Products run in at least float32, under autocast as well.
"""

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice, check_matrix, check_positive, check_tensor
from kdrefs._typing import Bool, Float

KERNELS = ("cosine", "gaussian", "laplace", "student_t", "cauchy")


def inner_products(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Inner product of every row of ``x`` with every row of ``y``, in their own precision under autocast too.

    Autocast would take the product in half precision, whose step near 1 (4e-3 in bfloat16) is coarser than the
    differences between cosines that the losses live on.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    check_matrix("x", x)
    check_matrix("y", y)
    if x.shape[1] != y.shape[1] or x.dtype != y.dtype:
        raise ValueError(
            f"y: expected {x.dtype} and {x.shape[1]} columns as in x, got {y.dtype} and {y.shape[1]}"
        )
    if not torch.is_autocast_enabled(x.device.type):  # entering the context costs as much as a small product
        return x @ y.mT
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide each row by its Euclidean norm; a zero row stays zero and gets no gradient.

    Rows are first scaled by their largest magnitude, so squares neither overflow nor underflow and the result
    depends on the direction only, whatever the norm. Rows without a number above the smallest normal one count as zero.
    """
    scaled = _scaled_rows(x)
    # Its norm is 0 or at least 1, up to rounding; the bound only keeps zero rows from 0 / 0.
    return scaled / torch.threshold(torch.linalg.vector_norm(scaled, dim=1, keepdim=True), 0.5, 0.5)


def cosines(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Cosine of every row with every row; 0 wherever a row is zero, which gets no gradient.

    The inner products of :func:`unit_rows` up to rounding. Here it is they that are divided by the norms, not the rows:
    less work where rows are wider than there are rows.
    """
    scaled = _scaled_rows(x)
    products = inner_products(scaled, scaled)
    inverse = torch.threshold(products.diagonal(), 0.25, 0.25).rsqrt()
    return products * inverse * inverse.unsqueeze(1)


def _scaled_rows(x: Tensor) -> Tensor:
    """Rows whose largest magnitude is 1, or zero rows."""
    check_matrix("x", x)
    x = at_least_float32(x)
    size = x.detach().abs().amax(dim=1, keepdim=True)
    return x * torch.threshold(size, torch.finfo(x.dtype).tiny, torch.inf).reciprocal()


def pairwise_squared_distances(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, same: Bool[Tensor, "n m"] | None = None
) -> Float[Tensor, "n m"]:
    r"""Squared Euclidean distances :math:`\lVert x_i - y_j \rVert^2`.

    Both sets are moved to the mean of ``x`` first, which leaves distances alone and keeps the expanded square
    from cancelling for features far from the origin. Pairs that are one row (``same``, or the diagonal with
    ``y=None``) have distance exactly zero, not a rounding error that a square root would magnify.
    """
    x, other = _pair(x, y)
    if same is not None:
        check_tensor("same", same)
        expected = (x.shape[0], x.shape[0] if other is None else other.shape[0])
        if same.shape != expected or same.dtype != torch.bool:
            raise ValueError(f"same: expected torch.bool {expected}, got {same.dtype} {tuple(same.shape)}")
    centre = x.detach().mean(dim=0, keepdim=True)
    x = x - centre
    other = x if other is None else other - centre
    squares = x.square().sum(dim=1).unsqueeze(1) + other.square().sum(dim=1).unsqueeze(0)
    distances = (squares - 2 * inner_products(x, other)).clamp(min=0)
    if y is None:
        same = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    return distances if same is None else distances.masked_fill(same, 0.0)


def cosine_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None) -> Float[Tensor, "n m"]:
    r"""Shifted cosine :math:`\tfrac12 (\cos(x_i, y_j) + 1) \in [0, 1]`; 1/2 wherever a row is zero."""
    return _cosine(x, y).clamp(0, 1)


def gaussian_kernel(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, bandwidth: float = 1.0
) -> Float[Tensor, "n m"]:
    r"""Gaussian :math:`\exp(-\lVert x_i - y_j\rVert^2 / \sigma)`: ``bandwidth`` is a squared length."""
    return log_kernel(x, y, kernel="gaussian", bandwidth=bandwidth).exp()


def laplace_kernel(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, bandwidth: float = 1.0
) -> Float[Tensor, "n m"]:
    r"""Laplacian :math:`\exp(-\lVert x_i - y_j\rVert / \sigma)`."""
    return log_kernel(x, y, kernel="laplace", bandwidth=bandwidth).exp()


def student_t_kernel(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, bandwidth: float = 1.0
) -> Float[Tensor, "n m"]:
    r"""Generalised Student-t of degree one, :math:`1 / (1 + \lVert x_i - y_j\rVert / \sigma)`."""
    return log_kernel(x, y, kernel="student_t", bandwidth=bandwidth).exp()


def cauchy_kernel(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None, *, bandwidth: float = 1.0
) -> Float[Tensor, "n m"]:
    r"""Cauchy :math:`1 / (1 + \lVert x_i - y_j\rVert^2 / \sigma^2)`."""
    return log_kernel(x, y, kernel="cauchy", bandwidth=bandwidth).exp()


def log_kernel(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"] | None = None,
    *,
    kernel: str = "cosine",
    bandwidth: float | None = None,
    same: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Logarithm of a kernel, finite wherever the features are.

    Args:
        x: Features ``(n, d)``.
        y: Features ``(m, d)``; ``x`` itself if None.
        kernel: ``"cosine"``, ``"gaussian"``, ``"laplace"``, ``"student_t"`` or ``"cauchy"``.
        bandwidth: Scale of the distance kernels (a squared length for the Gaussian, a length for the others).
            None: for the Gaussian the mean squared distance over all pairs, as a constant without gradient,
            which makes the kernel independent of the features' scale; 1 for the others. The cosine kernel
            has none.
        same: Marks the pairs that are one and the same row where ``y`` was taken out of ``x``.

    Returns:
        ``(n, m)``. The cosine kernel vanishes for opposite vectors; there its logarithm is held at that of
        the dtype's machine epsilon, the rounding error of the cosine itself.

    Raises:
        ValueError: A shape or dtype does not fit, the kernel is unknown, ``bandwidth`` is not positive or
            given for the cosine kernel.
    """
    check_choice("kernel", kernel, KERNELS)
    if kernel == "cosine":
        if bandwidth is not None:
            raise ValueError(f"bandwidth: the cosine kernel has none, expected None, got {bandwidth}")
        similarity = _cosine(x, y)
        return similarity.clamp(torch.finfo(similarity.dtype).eps, 1).log()
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    squared = pairwise_squared_distances(x, y, same=same)
    if kernel == "gaussian":
        if bandwidth is None:
            return -squared / _mean(squared)
        return -squared / bandwidth
    width = 1.0 if bandwidth is None else bandwidth
    if kernel == "cauchy":
        return -torch.log1p(squared / width**2)
    distance = _sqrt(squared) / width
    return -distance if kernel == "laplace" else -torch.log1p(distance)


def _cosine(x: Tensor, y: Tensor | None) -> Tensor:
    x, other = _pair(x, y)
    x = unit_rows(x)
    return (inner_products(x, x if other is None else unit_rows(other)) + 1) / 2


def _pair(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_matrix("x", x)
    if y is None:
        return at_least_float32(x), None
    check_matrix("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected {x.shape[1]} columns as in x, got {y.shape[1]}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _sqrt(square: Tensor) -> Tensor:
    """Square root with the gradient 0 at 0, where the true one is unbounded."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0.0)


def _mean(squared: Tensor) -> Tensor:
    """Mean over all pairs as a constant; 1 if all rows coincide."""
    mean = squared.detach().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))
