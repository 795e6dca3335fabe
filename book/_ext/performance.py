"""``{benchmarks} part``: what ``make bench`` recorded last, a group of it, the machine, or where it falls short."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.nodes import Node
from sphinx.application import Sphinx

from book import benchmarks
from book._ext.directive import EvidenceDirective, tidy
from reproductions.harness.profiles import HarnessError, suggestion


class Benchmarks(EvidenceDirective):
    """``{benchmarks} Losses``: the rows of a group; ``machine``, ``behind`` and ``missed`` are the other parts."""

    required_arguments = 1
    optional_arguments = 0
    final_argument_whitespace = True

    def columns(self) -> tuple[str, ...]:
        """Return none: benchmarks belong to no column."""
        return ()

    def answer(self) -> list[Node]:
        """Return the part, or a note where nothing is recorded."""
        self.env.note_dependency(str(benchmarks.RECORD))
        if not benchmarks.RECORD.is_file():
            return [self.note("Not recorded yet.")]
        record = benchmarks.Record.load(benchmarks.RECORD)
        (part,) = self.arguments
        parts = {"machine": self.machine, "behind": self.behind, "missed": self.missed}
        if part in parts:
            return [parts[part](record)]
        groups = {row.group: None for row in record.rows}
        if part not in groups:
            raise HarnessError(f"no benchmarks {part!r}{suggestion(part, [*groups, *parts])}")
        return [self.group([row for row in record.rows if row.group == part])]

    def group(self, rows: list[benchmarks.Row]) -> Node:
        """Return a table of the rows; a column in which nothing stands is left out."""
        lines = [row.cells() for row in rows]
        heads = [head for head in lines[0] if any(line[head] for line in lines)]
        shown = [[tidy(line[head]) for head in heads] for line in lines]
        numeric = [place for place, head in enumerate(heads) if head not in ("Case", "Size", "Goals")]
        ratio = self.head("Ratio", "theirs / ours" if rows[0].comparison == "rival" else "ours / theirs")
        pairs = {
            "Ratio": ratio,
            **{name: self.head(name, "ours / theirs") for name in ("Images/s", "Peak, MiB")},
        }
        return self.table(
            [pairs.get(head, head) for head in heads], [("", line) for line in shown], numeric=numeric
        )

    def machine(self, record: benchmarks.Record) -> Node:
        """Return what it was measured on."""
        where = record.machine
        threads = sorted({row.threads for row in record.rows})
        versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
        commit = f"`{record.commit[:10]}`" if record.commit else "unknown"
        lines = {
            "Date": f"{record.date:%Y-%m-%d}",
            "Commit": commit + (", with changes" if record.dirty else ""),
            "Processor": f"{where.processor}, {where.cores} cores",
            "Threads": ", ".join(map(str, threads)),
            "Accelerator": where.accelerator or "none: nothing on this page was measured on a GPU",
            "System": where.system,
            "Versions": versions,
            "Load before": "unknown" if where.load is None else f"{where.load:.2f}",
            "The whole run": f"{record.seconds / 60:.1f} min, {len(record.rows)} comparisons",
        }
        return self.table(["", ""], [("", line) for line in lines.items()], numeric=[])

    def behind(self, record: benchmarks.Record) -> Node:
        """Return the comparisons in which ours is not faster, or needs more memory."""
        found = [
            f"{row.title}, {row.size}: {row.cells()['Ratio']}"
            + (f", memory {benchmarks.times(row.memory_ratio)}" if row.heavier and row.memory_ratio else "")
            for row in record.rows
            if row.behind or row.heavier
        ]
        return self.points(found, "None.")

    def missed(self, record: benchmarks.Record) -> Node:
        """Return the goals that were not reached."""
        found = []
        for row, goal in record.missed:
            value = row.value(goal)
            measured = "nothing measured" if value is None else f"measured {goal.printed(value)}"
            found.append(f"{row.title}, {row.size}: {goal.text()}, {measured}")
        return self.points(found, "All goals were reached.")

    def points(self, texts: list[str], otherwise: str) -> Node:
        """Return a list, or a sentence where there is nothing to list."""
        if not texts:
            return self.note(otherwise)
        items = [nodes.list_item("", nodes.paragraph("", "", *self.inline(tidy(text)))) for text in texts]
        return nodes.bullet_list("", *items)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("benchmarks", Benchmarks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
