"""The shared table shows the rows of all columns with one recipe, and says what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from book import benchmarks
from book._ext.recipe import recipe_lines
from book._ext.shared_table import TABLES, table_rows
from book.paths import ROOT
from reproductions.harness.ledger import Ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.provenance import source_digest
from reproductions.harness.recording import merged
from reproductions.harness.store import Run
from reproductions.protocols.pairs import PAIRS, weights_digest
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS
from tests.book.pages import forget, lines_of, rendered, text_of
from tests.harness.fakes import make_result

# A column of the protocol. The second setting has the recipe of the first, whose numbers are shown; the last has
# another one: its arms are no rows, whatever they are called.
COLUMN = """\
from dataclasses import replace

from reproductions.protocols import classification
from reproductions.protocols.classification import Config
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, DIGITS

COLUMN = "NAME"
TITLE = "Column NAME"
PAPER = "hinton2015kd"
METRICS = classification.METRICS
ROWS = ARMS

PROFILES = {
    "quick": Config(
        profile="quick",
        settings=(
            Setting("DATA", DIGITS, ("teacher", "student", *ROWS, "further")),
            Setting("DATA-again", DIGITS, ROWS),
            Setting("digits-deep", replace(DIGITS, epochs=3), ("teacher", *ROWS)),
        ),
        seeds=(0, 1, 2),
        budget_minutes=1,
        data=(),
    ),
    "standard": Config(
        profile="standard",
        settings=(Setting("cifar10", CIFAR10, ("student", *ROWS)),),
        seeds=(0, 1),
        budget_minutes=1,
        data=(),
    ),
}


def plan(config):
    return classification.plan(COLUMN, config)


def relevant_config(run, config):
    return classification.relevant_config(run, config)


def execute(run, config, context):
    raise NotImplementedError
