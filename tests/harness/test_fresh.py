"""Fresh numbers go to the build folder and are read like a ledger, which they never touch."""

import pytest

from reproductions.harness.fresh import read_fresh, write_fresh
from reproductions.harness.profiles import HarnessError
from reproductions.harness.runs import run_profile


@pytest.fixture
def results(column, columns, store):
    return run_profile(column, columns=columns, store=store, threads=1)


def test_fresh_numbers_are_found_again(column, columns, results, tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_FRESH", str(tmp_path / "fresh"))
    assert write_fresh(column, "quick", results, columns) == tmp_path / "fresh" / f"{column}-quick.json"
    (ledger,) = read_fresh(tmp_path / "fresh")
    number = ledger.number(f"{column}/quick/synthetic/map/student")
    assert number.values == tuple(r.metrics["map"] for r in results if r.run.arm == "student")
    assert number.status == "fresh"
    assert not (columns / column / "ledger.json").exists()


def test_a_notebook_run_by_hand_writes_nothing(column, columns, results, tmp_path, monkeypatch):
    monkeypatch.delenv("KDREFS_FRESH", raising=False)
    assert write_fresh(column, "quick", results, columns) is None
    with pytest.raises(HarnessError, match="has no profile 'quik'"):
        write_fresh(column, "quik", results, columns)
