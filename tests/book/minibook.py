"""A book of one chapter about a column that costs nothing, for tests of the build."""

from __future__ import annotations

import textwrap
from pathlib import Path

from book.build import Book
from reproductions.harness.ledger import Ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged
from tests.harness.fakes import make_column, make_result

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
CELLS = """\
```{code-cell} python
:tags: [parameters]
profile = "quick"
```

```{code-cell} python
6 * 7
```
"""
CONFIG = """\
title: mini
author: nobody
only_build_toc_files: true
execute: {execute_notebooks: "off"}
bibtex_bibfiles: [references.bib]
sphinx:
  extra_extensions: [book._ext.roles, book._ext.tables, book._ext.offline]
  config: {nitpicky: true, bibtex_reference_style: author_year, html_theme_options: {navbar_persistent: []}}
"""
BIBLIOGRAPHY = (
    "@article{hinton2015kd, author={Hinton, Geoffrey}, title={Distilling}, journal={arXiv}, year={2015}}\n"
)
CLAIMS = """\
[[claim]]
id = "method-over-student"
title = "The method is better than the student"
kind = "greater"
keys.quick = ["COLUMN/quick/synthetic/map/method", "COLUMN/quick/synthetic/map/student"]
keys.standard = ["COLUMN/standard/synthetic/map/method", "COLUMN/standard/synthetic/map/student"]
delta = 1.0
primary = true
source = "Table 1"
known = "read in the paper"

[[claim]]
id = "student-over-method"
title = "The student is better than the method"
kind = "greater"
keys.quick = ["COLUMN/quick/synthetic/map/student", "COLUMN/quick/synthetic/map/method"]
delta = 1.0
source = "nobody says so"
known = "unverified"

[[claim]]
id = "method-value"
title = "The method's mAP"
kind = "value"
keys.quick = ["COLUMN/quick/synthetic/map/method"]
printed = 55.5
delta = 1.0
source = "Table 1"
known = "read in the paper"
"""
ERRATA = """\
from reproductions.harness.errata import Erratum, Evidence

ERRATA = (
    Erratum(
        id="F1", where="equation 1", kind="paper", printed="$1 + 1 = 3$", right="$1 + 1 = 2$",
        check=lambda: Evidence(1 + 1 == HOLDS, f"The sum is {1 + 1}."),
    ),
)
"""


def make_fake(columns: Path, *, holds: int = 2) -> str:
    """Make a column with a ledger of ten runs, three claims and an erratum; return its name."""
    name = make_column(columns)
    folder = columns / name
    (folder / "claims.toml").write_text(CLAIMS.replace("COLUMN", name))
    (folder / "errata.py").write_text(ERRATA.replace("HOLDS", str(holds)))
    column = load_column(name, columns)
    results = [
        make_result(name, arm, s, v + 0.1 * s)
        for arm, v in (("student", 50), ("method", 55))
        for s in range(5)
    ]
    merged(Ledger.empty(name), results, column).save(folder / "ledger.json")
    return name


def make_book(folder: Path, text: str = "", cells: str = CELLS) -> Book:
    """Write a mini book whose only chapter has ``text`` and ``cells``; COLUMN stands for the column's name."""
    columns = folder / "columns"
    name = next((path.name for path in columns.glob("fake*")), None) or make_fake(columns)
    source = folder / "book"
    (source / "chapters").mkdir(parents=True, exist_ok=True)
    write_chapter(source / "chapters" / f"{name}.md", text.replace("COLUMN", name), cells)
    for file, content in {
        "_config.yml": CONFIG,
        "_toc.yml": "format: jb-book\nroot: intro\nchapters:\n  - glob: chapters/*\n  - file: results\n",
        "intro.md": "# Mini\n\n```{bibliography}\n```\n",
        "results.md": "# Results\n\n```{numbers}\n```\n",
        "references.bib": BIBLIOGRAPHY,
    }.items():
        (source / file).write_text(content)
    return Book(source=source, output=folder / "build", columns=columns)


def write_chapter(path: Path, text: str = "", cells: str = CELLS) -> Path:
    """Write a chapter."""
    path.write_text(f"{HEADER}\n# Chapter\n\n{textwrap.dedent(text)}\n\n{cells}", encoding="utf8")
    return path