"""
CLAIMS = """\
[[claim]]
id = "better"
title = "It is better"
kind = "greater"
keys.quick = ["NAME/quick/digits/accuracy/own", "NAME/quick/digits/accuracy/student"]
delta = 0.5
primary = true
source = "a table"
known = "unverified"
"""
_numbers = count()


def make(columns: Path, letter: str, arms: tuple[str, ...], data: str = "digits") -> str:
    """Write a column of the protocol; its name begins with ``letter``."""
    name = f"{letter}_shared{os.getpid()}x{next(_numbers)}"
    folder = columns / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    text = COLUMN.replace("NAME", name).replace("ARMS", repr(arms)).replace("DATA", data)
    (folder / "run.py").write_text(text)
    return name


def record(
    columns: Path, name: str, data: str, values: dict[str, tuple[float, ...]], source: str = ""
) -> None:
    """Write a ledger with the accuracy of each seed; the other two metrics follow from it."""
    column = load_column(name, columns)
    results = []
    for arm, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            result = make_result(name, arm, seed, 0.0, source=source or source_digest(column.module))
            metrics = {"accuracy": accuracy, "agreement": accuracy - 1, "cross_entropy": accuracy / 100}
            run = Run(name, "quick", data, arm, seed)
            results.append(result.model_copy(update={"run": run, "metrics": metrics}).sealed())
    merged(Ledger.empty(name), results, column).save(columns / name / "ledger.json")


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KDREFS_COLUMNS", str(tmp_path / "columns"))
    monkeypatch.delenv("KDREFS_FRESH", raising=False)
    monkeypatch.setattr(benchmarks, "RECORD", tmp_path / "benchmarks.json")
    forget()
    yield tmp_path / "columns"
    forget()


@pytest.fixture
def baseline(columns: Path) -> str:
    """The column with the rows that all share; its name comes last in the alphabet."""
    name = make(columns, "z", ("kd", "student"))
    (columns / name / "figures.py").write_text(
        'ARM_TITLES = {"student": "labels alone", "kd": "KD, T = 4"}\n'
    )
    return name


def test_rows_of_all_columns_stand_below_the_teacher(tmp_path: Path, columns: Path, baseline: str) -> None:
    own = make(columns, "a", ("own",))
    (columns / own / "claims.toml").write_text(CLAIMS.replace("NAME", own))
    record(
        columns,
        baseline,
        "digits",
        {"teacher": (90.0, 91.0, 92.0), "student": (70.0, 71.0, 72.0), "kd": (73.0, 74.0, 76.0)},
    )
    record(
        columns, own, "digits", {"own": (69.0, 70.0, 71.0), "student": (70.0, 71.0, 72.0)}, source="b" * 64
    )
    html, warnings = rendered(
        tmp_path,
        "# Page\n\n```{shared-table} digits\n```\n",
        **{f"chapters__{own}": "# Own", f"chapters__{baseline}": "# Baseline"},
    )
    assert warnings == ""
    head, *lines = lines_of(html)
    assert head[0] == "Row"
    assert head[-1] == "Claim"
    # Half of the interval of three values 1 apart: 4.303 / sqrt 3 = 2.5; the differences 3, 3, 4 give 1.4.
    assert lines == [
        ["teacher", "91.0 ± 2.5 % n = 3", "", "", "0.910 ± 0.025 nat", ""],
        ["labels alone", "71.0 ± 2.5 % n = 3", "", "70.0 ± 2.5 %", "0.710 ± 0.025 nat", ""],
        [
            "KD, T = 4", "74.3 ± 3.8 % n = 3", "+3.3 points [+1.9, +4.8]", "73.3 ± 3.8 %", "0.743 ± 0.038 nat", "",
        ],
        [
            "own", "70.0 ± 2.5 % n = 3, stale", "−1.0 points [−1.0, −1.0]", "69.0 ± 2.5 %", "0.700 ± 0.025 nat",
            "✗ contradicted stale",
        ],
    ]  # fmt: skip
    assert f'href="chapters/{own}.html"' in html
    assert f'href="chapters/{baseline}.html"' in html
    assert html.count(f'href="chapters/{baseline}.html"') == 1, "the student's row belongs to nobody"
    assert "not recorded yet" not in text_of(html)


def test_a_row_needs_the_recipe_and_not_the_name_of_the_data(columns: Path, baseline: str) -> None:
    other = make(columns, "b", ("first", "second"), data="digits-table")
    found = [(row.column, row.profile, row.data, row.arm) for row in table_rows(DIGITS)]
    assert found == [
        (baseline, "quick", "digits", "student"),
        (baseline, "quick", "digits", "kd"),
        (other, "quick", "digits-table", "first"),
        (other, "quick", "digits-table", "second"),
    ]
    assert [row.profile for row in table_rows(CIFAR10)] == ["standard"] * 4
    assert table_rows(CIFAR100) == []
    assert table_rows(replace(DIGITS, epochs=3))[0].data == "digits-deep"


def test_what_is_not_recorded_is_said(tmp_path: Path, columns: Path, baseline: str) -> None:
    make(columns, "a", ("own",))
    nothing, warnings = rendered(tmp_path, "# Page\n\n```{shared-table} digits\n```\n")
    assert warnings == ""
    assert "Not recorded yet." in text_of(nothing)
    assert lines_of(nothing)[0] == ["All rows share", "which is"]
    record(columns, baseline, "digits", {"student": (70.0, 71.0, 72.0)})
    forget()
    (tmp_path / "again").mkdir()
    some, warnings = rendered(tmp_path / "again", "# Page\n\n```{shared-table} digits\n```\n")
    assert warnings == ""
    assert lines_of(some)[1:] == [
        ["teacher", "–", "", "", "–", ""],
        ["labels alone", "71.0 ± 2.5 % n = 3", "", "70.0 ± 2.5 %", "0.710 ± 0.025 nat", ""],
        ["KD, T = 4", "–", "–", "–", "–", ""],
        ["own", "–", "–", "–", "–", ""],
    ]
    assert "–: not recorded yet" in text_of(some)


def side(seconds: float, peak: float) -> benchmarks.Side:
    return benchmarks.Side(seconds=seconds, peak_mib=peak)


def measured(name: str, device: str, factor: float, peak: float) -> benchmarks.Row:
    return benchmarks.Row(
        group="Shared table", name=name, size="B 128", device=device, threads=1, comparison="cost",
        ours=side(factor, peak), theirs=side(1.0, 10.0), rounds=5,
        ratio=benchmarks.Ratio(low=0.9 * factor, median=factor, high=1.1 * factor),
    )  # fmt: skip


def test_cost_of_a_step_comes_from_the_benchmarks(tmp_path: Path, columns: Path, baseline: str) -> None:
    name = make(columns, "a", ("own",))
    for arm, column in (("student", baseline), ("own", name)):
        results = [make_result(column, arm, seed, 0.0, profile="standard") for seed in (0, 1)]
        metrics = {"accuracy": 70.0, "agreement": 60.0, "cross_entropy": 1.0}
        results = [
            result.model_copy(
                update={"run": replace(result.run, data="cifar10"), "metrics": metrics}
            ).sealed()
            for result in results
        ]
        ledger = merged(Ledger.empty(column), results, load_column(column, columns))
        ledger.save(columns / column / "ledger.json")
    rows = (
        measured("student", "cpu", 1.0, 10.0),
        measured("own", "cuda", 3.0, 10.0),
        measured("own", "cpu", 1.25, 15.0),
        measured("kd", "cuda", 7.0, 10.0),
    )
    machine = benchmarks.Machine(
        processor="a processor", cores=2, accelerator=None, system="Linux", versions={}, load=None
    )
    benchmarks.Record(
        date=datetime(2026, 1, 2, tzinfo=UTC),
        commit=None,
        dirty=False,
        seconds=1.0,
        machine=machine,
        rows=rows,
    ).save(benchmarks.RECORD)
    html, warnings = rendered(tmp_path, "# Page\n\n```{shared-table} cifar10\n```\n")
    assert warnings == ""
    lines = {line[0]: line[-2] for line in lines_of(html)}
    assert lines == {
        "Row": "A step student = 1", "teacher": "", "labels alone": "1.00 × memory 1.00 ×", "KD, T = 4": "–",
        "own": "1.25 × memory 1.50 ×",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [("digitz", "did you mean 'digits'"), ("cifar100", "no column has the row 'student' of cifar100")],
)
def test_unknown_tables_are_warnings(
    tmp_path: Path, columns: Path, baseline: str, data: str, message: str
) -> None:
    _, warnings = rendered(tmp_path, f"# Page\n\n```{{shared-table}} {data}\n```\n")
    assert message in warnings


def test_recipes_are_those_of_the_runs() -> None:
    lines = dict(recipe_lines(CIFAR10, (0, 1, 2)))
    digest = weights_digest(PAIRS["cifar10-small"])
    assert digest is not None
    assert digest[:16] in lines["Teacher"]
    assert lines["Intervals"] == "over students, given this teacher"
    assert lines["Seeds"] == "3 (0, 1, 2), each with its own initial weights and batch order"
    assert lines["Images"].startswith(
        "cifar10, random flips and random crops after 4 pixels of padding; mean 0.4914"
    )
    assert lines["Optimiser"] == "SGD, momentum 0.9, Nesterov, weight decay 0.0005"
    changed = replace(
        CIFAR10, epochs=99, batch_size=7, rate=0.3, optimizer="adam", weight_decay=0.0, views=None, precision="float32",
    )  # fmt: skip
    other = dict(recipe_lines(changed, (4,)))
    assert {name for name in lines if other[name] != lines[name]} == {
        "Views", "Epochs", "Batch size", "Optimiser", "Learning rate", "Precision", "Seeds",
    }  # fmt: skip
    assert (other["Epochs"], other["Batch size"], other["Optimiser"]) == ("99", "7", "Adam, weight decay 0")


def test_recipe_of_the_paper_is_repdistiller_s() -> None:
    """HobbitLong/RepDistiller@b84f547, train_student.py and train_teacher.py with their defaults."""
    lines = dict(recipe_lines(CIFAR100, (0, 1)))
    schedule = "0.05, divided by 10 at the start of epochs 150, 180, 210, counted from 0"
    assert (lines["Epochs"], lines["Batch size"], lines["Learning rate"]) == ("240", "64", schedule)
    assert lines["Optimiser"] == "SGD, momentum 0.9, weight decay 0.0005"
    assert lines["Precision"] == "float32"
    assert lines["Teacher"].startswith(
        "`resnet56`; trained on the labels for each seed: 240 epochs, batch size 64;"
    )
    assert lines["Intervals"] == "over students and teachers"


def test_every_column_of_the_repository_has_the_rows_it_names() -> None:
    forget()
    for data, training in TABLES.items():
        rows = table_rows(training)
        assert [row.arm for row in rows][:2] == ["student", "kd"], data
        assert all(row.title != row.arm for row in rows), data
        assert {row.column for row in rows} >= {"kd", "at", "nst", "fitnets"}, data
        claimed = {row.column for row in rows if row.verdict()}
        assert claimed >= {"kd", "at", "nst", "fitnets"}, data


def test_the_page_builds_whatever_is_recorded(tmp_path: Path) -> None:
    forget()
    html, warnings = rendered(tmp_path, (ROOT / "book" / "shared_table.md").read_text(encoding="utf8"))
    assert warnings == ""
    assert html.count("All rows share") == 3
