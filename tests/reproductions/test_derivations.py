"""What holds of every derivation: residuals of exactly 0, no formula without a step, the claim and the table."""

import pytest
import sympy as sp

from reproductions.concept_quantification import derivation as concept_quantification
from reproductions.kcd import derivation as kcd
from reproductions.qmi import derivation as qmi

MODULES = {"concept_quantification": concept_quantification, "kcd": kcd, "qmi": qmi}
every_derivation = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
STEPS = [
    pytest.param(step, module.FORMULAS, id=f"{name}-{step.name}")
    for name, module in MODULES.items()
    for step in module.STEPS
]


@pytest.mark.parametrize(("step", "formulas"), STEPS)
def test_residual_is_exactly_zero(step, formulas):
    assert step.residual(formulas) == sp.Integer(0)


@every_derivation
def test_every_formula_is_spoken_about(module):
    assert {name for step in module.STEPS for name in step.formulas} == module.FORMULAS.keys()
    assert len({step.name for step in module.STEPS}) == len(module.STEPS)


@every_derivation
def test_evidence_and_table_have_every_step(module):
    assert module.evidence().holds
    assert len(module.evidence().values) == len(module.STEPS)
    lines = module.table().splitlines()
    assert len(lines) == len(module.STEPS) + 2
    assert module.table().count("$0$") == len(module.STEPS)
    assert {line.count("|") for line in lines} == {5}  # no bar of the maths ends a cell


def test_a_statement_has_bars():
    assert any("|" in step.statement for step in kcd.STEPS)
