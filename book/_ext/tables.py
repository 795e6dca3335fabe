"""Directives that print what is known as tables and cards: results, numbers, claims, verdicts, errata, methods."""

from __future__ import annotations

import importlib
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from docutils import nodes
from docutils.nodes import Node
from sphinx.application import Sphinx

from book import benchmarks
from book._ext import evidence
from book._ext.directive import Cell, EvidenceDirective, tidy
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
from reproductions.harness.claims import PROFILES, Claim, Verdict, headline
from reproductions.harness.errata import Erratum, Evidence, errata_title
from reproductions.harness.ledger import Ledger
from reproductions.harness.number import Number
from reproductions.harness.profiles import Column, HarnessError
from reproductions.harness.schema import split_key

HEADS = {"quick": "Quick, recorded", "standard": "Standard", "paper": "Paper-scale"}
AGREEMENT = {
    "agrees": "agrees with ours",
    "differs": "differs from ours",
    "cannot tell": "agreement with ours: cannot tell",
}
Steps = Mapping[tuple[str, str], benchmarks.Row]
METHOD_HEADS = {
    "level": "Level",
    "matches": "What is matched",
    "widths": "Widths",
    "trains": "Trains",
    "labels": "Labels",
    "batch": "Batch",
}
WHOSE = {"note": "the note", "paper": "the paper", "code": "public code"}


def names(text: str) -> tuple[str, ...]:
    """Read a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def beside_ours(number: Number) -> list[Node]:
    """Return a note on whether an imported number agrees with the column's own, nothing if there is none to compare."""
    known = evidence.agreements(number.key.split("/")[0], number.machine) if number.machine else {}
    return [nodes.inline("", AGREEMENT[known[number.key]], classes=["seeds"])] if number.key in known else []


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
        known = evidence.column(name).profiles
        profiles = self.options.get("profiles", tuple(p for p in PROFILES if p in known))
        metrics: dict[str, list[Node]] = {}
        for table in results_tables(name, profiles, self.options):
            nodes_of_metric = metrics.setdefault(table.metric, [])
            nodes_of_metric += [
                self.note(f"{table.setting} · {table.metric}".removeprefix(" · ")),
                self.render(table),
            ]
        if not metrics:
            raise HarnessError(f"no run of {name} fits {dict(self.options)}")
        (_, shown), *folded = metrics.items()
        key = nodes.paragraph("", "–: no recorded run. Numbers in italics were computed with this page.")
        key["classes"].append("evidence-key")
        return [*shown, key, *(self.folded(title, content) for title, content in folded)]

    def render(self, table: ResultsTable) -> Node:
        """Return one table; a column that nothing belongs to is left out."""
        own = evidence.ledgers()[self.arguments[0]]
        columns: list[tuple[Cell, list[Cell]]] = [("Arm", [row.title for row in table.rows])]
        if any(row.printed for row in table.rows):
            columns.append(("Printed", [row.printed for row in table.rows]))
        for profile, data in table.data.items():
            keys = [row.keys.get(profile) for row in table.rows]
            if profile == "quick":
                fresh = [self.value(evidence.find_fresh(key), fresh=True) if key else "" for key in keys]
                columns.append((self.head("Quick, this build", data), fresh))
            columns.append((self.head(HEADS.get(profile, profile), data), self.recorded(keys, own)))
            for machine, ledger in evidence.elsewhere(self.arguments[0]).items():
                if any(key in ledger for key in keys if key):
                    title = f"{HEADS.get(profile, profile).partition(',')[0]}, {machine}"
                    columns.append((self.head(title, data), self.recorded(keys, ledger)))
        numeric = range(1, len(columns))
        if any(row.verdicts for row in table.rows):
            columns.append(("Claims", [self.badges(row.verdicts) for row in table.rows]))
        heads, cells = zip(*columns, strict=True)
        return self.table(heads, [("", row) for row in zip(*cells, strict=True)], numeric=numeric)

    def recorded(self, keys: Sequence[str | None], ledger: Ledger) -> list[Cell]:
        """Return the cells of one ledger; where a profile plans no run there is no key."""
        return [self.value(ledger.number(key) if key in ledger else None) if key else "" for key in keys]

    def badges(self, verdicts: Sequence[Verdict]) -> Cell:
        """Return the verdicts of one row, each with the title of its claim."""
        found: list[Node] = []
        for verdict in verdicts:
            title = nodes.inline("", "", *self.inline(verdict.claim.title), classes=["claim-title"])
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
            *beside_ours(number),
        ]


