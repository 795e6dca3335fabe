"""Every residual of the derivation is 0, and a wrong factor, sign or power in any formula makes one that is not."""

import math

import pytest
import sympy as sp

from reproductions.concept_quantification import derivation
from reproductions.concept_quantification.derivation import FORMULAS, STEPS

MUTATIONS = {
    "factor": lambda e: 2 * e,
    "sign": lambda e: -e,
    "power": lambda e: e**2,
    "cells": lambda e: e * derivation.n,
}
MUTANTS = [
    pytest.param(step, name, change, id=f"{step.name}-{name}-{kind}")
    for step in STEPS
    for name in step.formulas
    for kind, change in MUTATIONS.items()
    if (step.name, name) != ("concepts", "closed") or kind == "power"
]


@pytest.mark.parametrize(("step", "name", "change"), MUTANTS)
def test_a_wrong_formula_leaves_a_residual(step, name, change):
    assert sp.simplify(step.residual({**FORMULAS, name: change(FORMULAS[name])})) != 0


@pytest.mark.parametrize("kind", ["factor", "cells"])
def test_a_common_factor_changes_no_concept(kind):
    changed = {**FORMULAS, "closed": MUTATIONS[kind](FORMULAS["closed"])}
    assert derivation.concept(changed) == 0


def test_the_optimum_lies_above_the_stop():
    assert derivation.least_mean_entropy(7) == pytest.approx(
        math.log(0.01 * math.sqrt(3.5)) + 0.5 * math.log(2 * math.pi * math.e)
    )
    assert -2.8 < derivation.least_mean_entropy(6) < derivation.least_mean_entropy(7)
