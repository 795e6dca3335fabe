"""The ledger: complete, tamper-evident, append-only, and safe with two writers."""

import json
import os
import statistics

import pytest
from scipy import stats

from reproductions.harness import recording
from reproductions.harness.ledger import Ledger, LedgerError, all_ledgers, find_number, load_ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged, record, stored_results
from reproductions.harness.schema import split_key
from tests.harness.fakes import finish, make_result, meeting, start

SEEDS = range(5)


@pytest.fixture
def known(column, columns):
    return load_column(column, columns)


@pytest.fixture
def source(monkeypatch):
    """The present code has the source digest that `make_result` writes."""
    monkeypatch.setattr(recording, "source_digest", lambda module: "a" * 64)
    return "a" * 64


@pytest.fixture
def path(known):
    return known.folder / "ledger.json"


def results(column, arm="student", shift=0.0, seeds=SEEDS, **settings):
    return [make_result(column, arm, seed, 50 + shift + seed / 2, **settings) for seed in seeds]


def key(column, arm="student"):
    return f"{column}/quick/synthetic/map/{arm}"


def test_a_number_is_read_as_it_was_recorded(known, source, path):
    record(results(known.name), known)
    number = load_ledger(path, source).number(key(known.name))
    values = [50, 50.5, 51, 51.5, 52]
    assert number.values == tuple(values)
    assert number.seeds == (0, 1, 2, 3, 4)
    assert (number.n, number.unit, number.format, number.version, number.status) == (
        5,
        "%",
        ".1f",
        1,
        "fresh",
    )
    assert number.mean == 51
    half = stats.t.ppf(0.975, 4) * statistics.stdev(values) / 5**0.5
    assert number.interval == pytest.approx((51 - half, 51 + half))
    assert number.text() == "51.0 ± 1.0 %"
    assert [run.provenance.threads for run in number.runs] == [1] * 5


def test_a_number_that_nothing_random_enters_has_no_interval(known, source):
    number = record(results(known.name, "teacher", seeds=[0]), known).number(key(known.name, "teacher"))
    assert number.entry.fixed
    assert number.interval is None
    assert number.text() == "50.0 %"
    assert not record(results(known.name), known).number(key(known.name)).entry.fixed


def test_mean_interval_and_verdict_are_not_stored(known, source, path):
    record(results(known.name), known)
    text = path.read_text()
    assert "51.0" in text  # the value of seed 2, which is also the mean
    content = json.loads(text)
    (entry,) = content["numbers"][key(known.name)]
    assert not {"mean", "interval", "verdict", "value", "values"} & set(entry)


def test_what_runs_have_in_common_is_written_once(known, source, path):
    ledger = record(results(known.name), known)
    content = json.loads(path.read_text())
    runs = content["runs"].values()
    assert {run["config"] for run in runs} <= set(content["shared"])
    assert len(content["shared"]) == 3, "five runs have one configuration, one data set, one list of versions"
    unfolded = path.with_name("unfolded.json")
    unfolded.write_text(ledger.file.model_dump_json())
    assert load_ledger(unfolded, source).file == load_ledger(path, source).file == ledger.file


def edits():
    def number(content):
        return next(iter(content["numbers"].values()))[0]

    def run(content):
        return next(iter(content["runs"].values()))

    return {
        "a value": lambda c: run(c)["metrics"].update(map=99.0),
        "a probe": lambda c: run(c)["probe"].update(loss=9.0),
        "the source": lambda c: run(c)["provenance"].update(source="f" * 64),
        "the seed": lambda c: run(c)["run"].update(seed=7),
        "the date": lambda c: run(c)["provenance"].update(date="2020-01-01T00:00:00Z"),
        "a revalidation": lambda c: run(c)["revalidated"].append(
            {"source": "f" * 64, "date": "2020-01-01T00:00:00Z", "device_name": "x", "difference": 0.0}
        ),
        "the unit": lambda c: number(c).update(unit="points"),
        "the runs": lambda c: number(c)["runs"].pop(),
        "the smallest difference": lambda c: number(c).update(delta=100.0),
        "what runs have in common": lambda c: next(iter(c["shared"].values())).update(lr=9.0),
        "the name of what they have in common": lambda c: run(c).update(config={"lr": 9.0}),
        "no digest": lambda c: run(c).update(digest=""),
        "no digest of a number": lambda c: number(c).update(digest=""),
    }


@pytest.mark.parametrize("name", edits())
def test_an_edit_by_hand_is_caught(known, source, path, name):
    record(results(known.name), known)
    content = json.loads(path.read_text())
    edits()[name](content)
    path.write_text(json.dumps(content))
    with pytest.raises(LedgerError, match=r"digest|follow one another"):
        load_ledger(path, source)
    with pytest.raises(LedgerError):
        record(results(known.name, "method"), known)
    assert json.loads(path.read_text()) == content, "a damaged ledger must not be written over"


