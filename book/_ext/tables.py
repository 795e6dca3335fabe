"""Directives that print what is known as tables and cards: results, numbers, claims, verdicts, errata, methods."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from docutils import nodes
from docutils.nodes import Node
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from book._ext import evidence
from book._ext.layout import ResultsTable, results_tables
from book._ext.roles import (
    claim_id,
    erratum_id,
    number_id,
    number_node,
    number_text,
    verdict_node,
)
from book.paths import ROOT
from reproductions.harness.claims import Claim, Verdict
from reproductions.harness.errata import Erratum, Evidence
from reproductions.harness.number import Number
from reproductions.harness.profiles import HarnessError
from reproductions.harness.schema import split_key

log = logging.getLogger(__name__)

Cell = str | Sequence[Node]
WHOSE = {"note": "the note", "paper": "the paper", "code": "the authors' code"}


def names(text: str) -> tuple[str, ...]:
    """Read a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class EvidenceDirective(SphinxDirective):
    """A directive made from ledgers, claims or errata; what is unknown is a warning and fails the build."""

    optional_arguments = 1

    def answer(self) -> list[Node]:
        """Return the nodes; ``HarnessError`` if something named does not exist."""
        raise NotImplementedError

    def run(self) -> list[Node]:
        """Return the answer, or a warning and nothing."""
        for name in self.columns():
            for file in ("ledger.json", "claims.toml", "errata.py"):
                self.env.note_dependency(str(evidence.columns_root() / name / file))
        try:
            return self.answer()
        except HarnessError as error:
            log.warning(
                "{%s} %s: %s", self.name, " ".join(self.arguments), error, location=self.get_location()
            )
            return []

    def columns(self) -> tuple[str, ...]:
        """Return the column that the directive names, or all of them."""
        return tuple(self.arguments) or tuple(evidence.columns())

    def markdown(self, text: str, node: nodes.Element) -> nodes.Element:
        """Parse ``text`` into ``node``."""
        lines = StringList(text.splitlines(), source=self.env.docname)
        self.state.nested_parse(lines, self.content_offset, node)
        return node

    def inline(self, text: str) -> list[Node]:
        """Parse ``text`` without paragraphs around it."""
        parsed = self.markdown(text, nodes.container()).children if text else []
        if len(parsed) == 1 and isinstance(parsed[0], nodes.paragraph):
            return list(parsed[0].children)
        return list(parsed)

    def table(
        self, head: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], *, numeric: Sequence[int]
    ) -> Node:
        """Return a table.

        Args:
            head: Texts of the head row.
            rows: For each row its anchor (may be empty) and its cells, Markdown or nodes.
            numeric: Columns that are aligned to the right.
        """
        group = nodes.tgroup(cols=len(head))
        group += [nodes.colspec(colwidth=1) for _ in head]
        body = nodes.tbody()
        for anchor, cells in rows:
            body += self.row(cells, numeric, anchor)
        group += [nodes.thead("", self.row(head, numeric)), body]
        return nodes.table("", group, classes=["evidence"])

    def row(self, cells: Sequence[Cell], numeric: Sequence[int], anchor: str = "") -> nodes.row:
        """Return one row of a table."""
        row = nodes.row(ids=[anchor] if anchor else [])
        for position, cell in enumerate(cells):
            entry = nodes.entry(classes=["text-right"] if position in numeric else [])
            entry += nodes.paragraph("", "", *(self.inline(cell) if isinstance(cell, str) else cell))
            row += entry
        return row

    def section(self, title: str, anchor: str, *content: Node) -> nodes.section:
        """Return a section that appears in the page's table of contents."""
        section = nodes.section("", nodes.title("", "", *self.inline(title)), *content, ids=[anchor])
        section["names"] = [anchor]
        return section

    def folded(self, title: str, content: Sequence[Node]) -> Node:
        """Return ``content`` under a title that opens it."""
        return nodes.admonition("", nodes.title("", title), *content, classes=["dropdown", "evidence-fold"])

    def note(self, text: str) -> Node:
        """Return a muted paragraph."""
        return nodes.paragraph("", "", *self.inline(text), classes=["evidence-note"])


