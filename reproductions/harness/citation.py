"""How to cite a recorded number: a sentence and BibTeX, for our recording and for the paper."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproductions.harness.number import Number
from reproductions.harness.profiles import Column, HarnessError
from reproductions.harness.schema import split_key


@dataclass(frozen=True)
class Citation:
    """What a reader needs to cite a number.

    Attributes:
        key: With its version, so that it never changes its meaning.
        sentence: To be put into a text.
        bibtex: Entry of our recording.
        paper_bibtex: Entry of the paper that the column reproduces.
        version: Version of the package.
        source_digest: Of the code that the number was recorded with.
        status: `"fresh"`, `"revalidated"` or `"stale"` on the present code.
    """

    key: str
    sentence: str
    bibtex: str
    paper_bibtex: str
    version: str
    source_digest: str
    status: str


def cite(number: Number, column: Column, repository: Path | None = None) -> Citation:
    """Return the citation of a number.

    Args:
        number: From the ledger.
        column: Its column.
        repository: Root of the checkout, with `pyproject.toml` and `book/references.bib`.

    Raises:
        HarnessError: If the bibliography lacks the paper.
    """
    root = repository or Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    _, profile, data, _, arm = split_key(number.key)
    origin = number.runs[0].provenance
    version, year = importlib.metadata.version("kdrefs"), max(run.provenance.date for run in number.runs).year
    where = f", imported from {number.machine}: {origin.device_name}" if number.machine else ""
    seeds = "one run" if number.n == 1 else f"mean and 95 % interval of {number.n} seeds"
    sentence = (
        f"{column.title}, {number.entry.title} of “{arm}” on {data} (profile {profile}): {number.text()} "
        f"({seeds}; kdrefs {version}, {number.full_key}, source {origin.source[:12]}{where})."
    )
    fields = {
        "author": "{" + " and ".join(author["name"] for author in project["project"]["authors"]) + "}",
        "title": f"{column.title}: {number.entry.title} of ``{arm}'' on {data}, {_tex(number.text())}",
        "year": str(year),
        "version": version,
        "note": rf"kdrefs {version}, key \texttt{{{_tex(number.full_key)}}}, source digest {origin.source[:12]}",
    }
    url = project.get("tool", {}).get("kdrefs", {}).get("repository", "")
    if url:
        fields["url"] = url
    name = re.sub(r"[^a-z0-9]+", "-", f"kdrefs-{number.full_key}".lower())
    return Citation(
        key=number.full_key,
        sentence=sentence,
        bibtex=_entry("misc", name, fields),
        paper_bibtex=bibtex_entry(root / "book" / "references.bib", column.paper),
        version=version,
        source_digest=origin.source,
        status=number.status,
    )


def bibtex_entry(path: Path, key: str) -> str:
    """Return the entry `key` of a BibTeX file as it stands there.

    Raises:
        HarnessError: If there is none.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    start = re.search(rf"^@\w+\{{\s*{re.escape(key)}\s*,", text, re.MULTILINE)
    if start is None:
        raise HarnessError(f"{path.parent.name}/{path.name} has no entry {key!r}")
    depth = 0
    for place in range(text.index("{", start.start()), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start.start() : place + 1]
    raise HarnessError(f"{path.parent.name}/{path.name}: the braces of {key!r} do not close")


def _entry(kind: str, name: str, fields: dict[str, Any]) -> str:
    width = max(map(len, fields))
    lines = [f"  {field:<{width}} = {{{value}}}," for field, value in fields.items()]
    return "\n".join([f"@{kind}{{{name},", *lines, "}"])


def _tex(text: str) -> str:
    """Return `text` with what LaTeX takes for commands escaped."""
    return text.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$")
