"""What the benchmarks measure with, and that the cases can be built and agree."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch

from book.benchmarks import Record
from tests.benchmarks import __main__ as command
from tests.benchmarks.case import Case, Contest, assert_agree, at_least, at_most, run, settle
from tests.benchmarks.measure import LEAST, MOST, compare, peak_memory, rounds

CPU = torch.device("cpu")
CHEAP = ("B 64, 100 classes", "B 64, C 64, 8 x 8", "B 64, C 16 and 64, 8 x 8", "B 64, 512 wide")


def scripted(ours: list[float], theirs: list[float]):
    """A sampler that reads times from lists and keeps in which order it was asked."""
    asked: list[str] = []
    times = {"ours": iter(ours), "theirs": iter(theirs)}

    def sample(function, calls):
        asked.append(function())
        return next(times[function()]) / calls

    return sample, asked


def test_sides_take_turns_in_going_first():
    sample, asked = scripted([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0])
    pairs = rounds((lambda: "ours", lambda: "theirs"), (1, 10), seconds=0, sample=sample)
    assert asked == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert pairs == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]


@pytest.mark.parametrize(("seconds", "expected"), [(0, LEAST), (10, LEAST + 9), (10**6, MOST)])
def test_rounds_stop_at_the_time(seconds, expected):
    clock = itertools.count()
    sample, _ = scripted([1.0] * MOST, [1.0] * MOST)
    sides = (lambda: "ours", lambda: "theirs")
    assert len(rounds(sides, (1, 1), seconds=seconds, sample=sample, now=lambda: next(clock))) == expected


def test_peak_counts_tensors_that_are_alive_together():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(2**18)

    def together():
        return [torch.zeros(2**18) for _ in range(3)]

    kept = torch.zeros(2**20)
    assert peak_memory(one_after_the_other, CPU)[0] == pytest.approx(1, rel=0.01)
    assert peak_memory(together, CPU)[0] == pytest.approx(3, rel=0.01)
    assert peak_memory(lambda: kept.add_(1), CPU)[0] < 1e-3


@pytest.mark.parametrize("cost", [False, True])
def test_the_ratio_has_the_direction_of_the_comparison(cost):
    small, large = torch.zeros(64, 64), torch.zeros(512, 512)
    found = compare(lambda: small @ small, lambda: large @ large, CPU, cost=cost, seconds=0)
    assert (found.ratio.median < 1) is cost
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.rounds == LEAST
    assert found.ours.peak_mib < found.theirs.peak_mib


def case(check=None) -> Case:
    def build(device):
        return Contest(lambda: torch.ones(2, device=device), lambda: torch.ones(2**18, device=device), check)

    return Case("Group", "name", "2", build, (at_least(100.0, "memory"), at_most(0.5, "peak MiB")))


def test_a_case_becomes_a_row():
    row = run(case(), CPU, 0)
    assert (row.group, row.name, row.size, row.device, row.comparison) == (
        "Group",
        "name",
        "2",
        "cpu",
        "rival",
    )
    assert row.memory_ratio == pytest.approx(2**17)
    assert [row.met(goal) for goal in row.goals] == [True, True]


def test_sides_that_do_not_agree_are_not_timed():
    wrong = case(lambda: assert_agree([torch.ones(2)], [torch.tensor([1.0, 1.1])], 1e-2))
    with pytest.raises(AssertionError, match="apart, tolerance"):
        run(wrong, CPU, 0)


@pytest.mark.parametrize(
    "case", [c for c in command.CASES if c.size in CHEAP], ids=lambda c: f"{c.name}-{c.size}"
)
def test_losses_agree_with_their_plain_forms(case):
    check = case.build(CPU).check
    assert check is not None
    check()


@pytest.mark.parametrize(
    "case", [c for c in command.CASES if c.group == "Shared table"], ids=lambda c: c.name
)
def test_rows_of_the_shared_table_can_be_stepped(case):
    case.build(CPU).ours()


def test_cases_and_their_preparation_can_be_sent_to_a_worker():
    assert pickle.loads(pickle.dumps(settle)) is settle
    for case in command.CASES:
        assert pickle.loads(pickle.dumps(case)).name == case.name


def test_names_are_unique():
    names = [(case.group, case.name, case.size) for case in command.CASES]
    assert len(set(names)) == len(names)


def test_the_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    assert command.main(["--only", "B 64, 100 classes", "--seconds", "0", "--output", str(path)]) == 0
    record = Record.load(path)
    assert [(row.name, row.size) for row in record.rows if row.device == "cpu"] == [
        ("KD", "B 64, 100 classes")
    ]
    assert json.loads(path.read_text())["machine"]["cores"] >= 1
    printed = capsys.readouterr().out
    assert "B 64, 100 classes" in printed
    assert "Goals missed" in printed


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing is called so"])
    assert "no case has" in capsys.readouterr().err


def test_a_record_holds_all_cases(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["--only", "KD", "--record"])
    assert "a record holds all cases" in capsys.readouterr().err