class Results(EvidenceDirective):
    """``{results} column``: printed, quick, standard and paper-scale beside each other, with the verdicts."""

    required_arguments = 1
    optional_arguments = 0
    option_spec: ClassVar[dict[str, Any]] = {
        "data": names,
        "metrics": names,
        "arms": names,
        "profiles": names,
    }

    def answer(self) -> list[Node]:
        """Return the tables, those of all metrics but the first folded away."""
        name = self.arguments[0]
        profiles = self.options.get("profiles", evidence.PROFILES)
        metrics: dict[str, list[Node]] = {}
        for table in results_tables(name, profiles, self.options):
            nodes_of_metric = metrics.setdefault(table.metric, [])
            nodes_of_metric += [
                self.note(f"{table.setting} · {table.metric}".removeprefix(" · ")),
                self.render(table),
            ]
        (_, shown), *folded = metrics.items()
        return shown + [self.folded(title, content) for title, content in folded]

    def render(self, table: ResultsTable) -> Node:
        """Return one table; a column that nothing belongs to is left out."""
        words = {"quick": "Quick, recorded", "standard": "Standard", "paper": "Paper-scale"}
        columns: dict[str, list[Cell]] = {"": [row.title for row in table.rows]}
        if any(row.printed for row in table.rows):
            columns["Printed"] = [row.printed for row in table.rows]
        for profile, data in table.data.items():
            keys = [row.keys.get(profile) for row in table.rows]
            if profile == "quick":
                fresh = [self.value(evidence.find_fresh(key), fresh=True) if key else "" for key in keys]
                columns[f"Quick, this build ({data})"] = fresh
            recorded = evidence.ledgers()[self.arguments[0]]
            columns[f"{words.get(profile, profile)} ({data})"] = [
                self.value(recorded.number(key) if key in recorded else None) if key else "" for key in keys
            ]
        numeric = range(1, len(columns))
        if any(row.verdicts for row in table.rows):
            columns["Claims"] = [self.badges(row.verdicts) for row in table.rows]
        rows = [("", list(cells)) for cells in zip(*columns.values(), strict=True)]
        return self.table(list(columns), rows, numeric=numeric)

    def badges(self, verdicts: Sequence[Verdict]) -> Cell:
        """Return the verdicts of one row, each with the title of its claim."""
        found: list[Node] = []
        for verdict in verdicts:
            title = nodes.inline(
                "", "", nodes.Text(" "), *self.inline(verdict.claim.title), classes=["verdict-note"]
            )
            found.append(
                nodes.inline("", "", verdict_node(self.env, verdict), title, classes=["verdict-line"])
            )
        return found

    def value(self, number: Number | None, *, fresh: bool = False) -> Cell:
        """Return the cell of a number: value with interval, and how many seeds."""
        if number is None:
            return "–"
        return [
            number_node(self.env, number, fresh=fresh),
            nodes.inline("", f"n = {number.n}", classes=["seeds"]),
        ]


class Numbers(EvidenceDirective):
    """``{numbers}``: every recorded number, with its anchor; ``{numbers} column`` only those of one."""

    def answer(self) -> list[Node]:
        """Return a section for each column with a table for each profile and data set."""
        found: list[Node] = []
        for name in self.columns():
            column, ledger = evidence.column(name), evidence.ledgers()[name]
            groups: dict[tuple[str, str], list[tuple[str, list[Cell]]]] = {}
            for key, number in ledger.numbers.items():
                _, profile, data, metric, arm = split_key(key)
                cells: list[Cell] = [number.entry.title or metric, arm, number_text(number), str(number.n)]
                cells += [f"{number.status}, version {number.version}"]
                groups.setdefault((profile, data), []).append((number_id(key), cells))
            content: list[Node] = []
            for (profile, data), rows in sorted(groups.items()):
                content.append(self.note(f"**{profile}**, {data}: keys `{name}/{profile}/{data}/…`"))
                content.append(self.table(["Metric", "Arm", "Value", "n", "State"], rows, numeric=[2, 3]))
            content = content or [self.note("Nothing is recorded yet.")]
            found.append(self.section(column.title, f"numbers-{name}", *content))
        return found


class Claims(EvidenceDirective):
    """``{claims} column``: every claim with its source, and a verdict for each profile."""

    required_arguments = 1
    optional_arguments = 0

    def answer(self) -> list[Node]:
        """Return a card for each claim, those of exploratory ones folded away."""
        name = self.arguments[0]
        cards: dict[bool, list[Node]] = {True: [], False: []}
        for claim in evidence.claims(name):
            cards[claim.primary].append(self.card(claim, evidence.judged(name)[claim.id]))
        title = f"{len(cards[False])} exploratory claims"
        return cards[True] + ([self.folded(title, cards[False])] if cards[False] else [])

    def card(self, claim: Claim, verdicts: Sequence[Verdict]) -> Node:
        """Return the card of one claim."""
        card = nodes.container(classes=["evidence-card"], ids=[claim_id(claim.column, claim.id)])
        rank = "primary" if claim.primary else "exploratory"
        known = "" if claim.known == "unverified" and claim.printed is None else f", {claim.known}"
        values = claim.printed if isinstance(claim.printed, tuple) else (claim.printed,)
        printed = ", ".join(f"{value:g}" for value in values if value is not None)
        source = f"Source: {claim.source}{known}." + (f" Printed: {printed}." if printed else "")
        self.markdown(f"**{claim.title}** · {rank}\n\n{source}", card)
        card["classes"] += [f"claim-{rank}"]
        listed = nodes.bullet_list(classes=["evidence-list"])
        for verdict in verdicts:
            text = nodes.paragraph("", "", verdict_node(self.env, verdict, profile=False), nodes.Text(" "))
            if not claim.check:
                text.insert(0, nodes.inline("", f"{verdict.profile} ", classes=["profile"]))
            if verdict.verdict != "not run":  # a sentence that ends in the badge's word need not repeat it
                text += self.inline(verdict.text.removesuffix(f": {verdict.verdict}."))
            listed += nodes.list_item("", text)
        card += listed
        return card


