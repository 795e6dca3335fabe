"""``{relations}``: what the notes say about how methods relate, each statement with its verdict and proof."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from docutils import nodes
from docutils.nodes import Node
from sphinx.application import Sphinx

from book._ext.directive import Cell, EvidenceDirective
from book.paths import ROOT
from reproductions.harness.errata import Evidence
from reproductions.relations.relation import GROUPS, Relation
from reproductions.relations.statements import RELATIONS

TONES = {"holds": "good", "holds with conditions": "plain", "does not hold": "bad", "open": "plain"}
SIGNS = {"holds": "✓", "holds with conditions": "○", "does not hold": "✗", "open": "?"}


@cache
def proved() -> tuple[tuple[Relation, Evidence | None], ...]:
    """Return every relation with the evidence of its proof, which is run here."""
    return tuple((one, one.check() if one.check else None) for one in RELATIONS)


def badge(verdict: str) -> nodes.inline:
    """Return a verdict as a badge; its sign says the same as its colour."""
    return nodes.inline("", f"{SIGNS[verdict]} {verdict}", classes=["verdict", f"verdict-{TONES[verdict]}"])


def anchor(relation: Relation) -> str:
    """Return the anchor of a relation's card."""
    return f"relation-{relation.id.lower()}"


class Relations(EvidenceDirective):
    """A table of all verdicts, then a section a group with a card for each statement."""

    optional_arguments = 0

    def columns(self) -> tuple[str, ...]:
        """Return nothing: no ledger is read here."""
        return ()

    def answer(self) -> list[Node]:
        """Return the table and the sections."""
        for file in (ROOT / "reproductions" / "relations").glob("*.py"):
            self.env.note_dependency(str(file))
        found = proved()
        sections = [
            self.section(
                group,
                nodes.make_id(f"relations-{group}"),
                *(self.card(one, evidence) for one, evidence in found if one.group == group),
            )
            for group in GROUPS
        ]
        return [self.overview([one for one, _ in found]), *sections]

    def overview(self, relations: Sequence[Relation]) -> Node:
        """Return the table of statements and verdicts."""
        rows: list[tuple[str, list[Cell]]] = []
        for one in relations:
            link = nodes.reference("", one.id, internal=True, refid=anchor(one))
            rows.append(("", [[link], one.statement, [badge(one.verdict)]]))
        return self.table(["", "Statement", "Verdict"], rows, numeric=[])

    def card(self, relation: Relation, evidence: Evidence | None) -> Node:
        """Return the card of one statement; a proof that fails is said on the page, and the tests fail."""
        card = nodes.container(classes=["evidence-card"], ids=[anchor(relation)])
        parts = [f"**{relation.id}** · {relation.where}", f"Said\n: {relation.statement}"]
        parts.append(f"What holds\n: {relation.answer}")
        if evidence is not None:
            parts.append(f"Proof\n: {evidence.summary}")
        if relation.errata:
            links = ", ".join(f"{{erratum}}`{name}`" for name in relation.errata)
            parts.append(f"See also\n: {links}")
        self.markdown("\n\n".join(parts) + "\n", card)
        card[0] += [nodes.Text(" "), badge(relation.verdict)]
        if evidence is not None and not evidence.holds:
            failed = nodes.inline("", "✗ the proof fails", classes=["verdict", "verdict-bad"])
            card[0] += [nodes.Text(" "), failed]
        return card


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("relations", Relations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
