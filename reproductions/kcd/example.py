"""Exact numbers: three points of two classes, with a bit for whether a point is of value."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import sympy as sp

from reproductions.kcd.derivation import FORMULAS, a, b, q

# JOINT[x][c] = (a, b) in 48ths; together they are 1.
JOINT = (((1, 7), (2, 4)), ((5, 3), (1, 6)), ((4, 2), (7, 6)))
TEACHER = (
    (sp.Rational(3, 4), sp.Rational(1, 4)),
    (sp.Rational(1, 3), sp.Rational(2, 3)),
    (sp.Rational(1, 2),) * 2,
)
KEPT = (1, 1, 0)  # the third point is dropped


def bounds() -> dict[str, sp.Expr]:
    """The objective of equation 3 and what the paper's steps make of it, exactly, on a small joint distribution.

    Returns:
        By name: the objective; the bound with the posterior of each pair, with the best Q of each point, with the best
        Q of all, with a threshold; and what equations 9 and 11 have printed.
    """
    pairs = [(point, label) for point, label in product(range(len(JOINT)), range(2))]
    weight = {pair: TEACHER[pair[0]][pair[1]] for pair in pairs}
    low, high = ({pair: sp.Rational(JOINT[pair[0]][pair[1]][y], 48) for pair in pairs} for y in range(2))

    def bound(share: Mapping[tuple[int, int], sp.Expr]) -> sp.Expr:
        return sp.Add(
            *(
                weight[p] * FORMULAS["bound"].subs({a: low[p], b: high[p], q: share[p]}, simultaneous=True)
                for p in pairs
            )
        )

    def best(group: list[tuple[int, int]]) -> sp.Expr:
        odds = sum(weight[p] * sp.log(high[p] / low[p]) for p in group) / sum(weight[p] for p in group)
        return 1 / (1 + sp.exp(-odds))

    of_point = [best([p for p in pairs if p[0] == point]) for point in range(len(JOINT))]
    of_all = best(pairs)
    return {
        "objective": sp.Add(*(weight[p] * sp.log(low[p] + high[p]) for p in pairs)),
        "posterior of each pair": bound({p: high[p] / (low[p] + high[p]) for p in pairs}),
        "one Q a point": bound({p: of_point[p[0]] for p in pairs}),
        "one Q": bound(dict.fromkeys(pairs, of_all)),
        "threshold": sp.Add(*(weight[p] * sp.log(high[p] if KEPT[p[0]] else low[p]) for p in pairs)),
        "equation 9": sp.Add(*(weight[p] * KEPT[p[0]] * sp.log(low[p] * high[p]) for p in pairs)),
        "equation 11": sp.Add(*(weight[p] * KEPT[p[0]] * sp.log(2 * high[p]) for p in pairs)),
    }


NAMES = {
    "objective": "the objective, equation 3",
    "posterior of each pair": r"bound, $Q_{x,c}$ the posterior of each pair",
    "one Q a point": r"bound, the best $Q_x$ of each point",
    "one Q": r"bound, the best single $Q$",
    "threshold": r"bound, $Q$ one-hot: the third point dropped",
    "equation 9": "equation 9 as printed",
    "equation 11": "equation 11",
}


def table() -> str:
    """The exact values with five digits, and how far each is from the objective, as a Markdown table."""
    found = bounds()
    lines = ["| | Value | Below the objective by |", "|:--|--:|--:|"]
    for name, value in found.items():
        number, gap = (float(x.evalf(20)) for x in (value, found["objective"] - value))
        lines.append(f"| {NAMES[name]} | {number:.4f} | {0.0 if abs(gap) < 1e-12 else gap:.4f} |")
    return "\n".join(lines)
