"""Three classes on three interleaved spirals in the plane, and rings of points around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TURNS = 3


def spirals(count: int, generator: torch.Generator, *, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    r"""Draw ``count`` points of each of three spirals.

    A point at share :math:`u \sim U(0, 1)` of its spiral's area lies at distance u from the centre and at the angle
    :math:`6 \pi \sqrt u` from its spiral's beginning, plus Gaussian noise that grows as :math:`u^{3/4}`. Neighbouring
    spirals lie apart as :math:`u^{1/2}`: in the middle they are close, at the rim they overlap most. The set of
    KaosEngineer/PriorNetworks@d6f6ffb, in units of its largest radius.

    Args:
        count: Points a spiral.
        generator: On the CPU.
        noise: Standard deviation of the noise at the rim, in units of :math:`1 / \sqrt{6 \pi}`.

    Returns:
        Points ``(3 count, 2)`` and labels ``(3 count,)``.

    Raises:
        ValueError: A number is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected a whole number from 1 on, got {count!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: expected a finite number from 0 on, got {noise}")
    labels = torch.arange(3).repeat_interleave(count)
    share = torch.rand(len(labels), generator=generator)
    angle = 2 * math.pi * (TURNS * share.sqrt() + labels / 3)
    centre = torch.stack([-angle.cos(), angle.sin()], dim=1) * share.unsqueeze(1)
    spread = noise * share**0.75 / math.sqrt(2 * math.pi * TURNS)
    return centre + spread.unsqueeze(1) * torch.randn(len(labels), 2, generator=generator), labels


def ring(count: int, inner: float, outer: float, generator: torch.Generator) -> Tensor:
    """Draw ``count`` points ``(count, 2)`` uniformly from the ring between two radii.

    Raises:
        ValueError: Not 0 <= inner < outer.
    """
    if not 0 <= inner < outer < math.inf:
        raise ValueError(f"inner, outer: expected 0 <= inner < outer, got {inner} and {outer}")
    area, turn = torch.rand(2, count, generator=generator)
    radius = (inner**2 + (outer**2 - inner**2) * area).sqrt()
    return torch.stack([radius * (2 * math.pi * turn).cos(), radius * (2 * math.pi * turn).sin()], dim=1)
