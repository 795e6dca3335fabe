"""Single pages of the book, rendered for tests, and what is read from their HTML."""

from __future__ import annotations

import io
import re
from html import unescape
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from book._ext import evidence
from tests.book.minibook import BIBLIOGRAPHY

EXTENSIONS = ["myst_parser", "sphinxcontrib.bibtex"]
OWN = ["roles", "tables", "shared_table", "performance", "relations"]


def rendered(folder: Path, text: str, **pages: str) -> tuple[str, str]:
    """Render Markdown.

    Args:
        folder: Where everything is put.
        text: The page.
        pages: Others that it may refer to, by name; ``__`` stands for a slash.

    Returns:
        The page with its tags, and the warnings.
    """
    source = folder / "source"
    others = {name.replace("__", "/"): f"---\norphan: true\n---\n{page}\n" for name, page in pages.items()}
    for name, content in {"index": text, **others}.items():
        path = source / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf8")
    (source / "references.bib").write_text(BIBLIOGRAPHY)
    options = {
        "extensions": [*EXTENSIONS, *(f"book._ext.{name}" for name in OWN)],
        "bibtex_bibfiles": ["references.bib"],
        "bibtex_reference_style": "author_year",
        "myst_enable_extensions": ["dollarmath", "deflist"],
        "nitpicky": True,
    }
    warnings, out = io.StringIO(), folder / "out"
    with patch_docutils(), docutils_namespace():
        app = Sphinx(source, None, out, folder / "trees", "html", options, None, warnings, freshenv=True)
        app.build()
    page = (out / "index.html").read_text(encoding="utf8")
    return unescape(page[page.index('role="main"') :]), warnings.getvalue()


def forget() -> None:
    """Empty the caches that a build fills once."""
    for known in vars(evidence).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


def text_of(html: str) -> str:
    """The text between the tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def lines_of(html: str, table: int = 0) -> list[list[str]]:
    """The cells of a table, row by row."""
    body = re.findall(r"<table.*?</table>", html, re.DOTALL)[table]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    cells = [re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL) for row in rows]
    return [[text_of(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in cells]
