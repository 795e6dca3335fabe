"""Comparisons of two numbers: recordings of one, or arms of one setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import special  # Student's t; scipy.stats would add a second to every command

from reproductions.harness.number import Number, difference_unit
from reproductions.harness.profiles import HarnessError
from reproductions.harness.schema import split_key
from reproductions.harness.statistics import mean_interval

ALPHA = 0.05
ROUNDING = 1e-3


@dataclass(frozen=True)
class Agreement:
    """The outcome of comparing two recordings.

    Attributes:
        key: The number.
        verdict: `"agrees"`, `"differs"` or `"cannot tell"`.
        text: One sentence with the numbers.
        difference: Mean of the first minus mean of the second.
        width: Largest difference that chance explains; none where bits were compared.
    """

    key: str
    verdict: str
    text: str
    difference: float
    width: float | None = None


def agree(first: Number, second: Number, comparisons: int = 1) -> Agreement:
    """Compare two recordings of a number.

    With equal code, data, versions, device and threads the bits must be equal, provided that each run
    shared its training with the same seeds, if with any: partners change the rounding. Else the difference
    of the means is held against t·s·√(1/n + 1/m), s pooled, at 5 % divided by `comparisons`:
    *differs* if it is larger, *agrees* if that width is below the metric's δ, else *cannot tell*.
    Two values that nothing random enters must be equal to one part in a thousand.

    Args:
        first: A recording.
        second: Another one of the same number.
        comparisons: How many numbers are compared at once.
    """
    difference = first.mean - second.mean
    unit = difference_unit(first.unit)
    if _same_bits_expected(first, second):
        common = first.by_seed.keys() & second.by_seed.keys()
        same = all(first.by_seed[seed] == second.by_seed[seed] for seed in common)
        text = f"{'equal' if same else 'unequal'} bits on {len(common)} seeds, difference {difference:+.3g}{unit}"
        return Agreement(first.key, "agrees" if same else "differs", text, difference)
    if first.entry.fixed and second.entry.fixed:
        width = ROUNDING * max(abs(first.mean), abs(second.mean))
        verdict = "differs" if abs(difference) > width else "agrees"
    else:
        width = _width(first.values, second.values, ALPHA / comparisons)
        verdict = _judged(abs(difference), width, first.entry.delta)
    text = f"difference {difference:+.3g}{unit}, by chance up to {width:.3g}{unit}"
    return Agreement(first.key, verdict, text, difference, width)


def agree_all(pairs: Iterable[tuple[Number, Number]]) -> list[Agreement]:
    """Compare several pairs of recordings, at a level corrected for their number."""
    pairs = list(pairs)
    return [agree(first, second, len(pairs)) for first, second in pairs]


def compare(first: Number, second: Number) -> Agreement:
    """Compare any two numbers of one unit.

    Two recordings of one number are compared by :func:`agree`; two arms of one setting by their
    difference paired by seed; anything else as independent samples.

    Raises:
        HarnessError: If the units differ.
    """
    if first.unit != second.unit:
        raise HarnessError(f"{first.key} is in {first.unit!r}, {second.key} in {second.unit!r}")
    if first.key == second.key:
        return agree(first, second)
    key, unit = f"{first.full_key} - {second.full_key}", difference_unit(first.unit)
    differences = list(paired(first, second).values())
    if split_key(first.key)[:4] == split_key(second.key)[:4] and len(differences) > 1:
        mean, low, high = mean_interval(differences)
        assert low is not None
        assert high is not None
        text = f"paired difference {mean:+.3g}{unit}, 95 % interval {low:+.3g} to {high:+.3g}, n = {len(differences)}"
        return Agreement(key, "cannot tell" if low <= 0 <= high else "differs", text, mean, high - mean)
    difference, width = first.mean - second.mean, _width(first.values, second.values, ALPHA)
    text = f"difference {difference:+.3g}{unit}, by chance up to {width:.3g}{unit}"
    return Agreement(key, "differs" if abs(difference) > width else "cannot tell", text, difference, width)


def paired(first: Number, second: Number) -> dict[int, float]:
    """Return first - second by seed, over the seeds that both have; a fixed arm is a constant."""
    a, b = first.by_seed, second.by_seed
    if first.entry.fixed and not second.entry.fixed:
        a = dict.fromkeys(b, first.values[0])
    if second.entry.fixed and not first.entry.fixed:
        b = dict.fromkeys(a, second.values[0])
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def _same_bits_expected(first: Number, second: Number) -> bool:
    origins = [run.provenance for run in (*first.runs, *second.runs)]
    partners = [{run.run.seed: run.provenance.seeds for run in number.runs} for number in (first, second)]
    common = partners[0].keys() & partners[1].keys()
    same_partners = all(partners[0][seed] == partners[1][seed] for seed in common)
    return bool(common) and same_partners and all(origins[0].same_machine(origin) for origin in origins)


def _width(first: tuple[float, ...], second: tuple[float, ...], alpha: float) -> float:
    n, m = len(first), len(second)
    freedom = n + m - 2
    if freedom < 1:
        return math.inf
    squares = n * float(np.var(first)) + m * float(np.var(second))
    pooled = math.sqrt(squares / freedom)
    return float(special.stdtrit(freedom, 1 - alpha / 2)) * pooled * math.sqrt(1 / n + 1 / m)


def _judged(difference: float, width: float, delta: float | None) -> str:
    if difference > width:
        return "differs"
    return "agrees" if delta is not None and width < delta else "cannot tell"