def test_an_edit_with_a_new_digest_is_caught_by_the_name_of_the_run(known, source, path):
    ledger = record(results(known.name), known)
    name, entry = next(iter(ledger.runs.items()))
    content = json.loads(path.read_text())
    content["runs"][name] = (
        entry.model_copy(update={"metrics": {"map": 99.0}}).sealed().model_dump(mode="json")
    )
    path.write_text(json.dumps(content))
    with pytest.raises(LedgerError, match="its content belongs to"):
        load_ledger(path, source)


@pytest.mark.parametrize("part", ["runs", "numbers"])
def test_a_missing_or_unknown_field_is_named(known, source, path, part):
    record(results(known.name), known)
    for spoil in ("remove", "add"):
        content = json.loads(path.read_text())
        entry = next(iter(content[part].values()))
        entry = entry[0] if part == "numbers" else entry["provenance"]
        field = sorted(entry)[-1] if spoil == "remove" else "colour"
        entry.pop(field) if spoil == "remove" else entry.update(colour="red")
        spoilt = path.with_name("spoilt.json")
        spoilt.write_text(json.dumps(content))
        with pytest.raises(LedgerError, match=rf"spoilt.json: {part} → .* → {field}: "):
            load_ledger(spoilt, source)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, k: c["runs"].popitem(), "is not in the ledger"),
        (lambda c, k: c["numbers"].update({"other/quick/d/map/a": c["numbers"][k]}), "this is the ledger of"),
        (lambda c, k: c["numbers"].update({"a/b": c["numbers"][k]}), "column/profile/data/metric/arm"),
        (lambda c, k: c["numbers"].update({k.replace("map", "p1"): c["numbers"][k]}), "has no such value"),
        (lambda c, k: c["numbers"][k].append(c["numbers"][k][0]), "do not follow one another"),
        (lambda c, k: c.update(format_version=2), "format_version"),
        (lambda c, k: c["shared"].popitem(), "there is no shared"),
        (lambda c, k: c.update(shared=None), "there is no shared config"),
    ],
)
def test_entries_must_fit_together(known, source, path, spoil, message):
    record(results(known.name), known)
    content = json.loads(path.read_text())
    spoil(content, key(known.name))
    path.write_text(json.dumps(content))
    with pytest.raises(LedgerError, match=message):
        load_ledger(path, source)


def test_the_file_is_not_json(path, source):
    path.write_text("{")
    with pytest.raises(LedgerError, match=r"ledger\.json"):
        load_ledger(path, source)


@pytest.mark.parametrize("keep", [0, 1, 0.3, 0.9, 0.999])
def test_a_truncated_ledger_is_refused_and_left_alone(known, source, path, keep):
    record(results(known.name), known)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep in (0, 1) else int(keep * len(content))])
    left = path.read_bytes()
    with pytest.raises(LedgerError, match=r"/ledger\.json: ") as error:
        load_ledger(path, source)
    assert "\n" not in str(error.value)
    with pytest.raises(LedgerError):
        record(results(known.name, "method"), known)
    assert path.read_bytes() == left


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_found_wherever_it_is(known, source, path, bit):
    file = record(results(known.name), known).file
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 1 + len(content) // 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert load_ledger(path, source).file == file, position
        except LedgerError:
            refused += 1
    assert refused > 50


def test_recording_anew_supersedes_and_keeps_the_old(known, source):
    record(results(known.name), known)
    ledger = record(results(known.name, shift=3, source="b" * 64), known)
    old, new = ledger.number(f"{key(known.name)}@1"), ledger.number(key(known.name))
    assert (old.mean, old.entry.superseded_by, old.status) == (51, 2, "fresh")
    assert (new.mean, new.version, new.entry.superseded_by, new.status) == (54, 2, None, "stale")
    assert len(ledger.runs) == 10


def test_recording_the_same_again_changes_nothing(known, source, path):
    record(results(known.name), known)
    before, file = path.read_bytes(), path.stat()
    record(results(known.name), known)
    assert path.read_bytes() == before
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (file.st_ino, file.st_mtime_ns)  # not even written


def test_seeds_join_while_nothing_that_computes_differs(known, source):
    record(results(known.name), known)
    ledger = record(results(known.name, seeds=[5, 6]), known)
    number = ledger.number(key(known.name))
    assert (number.version, number.seeds) == (2, (0, 1, 2, 3, 4, 5, 6))
    # Other threads: other bits are to be expected, so the old seeds stay apart.
    number = record(results(known.name, threads=2), known).number(key(known.name))
    assert (number.version, number.seeds) == (3, (0, 1, 2, 3, 4))


def test_an_arm_that_nothing_random_enters_keeps_its_one_run(known, source):
    record(results(known.name, "teacher", seeds=[0]), known)
    ledger = record(results(known.name, "teacher", seeds=[9]), known)
    number = ledger.number(key(known.name, "teacher"))
    assert (number.version, number.seeds, len(ledger.runs)) == (1, (0,), 1)


def test_runs_of_one_number_come_from_one_machine(known, source):
    mixed = [*results(known.name, seeds=[0, 1, 2]), *results(known.name, seeds=[3, 4], threads=2)]
    with pytest.raises(LedgerError, match="differ in code, data, versions, device or threads"):
        record(mixed, known)


