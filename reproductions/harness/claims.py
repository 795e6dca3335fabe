"""Claims and the verdicts on them, computed from the ledger whenever they are read.

Let d be the differences between two arms, paired by seed (same initial weights, batch order and
teacher), and δ the smallest difference that matters, fixed before the run.

`value`, only where the protocol is the source's (profile `paper`); 90 % interval of ours - printed,
which is the pair of one-sided tests at 5 %:

- **reproduced**: inside ±δ.
- **value differs**: wholly outside ±δ.
- **cannot tell**: anything else.
- **other protocol**: another profile; the numbers are shown, not judged.

`greater` and `contrast`, 95 % interval of the mean of d:

- **no effect beyond δ**: inside ±δ. Even a difference that is surely there is then below what matters.
- **direction holds**: above 0, and not inside ±δ.
- **contradicted**: below 0, and not inside ±δ.
- **underpowered**: anything else; the text says which difference would have been seen with 80 % power.

`order` takes each step of the order as `greater`: it holds if every step holds, is contradicted if
one step is at the level divided by the number of steps, has no effect beyond δ if one step has none.

`not_worse`, 95 % interval: **not worse** if above -δ, **worse** if wholly below -δ, else **underpowered**.

`identity`: **verified** or **refuted**.

**not run**: a number is missing. Levels of the primary claims of a profile are corrected by Holm's
procedure; claims that were not run count. An arm that nothing random enters is compared as a constant,
and the difference of two such arms is exact.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reproductions.harness.agreement import paired
from reproductions.harness.claims_file import Claim, ClaimError, load_claims
from reproductions.harness.errata import Evidence
from reproductions.harness.ledger import Ledger
from reproductions.harness.number import difference_unit
from reproductions.harness.statistics import Sample, holm_alphas

__all__ = [
    "ALPHA",
    "PROFILES",
    "Claim",
    "ClaimError",
    "Verdict",
    "headline",
    "judge",
    "load_claims",
    "paired",
    "verdicts",
    "verdicts_by_claim",
]

ALPHA = 0.05
PROFILES = ("quick", "standard", "paper")  # from the furthest to the nearest to the paper's protocol
UNDECIDED = {"not run", "other protocol"}


@dataclass(frozen=True)
class Verdict:
    """A verdict with what it rests on.

    Attributes:
        claim: The claim.
        profile: The profile it was judged on.
        verdict: One of the words in the module's description.
        text: One sentence with the numbers.
        estimate: Ours - printed, or the mean difference; for an order the smallest step.
        interval: At `level`; none where there is too little to give one.
        level: Confidence level of the interval after Holm's correction.
        n: Number of seeds.
        stale: Whether a number it rests on is stale.
    """

    claim: Claim
    profile: str
    verdict: str
    text: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    level: float | None = None
    n: int = 0
    stale: bool = False

    @property
    def primary(self) -> bool:
        return self.claim.primary


def verdicts(column: str, profile: str, ledger: Ledger, root: Path | None = None) -> list[Verdict]:
    """Judge every claim of a column that names keys of the profile, and every checked identity.

    Args:
        column: Name of the column.
        profile: Name of the profile.
        ledger: The column's ledger.
        root: Folder that holds the columns; default: the `reproductions` package.
    """
    claims = [claim for claim in load_claims(column, root) if profile in claim.keys or claim.check]
    return judge(claims, profile, ledger)


def verdicts_by_claim(
    column: str, ledger: Ledger, root: Path | None = None
) -> dict[str, tuple[Verdict, ...]]:
    """Every verdict of a column by claim, one for each of :data:`PROFILES` that the claim names.

    An identity that a check decides is the same on every profile: it is checked and listed once.
    """
    claims = load_claims(column, root)
    found: dict[str, tuple[Verdict, ...]] = {claim.id: () for claim in claims}
    for profile in PROFILES:
        due = [one for one in claims if profile in one.keys or (one.check and not found[one.id])]
        for verdict in judge(due, profile, ledger):
            found[verdict.claim.id] += (verdict,)
    return found


def headline(verdicts_of_claim: Sequence[Verdict]) -> Verdict:
    """The verdict that stands for a claim: of those decided, the one nearest to the paper's protocol."""
    nearest = sorted(verdicts_of_claim, key=lambda one: PROFILES.index(one.profile), reverse=True)
    return next((one for one in nearest if one.verdict not in UNDECIDED), nearest[0])


def judge(claims: Sequence[Claim], profile: str, ledger: Ledger) -> list[Verdict]:
    """Judge `claims` on one profile; see :func:`verdicts`."""
    samples = {claim.id: _samples(claim, profile, ledger) for claim in claims}
    tested = [claim for claim in claims if claim.primary and claim.kind != "identity"]
    levels = holm_alphas([_p_value(c, samples[c.id], c.delta_of(profile)) for c in tested], ALPHA)
    alphas = dict(zip((claim.id for claim in tested), levels, strict=True))
    found = [_verdict(c, profile, ledger, samples[c.id], alphas.get(c.id, ALPHA)) for c in claims]
    return [replace(v, stale=_stale(v.claim, profile, ledger)) for v in found]


def _samples(claim: Claim, profile: str, ledger: Ledger) -> list[Sample]:
    """Return the differences that decide a claim, one sample a step; none if a number is missing."""
    keys = claim.keys.get(profile, ())
    if claim.kind == "identity" or not all(key in ledger for key in keys):
        return []
    numbers = [ledger.number(key) for key in keys]
    if claim.kind == "value":
        assert isinstance(claim.printed, float)
        differences = [[value - claim.printed for value in numbers[0].values]]
    elif claim.kind == "contrast":
        one, two = paired(*numbers[:2]), paired(*numbers[2:])
        differences = [[one[seed] - two[seed] for seed in one if seed in two]]
    else:
        differences = [list(paired(a, b).values()) for a, b in itertools.pairwise(numbers)]
    if all(number.entry.fixed for number in numbers):
        return [Sample.exact(values[0]) for values in differences if values]
    return [Sample.of(values) for values in differences] if all(differences) else []


