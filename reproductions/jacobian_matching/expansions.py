"""Expected losses under noise, exactly and as the note has them, for small smooth networks in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from kdrefs.methods.jacobian_matching import output_jacobian
from kdrefs.noise import noise_expansion

POINT = torch.tensor([[0.3, -0.2]], dtype=torch.float64)

Net = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]


def random_net(seed: int, *, affine: bool = False, inputs: int = 2, hidden: int = 8, outputs: int = 4) -> Net:
    """C tanh(A x + b) + d with random weights, or C x + d."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if affine:
        c, d = draw(outputs, inputs), draw(outputs)
        return lambda x: x @ c.T + d
    a, b, c, d = draw(hidden, inputs), draw(hidden), draw(outputs, hidden), draw(outputs)
    return lambda x: torch.tanh(x @ a.T + b) @ c.T + d


def softmax_of(net: Net) -> Net:
    """The net's probabilities."""
    return lambda x: net(x).softmax(-1)


def smooth_pair(seed: int = 1) -> tuple[Net, Net]:
    """Probabilities of two tanh networks of two inputs and four classes."""
    return softmax_of(random_net(2 * seed)), softmax_of(random_net(2 * seed + 1))


def squared_error(target: Net, student: Net) -> Loss:
    """Sum of squared differences of two nets' outputs."""
    return lambda x: (target(x) - student(x)).square().sum(1)


def cross_entropy(target: Net, student: Net) -> Loss:
    """Cross-entropy of two nets whose outputs are probabilities."""
    return lambda x: -(target(x) * student(x).log()).sum(1)


def constant(values: Tensor) -> Net:
    """Labels: the same whatever the input."""
    return lambda x: values.expand(len(x), -1) + 0 * x.sum()


def jacobians(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(N, K)`` and their Jacobians ``(N, K, D)``."""
    x = x.detach().requires_grad_()
    outputs = net(x)
    return outputs.detach(), output_jacobian(outputs, x, create_graph=False)


def as_printed(target: Net, student: Net, x: Tensor) -> Mapping[str, Tensor]:
    """The four coefficients of σ² that the note prints, by the names in ``propositions``; labels are ``target(x)``."""
    t, by_t = jacobians(target, x)
    s, by_s = jacobians(student, x)
    return {
        "squared error": (by_t - by_s).square().sum((1, 2)),
        "squared error, labels": by_s.square().sum((1, 2)),
        "cross-entropy": -((by_t * by_s).sum(2) / s).sum(1),
        "cross-entropy, labels": (t * by_s.square().sum(2) / s.square()).sum(1),
    }


def gauss_hermite(loss: Loss, x: Tensor, sigma: float, nodes: int = 60) -> Tensor:
    """E loss(x + σ z) for inputs ``(N, 2)`` by a rule that is exact for polynomials of degree 2 ``nodes`` - 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z = torch.from_numpy(np.stack(np.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2))
    w = torch.from_numpy(np.outer(weights, weights).reshape(-1)) / (2 * np.pi)
    return torch.stack([(w * loss(one + sigma * z)).sum() for one in x])


def monte_carlo(
    loss: Loss, x: Tensor, sigma: float, draws: int, generator: torch.Generator
) -> tuple[float, float]:
    """Mean over inputs and noise of loss(x + σ z), and its standard error over draws of the noise."""
    means = []
    for _ in range(draws):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        # The noise and its opposite: odd orders cancel instead of adding to the error.
        means.append(((loss(x + sigma * z) + loss(x - sigma * z)) / 2).mean())
    found = torch.stack(means).double()
    return found.mean().item(), (found.std() / draws**0.5).item()


def second_coefficient(loss: Loss, x: Tensor) -> Tensor:
    """The exact coefficient of σ², ``(N,)``."""
    return noise_expansion(loss, x).second


def extrapolated(loss: Loss, x: Tensor, sigma: float = 0.02) -> Tensor:
    """The same from quadrature alone: (E - loss) / σ² at two noise levels, the next order taken off."""
    slopes = [(gauss_hermite(loss, x, s, 40) - loss(x)) / s**2 for s in (sigma, sigma / 2)]
    return (4 * slopes[1] - slopes[0]) / 3


def kept_and_whole(scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """The note's cross-entropy term, and it with the dropped square, by scale of a student's Jacobian.

    Both have the same affine logits at the point; the student's slopes are the teacher's times the scale.
    """
    teacher = random_net(30, affine=True)
    value, _ = jacobians(teacher, POINT)
    kept, whole = [], []
    for scale in scales:
        student = softmax_of(partial(_rescaled, teacher, value, scale))
        printed = as_printed(softmax_of(teacher), student, POINT)["cross-entropy"].item()
        s, by_s = jacobians(student, POINT)
        kept.append(printed)
        whole.append(printed + (by_s.square().sum(2) / (2 * s)).sum().item())  # T = S at the point
    return kept, whole


def _rescaled(net: Net, value: Tensor, scale: float, x: Tensor) -> Tensor:
    return value + scale * (net(x) - value)


def at_the_kink(sigma: float, c: float = 1.0) -> float:
    """(E (c + relu(σ z))² - c²) / σ, by quadrature on the half line where relu is the identity."""
    points, weights = _legendre(200)
    z = 6 * (points + 1)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    above = 6 * (weights * density * ((c + sigma * z) ** 2 - c**2)).sum()
    return float(above / sigma)


@cache
def _legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return points, weights


def averaged_over_kinks(sigma: float, c: float = 1.0) -> float:
    """(E (c + relu(x + σ z))² - (c + relu(x))²) / σ², averaged over inputs x from U(-1, 1)."""
    x, weights = _legendre(400)
    below = np.array([math.erfc(-one / (sigma * math.sqrt(2))) / 2 for one in x])
    density = np.exp(-((x / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
    first = x * below + sigma * density  # E relu, then E relu²
    second = (x**2 + sigma**2) * below + x * sigma * density
    noisy = (weights * (2 * c * first + second)).sum() / 2
    return float((noisy - (c / 2 + 1 / 6)) / sigma**2)