class Numbers(EvidenceDirective):
    """``{numbers}``: every recorded number, with its anchor; ``{numbers} column`` only those of one."""

    def answer(self) -> list[Node]:
        """Return a section for each column with a table for each profile and data set."""
        found: list[Node] = []
        for name in self.columns():
            column = evidence.column(name)
            content: list[Node] = []
            for ledger in (evidence.ledgers()[name], *evidence.elsewhere(name).values()):
                content += self.groups(column, ledger)
            content = content or [self.note("Nothing is recorded yet.")]
            found.append(self.section(column.title, f"numbers-{name}", *content))
        return found

    def groups(self, column: Column, ledger: Ledger) -> list[Node]:
        """Return the tables of one ledger, each with its heading."""
        groups: dict[tuple[str, str], list[Number]] = {}
        for key, number in ledger.numbers.items():
            _, profile, data, _, _ = split_key(key)
            groups.setdefault((profile, data), []).append(number)
        found: list[Node] = []
        for (profile, data), numbers in sorted(groups.items()):
            keys = f"{column.name}/{profile}/{data}/metric/arm"
            if ledger.machine:
                origin = numbers[0].runs[0].provenance
                note = self.note(f"**{profile}**, {data}, imported: keys `{keys}%{ledger.machine}`")
                note += nodes.Text(f", computed on {origin.device_name} ({origin.device})")
            else:
                note = self.note(f"**{profile}**, {data}: keys `{keys}`")
            found += [note, self.group(column, numbers)]
        return found

    def group(self, column: Column, numbers: Sequence[Number]) -> Node:
        """Return the table of one profile and data set: a row for each arm, a column for each metric."""
        arms: dict[str, dict[str, Number]] = {}
        for number in numbers:
            arms.setdefault(split_key(number.key)[4], {})[number.metric] = number
        metrics = [metric for metric in column.metrics if any(metric in row for row in arms.values())]
        heads: list[Cell] = [
            "Arm",
            "n",
            *(self.head(column.metrics[one].title, one) for one in metrics),
            "State",
        ]
        rows: list[tuple[str, list[Cell]]] = []
        for arm, row in sorted(arms.items()):
            states = sorted({f"{number.status}, version {number.version}" for number in row.values()})
            seeds = sorted({number.n for number in row.values()})
            cells: list[Cell] = [arm, ", ".join(map(str, seeds))]
            cells += [self.anchored(row[metric]) if metric in row else "–" for metric in metrics]
            rows.append(("", [*cells, [nodes.inline("", "; ".join(states), classes=["state"])]]))
        return self.table(heads, rows, numeric=range(1, len(heads) - 1))

    def anchored(self, number: Number) -> Cell:
        """Return a number that pages link to."""
        found = nodes.inline("", number_text(number), ids=[number_id(number.named)], classes=["num"])
        return [found, *beside_ours(number)]


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
                text += self.inline(tidy(verdict.text.removesuffix(f": {verdict.verdict}.")))
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
            chapter = f"{self.chapter(name, column.title)} ({{cite:t}}`{column.paper}`)"
            primary = [claim for claim in evidence.claims(name) if claim.primary]
            for claim in primary:
                verdict = headline(evidence.judged(name)[claim.id])
                rows.append(("", [chapter, claim.title, [verdict_node(self.env, verdict)]]))
                chapter = ""
            if not primary:
                rows.append(("", [chapter, "no primary claim", ""]))
        return [self.table(["Chapter", "Claim", "Verdict"], rows, numeric=[])]