def test_a_number_is_recorded_with_all_planned_seeds(known, source, path):
    with pytest.raises(LedgerError, match="lacks planned seeds: 2, 3, 4"):
        record(results(known.name, seeds=[0, 1]), known)
    assert not path.exists()


@pytest.mark.parametrize("probe", [None, {}])
def test_a_run_without_a_probe_is_not_recorded(known, source, probe):
    bare = [result.model_copy(update={"probe": probe}).sealed() for result in results(known.name)]
    with pytest.raises(LedgerError, match="has no probe"):
        record(bare, known)


def test_results_of_another_column_are_refused(known):
    with pytest.raises(LedgerError, match="does not belong"):
        merged(Ledger.empty(known.name), results("other"), known)


@pytest.mark.parametrize("wrong", ["quick/synthetic/mAP/student", "quick/syntetic/map/student"])
def test_an_unknown_key_gets_close_matches(known, source, wrong):
    ledger = record(results(known.name), known)
    with pytest.raises(LedgerError, match=f"did you mean '{key(known.name)}'"):
        ledger.number(f"{known.name}/{wrong}")


@pytest.mark.parametrize("version", ["2", "0", "x", "-1"])
def test_an_unknown_version_is_refused(known, source, version):
    ledger = record(results(known.name), known)
    with pytest.raises(LedgerError, match="has no version"):
        ledger.number(f"{key(known.name)}@{version}")


def test_ledgers_are_found_by_folder(known, source, columns):
    record(results(known.name), known)
    assert set(all_ledgers(columns)) == {known.name}
    assert find_number(key(known.name), columns).mean == 51
    with pytest.raises(LedgerError, match="no number"):
        find_number("nothing/quick/d/map/a", columns)


def test_status_is_the_worst_of_the_runs(known):
    mixed = [*results(known.name, seeds=[0]), *results(known.name, seeds=[1], source="b" * 64)]
    for source, expected in (("a" * 64, "fresh"), ("b" * 64, "stale")):
        assert (
            merged(Ledger.empty(known.name, source), mixed[:1], known).number(key(known.name)).status
            == expected
        )


def test_keys_have_five_parts():
    assert split_key("pkt/standard/cifar10/map/pkt") == ("pkt", "standard", "cifar10", "map", "pkt")
    for wrong in ("pkt", "a/b/c/d", "a/b/c/d/e/f", "a//c/d/e"):
        with pytest.raises(ValueError, match="key"):
            split_key(wrong)


def test_two_writers_at_once_lose_nothing(known, columns, path, tmp_path):
    # Each dawdles between reading and writing: without the lock the other's entries would be lost.
    code = (
        "import time; from pathlib import Path\n"
        "from reproductions.harness import recording\n"
        "from reproductions.harness.profiles import load_column\n"
        "from reproductions.harness.recording import record\n"
        "from tests.harness.fakes import make_result\n"
        "def dawdle(*arguments, load=recording.load_ledger):\n"
        "    ledger = load(*arguments)\n"
        "    time.sleep(0.05)\n"
        "    return ledger\n"
        "recording.load_ledger = dawdle\n"
        f"column = load_column({known.name!r}, Path({str(columns)!r}))\n"
        f"{meeting(tmp_path / 'ready')}"
        "for arm in {arms}:\n"
        "    for shift in range(4):\n"
        f"        record([make_result({known.name!r}, arm, s, 50 + s + shift) for s in range(5)], column)\n"
    )
    finish(start(code.replace("{arms}", "['student']")), start(code.replace("{arms}", "['method', 'twin']")))
    ledger = load_ledger(path, "a" * 64)
    assert {name: number.version for name, number in ledger.numbers.items()} == {
        key(known.name, arm): 4 for arm in ("student", "method", "twin")
    }
    assert len(ledger.runs) == 3 * 4 * 5


def test_a_writer_stopped_in_mid_write_leaves_the_ledger_whole(known, source, path, monkeypatch):
    record(results(known.name), known)
    before = path.read_bytes()

    def stop(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            record(results(known.name, "method"), known)
    assert path.read_bytes() == before
    left = path.parent / ".ledger.json.left-by-a-kill.tmp"
    left.write_text("{")
    assert record(results(known.name, "method"), known).number(key(known.name)).mean == 51
    assert not left.exists()


def test_stored_results_of_earlier_code_can_be_recorded(known, store):
    for source in ("abcdef01" + "0" * 56, "abcdef02" + "0" * 56):
        for result in results(known.name, shift=int(source[7]), source=source):
            store.put(result.model_copy(update={"key": source}).sealed())
    found = stored_results(store, known.name, "quick", "abcdef02")
    assert sorted(result.metrics["map"] for result in found) == [52, 52.5, 53, 53.5, 54]
    for wrong in ("abcdef0", "ffffffff", "abc"):
        with pytest.raises(LedgerError, match="digests in the store begin with"):
            stored_results(store, known.name, "quick", wrong)
