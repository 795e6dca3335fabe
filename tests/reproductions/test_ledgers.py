"""What is committed of every column: the whole plan of the profiles that need no GPU, each number with its origin."""

import pytest

from reproductions.harness.ledger import column_ledger
from reproductions.harness.profiles import column_names, get_profile, load_column

COLUMNS = column_names()


def recorded(name, profile):
    """The numbers of a profile's plan, by run."""
    column, ledger = load_column(name), column_ledger(name)
    plan = column.plan(get_profile(column, profile))
    return {
        run: [
            ledger.number(key)
            for metric in column.metrics
            if (key := f"{name}/{profile}/{run.data}/{metric}/{run.arm}") in ledger
        ]
        for run in plan
    }


@pytest.mark.parametrize("profile", ["quick", "standard"])
@pytest.mark.parametrize("name", COLUMNS)
def test_ledger_has_the_whole_plan(name, profile):
    missing = [
        run.key
        for run, numbers in recorded(name, profile).items()
        if not numbers or any(run.seed not in number.by_seed for number in numbers)
    ]
    assert missing == []


@pytest.mark.parametrize("name", COLUMNS)
def test_quick_numbers_are_those_of_the_present_code(name):
    """Hours on another machine may lie behind the other profiles; where code has changed since, pages say stale."""
    stale = {
        number.key
        for numbers in recorded(name, "quick").values()
        for number in numbers
        if number.status not in ("fresh", "revalidated")
    }
    assert stale == set()


@pytest.mark.parametrize("name", COLUMNS)
def test_runs_were_recorded_from_committed_code(name):
    ledger = column_ledger(name)
    assert {run.provenance.dirty for number in ledger.numbers.values() for run in number.runs} == {False}