class Errata(EvidenceDirective):
    """``{errata} column``: a card for each erratum; ``{errata}`` a table of counts and all cards, in sections."""

    def answer(self) -> list[Node]:
        """Return the cards; those of all columns with what the script needs to filter them by source."""
        if self.arguments:
            return self.cards(self.arguments[0])
        known = {name: evidence.errata(name) for name in self.columns()}
        titles = {name: errata_title(name, evidence.columns_root()) for name in known}
        return [
            self.counts(known, titles),
            nodes.container(classes=["errata-filter"]),
            *(self.section(titles[name], f"errata-{name}", *self.cards(name)) for name in known),
        ]

    def columns(self) -> tuple[str, ...]:
        """Return the column that the directive names, or all that have errata."""
        return tuple(self.arguments) or evidence.with_errata()

    def counts(
        self, known: Mapping[str, Sequence[tuple[Erratum, Evidence]]], titles: Mapping[str, str]
    ) -> Node:
        """Return the table of how many errata there are, a row a column and a column a source."""
        rows: list[tuple[str, list[Cell]]] = []
        total: Counter[str] = Counter()
        for name, found in known.items():
            count = Counter(erratum.kind for erratum, _ in found)
            total.update(count)
            link = nodes.reference("", titles[name], internal=True, refid=f"errata-{name}")
            rows.append(("", [[link], *self.row_of_counts(count)]))
        rows.append(("", ["All", *self.row_of_counts(total)]))
        heads = ["Errata on", *(whose.removeprefix("the ").capitalize() for whose in WHOSE.values()), "All"]
        return self.table(heads, rows, numeric=range(1, len(heads)))

    def row_of_counts(self, count: Counter[str]) -> list[Cell]:
        """Return the cells of one row, the sum last."""
        return [*(str(count[kind]) for kind in WHOSE), str(count.total())]

    def cards(self, name: str) -> list[Node]:
        """Return the cards of one column."""
        return [self.card(name, erratum, found) for erratum, found in evidence.errata(name)]

    def card(self, name: str, erratum: Erratum, found: Evidence) -> Node:
        """Return the card of one erratum; a check that fails is said on the page, and the tests fail."""
        classes = ["evidence-card", "erratum", f"erratum-{erratum.kind}"]
        card = nodes.container(classes=classes, ids=[erratum_id(name, erratum.id)])
        text = (
            f"**{erratum.id}** · {erratum.where}\n\n"
            f"Printed\n: {erratum.printed}\n\nRight\n: {erratum.right}\n\nEvidence\n: {found.summary}\n"
        )
        self.markdown(text, card)
        whose = nodes.inline("", WHOSE[erratum.kind], classes=["verdict", "verdict-plain"])
        card[0] += [nodes.Text(" "), whose]
        if not found.holds:
            card[0] += [
                nodes.Text(" "),
                nodes.inline("", "✗ does not hold", classes=["verdict", "verdict-bad"]),
            ]
        return card


class Methods(EvidenceDirective):
    """``{methods}``: a row a column, from ``methods.toml``; ``{methods} evidence``: who has it, its cost, what held."""

    final_argument_whitespace = True

    def columns(self) -> tuple[str, ...]:
        """Return all columns."""
        return tuple(evidence.columns())

    def answer(self) -> list[Node]:
        """Return the table."""
        file = ROOT / "book" / "methods.toml"
        self.env.note_dependency(str(file))
        self.env.note_dependency(str(benchmarks.RECORD))
        entries = tomllib.loads(file.read_text(encoding="utf8"))
        for name in self.columns():
            if lacking := {*METHOD_HEADS, "functions", "toolboxes"} - set(entries.get(name, ())):
                raise HarnessError(f"methods.toml, {name}: no {', '.join(sorted(lacking))}")
        rows: list[list[Cell]] = []
        if self.arguments:
            steps, own = benchmarks.steps(), benchmarks.steps(benchmarks.OWN)
            for name, column in evidence.columns().items():
                title, cost = self.chapter(name, column.title), self.cost(column, steps, own)
                rows.append([title, entries[name]["toolboxes"], cost, self.held(name)])
            heads = ["Method", "Public toolboxes", self.head("A step", "student = 1"), "Primary claims"]
            return [self.table(heads, [("", row) for row in rows], numeric=[2])]
        for name, column in evidence.columns().items():
            functions = " ".join(f"{{py:func}}`~{function}`" for function in entries[name]["functions"])
            title = f"{self.chapter(name, column.title)}, {{cite:t}}`{column.paper}`: {functions}"
            rows.append([title, *(entries[name][field] for field in METHOD_HEADS)])
        return [self.table(["Method", *METHOD_HEADS.values()], [("", row) for row in rows], numeric=[])]

    def cost(self, column: Column, steps: Steps, own: Steps) -> Cell:
        """Return the time of a training step: of the column's row of the shared table, else with its own recipe."""
        for arm in getattr(importlib.import_module(column.module), "ROWS", ()):
            if step := steps.get((arm, "cpu")):
                return f"{step.ratio.median:.2f} ×"
        step = own.get((column.name, "cpu"))
        return f"{step.ratio.median:.2f} × (own)" if step else "–"

    def held(self, name: str) -> Cell:
        """Return the verdicts on the column's primary claims."""
        judged = evidence.judged(name)
        found: list[Node] = []
        for claim in evidence.claims(name):
            if claim.primary:
                found += [verdict_node(self.env, headline(judged[claim.id])), nodes.Text(" ")]
        return found or "none"


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