class Verdicts(EvidenceDirective):
    """``{verdicts}``: the chapters with the verdicts on their primary claims."""

    def answer(self) -> list[Node]:
        """Return the table."""
        rows: list[tuple[str, list[Cell]]] = []
        for name in self.columns():
            column = evidence.column(name)
            chapter = f"{{doc}}`{column.title} <chapters/{name}>` ({{cite:t}}`{column.paper}`)"
            if f"chapters/{name}" not in self.env.found_docs:
                chapter = f"{column.title} ({{cite:t}}`{column.paper}`)"
            primary = [claim for claim in evidence.claims(name) if claim.primary]
            for claim in primary:
                verdict = evidence.headline(evidence.judged(name)[claim.id])
                rows.append(("", [chapter, claim.title, [verdict_node(self.env, verdict)]]))
                chapter = ""
            if not primary:
                rows.append(("", [chapter, "no primary claim", ""]))
        return [self.table(["Chapter", "Claim", "Verdict"], rows, numeric=[])]


class Errata(EvidenceDirective):
    """``{errata} column``: a card for each erratum; ``{errata}`` those of all columns, in sections."""

    def answer(self) -> list[Node]:
        """Return the cards."""
        if self.arguments:
            evidence.column(self.arguments[0])
            return self.cards(self.arguments[0])
        titles = {name: column.title for name, column in evidence.columns().items()}
        return [
            self.section(titles.get(name, name.capitalize()), f"errata-{name}", *self.cards(name))
            for name in evidence.with_errata()
        ]

    def cards(self, name: str) -> list[Node]:
        """Return the cards of one column."""
        return [self.card(name, erratum, found) for erratum, found in evidence.errata(name)]

    def card(self, name: str, erratum: Erratum, found: Evidence) -> Node:
        """Return the card of one erratum; a check that fails is a warning."""
        if not found.holds:
            message = "erratum %s/%s does not hold: %s"
            log.warning(message, name, erratum.id, found.summary, location=self.get_location())
        card = nodes.container(classes=["evidence-card"], ids=[erratum_id(name, erratum.id)])
        text = (
            f"**{erratum.id}** · {WHOSE[erratum.kind]} · {erratum.where}\n\n"
            f"Printed\n: {erratum.printed}\n\nRight\n: {erratum.right}\n\nEvidence\n: {found.summary}\n"
        )
        return self.markdown(text, card)


class Methods(EvidenceDirective):
    """``{methods}``: one row a column, from ``methods.toml`` and what the column says of itself."""

    def answer(self) -> list[Node]:
        """Return the table."""
        file = ROOT / "book" / "methods.toml"
        self.env.note_dependency(str(file))
        entries = tomllib.loads(file.read_text(encoding="utf8"))
        if lacking := [name for name in evidence.columns() if name not in entries]:
            raise HarnessError(f"methods.toml has no entry for {', '.join(lacking)}")
        rows: list[tuple[str, list[Cell]]] = []
        for name, column in evidence.columns().items():
            entry = entries[name]
            functions = ", ".join(f"{{py:func}}`~{function}`" for function in entry["functions"])
            chapter = f"{{doc}}`{column.title} <chapters/{name}>`"
            title = chapter if f"chapters/{name}" in self.env.found_docs else column.title
            fields = [entry[field] for field in ("level", "matches", "widths", "trains", "labels", "batch")]
            rows.append(("", [f"{title}, {{cite:t}}`{column.paper}`", *fields, functions]))
        heads = ["Method", "Level", "What is matched", "Widths", "Trains", "Labels", "Batch", "Code"]
        return [self.table(heads, rows, numeric=[])]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    for name, directive in {
        "results": Results,
        "numbers": Numbers,
        "claims": Claims,
        "verdicts": Verdicts,
        "errata": Errata,
        "methods": Methods,
    }.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
