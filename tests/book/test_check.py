"""The link check finds each kind of defect, and only defects."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from book.check import Defect, check_site
from book.paths import ROOT, machine_paths

GOOD = {
    "index.html": (
        '<link rel="stylesheet" href="style.css"><p id="top">Text</p>'
        '<a href="sub/page.html#section">in</a><a href="#top">up</a><a href="https://example.org/x">out</a>'
        "<p>|K| is 3 and |L| 4</p>"
        '<img src="figure.png" alt="A curve that falls"><a href="sub/">folder</a><a href="mailto:a@b.c">mail</a>'
    ),
    "sub/index.html": "<p>Sub</p>",
    "sub/page.html": '<h2 id="section">Section</h2><a href="../index.html">home</a>',
    "style.css": "body { background: url(figure.png) }",
    "figure.png": "",
}


def site(folder: Path, **changes: str) -> Path:
    for name, text in (GOOD | changes).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_sound_site_has_no_defect(tmp_path: Path) -> None:
    assert check_site(site(tmp_path)) == []


@pytest.mark.parametrize(
    ("page", "kind", "detail"),
    [
        ('<a href="gone.html">x</a>', "no such file", "gone.html"),
        ('<a href="../outside.html">x</a>', "no such file", "../outside.html"),
        ('<a href="index.html#gone">x</a>', "no such anchor", "index.html#gone"),
        ('<a href="#gone">x</a>', "no such anchor", "#gone"),
        ('<p id="a"></p><p id="a"></p>', "duplicate id", "a"),
        (
            '<script src="https://cdn.example.org/x.js"></script>',
            "remote asset",
            "https://cdn.example.org/x.js",
        ),
        ('<link rel="stylesheet" href="//cdn.example.org/x.css">', "remote asset", "//cdn.example.org/x.css"),
        (
            '<img src="https://example.org/a.png" alt="A picture">',
            "remote asset",
            "https://example.org/a.png",
        ),
        ('<script src="gone.js"></script>', "no such file", "gone.js"),
        ('<img src="figure.png">', "missing alternative text", "figure.png"),
        ('<img src="figure.png" alt="_images/figure.png"/>', "missing alternative text", "figure.png"),
        ("<p>| a | b |\n|--:|:--|\n| 1 | 2 |</p>", "table that is not rendered", "| a | b |"),
        (f"<pre>{ROOT}/kdrefs/x.py</pre>", "machine path", f"{ROOT}/kdrefs/x.py"),
        ("<pre>lib/site-packages/torch/x.py:3</pre>", "machine path", "lib/site-packages/torch/x.py:3"),
    ],
)
def test_each_defect_is_found(tmp_path: Path, page: str, kind: str, detail: str) -> None:
    assert check_site(site(tmp_path, **{"bad.html": page})) == [Defect("bad.html", kind, detail)]


def test_remote_style_and_empty_site_are_found(tmp_path: Path) -> None:
    changed = site(tmp_path / "one", **{"style.css": '@import "https://fonts.example.org/css";'})
    assert [defect.kind for defect in check_site(changed)] == ["remote asset"]
    (tmp_path / "none").mkdir()
    assert [defect.kind for defect in check_site(tmp_path / "none")] == ["empty site"]


@pytest.mark.parametrize(
    "text", ["~/.cache/kdrefs", "https://example.org/tmp/x", "see /etc/hosts", "a/root/b"]
)
def test_ordinary_paths_are_no_machine_paths(text: str) -> None:
    assert machine_paths(text) == []


def test_paths_of_this_machine_are_found() -> None:
    assert machine_paths(f'File "{sys.prefix}/lib/x.py"') == [f"{sys.prefix}/lib/x.py"]
