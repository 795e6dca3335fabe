"""Revalidation: old runs keep their worth on new code only if their first steps are the same."""

import pytest

from reproductions.harness.ledger import load_ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.provenance import source_digest
from reproductions.harness.recording import record
from reproductions.harness.revalidation import relative_difference, revalidate
from reproductions.harness.runs import run_profile


@pytest.fixture
def known(column, columns):
    return load_column(column, columns)


@pytest.fixture
def recorded(known, columns, store):
    """Record a profile as if by earlier code: the present source digest is another one."""

    def call(profile="quick", origin=(), **changes):
        results = run_profile(known.name, profile, columns=columns, store=store, threads=1, probe=True)
        old = [
            r.model_copy(
                update={
                    "provenance": r.provenance.model_copy(update={"source": "0" * 64, **dict(origin)}),
                    **changes,
                }
            ).sealed()
            for r in results
        ]
        return record(old, known)

    return call


@pytest.fixture
def again(known, columns, store):
    return lambda **settings: revalidate(known.name, columns=columns, store=store, **settings)


def statuses(known):
    return {number.status for number in load_ledger(known.folder / "ledger.json").numbers.values()}


def test_equal_probes_make_stale_numbers_valid_again(known, recorded, again, log):
    assert {n.status for n in recorded().numbers.values()} == {"stale"}
    log.write_text("")
    seen = []
    outcomes = again(on_probe=seen.append)
    assert [item.status for item in outcomes] == ["revalidated"] * 16 == [item.status for item in seen]
    assert statuses(known) == {"revalidated"}
    # Probes only: no run was executed in full.
    assert {line.split()[1] for line in log.read_text().splitlines()} == {"50"}
    entry = next(iter(load_ledger(known.folder / "ledger.json").runs.values()))
    assert entry.provenance.source == "0" * 64
    assert [item.source for item in entry.revalidated] == [source_digest(known.module)]
    assert again() == []


def test_unequal_probes_stay_stale(known, recorded, again, monkeypatch):
    recorded()
    monkeypatch.setenv("FAKE_SHIFT", "0.01")
    outcomes = again()
    assert {item.status for item in outcomes} == {"stale"}
    assert all("first steps differ by" in item.reason for item in outcomes)
    assert statuses(known) == {"stale"}


@pytest.mark.parametrize("here", ["the same processor", "another processor"])
def test_another_kind_of_processor_is_named(known, recorded, again, monkeypatch, here):
    monkeypatch.setattr("reproductions.harness.revalidation.device_name", lambda device: here)
    monkeypatch.setenv("FAKE_SHIFT", "0.01")
    recorded(origin={"device_name": "the same processor"})
    found = {
        "; it was recorded on the same processor, this is another processor" in item.reason
        for item in again()
    }
    assert found == {here == "another processor"}


def test_rounding_is_forgiven(known, recorded, again, monkeypatch):
    recorded()
    monkeypatch.setenv("FAKE_SHIFT", "0.0001")
    assert {item.status for item in again()} == {"revalidated"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"profile": "quick", "rate": 2}}, "its configuration changed"),
        ({"probe": {"other": 1.0}}, "its first steps differ by inf"),
    ],
)
def test_a_probe_of_something_else_proves_nothing(known, recorded, again, changes, reason):
    recorded(**changes)
    outcomes = again()
    assert {item.status for item in outcomes} == {"stale"}
    assert {item.reason.partition(" (relative)")[0] for item in outcomes} == {reason}


def test_what_the_profile_has_no_more_stays_stale(known, recorded, again, monkeypatch):
    recorded()
    without = {name: config for name, config in known.profiles.items() if name != "quick"}
    monkeypatch.setattr(__import__(known.module, fromlist=["run"]), "PROFILES", without)
    assert {(item.status, item.reason) for item in again()} == {("stale", "its profile is gone")}


def test_an_interrupted_revalidation_keeps_what_it_found(known, recorded, again):
    recorded()

    def stop(item):
        if item.id.startswith(f"{known.name}/quick/synthetic/student#2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(on_probe=stop)
    ledger = load_ledger(known.folder / "ledger.json")
    valid = [run.run.key for run in ledger.runs.values() if run.status(ledger.source) == "revalidated"]
    assert 0 < len(valid) < 16
    assert len(again()) == 16 - len(valid)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, 0.0),
        ({"a": 1.0}, {"a": 1.1}, 0.1 / 1.1),
        ({"a": 0.0}, {"a": 1e-9}, 1.0),
        ({"a": 1.0}, {"b": 1.0}, float("inf")),
        ({}, {}, float("inf")),
    ],
)
def test_relative_difference(first, second, expected):
    assert relative_difference(first, second) == pytest.approx(expected)
