"""Means, intervals and tests for a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # Student's t; scipy.stats would add a second to every command


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Return the mean of `values` and its Student t interval at `level`; no interval for one value."""
    sample = Sample.of(values)
    if sample.n < 2:
        return sample.mean, None, None
    low, high = sample.interval(level)
    return sample.mean, low, high


@dataclass(frozen=True)
class Sample:
    """What a t test needs of a sample: its size, mean and standard error (NaN for a single value)."""

    n: int
    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Summarise `values`.

        Raises:
            ValueError: If there is none.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0:
            raise ValueError("values: got none, expected at least one")
        error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
        return cls(int(array.size), float(array.mean()), error)

    @classmethod
    def exact(cls, value: float) -> Sample:
        """Summarise a value that nothing random enters: its standard error is 0."""
        return cls(1, value, 0.0)

    def interval(self, level: float) -> tuple[float, float]:
        """Return the two-sided Student t interval of the mean; the whole line for a single value."""
        if self.error == 0:
            return self.mean, self.mean
        if self.n < 2:
            return -math.inf, math.inf
        half = float(special.stdtrit(self.n - 1, 0.5 + level / 2)) * self.error
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float:
        """Return the one-sided p value against "the true mean is at most `bound`"."""
        if self.error == 0:
            return float(self.mean <= bound)
        if self.n < 2:
            return 1.0
        return float(special.stdtr(self.n - 1, (bound - self.mean) / self.error))

    def p_below(self, bound: float) -> float:
        """Return the one-sided p value against "the true mean is at least `bound`"."""
        return Sample(self.n, -self.mean, self.error).p_above(-bound)

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """Return the difference from zero that a two-sided test at `alpha` finds with `power`."""
        if self.error == 0:
            return 0.0
        if self.n < 2:
            return math.inf
        quantiles = special.stdtrit(self.n - 1, [1 - alpha / 2, power])
        return float(quantiles.sum() * self.error)


def holm_alphas(p_values: Sequence[float], alpha: float) -> list[float]:
    """Return the level at which each of several tests is decided by Holm's step-down procedure.

    With the p values in ascending order, the i-th (from 1) is decided at alpha / (m - i + 1) until
    one is not below its level; all further ones are decided at that level. Deciding each test at the
    level returned keeps the chance of any false rejection below `alpha`.
    """
    count = len(p_values)
    levels = [alpha] * count
    level, stopped = alpha, False
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        if not stopped:
            level = alpha / (count - rank)
            stopped = p_values[index] > level
        levels[index] = level
    return levels
