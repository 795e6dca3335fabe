"""Every residual of the derivation is 0, and a wrong sign, factor or index anywhere makes one that is not."""

from collections.abc import Iterator

import numpy as np
import pytest
import sympy as sp
import torch

from kdrefs.kernels import gaussian_kernel
from reproductions.qmi import derivation, integrals
from reproductions.qmi.derivation import FORMULAS, STEPS, C, D, J, N, c, delta, p, q, r, v

INDICES = {p, q, c}
SIZES = {0: 5, 1: 2, 2: 3, 3: 4, 4: 7}  # of three classes, and what a shifted index reads beyond them


def mutants(expression: sp.Expr) -> Iterator[tuple[str, sp.Expr]]:
    """The expression with one sign flipped, one factor or power dropped, or one index shifted, in every place."""
    if expression == C:
        yield from (("limit", C - 1), ("limit", C + 1))
        return
    yield "sign", -expression
    if isinstance(expression, sp.Pow):
        yield "factor", sp.Integer(1)
    yield from _within(expression)


def _within(node: sp.Basic) -> Iterator[tuple[str, sp.Basic]]:
    for place, part in enumerate(node.args):
        others = node.args[:place] + node.args[place + 1 :]
        if isinstance(node, sp.Add):
            yield "sign", node.func(*others, -part)
        if isinstance(node, sp.Mul):
            yield "factor", node.func(*others)
        if isinstance(node, sp.Pow) and place == 1 and part not in (1, -1):
            yield "power", node.args[0]
        if part in INDICES and isinstance(node, sp.Indexed | sp.KroneckerDelta):
            yield "index", node.func(*node.args[:place], part + 1, *node.args[place + 1 :])
        if isinstance(node, sp.Sum) and place > 0:
            index, first, last = part
            yield "limit", sp.Sum(node.function, (index, first, last - 1))
            yield "limit", sp.Sum(node.function, (index, first + 1, last))
            continue  # what stands in the limits is no part of the summand
        for kind, changed in _within(part):
            yield kind, node.func(*node.args[:place], changed, *node.args[place + 1 :])


MUTANTS = [
    pytest.param(name, changed, id=f"{name}-{number}-{kind}")
    for name, formula in FORMULAS.items()
    for number, (kind, changed) in enumerate(mutants(formula))
    if changed != formula
]


def is_zero(residual: sp.Expr) -> bool:
    """Whether a residual vanishes for three classes of 2, 3 and 4: for every pair of classes, in two dimensions."""
    for first in range(1, 4):
        for second in range(1, 4):
            value = residual.subs({C: 3, N: 9, D: 2, p: first, q: second}).doit()
            value = value.replace(lambda e: isinstance(e, sp.Indexed) and e.base == J, _size)
            if sp.simplify(value.subs({v: sp.Rational(3, 7), r: sp.Rational(5, 11), c: 2})) != 0:
                return False
    return True


def _size(indexed: sp.Indexed) -> sp.Integer:
    return sp.Integer(SIZES[int(indexed.indices[0].subs(c, 2))])


def test_the_mutants_are_of_every_kind():
    kinds = {param.id.rpartition("-")[2] for param in MUTANTS}
    assert kinds == {"sign", "factor", "power", "index", "limit"}
    assert len(MUTANTS) > 80


@pytest.mark.parametrize(("name", "changed"), MUTANTS)
def test_a_wrong_formula_makes_a_residual_that_is_not_zero(name, changed):
    concerned = [step for step in STEPS if name in step.formulas]
    residuals = [step.residual(FORMULAS | {name: changed}) for step in concerned]
    assert any(residual != 0 and not is_zero(residual) for residual in residuals)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_can_fail_by_each_of_its_formulas(step):
    for name in step.formulas:
        assert any(
            step.residual(FORMULAS | {name: changed}) != 0 for _, changed in mutants(FORMULAS[name])
        ), name


def test_the_note_s_own_formulas_fail():
    limit = derivation.marginal(FORMULAS | {"classes": J[p]})
    bracket = derivation.over_classes(J[c] / N) / N**2
    assert limit != 0
    assert bracket == 1 / N**2
    assert derivation.potential_between(FORMULAS | {"between": bracket}) != 0
    others = (1 - delta(p, q)) * J[p] / N**3
    assert derivation.potential_between(FORMULAS | {"between": others}) != 0


def test_coefficients_are_those_of_the_centred_labels_matrix():
    labels = torch.arange(3).repeat_interleave(torch.tensor([2, 3, 4]))
    same = (labels.unsqueeze(1) == labels).double()
    h = torch.eye(9, dtype=torch.float64) - 1 / 9
    expected = (h @ same @ h / 81).numpy()
    found = np.empty((9, 9))
    for k in range(9):
        for l in range(9):
            value = (
                FORMULAS["centred"].subs({C: 3, N: 9, p: int(labels[k]) + 1, q: int(labels[l]) + 1}).doit()
            )
            found[k, l] = float(value.replace(lambda e: isinstance(e, sp.Indexed), _size))
    np.testing.assert_allclose(found, expected, atol=1e-15)


def test_integrals_know_no_closed_form_and_agree():
    found = integrals.evidence()
    assert found.holds, found.summary
    # Two points of one class: p(x, c) = p(x), and every term is the mean of the kernel.
    points = np.array([[0.0], [1.0]])
    values = integrals.integrated_potentials(points, np.array([4, 4]), 0.5)
    kernel = gaussian_kernel(torch.from_numpy(points), bandwidth=2.0) / np.sqrt(2 * np.pi)
    for name in ("within", "all", "between"):
        assert values[name] == pytest.approx(float(kernel.mean()), rel=1e-12)
    assert values["qmi"] == pytest.approx(0, abs=1e-15)
