"""The built book in a real browser: maths, numbers, search, narrow screens, accessibility, both themes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.book.chromium import Tab, chromium, find_chromium

pytestmark = pytest.mark.browser

SITE = Path(__file__).resolve().parents[2] / "build" / "book" / "html"
AXE = "axe-core@4.10.3"
PAGES = (
    "intro",
    "chapters/pkt",
    "shared_table",
    "results",
    "errata",
    "methods",
    "relations",
    "glossary",
    "notes_map",
    "api/kdrefs.methods.pkt",
)


def address(page: str) -> str:
    return (SITE / f"{page}.html").as_uri()


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH")
    if not (SITE / "chapters" / "pkt.html").is_file():
        pytest.skip("the book is not built: make book")
    with chromium(program) as opened:
        opened.size(1400, 1000)
        yield opened


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, fetched by npm at a fixed version."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm on the PATH to fetch axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        [npm, "pack", AXE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    if packed.returncode:
        pytest.skip(f"npm could not fetch {AXE}: {packed.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def test_chapter_renders_maths_and_nothing_fails(tab: Tab) -> None:
    tab.open(address("chapters/pkt"))
    assert tab.messages == []
    formulas = "document.querySelectorAll('.math').length"
    assert tab.evaluate(formulas) >= 5
    assert tab.evaluate("document.querySelectorAll('.math mjx-container').length") == tab.evaluate(formulas)
    assert tab.evaluate("document.querySelectorAll('mjx-merror').length") == 0
    # With the fonts missing, a glyph falls back and the formula loses its height.
    assert (
        tab.evaluate("document.querySelector('div.math mjx-container').getBoundingClientRect().height") > 20
    )


def test_chapter_shows_its_numbers(tab: Tab) -> None:
    tab.open(address("chapters/pkt"))
    numbers = tab.evaluate("[...document.querySelectorAll('.num')].map(one => one.textContent)")
    assert len(numbers) > 10
    assert [one for one in numbers if not any(c.isdigit() for c in one)] == []
    assert tab.evaluate("document.querySelectorAll('.verdict').length") > 0
    assert tab.evaluate("document.querySelectorAll('.problematic, .system-message').length") == 0


def test_figures_are_there_and_described(tab: Tab) -> None:
    tab.open(address("chapters/pkt"))
    figures: list[dict[str, Any]] = tab.evaluate(
        "[...document.querySelectorAll('.cell_output img')].map(i => ({width: i.naturalWidth, alt: i.alt}))"
    )
    assert len(figures) >= 4
    assert all(figure["width"] > 100 and len(figure["alt"]) > 20 for figure in figures)


def test_notebook_can_be_downloaded(tab: Tab) -> None:
    tab.open(address("chapters/pkt"))
    link = tab.evaluate(
        "document.querySelector('a[href*=\"_sources/\"][href$=\"pkt.ipynb\"]').getAttribute('href')"
    )
    notebook = json.loads((SITE / "chapters" / link).resolve().read_text(encoding="utf8"))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts
    assert None not in counts


@pytest.mark.parametrize("word", ["neighbour", "diagonal"])
def test_search_finds_the_chapter(tab: Tab, word: str) -> None:
    tab.open(f"{address('search')}?q={word}")
    tab.wait("document.querySelector('#search-results ul.search li a')")
    tab.wait("[...document.querySelectorAll('#search-results a')].some(a => a.href.includes('chapters/pkt'))")


@pytest.mark.parametrize("page", PAGES)
def test_nothing_scrolls_sideways_on_a_phone(tab: Tab, page: str) -> None:
    tab.size(390, 844)
    try:
        tab.open(address(page))
        wide = tab.evaluate("document.documentElement.scrollWidth")
    finally:
        tab.size(1400, 1000)
    assert wide <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_serious(tab: Tab, axe: str, page: str, theme: str) -> None:
    tab.open(address(page))
    tab.theme(theme)
    tab.evaluate(f"{axe}; true")
    found: list[dict[str, Any]] = tab.evaluate(
        "axe.run({resultTypes: ['violations']}).then(r => r.violations)"
    )
    serious = {
        one["id"]: [node["html"][:200] for node in one["nodes"][:3]]
        for one in found
        if one["impact"] in ("serious", "critical")
    }
    assert serious == {}
