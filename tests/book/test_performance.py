"""The page on performance prints the last record, and says where it falls short."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from book import benchmarks
from book.benchmarks import Goal, Machine, Ratio, Record, Row, Side
from book.paths import ROOT
from tests.book.pages import lines_of, rendered, text_of

PAGE = "# Page\n\n```{{benchmarks}} {}\n```\n"
MACHINE = Machine(
    processor="a processor", cores=2, accelerator=None, system="Linux", versions={"torch": "2.11"}, load=0.5
)


def row(name: str, ours: tuple[float, float], theirs: tuple[float, float], **changes: Any) -> Row:
    """A comparison by seconds and MiB of both sides; the quartiles lie 10 % around the median."""
    cost = changes.get("comparison") == "cost"
    ratio = ours[0] / theirs[0] if cost else theirs[0] / ours[0]
    sides = [Side(seconds=seconds, peak_mib=peak) for seconds, peak in (ours, theirs)]
    made = Row(
        group="Losses", name=name, size="B 64", device="cpu", threads=1, comparison="rival", ours=sides[0],
        theirs=sides[1], ratio=Ratio(low=0.9 * ratio, median=ratio, high=1.1 * ratio), rounds=9,
    )  # fmt: skip
    return made.model_copy(update=changes)


def goal(quantity: Any, sense: Any, bound: float) -> Goal:
    return Goal(quantity=quantity, sense=sense, bound=bound)


ROWS = (
    row("fast", (0.001, 2.0), (0.020, 20.0), goals=(goal("time", "at least", 15), goal("memory", "at least", 8))),
    row("even", (0.002, 3.0), (0.0022, 2.0), goals=(goal("time", "at least", 2),), device="cuda"),
    row("cost", (3.0, 1500.0), (1.0, 10.0), group="Sums", comparison="cost", images=300,
        goals=(goal("time", "at most", 2), goal("peak MiB", "at most", 1023))),
)  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    path = tmp_path / "benchmarks.json"
    monkeypatch.setattr(benchmarks, "RECORD", path)
    Record(
        date=datetime(2026, 1, 2, tzinfo=UTC), commit="0123456789abcdef", dirty=True, seconds=90.0, machine=MACHINE,
        rows=ROWS,
    ).save(path)  # fmt: skip
    return Record.load(path)


def test_a_group_is_a_table(tmp_path: Path, recorded: Record) -> None:
    html, warnings = rendered(tmp_path, PAGE.format("Losses"))
    assert warnings == ""
    assert lines_of(html) == [
        ["Case", "Size", "Ours", "Theirs", "Ratio theirs / ours", "Peak, MiB ours / theirs", "Goals"],
        ["fast", "B 64", "1 ms", "20 ms", "20 × [18, 22]", "2.0 / 20.0", "✓ time ≥ 15 ×; ✓ memory ≥ 8 ×"],
        ["even (cuda)", "B 64", "2 ms", "2.2 ms", "1.1 × [0.99, 1.21]", "3.0 / 2.0", "✗ time ≥ 2 ×"],
    ]


def test_a_cost_says_how_many_times_as_long(tmp_path: Path, recorded: Record) -> None:
    html, _ = rendered(tmp_path, PAGE.format("Sums"))
    head, line = lines_of(html)
    assert head[4:6] == ["Ratio ours / theirs", "Images/s ours / theirs"]
    assert line[4:] == ["3 × [2.7, 3.3]", "100 / 300", "1,500.0 / 10.0", "✗ time ≤ 2 ×; ✗ peak ≤ 1,023 MiB"]


def test_what_is_not_faster_and_what_was_missed_is_listed(tmp_path: Path, recorded: Record) -> None:
    html, warnings = rendered(tmp_path, PAGE.format("behind") + PAGE.format("missed"))
    assert warnings == ""
    text = text_of(html).replace("\N{NO-BREAK SPACE}", " ")
    assert "even (cuda), B 64: 1.1 × [0.99, 1.21], memory 0.667 ×" in text
    assert "fast" not in text
    assert "even (cuda), B 64: time ≥ 2 ×, measured 1.1 ×" in text
    assert "cost, B 64: time ≤ 2 ×, measured 3 ×" in text
    assert "cost, B 64: peak ≤ 1,023 MiB, measured 1,500 MiB" in text


def test_the_machine_is_described(tmp_path: Path, recorded: Record) -> None:
    html, _ = rendered(tmp_path, PAGE.format("machine"))
    lines = dict(lines_of(html)[1:])
    assert lines["Commit"] == "0123456789 , with changes"
    assert lines["Accelerator"] == "none: nothing on this page was measured on a GPU"
    assert lines["The whole run"] == "1.5 min, 3 comparisons"


def test_an_unknown_part_is_a_warning(tmp_path: Path, recorded: Record) -> None:
    _, warnings = rendered(tmp_path, PAGE.format("Loses"))
    assert "no benchmarks 'Loses'; did you mean 'Losses'" in warnings


def test_without_a_record_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "RECORD", tmp_path / "none.json")
    html, warnings = rendered(tmp_path, PAGE.format("machine"))
    assert (warnings, "Not recorded yet." in text_of(html)) == ("", True)


def test_an_edited_record_is_refused(recorded: Record) -> None:
    path = benchmarks.RECORD
    path.write_text(
        path.read_text(encoding="utf8").replace('"median": 20.0', '"median": 40.0'), encoding="utf8"
    )
    with pytest.raises(ValueError, match="digest"):
        Record.load(path)


def test_the_page_shows_every_group_of_its_record(tmp_path: Path) -> None:
    text = (ROOT / "book" / "performance.md").read_text(encoding="utf8")
    record = Record.load(benchmarks.RECORD)
    assert not record.dirty
    _, warnings = rendered(tmp_path, text, shared_table="# Shared table")
    assert warnings == ""
    missing = {row.group for row in record.rows if f"{{benchmarks}} {row.group}\n" not in text}
    assert missing == set()
