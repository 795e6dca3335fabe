"""What the directives have in common: warnings for what is unknown, Markdown in cells, tables, cards, folds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from docutils import nodes
from docutils.nodes import Node
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from book._ext import evidence
from reproductions.harness.ledger import ELSEWHERE
from reproductions.harness.profiles import HarnessError

log = logging.getLogger(__name__)

Cell = str | Sequence[Node]


def tidy(text: str) -> str:
    """Return a sentence with a minus sign before negative numbers and no line break inside a quantity."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r" (?==)|(?<==) |(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


class EvidenceDirective(SphinxDirective):
    """A directive made from ledgers, claims or errata; what is unknown is a warning and fails the build."""

    optional_arguments = 1

    def answer(self) -> list[Node]:
        """Return the nodes; ``HarnessError`` if something named does not exist."""
        raise NotImplementedError

    def run(self) -> list[Node]:
        """Return the answer, or a warning and nothing."""
        for name in self.columns():
            folder = evidence.columns_root() / name
            files = (folder / file for file in ("ledger.json", "claims.toml", "errata.py"))
            for file in (*files, *sorted((folder / ELSEWHERE).glob("*.json"))):
                self.env.note_dependency(str(file))
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

    def chapter(self, name: str, text: str) -> str:
        """Return ``text``, linked to a column's chapter where there is one."""
        page = f"chapters/{name}"
        return f"{{doc}}`{text} <{page}>`" if page in self.env.found_docs else text

    def table(
        self, head: Sequence[Cell], rows: Iterable[tuple[str, Sequence[Cell]]], *, numeric: Sequence[int]
    ) -> Node:
        """Return a table.

        Args:
            head: Cells of the head row.
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

    def head(self, title: str, detail: str) -> Cell:
        """Return the head of a column: a title and, below it, what it is more exactly."""
        return [nodes.Text(title), nodes.inline("", detail, classes=["seeds"])]

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
