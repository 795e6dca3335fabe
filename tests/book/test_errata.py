"""The page of errata: all cards with what they need, counts by source, and a filter that a keyboard can use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from book.paths import ROOT
from reproductions.toolboxes.errata import ERRATA
from tests.book.chromium import Tab, chromium, find_chromium
from tests.book.minibook import make_fake
from tests.book.pages import forget, lines_of, rendered, text_of

STATIC = ROOT / "book" / "_static"


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two columns, one with a mistake of a paper and one with one of a note, and the toolboxes."""
    folder = tmp_path / "columns"
    names = sorted(make_fake(folder) for _ in range(2))
    second = folder / names[1] / "errata.py"
    second.write_text(second.read_text().replace('kind="paper"', 'kind="note"'))
    (folder / "toolboxes").mkdir()
    (folder / "toolboxes" / "errata.py").touch()  # imported from the package itself, which comes first
    monkeypatch.setenv("KDREFS_COLUMNS", str(folder))
    forget()
    yield names
    forget()


@pytest.fixture
def page(tmp_path: Path, columns: list[str]) -> str:
    html, warnings = rendered(tmp_path, "# Errata\n\n```{errata}\n```\n\n```{bibliography}\n```\n")
    assert warnings == ""
    return html


def test_every_erratum_has_its_card(page: str, columns: list[str]) -> None:
    text = text_of(page)
    for erratum in ERRATA:
        assert f'id="erratum-toolboxes-{erratum.id.lower()}"' in page
        assert f"{erratum.id} · {erratum.where.split(',')[0]}" in text
    for name, kind in zip(columns, ("paper", "note"), strict=True):
        assert re.search(rf'class="[^"]*\berratum-{kind}\b[^"]*" id="erratum-{name}-f1"', page)
    assert page.count('class="evidence-card erratum ') == len(ERRATA) + 2
    assert text.count("Evidence ") == len(ERRATA) + 2
    assert "does not hold" not in text


def test_counts_by_source_lead_to_the_sections(page: str, columns: list[str]) -> None:
    n = str(len(ERRATA))
    assert lines_of(page) == [
        ["Errata on", "Note", "Paper", "Public code", "All"],
        ["A fake column", "0", "1", "0", "1"],
        ["A fake column", "1", "0", "0", "1"],
        ["Public toolboxes", "0", "0", n, n],
        ["All", "1", "1", n, str(len(ERRATA) + 2)],
    ]
    for name in (*columns, "toolboxes"):
        assert f'href="#errata-{name}"' in page
        assert f'<section id="errata-{name}">' in page


def test_without_a_script_there_are_no_buttons(page: str) -> None:
    assert "<button" not in page
    assert re.search(r'<div class="errata-filter[^"]*">\s*</div>', page)


def test_one_column_has_no_filter_and_no_counts(tmp_path: Path, columns: list[str]) -> None:
    html, warnings = rendered(
        tmp_path, f"# Page\n\n```{{errata}} {columns[0]}\n```\n\n```{{bibliography}}\n```\n"
    )
    assert warnings == ""
    assert "errata-filter" not in html
    assert "<table" not in html
    assert f'id="erratum-{columns[0]}-f1"' in html


def test_toolboxes_can_stand_on_a_page(tmp_path: Path, columns: list[str]) -> None:
    text = "# Page\n\nSee {erratum}`toolboxes/T1`.\n\n```{errata} toolboxes\n```\n\n```{bibliography}\n```\n"
    html, warnings = rendered(tmp_path, text)
    assert warnings == ""
    assert html.count('class="evidence-card erratum ') == len(ERRATA)
    assert "See T1 ." in text_of(html)


@pytest.fixture
def tab(tmp_path: Path, page: str) -> Iterator[Tab]:
    """The page in a browser, with the book's own script and style."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH")
    file = tmp_path / "out" / "index.html"
    style, script = ((STATIC / name).read_text(encoding="utf8") for name in ("book.css", "book.js"))
    html = re.sub(r"<script[^>]*https?://[^>]*></script>", "", file.read_text(encoding="utf8"))
    html = html.replace('class="body"', 'class="body bd-article"')
    html = html.replace("</head>", f"<style>{style}</style><script>{script}</script></head>")
    file.write_text(html, encoding="utf8")
    with chromium(program) as opened:
        opened.size(1400, 1000)
        opened.open(file.as_uri())
        yield opened


def buttons(tab: Tab) -> dict[str, str]:
    """The label of each button and whether it is pressed."""
    found = "[...document.querySelectorAll('.errata-filter button')]"
    return dict(tab.evaluate(f"{found}.map(b => [b.textContent, b.getAttribute('aria-pressed')])"))


def visible(tab: Tab, selector: str) -> list[str]:
    """The ids of the elements that take part in the layout."""
    found = f"[...document.querySelectorAll({selector!r})].filter(one => one.getClientRects().length)"
    return list(tab.evaluate(f"{found}.map(one => one.id)"))


def press(tab: Tab, key: str) -> None:
    """Press a key that scripts and the browser itself see."""
    code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
    options = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    tab.call("Input.dispatchKeyEvent", type="keyDown", **options, **({"text": text} if text else {}))
    tab.call("Input.dispatchKeyEvent", type="keyUp", **options)


@pytest.mark.browser
def test_buttons_show_the_errata_of_one_source(tab: Tab, columns: list[str]) -> None:
    first, second = columns
    status = "document.querySelector('.errata-filter [role=status]').textContent"
    everything = len(ERRATA) + 2
    assert buttons(tab) == {"All": "true", "Notes": "false", "Papers": "false", "Public code": "false"}
    assert len(visible(tab, ".erratum")) == everything
    assert tab.evaluate(status) == f"{everything} of {everything} shown"

    tab.evaluate("document.querySelector('.errata-filter button[value=code]').click()")
    assert buttons(tab) == {"All": "false", "Notes": "false", "Papers": "false", "Public code": "true"}
    assert visible(tab, ".erratum") == [f"erratum-toolboxes-{erratum.id.lower()}" for erratum in ERRATA]
    assert visible(tab, "section section") == ["errata-toolboxes"]
    assert tab.evaluate(status) == f"{len(ERRATA)} of {everything} shown"

    # By keyboard: the button after that of the notes is that of the papers.
    tab.evaluate("document.querySelector('.errata-filter button[value=note]').focus()")
    press(tab, "Tab")
    press(tab, "Enter")
    assert buttons(tab)["Papers"] == "true"
    assert visible(tab, ".erratum") == [f"erratum-{first}-f1"]

    # On paper there is everything but the buttons.
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert len(visible(tab, ".erratum")) == everything
    assert visible(tab, ".errata-filter, .errata-filter button") == []
    tab.call("Emulation.setEmulatedMedia", media="")

    # A link to a card that is not shown shows it.
    tab.evaluate(f"location.hash = '#erratum-{second}-f1'")
    tab.wait(
        "document.querySelector('.errata-filter button[value=\"\"]').getAttribute('aria-pressed') === 'true'"
    )
    assert len(visible(tab, ".erratum")) == everything
    assert tab.messages == []
