"""Write the generated tables of README.md: ``python -m reproductions.readme`` (``make readme``).

What a profile costs comes from the columns' configurations, the verdicts are computed from the ledgers; a test
fails while the committed tables differ from what this module writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from reproductions.harness.claims import Verdict, headline, verdicts_by_claim
from reproductions.harness.files import write_atomic
from reproductions.harness.ledger import Ledger, column_ledger
from reproductions.harness.profiles import Column, announcement, column_names, load_column

README = Path(__file__).resolve().parents[1] / "README.md"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar inside a cell is escaped."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def profiles_table(columns: Iterable[Column]) -> str:
    """Return what each profile of each column takes: time, download, disk and data."""
    rows = [
        [column.name, f"`{name}`", announcement(config)]
        for column in columns
        for name, config in column.profiles.items()
    ]
    return table(["paper", "profile", "takes"], rows)


def verdicts_table(columns: Iterable[Column], ledgers: Mapping[str, Ledger]) -> str:
    """Return the verdict on every primary claim, of the widest profile that was run."""
    rows = []
    for column in columns:
        paper = f"[{column.title}](book/chapters/{column.name}.md)"
        judged = verdicts_by_claim(column.name, ledgers[column.name]).values()
        found = [headline(of_claim) for of_claim in judged if of_claim and of_claim[0].primary]
        rows += [[paper, *verdict_cells(v)] for v in found] or [[paper, "no primary claim", "", "", ""]]
    return table(["paper", "claim", "profile", "verdict", "evidence"], rows)


def verdict_cells(verdict: Verdict) -> list[str]:
    """Return claim, profile, verdict and evidence. A check's evidence is printed in the book, where it is run."""
    word = f"**{verdict.verdict}**" + (" (stale)" if verdict.stale else "")
    evidence = "checked by `make test`" if verdict.claim.check else verdict.text
    return [verdict.claim.title, f"`{verdict.profile}`", word, evidence]


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Return ``text`` with each table between its ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: A mark is missing or stands twice.
    """
    for name, content in tables.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if (text.count(begin), text.count(end)) != (1, 1):
            raise ValueError(f"README.md: expected the marks of {name!r} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}{content}\n{end}{rest.split(end)[1]}"
    return text


def with_tables(text: str) -> str:
    """Return the README's ``text`` with both tables as they are today."""
    columns = [load_column(name) for name in column_names()]
    ledgers = {column.name: column_ledger(column.name) for column in columns}
    tables = {"profiles": profiles_table(columns), "verdicts": verdicts_table(columns, ledgers)}
    return fill(text, tables)


if __name__ == "__main__":
    write_atomic(README, with_tables(README.read_text(encoding="utf-8")))
