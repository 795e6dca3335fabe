"""``{shared-table} data``: every method on one student, one teacher and one recipe, from the ledgers of all columns.

A column's rows are the arms that its ``run.py`` names in ``ROWS``; they belong to the table whose recipe their runs
were given, whatever their data is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from docutils import nodes
from docutils.nodes import Node
from sphinx.application import Sphinx

from book import benchmarks
from book._ext import evidence
from book._ext.directive import Cell, EvidenceDirective, tidy
from book._ext.layout import titles
from book._ext.recipe import recipe_lines
from book._ext.roles import number_node, verdict_node
from reproductions.harness.agreement import paired
from reproductions.harness.claims import Verdict
from reproductions.harness.files import plain
from reproductions.harness.number import Number, difference_unit
from reproductions.harness.profiles import HarnessError, suggestion
from reproductions.harness.statistics import mean_interval
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS
from reproductions.protocols.rows import BASELINES
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

TABLES = {PAIRS[training.pair].data: training for training in (DIGITS, CIFAR10, CIFAR100)}
REFERENCE = "student"  # the row that the others are compared with
MEASURED = CIFAR10  # whose training steps are measured


@dataclass(frozen=True)
class TableRow:
    """One line: an arm of a column, and the beginning of its keys."""

    column: str
    profile: str
    data: str
    arm: str
    title: str

    def key(self, metric: str, arm: str | None = None) -> str:
        """The key of a metric of the arm, or of another arm beside it."""
        return f"{self.column}/{self.profile}/{self.data}/{metric}/{arm or self.arm}"

    def number(self, metric: str, arm: str | None = None) -> Number | None:
        """The recorded number, if there is one."""
        ledger, key = evidence.ledgers()[self.column], self.key(metric, arm)
        return ledger.number(key) if key in ledger else None

    def verdict(self) -> Verdict | None:
        """The verdict on the claim that this arm is more accurate than the student, if the column makes it."""
        for claim in evidence.claims(self.column):
            keys = claim.keys.get(self.profile, ())
            if keys == (self.key("accuracy"), self.key("accuracy", REFERENCE)):
                judged = evidence.judged(self.column)[claim.id]
                return next(one for one in judged if one.profile == self.profile)
        return None


def table_rows(training: Training) -> list[TableRow]:
    """The rows of all columns with this recipe: those that all share first, then column by column.

    An arm that stands in several settings of a column has the first one's numbers.
    """
    recipe, found = plain(asdict(training)), dict[tuple[str, str], TableRow]()
    for name, column in evidence.columns().items():
        arms = getattr(importlib.import_module(column.module), "ROWS", ())
        arm_titles = titles(column, "ARM_TITLES") if arms else {}
        for profile, config in column.profiles.items() if arms else ():
            for run in column.plan(config):
                if run.arm in arms and column.relevant_config(run, config).get("training") == recipe:
                    title = arm_titles.get(run.arm, run.arm)
                    found.setdefault((name, run.arm), TableRow(name, profile, run.data, run.arm, title))
    order = [*BASELINES]
    return sorted(found.values(), key=lambda row: order.index(row.arm) if row.arm in order else len(order))


class SharedTable(EvidenceDirective):
    """``{shared-table} digits``: the rows on a data set, then the recipe that they share."""

    required_arguments = 1
    optional_arguments = 0

    def columns(self) -> tuple[str, ...]:
        """Return all columns: any of them may have a row."""
        return tuple(evidence.columns())

    def answer(self) -> list[Node]:
        """Return the table, or a note where nothing is recorded, and the recipe."""
        (data,) = self.arguments
        if data not in TABLES:
            raise HarnessError(f"no shared table {data!r}{suggestion(data, TABLES)}")
        self.env.note_dependency(str(benchmarks.RECORD))
        rows = table_rows(TABLES[data])
        reference = next((row for row in rows if row.arm == REFERENCE), None)
        if reference is None:
            raise HarnessError(f"no column has the row {REFERENCE!r} of {data}")
        found: list[Node] = [self.note("Not recorded yet.")]
        if any(row.number("accuracy") for row in rows):
            table = self.comparison(TABLES[data], rows, reference)
            key = nodes.paragraph("", "–: not recorded yet, or not measured.", classes=["evidence-key"])
            found = [table, key] if "–" in (text.astext() for text in table.findall(nodes.Text)) else [table]
        return [*found, self.recipe(TABLES[data], reference)]

    def comparison(self, training: Training, rows: list[TableRow], reference: TableRow) -> Node:
        """Return the table, the teacher in its first line."""
        teacher = [reference.number(metric, "teacher") for metric in ("accuracy", "cross_entropy")]
        accuracies = [teacher[0], *(row.number("accuracy") for row in rows)]
        entropies = [teacher[1], *(row.number("cross_entropy") for row in rows)]
        columns: list[tuple[Cell, list[Cell]]] = [
            ("Row", ["teacher", *map(self.name_of, rows)]),
            (self.head("Test accuracy", "mean, 95 % interval"), [*map(self.counted, accuracies)]),
            (
                self.head("Against the student", "paired, 95 % interval"),
                ["", *(self.difference(row, reference) for row in rows)],
            ),
            ("Agrees with the teacher", ["", *(self.value(row.number("agreement")) for row in rows)]),
            ("Cross-entropy", [*map(self.value, entropies)]),
        ]
        if training == MEASURED:
            steps = benchmarks.steps()
            columns.append(
                (self.head("A step", "student = 1"), ["", *(self.cost(row, steps) for row in rows)])
            )
        numeric = range(1, len(columns))
        columns.append(("Claim", ["", *map(self.claim, rows)]))
        heads, cells = zip(*columns, strict=True)
        return self.table(heads, [("", line) for line in zip(*cells, strict=True)], numeric=numeric)

    def name_of(self, row: TableRow) -> Cell:
        """Return the row's name, linked to its chapter where it is a method's and there is one."""
        return row.title if row.arm == REFERENCE else self.chapter(row.column, row.title)

    def value(self, number: Number | None) -> list[Node]:
        """Return a number, linked to what stands behind it."""
        return [nodes.Text("–") if number is None else number_node(self.env, number)]

    def counted(self, number: Number | None) -> Cell:
        """Return a number, and below it how many seeds it is from and whether it is stale."""
        if number is None:
            return "–"
        notes = f"n = {number.n}" + (", stale" if number.status == "stale" else "")
        return [*self.value(number), nodes.inline("", notes, classes=["seeds"])]

    def difference(self, row: TableRow, reference: TableRow) -> Cell:
        """Return the mean difference in accuracy over the seeds that both have, with its interval."""
        ours, theirs = row.number("accuracy"), reference.number("accuracy")
        if row is reference:
            return ""
        if ours is None or theirs is None or not (gaps := paired(ours, theirs)):
            return "–"
        mean, low, high = mean_interval(list(gaps.values()))
        text = f"{mean:+{ours.format}}{difference_unit(ours.unit)}"
        interval = "one seed" if low is None else f"[{low:+{ours.format}}, {high:+{ours.format}}]"
        return [nodes.Text(tidy(text)), nodes.inline("", tidy(interval), classes=["seeds"])]

    def cost(self, row: TableRow, steps: Mapping[tuple[str, str], benchmarks.Row]) -> Cell:
        """Return time and memory of a training step as multiples of the student's, on the device of the runs."""
        number = row.number("accuracy")
        step = steps.get((row.arm, number.runs[0].provenance.device if number else "cpu"))
        if step is None:
            return "–"
        memory = "–" if step.memory_ratio is None else f"{step.memory_ratio:.2f} ×"
        below = nodes.inline("", f"memory {memory}", classes=["seeds"])
        return [nodes.Text(f"{step.ratio.median:.2f} ×"), below]

    def claim(self, row: TableRow) -> Cell:
        """Return the verdict on the row's claim."""
        verdict = row.verdict()
        return "" if verdict is None else [verdict_node(self.env, verdict, profile=False)]

    def recipe(self, training: Training, reference: TableRow) -> Node:
        """Return what all rows share, line by line."""
        seeds = evidence.column(reference.column).profiles[reference.profile].seeds
        lines = [("", [name, text]) for name, text in recipe_lines(training, seeds)]
        return self.table(["All rows share", "which is"], lines, numeric=[])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("shared-table", SharedTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
