"""Derivations by computer algebra: steps with residuals, the claim that all are 0, and their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy as sp

from reproductions.harness.errata import Evidence

Formulas = Mapping[str, sp.Expr]


@dataclass(frozen=True)
class Step:
    """A step of a derivation.

    Attributes:
        name: What it does.
        statement: What it says, LaTeX.
        formulas: The formulas it speaks about; with any of them wrong its residual is not 0.
        residual: Left side less right side.
    """

    name: str
    statement: str
    formulas: tuple[str, ...]
    residual: Callable[[Formulas], sp.Expr]


@dataclass(frozen=True)
class Derivation:
    """Steps that take the formulas they speak about from a table, so that a wrong one can be put in its place.

    Attributes:
        formulas: The right formulas by name.
        steps: In their order.
        scope: What they hold for, such as ``"for any number of cells"``.
    """

    formulas: Formulas
    steps: tuple[Step, ...]
    scope: str = ""

    def evidence(self) -> Evidence:
        """Every residual, for the claim that all are 0."""
        residuals = {step.name: step.residual(self.formulas) for step in self.steps}
        wrong = [name for name, residual in residuals.items() if residual != 0]
        count = f"{len(residuals)} steps {self.scope}".rstrip()
        result = f"not 0: {', '.join(wrong)}." if wrong else "every residual exactly 0."
        values = {name: str(residual) for name, residual in residuals.items()}
        return Evidence(holds=not wrong, summary=f"{count}, {result}", values=values)

    def table(self) -> str:
        """The steps with their residuals, computed now, as a Markdown table."""
        lines = ["| | Step | Statement | Residual |", "|--:|:--|:--|--:|"]
        for number, step in enumerate(self.steps, start=1):
            # A bar would end the cell, inside maths too.
            statement = step.statement.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
            residual = sp.latex(step.residual(self.formulas))
            lines.append(f"| {number} | {step.name} | ${statement}$ | ${residual}$ |")
        return "\n".join(lines)
