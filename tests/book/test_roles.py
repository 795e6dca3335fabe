"""Roles and directives print what the ledger, the claims and the errata say, and name what is unknown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from book._ext.buttons import COLAB, colab_link
from book._ext.docstrings import find_object
from book._ext.layout import results_tables, setting_of
from book._ext.roles import TONES, locate
from book._ext.tables import tidy
from book.paths import ROOT
from reproductions.harness import claims
from reproductions.harness.profiles import HarnessError
from tests.book.minibook import make_fake
from tests.book.pages import forget, rendered, text_of

Render = Callable[[str], tuple[str, str]]


@pytest.fixture
def column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = make_fake(tmp_path / "columns")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / f"{name}-quick.json").write_bytes((tmp_path / "columns" / name / "ledger.json").read_bytes())
    monkeypatch.setenv("KDREFS_COLUMNS", str(tmp_path / "columns"))
    monkeypatch.setenv("KDREFS_FRESH", str(fresh))
    forget()
    yield name
    forget()


@pytest.fixture
def render(tmp_path: Path, column: str) -> Render:
    """Render a page of Markdown, COLUMN standing for the column; return its text with tags, and the warnings."""

    def of_column(text: str) -> tuple[str, str]:
        page = f"# Page\n\n{text.replace('COLUMN', column)}\n\n```{{bibliography}}\n```\n"
        evidence_pages = {
            "results": "# Results\n\n```{numbers}\n```",
            "errata": "# Errata\n\n```{errata}\n```",
        }
        return rendered(tmp_path, page, **evidence_pages)

    return of_column


def test_number_and_its_fields(render: Render, column: str, tmp_path: Path) -> None:
    key = f"{column}/quick/synthetic/map/method"
    html, warnings = render(
        f"A {{num}}`{key}` B {{num}}`{key}.mean` C {{num}}`{key}.interval` D {{num}}`{key}.n` E"
    )
    # 55.0 to 55.4 in steps of 0.1: mean 55.2, half width 2.776 * 0.158 / sqrt 5
    assert "A 55.2 ± 0.2 % B 55.2 % C [55.0, 55.4] D 5 E" in text_of(html).replace("\N{NO-BREAK SPACE}", " ")
    assert warnings == ""
    anchor = f"num-{column}-quick-synthetic-map-method"
    assert f'href="results.html#{anchor}"' in html
    results = (tmp_path / "out" / "results.html").read_text(encoding="utf8")
    assert f'id="{anchor}"' in results
    assert "method 5 55.2 ± 0.2 % stale, version 1" in text_of(results).replace("\N{NO-BREAK SPACE}", " ")


def test_number_of_a_profile_that_nobody_has_recorded(render: Render, column: str) -> None:
    html, warnings = render(
        "A {num}`COLUMN/standard/synthetic/map/method` B {num}`COLUMN/standard/synthetic/map/student.n` C"
    )
    assert "A not recorded B not recorded C" in text_of(html)
    assert warnings == ""
    for unknown in (
        "standard/synthetic/map/methode",
        "standard/synthetic/mpa/method",
        "standard/synthetc/map/method",
    ):
        _, warnings = render(f"{{num}}`COLUMN/{unknown}`")
        assert "no recorded number" in warnings


def test_fresh_number(render: Render, column: str) -> None:
    html, warnings = render(f"A {{fresh}}`{column}/quick/synthetic/map/student.mean` B")
    assert "A 50.2 % B" in text_of(html)
    assert warnings == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{num}`COLUMN/quick/synthetic/map/methode`", "did you mean 'COLUMN/quick/synthetic/map/method'"),
        ("{num}`other/quick/synthetic/map/method`", "no recorded number"),
        ("{num}`COLUMN/quick/synthetic/map/method@7`", "has no version '7'"),
        ("{fresh}`COLUMN/quick/synthetic/map/metod`", "no number computed in this build"),
        ("{verdict}`COLUMN/method-over-studnt`", "did you mean 'method-over-student'"),
        ("{verdict}`COLUMN/paper/method-over-student`", "has no profile 'paper'"),
        ("{verdict}`nocolumn/method-over-student`", "no column 'nocolumn'"),
        ("{badge}`reproducd`", "did you mean 'reproduced'"),
        ("{erratum}`COLUMN/F2`", "no erratum 'F2'"),
        ("{source}`kdrefs.methods.pkt.pkt_los`", "did you mean 'pkt_loss'"),
        ("{source}`kdrefs.nomodule.f`", "no module for"),
        ("```{claims} nocolumn\n```", "no column 'nocolumn'"),
        ("```{results} COLUMN\n:metrics: mpa\n```", "no metric 'mpa'; did you mean 'map'"),
        ("```{results} COLUMN\n:arms: twinn\n```", "no arm 'twinn'"),
        ("```{errata} nocolumn\n```", "no column 'nocolumn'"),
    ],
)
def test_unknown_names_are_warnings_with_close_matches(
    render: Render, column: str, text: str, message: str
) -> None:
    _, warnings = render(text)
    assert message.replace("COLUMN", column) in warnings
    assert "index.md" in warnings


def test_verdicts(render: Render, column: str) -> None:
    html, warnings = render(
        "A {verdict}`COLUMN/method-over-student` B {verdict}`COLUMN/student-over-method` "
        "C {verdict}`COLUMN/standard/method-over-student` D"
    )
    # Decided on quick only, so the headline is quick's; standard has no numbers.
    assert "A ✓ direction holds quick, stale B ✗ contradicted quick, stale C ○ not run standard D" in text_of(
        html
    )
    assert warnings == ""


def test_every_verdict_of_the_harness_has_a_badge() -> None:
    words = set(re.findall(r"\*\*([^*]+)\*\*", claims.__doc__ or ""))
    assert words == set(TONES)


def test_introduction_explains_every_badge() -> None:
    intro = (ROOT / "book" / "intro.md").read_text(encoding="utf8")
    assert re.findall(r"\{badge\}`([^`]+)`", intro) == list(
        dict.fromkeys(re.findall(r"\{badge\}`([^`]+)`", intro))
    )
    assert set(re.findall(r"\{badge\}`([^`]+)`", intro)) == set(TONES)


def test_results_table(render: Render, column: str) -> None:
    html, warnings = render("```{results} COLUMN\n:metrics: map, error\n:arms: method, student\n```")
    text = text_of(html).replace("\N{NO-BREAK SPACE}", " ")
    assert "Arm Printed Quick, this build synthetic Quick, recorded synthetic Standard synthetic" in text
    assert "method 55.5 55.2 ± 0.2 % n = 5 55.2 ± 0.2 % n = 5 – –" in text
    assert "–: no recorded run" in text
    assert "✓ direction holds quick, stale The method is better than the student" in text
    assert re.search(r'<div class="[^"]*dropdown[^"]*">\s*<p class="admonition-title">error', html)
    assert warnings == ""


def test_a_metric_that_a_setting_does_not_have_gets_no_table() -> None:
    forget()
    options = {"metrics": ("accuracy", "noise_change")}
    tables = list(results_tables("quest", ("quick", "standard"), options))
    assert {(table.metric, "-targets" in table.data["standard"]) for table in tables} == {
        ("test accuracy", False),
        ("change by noise", True),
    }


def test_numbers_claims_and_errata(render: Render, column: str) -> None:
    html, warnings = render("```{claims} COLUMN\n```\n\n```{errata} COLUMN\n```\n\n```{verdicts}\n```")
    text = text_of(html)
    assert "The method is better than the student · primary Source: Table 1, read in the paper." in text
    assert "2 exploratory claims" in text
    assert "Printed: 55.5." in text
    assert f'id="claim-{column}-method-over-student"' in html
    assert "F1 · equation 1 the paper" in text
    assert "does not hold" not in text
    assert "The sum is 2." in text
    assert "A fake column" in text
    assert warnings == ""


def test_erratum_that_does_not_hold_says_so(
    render: Render, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = make_fake(tmp_path / "wrong", holds=3)
    monkeypatch.setenv("KDREFS_COLUMNS", str(tmp_path / "wrong"))
    forget()
    html, warnings = render(f"```{{errata}} {wrong}\n```")
    assert "✗ does not hold" in text_of(html)
    assert "The sum is 2." in text_of(html)
    assert warnings == ""


def test_source_lines_are_those_of_the_definition() -> None:
    file, name, line = locate("kdrefs.methods.pkt.pkt_loss")
    assert (file.name, name) == ("pkt.py", "pkt_loss")
    assert file.read_text(encoding="utf8").splitlines()[line - 1].startswith("def pkt_loss(")
    with pytest.raises(HarnessError, match="has no 'forwrad'; did you mean 'forward'"):
        locate("kdrefs.nets.small.TinyCNN.forwrad")


@pytest.mark.parametrize(
    ("data", "setting"), [("cifar10", ""), ("cifar10-10pct", "10pct"), ("digits-hog", "hog")]
)
def test_setting_of_a_data_set(data: str, setting: str) -> None:
    assert setting_of(data) == setting


@pytest.mark.parametrize(
    ("repository", "link"),
    [
        ("https://github.com/owner/name", f"{COLAB}/owner/name/blob/gh-pages/_sources/chapters/pkt.ipynb"),
        (
            "https://github.com/owner/name.git/",
            f"{COLAB}/owner/name/blob/gh-pages/_sources/chapters/pkt.ipynb",
        ),
        ("https://example.org/owner/name", None),
        ("", None),
    ],
)
def test_colab_needs_a_repository_that_it_can_open(repository: str, link: str | None) -> None:
    assert colab_link(repository, "chapters/pkt") == link


def test_names_are_found_where_they_are_defined() -> None:
    assert (
        find_object("kdrefs.nets.resnet", "Output")
        is find_object(None, "kdrefs.nets.output.Output")
        is not None
    )
    assert find_object("kdrefs.nets.resnet", "nn.Module") is torch.nn.Module
    assert find_object("kdrefs.nets.resnet", "NoSuchThing") is None


def test_sentences_get_minus_signs_and_unbroken_quantities() -> None:
    nbsp = "\N{NO-BREAK SPACE}"
    assert (
        tidy("Difference -1.7 % (n = 5), CIFAR-10") == f"Difference −1.7{nbsp}% (n{nbsp}={nbsp}5), CIFAR-10"
    )
