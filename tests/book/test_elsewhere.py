"""Numbers imported from another machine have a column of their own beside ours, and no say in verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from book._ext import evidence
from book._ext.layout import results_tables
from reproductions.harness.ledger import Ledger, column_ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged
from reproductions.harness.store import Result
from tests.book.minibook import make_fake
from tests.book.pages import forget, lines_of, rendered, text_of
from tests.harness.fakes import make_result

MACHINE = "some-gpu"
DEVICE = "A *GPU* [1]"


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KDREFS_COLUMNS", str(tmp_path / "columns"))
    monkeypatch.delenv("KDREFS_FRESH", raising=False)
    forget()
    yield tmp_path / "columns"
    forget()


@pytest.fixture
def column(columns: Path) -> str:
    """A column whose method has 55.0 to 55.4 here and whose student has 50.0 to 50.4."""
    return make_fake(columns)


def elsewhere(columns: Path, name: str, results: list[Result]) -> None:
    """Put results into the ledger of a machine, as an import would."""
    device = {"device_name": DEVICE, "device": "cuda"}
    there = [
        r.model_copy(update={"provenance": r.provenance.model_copy(update=device)}).sealed() for r in results
    ]
    ledger = merged(Ledger.empty(name), there, load_column(name, columns))
    ledger.save(columns / name / "elsewhere" / f"{MACHINE}.json")
    forget()


def quick(name: str, arm: str, value: float) -> list[Result]:
    return [make_result(name, arm, seed, value + 0.1 * seed) for seed in range(5)]


def page(folder: Path, text: str) -> tuple[str, str]:
    return rendered(
        folder, f"# Page\n\n{text}\n\n```{{bibliography}}\n```\n", results="# Results\n\n```{numbers}\n```"
    )


def plain(folder: Path, name: str) -> str:
    text = (folder / "out" / f"{name}.html").read_text(encoding="utf8")
    return text_of(text[text.index('role="main"') :]).replace("\N{NO-BREAK SPACE}", " ")


def test_a_machine_has_a_column_beside_ours(tmp_path: Path, columns: Path, column: str) -> None:
    elsewhere(columns, column, [*quick(column, "method", 55.05), *quick(column, "student", 60.0)])
    html, warnings = page(tmp_path, f"```{{results}} {column}\n:arms: method, student, twin\n```")
    head, *rows = lines_of(html)
    assert head[3:5] == ["Quick, recorded synthetic", f"Quick, {MACHINE} synthetic"]
    assert [row[4] for row in rows] == [
        "60.2 ± 0.2 % n = 5 differs from ours",
        "55.2 ± 0.2 % n = 5 agrees with ours",
        "–",
    ]
    assert rows[0][3] == "50.2 ± 0.2 % n = 5"
    assert warnings == ""


def test_verdicts_are_those_of_our_numbers(tmp_path: Path, columns: Path, column: str) -> None:
    before = {name: [v.verdict for v in found] for name, found in evidence.judged(column).items()}
    elsewhere(columns, column, [*quick(column, "method", 40.0), *quick(column, "student", 60.0)])
    assert {name: [v.verdict for v in found] for name, found in evidence.judged(column).items()} == before
    assert before["method-over-student"][0] == "direction holds"


def test_a_profile_that_only_the_machine_has(tmp_path: Path, columns: Path, column: str) -> None:
    results = [make_result(column, "method", seed, 70.0 + seed, profile="paper") for seed in range(5)]
    elsewhere(columns, column, results)
    html, warnings = page(tmp_path, f"```{{results}} {column}\n:profiles: paper\n:arms: method\n```")
    head, row = lines_of(html)
    assert head[-3:-1] == ["Paper-scale synthetic", f"Paper-scale, {MACHINE} synthetic"]
    assert row[-3:-1] == ["–", "72.0 ± 2.0 % n = 5"]
    assert warnings == ""


def test_the_page_of_results_lists_them_with_their_machine(
    tmp_path: Path, columns: Path, column: str
) -> None:
    elsewhere(columns, column, quick(column, "method", 55.05))
    key = f"{column}/quick/synthetic/map/method"
    html, warnings = page(
        tmp_path, f"A {{num}}`{key}` B {{num}}`{key}%{MACHINE}` C {{num}}`{key}%{MACHINE}.key` D"
    )
    text = text_of(html).replace("\N{NO-BREAK SPACE}", " ")
    assert f"A 55.2 ± 0.2 % B 55.2 ± 0.2 % C {key}@1%{MACHINE} D" in text
    results = plain(tmp_path, "results")
    assert f"quick , synthetic, imported: keys {column}/quick/synthetic/metric/arm%{MACHINE}" in results
    assert f"computed on {DEVICE} (cuda)" in results
    assert "method 5 55.2 ± 0.2 % agrees with ours stale, version 1" in results
    anchors = re.findall(r'href="results\.html#([^"]+)"', html)
    assert len(set(anchors)) == 2
    source = (tmp_path / "out" / "results.html").read_text(encoding="utf8")
    assert [source.count(f'id="{anchor}"') for anchor in dict.fromkeys(anchors)] == [1, 1]
    assert warnings == ""


def test_an_unknown_machine_is_a_warning(tmp_path: Path, columns: Path, column: str) -> None:
    elsewhere(columns, column, quick(column, "method", 55.05))
    _, warnings = page(tmp_path, f"{{num}}`{column}/quick/synthetic/map/method%some-gpuu`")
    assert "no machine 'some-gpuu'" in warnings
    assert f"did you mean '{MACHINE}'" in warnings


def test_without_imports_pages_say_nothing_of_machines(tmp_path: Path, columns: Path, column: str) -> None:
    html, _ = page(tmp_path, f"```{{results}} {column}\n```")
    assert lines_of(html)[0] == [
        "Arm",
        "Printed",
        "Quick, this build synthetic",
        "Quick, recorded synthetic",
        "Standard synthetic",
        "Paper-scale synthetic",
        "Claims",
    ]
    assert "imported" not in plain(tmp_path, "results")
    assert "ours" not in plain(tmp_path, "results")


def test_a_metric_that_only_the_machine_has_in_a_setting_gets_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tables() -> set[tuple[str, bool]]:
        found = results_tables("quest", ("quick",), {"metrics": ("accuracy",)})
        return {(table.metric, "-targets" in table.data["quick"]) for table in found}

    monkeypatch.setattr(evidence, "ledgers", lambda: {"quest": column_ledger("quest")})
    monkeypatch.setattr(evidence, "elsewhere", lambda name: {})
    assert tables() == {("test accuracy", False)}
    there = {"quest/quick/digits-targets/accuracy/student": ()}
    ledger = SimpleNamespace(file=SimpleNamespace(numbers=there))
    monkeypatch.setattr(evidence, "elsewhere", lambda name: {MACHINE: ledger})
    assert tables() == {("test accuracy", False), ("test accuracy", True)}
