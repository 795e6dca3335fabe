"""What holds for every column: its plan, claims and errata fit each other, and its ledger has the plan."""

import pytest

from reproductions.harness.claims import load_claims
from reproductions.harness.errata import load_errata
from reproductions.harness.ledger import column_ledger, machine_ledgers
from reproductions.harness.profiles import column_names, get_profile, load_column
from reproductions.harness.runs import chosen_runs

COLUMNS = column_names()
PROFILES = [(name, profile) for name in COLUMNS for profile in load_column(name).profiles]
IMPORTED = [(name, machine) for name in COLUMNS for machine in machine_ledgers(name)]
ERRATA = [(name, erratum) for name in COLUMNS for erratum in load_errata(name)]


@pytest.mark.parametrize(("name", "profile"), PROFILES)
def test_no_run_is_planned_twice(name, profile):
    column = load_column(name)
    plan = column.plan(get_profile(column, profile))
    assert plan
    assert len(plan) == len(set(plan))
    assert {(run.column, run.profile) for run in plan} == {(name, profile)}


@pytest.mark.parametrize(("name", "profile"), PROFILES)
def test_a_run_can_be_asked_for_alone(name, profile):
    """Each is a job of the workflow, which names data, arm and seed."""
    column = load_column(name)
    config = get_profile(column, profile)
    for run in column.plan(config):
        alone = get_profile(column, profile, [run.seed])
        assert chosen_runs(column, alone, [run.arm], [run.data]) == [run]
        assert column.relevant_config(run, alone) == column.relevant_config(run, config)


@pytest.mark.parametrize("name", COLUMNS)
def test_claims_name_runs_and_metrics_of_the_plan(name):
    column = load_column(name)
    planned = {run.arm_key for config in column.profiles.values() for run in column.plan(config)}
    keys = [key for claim in load_claims(name) for keys in claim.keys.values() for key in keys]
    assert keys
    for key in keys:
        own, profile, data, metric, arm = key.split("/")
        assert f"{own}/{profile}/{data}/{arm}" in planned
        assert metric in column.metrics


@pytest.mark.parametrize("erratum", [e for _, e in ERRATA], ids=[f"{name}-{e.id}" for name, e in ERRATA])
def test_erratum_is_proved(erratum):
    evidence = erratum.check()
    assert evidence.holds, evidence.summary


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
    """A profile of hours is recorded whole or not at all; what is not says "not run" on every page."""
    found = recorded(name, profile)
    if profile != "quick" and not any(found.values()):
        pytest.skip(f"{name}: no run of {profile} is recorded")
    missing = [
        run.key
        for run, numbers in found.items()
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


@pytest.mark.parametrize(("name", "machine"), IMPORTED)
def test_imported_numbers_are_of_the_plan_and_of_one_device(name, machine):
    column, ledger = load_column(name), machine_ledgers(name)[machine]
    planned = {run.arm_key for config in column.profiles.values() for run in column.plan(config)}
    assert {run.run.arm_key for run in ledger.runs.values()} <= planned
    assert len({(run.provenance.device, run.provenance.device_name) for run in ledger.runs.values()}) == 1
