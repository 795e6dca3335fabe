"""The steps from the objective to the threshold: every residual is 0, a wrong formula makes one that is not."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import sympy as sp

from reproductions.kcd import derivation, example
from reproductions.kcd.derivation import FORMULAS, STEPS, F, V, Y, a, b, n, q, v
from reproductions.kcd.equations import one_parameter
from reproductions.kcd.selection import falling_entropies


def mutants(formula: sp.Expr) -> Iterator[tuple[str, sp.Expr]]:
    """The formula with its sign turned, one part left out or one part turned."""
    yield "sign", -formula
    for place, part in enumerate(formula.args):
        others = formula.args[:place] + formula.args[place + 1 :]
        if isinstance(formula, sp.Add):
            yield f"without {place}", formula.func(*others)
            yield f"turned {place}", formula.func(*others, -part)
        if isinstance(formula, sp.Mul):
            yield f"without {place}", formula.func(*others)
    if isinstance(formula, sp.Pow):
        yield "without its exponent", formula.base
    if formula.has(a):
        yield "b for a", formula.subs(a, b)
    if formula.has(q):
        yield "1 - q for q", formula.subs(q, 1 - q)
    if formula.has(Y):
        yield "1 - Y for Y", formula.subs(Y, 1 - Y)


MUTANTS = [
    pytest.param(name, wrong, id=f"{name}-{kind}")
    for name, formula in FORMULAS.items()
    for kind, wrong in mutants(formula)
    if sp.simplify(sp.expand_log(wrong - formula, force=True)) != 0
]


@pytest.mark.parametrize(("name", "wrong"), MUTANTS)
def test_a_wrong_formula_is_noticed(name, wrong):
    changed = {**FORMULAS, name: wrong}
    residuals = [step.residual(changed) for step in STEPS if name in step.formulas]
    assert any(residual != 0 for residual in residuals)


def test_there_are_wrong_formulas_of_every_kind():
    assert {str(mutant.values[0]) for mutant in MUTANTS} == FORMULAS.keys()


def test_formulas_agree_with_numbers():
    low, high, share = 0.07, 0.31, 0.4
    at = {a: low, b: high, q: share}
    gap = math.log(low + high) - sum(
        weight * math.log(p / weight) for weight, p in ((1 - share, low), (share, high))
    )
    posterior = np.array([low, high]) / (low + high)
    divergence = sum(
        weight * math.log(weight / p) for weight, p in zip((1 - share, share), posterior, strict=True)
    )
    assert float(FORMULAS["gap"].subs(at)) == pytest.approx(gap) == pytest.approx(divergence)
    mean = 0.0
    for count, value in enumerate((0.5, 1.25, 0.1), start=1):
        mean = float(FORMULAS["running mean"].subs({F: count, V: mean, v: value}))
    assert mean == pytest.approx((0.5 + 1.25 + 0.1) / 3)


def test_best_common_distribution_is_best_on_a_grid():
    odds = FORMULAS["common"].subs(n, 2).doit()
    weights, low, high = (0.7, 0.3), (0.1, 0.2), (0.3, 0.4)
    values = {derivation.T[k + 1]: weights[k] for k in range(2)}
    values |= {derivation.LA[k + 1]: math.log(low[k]) for k in range(2)}
    values |= {derivation.LB[k + 1]: math.log(high[k]) for k in range(2)}
    best = 1 / (1 + math.exp(-float(odds.subs(values))))

    def bound(share: float) -> float:
        return sum(
            w * float(FORMULAS["bound"].subs({a: x, b: y, q: share}))
            for w, x, y in zip(weights, low, high, strict=True)
        )

    assert all(bound(best) > bound(best + step) for step in (-0.01, 0.01))


def test_the_example_is_a_distribution_and_its_bounds_stand_in_order():
    assert sum(sum(pair) for point in example.JOINT for pair in point) == 48
    assert all(sum(point) == 1 for point in example.TEACHER)
    found = {name: float(value.evalf(20)) for name, value in example.bounds().items()}
    low = np.array(example.JOINT)[..., 0] / 48
    high = np.array(example.JOINT)[..., 1] / 48
    weights = np.array([[float(x) for x in point] for point in example.TEACHER])
    assert found["objective"] == pytest.approx((weights * np.log(low + high)).sum())
    assert found["posterior of each pair"] == pytest.approx(found["objective"], abs=1e-12)
    assert found["equation 11"] == pytest.approx((weights * np.log(2 * high))[:2].sum())
    order = ["equation 9", "threshold", "one Q", "one Q a point", "objective", "equation 11"]
    assert [found[name] for name in order] == sorted(found[name] for name in order)
    assert example.table().count("\n") == len(found) + 1


def test_numbers_of_the_errata():
    before, after = one_parameter()
    assert before == pytest.approx(2 * math.log(0.5))
    assert after == pytest.approx(math.log(0.9) + math.log(0.1))
    steady = falling_entropies(100.0)  # the frequency alone decides: nobody who was dropped can come back
    assert steady[1] == 0
