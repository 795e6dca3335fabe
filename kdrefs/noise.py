r"""The expected loss under small Gaussian noise on the input, as a series in the noise's variance.

Adding noise to the input and penalising derivatives are two sides of one expansion (Bishop, Neural Computation 1995;
Srinivas and Fleuret, ICML 2018). :func:`noise_expansion` computes its coefficients for any loss.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import check_tensor
from kdrefs._typing import Float


class NoiseExpansion(NamedTuple):
    r"""The expected loss of each sample, :math:`\ell + c_2 \sigma^2 + c_4 \sigma^4 + O(\sigma^6)`.

    Attributes:
        value: The loss without noise ``(batch,)``.
        second: :math:`c_2 = \Delta \ell / 2`.
        fourth: :math:`c_4 = \Delta^2 \ell / 8`; None with ``order=2``.
        second_error: Standard error of ``second``; None where it is exact.
        fourth_error: Standard error of ``fourth``; None where it is exact.
    """

    value: Tensor
    second: Tensor
    fourth: Tensor | None = None
    second_error: Tensor | None = None
    fourth_error: Tensor | None = None

    def at(self, sigma: float) -> Tensor:
        """The expansion's value at a noise level, ``(batch,)``."""
        total = self.value + sigma**2 * self.second
        return total if self.fourth is None else total + sigma**4 * self.fourth


def noise_expansion(
    loss: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *input"],
    order: int = 2,
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 32,
) -> NoiseExpansion:
    r"""Coefficients of the expected loss under isotropic Gaussian noise on the input.

    .. math:: \mathbb{E}_{z \sim N(0, I)}\, \ell(x + \sigma z)
              = \ell(x) + \frac{\sigma^2}{2} \Delta \ell(x) + \frac{\sigma^4}{8} \Delta^2 \ell(x) + O(\sigma^6)

    for a loss with six continuous derivatives (four for the first coefficient). Second derivatives along a direction
    are taken forward over reverse, so no Hessian is kept: D directions for :math:`\Delta \ell`, D (D + 1) / 2 pairs for
    :math:`\Delta^2 \ell`. With ``probes``, Hutchinson's estimate from random signs instead,
    :math:`\Delta \ell = \mathbb{E}\, v^\top \nabla^2 \ell\, v`, with its standard error.

    Where an activation has a kink, derivatives are those of the piece on which x lies; what the kinks contribute to an
    average over data, which is of order :math:`\sigma^2` too, is not in them.

    Args:
        loss: Takes ``(batch, *input)``, returns ``(batch,)``, the loss of each sample alone; it is run under
            ``torch.func.grad``, ``jvp`` and ``vmap``.
        x: Inputs ``(batch, *input)``; float64 for differences that count.
        order: 2, or 4 for the next coefficient as well.
        probes: Number of random directions (pairs of them for :math:`c_4`), at least 2; None: exact.
        generator: Where the random directions come from; needed with ``probes``.
        chunk: Directions taken at a time: more is faster and takes more memory.

    Returns:
        The coefficients, constants with respect to the weights.

    Raises:
        ValueError: An argument or the shape of the loss does not fit.
    """
    check_tensor("x", x)
    if x.ndim < 2 or x.numel() < 1 or not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating tensor (batch, *input), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if order not in (2, 4):
        raise ValueError(f"order: expected 2 or 4, got {order!r}")
    _check_count("chunk", chunk)
    if probes is not None:
        _check_count("probes", probes, least=2)
        if generator is None:
            raise ValueError("generator: expected one, since probes are drawn from it, got None")
    with torch.no_grad(), warnings.catch_warnings():
        # What PyTorch loads at the first use of forward mode warns of its own way to do so.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        x = x.detach().clone(memory_format=torch.contiguous_format)  # forward mode takes no expanded tensor
        value = loss(x)
        if value.shape != x.shape[:1]:
            raise ValueError(f"loss: expected one value a sample ({len(x)},), got {tuple(value.shape)}")
        if probes is not None and generator is not None:
            second, second_error = _estimate(loss, x, probes, generator, chunk, 1)
            if order == 2:
                return NoiseExpansion(value, second / 2, None, second_error / 2)
            fourth, fourth_error = _estimate(loss, x, probes, generator, chunk, 2)
            return NoiseExpansion(value, second / 2, fourth / 8, second_error / 2, fourth_error / 8)
        second = _exact(loss, x, chunk, 1)
        fourth_exact = _exact(loss, x, chunk, 2) / 8 if order == 4 else None
        return NoiseExpansion(value, second / 2, fourth_exact)


def _derivative(loss: Callable[[Tensor], Tensor], x: Tensor, directions: tuple[Tensor, ...]) -> Tensor:
    """Second derivatives along every one of ``directions``, one on top of the other, of each sample's loss."""
    *inner, v = directions

    def below(x: Tensor) -> Tensor:
        return _derivative(loss, x, tuple(inner)) if inner else loss(x)

    gradient = torch.func.grad(lambda x: below(x).sum())
    along = torch.func.jvp(gradient, (x,), (v,))[1]
    return (along * v).flatten(1).sum(dim=1)


def _exact(loss: Callable[[Tensor], Tensor], x: Tensor, chunk: int, power: int) -> Tensor:
    """``power`` Laplacians: the sum over all axes, or over all pairs of them."""
    size = x[0].numel()
    axes = (
        torch.arange(size, device=x.device)[None]
        if power == 1
        else torch.triu_indices(size, size, device=x.device)
    )
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for part in axes.split(chunk, dim=1):
        units = [
            F.one_hot(index, size).to(x.dtype).view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            for index in part
        ]
        found = torch.vmap(lambda *v: _derivative(loss, x, v))(*units)
        if power == 2:  # a pair of different axes stands for both orders
            found = found * torch.where(part[0] == part[1], 1, 2)[:, None]
        total += found.sum(dim=0)
    return total


def _estimate(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    probes: int,
    generator: torch.Generator,
    chunk: int,
    power: int,
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of ``power`` Laplacians over random signs, drawn for each sample."""
    parts = []
    for start in range(0, probes, chunk):
        count = min(chunk, probes - start)
        signs = [
            2 * torch.randint(0, 2, (count, *x.shape), generator=generator, device=x.device).to(x.dtype) - 1
            for _ in range(power)
        ]
        parts.append(torch.vmap(lambda *v: _derivative(loss, x, v))(*signs))
    drawn = torch.cat(parts)
    return drawn.mean(dim=0), drawn.std(dim=0) / probes**0.5


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least} on, got {value!r}")