def _p_value(claim: Claim, samples: list[Sample], delta: float) -> float:
    """Return the p value whose comparison with α is the claim's own decision."""
    if not samples:
        return 1.0
    if claim.kind == "value":
        return max(samples[0].p_above(-delta), samples[0].p_below(delta))
    if claim.kind == "not_worse":
        return min(1.0, 2 * samples[0].p_above(-delta))
    return max(min(1.0, 2 * min(s.p_above(0), s.p_below(0))) for s in samples)


def _verdict(claim: Claim, profile: str, ledger: Ledger, samples: list[Sample], alpha: float) -> Verdict:
    if claim.kind == "identity":
        return _identity(claim, profile, ledger)
    if not samples:
        return Verdict(claim, profile, "not run", "Not run: the ledger lacks a number of it.")
    delta = claim.delta_of(profile)
    step = min(samples, key=lambda sample: sample.mean)
    if claim.kind == "value":
        level = 1 - 2 * alpha
        word = value_verdict(step, delta, level) if profile == "paper" else "other protocol"
    elif claim.kind == "not_worse":
        level = 1 - alpha
        word = not_worse_verdict(step, delta, level)
    else:
        level = 1 - alpha
        word = order_verdict(samples, delta, level)
    interval = None if math.isnan(step.error) else step.interval(level)
    unit = ledger.number(claim.keys[profile][0]).unit
    text = _sentence(claim, word, step, interval, level, delta, unit, alpha)
    return Verdict(claim, profile, word, text, step.mean, interval, level, min(s.n for s in samples))


def value_verdict(sample: Sample, delta: float, level: float = 0.9) -> str:
    """Judge ours - printed; see the module's description."""
    low, high = sample.interval(level)
    if -delta < low and high < delta:
        return "reproduced"
    return "value differs" if low > delta or high < -delta else "cannot tell"


def greater_verdict(sample: Sample, delta: float, level: float = 0.95) -> str:
    """Judge a paired difference that should be above 0; see the module's description."""
    low, high = sample.interval(level)
    if -delta < low and high < delta:
        return "no effect beyond δ"
    return "direction holds" if low > 0 else "contradicted" if high < 0 else "underpowered"


def order_verdict(steps: Sequence[Sample], delta: float, level: float = 0.95) -> str:
    """Judge an order by its steps; see the module's description."""
    words = [greater_verdict(step, delta, level) for step in steps]
    strict = 1 - (1 - level) / len(steps)
    if any(greater_verdict(step, delta, strict) == "contradicted" for step in steps):
        return "contradicted"
    if all(word == "direction holds" for word in words):
        return "direction holds"
    return "no effect beyond δ" if "no effect beyond δ" in words else "underpowered"


def not_worse_verdict(sample: Sample, delta: float, level: float = 0.95) -> str:
    """Judge a paired difference that should be above -δ; see the module's description."""
    low, high = sample.interval(level)
    return "not worse" if low > -delta else "worse" if high < -delta else "underpowered"


def _identity(claim: Claim, profile: str, ledger: Ledger) -> Verdict:
    if claim.check is not None:
        module, _, name = claim.check.partition(":")
        try:
            check = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ClaimError(f"claim {claim.id!r}: no check {claim.check!r} ({error})") from None
        evidence: Evidence = check()
        return Verdict(claim, profile, "verified" if evidence.holds else "refuted", evidence.summary)
    keys = claim.keys[profile]
    if not all(key in ledger for key in keys):
        return Verdict(claim, profile, "not run", "Not run: the ledger lacks a number of it.")
    values = [value for key in keys for value in ledger.number(key).values]
    worst, delta = max(abs(value) for value in values), claim.delta_of(profile)
    text = f"Largest absolute value {worst:.2g}, tolerance {delta:.2g}."
    return Verdict(claim, profile, "verified" if worst <= delta else "refuted", text, worst, n=len(values))


def _stale(claim: Claim, profile: str, ledger: Ledger) -> bool:
    keys = [key for key in claim.keys.get(profile, ()) if key in ledger]
    return any(ledger.number(key).status == "stale" for key in keys)


def _sentence(
    claim: Claim,
    word: str,
    step: Sample,
    interval: tuple[float, float] | None,
    level: float,
    delta: float,
    unit: str,
    alpha: float,
) -> str:
    """Return the verdict's sentence: difference, interval, seeds, and what could have been seen."""
    what = {"value": "Ours − printed", "contrast": "Difference of the differences"}.get(
        claim.kind, "Difference"
    )
    if claim.kind == "order":
        what = "Smallest step"
    unit = difference_unit(unit)
    if interval is None:
        return f"{what} {step.mean:+.3g}{unit} from one seed, so no interval; δ = {delta:g}{unit}: {word}."
    low, high = interval
    # What differences of equal means leave over in floating point would be printed to three digits.
    mean = 0.0 if abs(step.mean) < 1e-9 * max(abs(low), abs(high)) else step.mean
    text = (
        f"{what} {mean:+.3g}{unit} ({100 * level:.3g} % interval {low:+.3g} to {high:+.3g}, "
        f"n = {step.n}), δ = {delta:g}{unit}: {word}"
    )
    if word == "underpowered" and claim.kind == "not_worse":
        text += "; the interval reaches across −δ"
    elif word == "underpowered" and math.isfinite(step.detectable(alpha)):
        text += f"; a difference of {step.detectable(alpha):.2g}{unit} would have been seen with 80 % power"
    return text + "."
