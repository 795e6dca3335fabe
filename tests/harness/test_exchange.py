"""Numbers from another machine: a round trip through a file, and every file that is refused."""

import copy
import json
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reproductions import cli
from reproductions.harness import exchange
from reproductions.harness import ledger as ledger_module
from reproductions.harness.ledger import (
    Ledger,
    LedgerError,
    column_ledger,
    find_number,
    load_ledger,
    machine_ledgers,
)
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged, record
from reproductions.harness.runs import RunStore, run_profile
from reproductions.harness.schema import LedgerFile, Revalidation, RunEntry
from reproductions.harness.store import run_key
from tests.fuzz.test_command_line import refusal, tree
from tests.harness.fakes import make_column

DEVICE = "NVIDIA H200 (SXM)"
MACHINE = "nvidia-h200-sxm"


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A column that uses a data set, recorded here and (half a point higher) on another machine, and the export."""
    root = tmp_path_factory.mktemp("master")
    name = make_column(root / "columns")
    code = root / "columns" / name / "run.py"
    code.write_text(
        code.read_text().replace("data: tuple[str, ...] = ()", 'data: tuple[str, ...] = ("digits",)')
    )
    results = run_profile(
        name, columns=root / "columns", store=RunStore(root / "store"), threads=1, probe=True
    )
    column = load_column(name, root / "columns")
    record(results, column)
    there = merged(Ledger.empty(name), [foreign(result) for result in results], column)
    exchange.export_profile(there, "quick", root / "export.json")
    return root


@pytest.fixture
def here(master, tmp_path, monkeypatch):
    """A copy of it all; the folder of the column."""
    shutil.copytree(
        master, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("store", ".ledger.lock")
    )
    monkeypatch.setattr(cli, "COLUMNS", tmp_path / "columns")
    (path,) = (tmp_path / "columns").glob("*/run.py")
    return path.parent


@pytest.fixture
def file(here):
    return here.parents[1] / "export.json"


def foreign(result, shift=0.5, device_name=DEVICE, **changes):
    """The result as another machine would have given it."""
    origin = result.provenance.model_copy(update={"device_name": device_name, **changes})
    metrics = {name: value + shift for name, value in result.metrics.items()}
    return rekeyed(result.model_copy(update={"provenance": origin, "metrics": metrics}))


def rekeyed(run):
    p = run.provenance
    key = run_key(run.run, run.config, p.source, p.device, p.threads, p.data)
    return run.model_copy(update={"key": key}).sealed()


def reproduce(*arguments):
    found = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.stderr
    return found.stdout, found.stderr


def key(here, arm="method"):
    return f"{here.name}/quick/synthetic/map/{arm}"


def test_a_round_trip_keeps_runs_and_stands_beside_the_own_numbers(here, file):
    before = (here / "ledger.json").read_bytes()
    _, said = reproduce("import", file)
    assert said == f"imported 8 numbers of {here.name} from {MACHINE}\n"
    (path,) = (here / "elsewhere").iterdir()
    assert path.name == f"{MACHINE}.json"
    assert load_ledger(path).file == load_ledger(file).file
    assert (here / "ledger.json").read_bytes() == before
    own, other = (
        json.loads(reproduce("show", f"{key(here)}{at}", "--json")[0]) for at in ("", f"%{MACHINE}")
    )
    assert other["mean"] == pytest.approx(own["mean"] + 0.5)
    assert (own["machine"], other["machine"]) == (None, MACHINE)
    assert other["key"] == f"{key(here)}@1%{MACHINE}"
    assert json.loads(reproduce("show", other["key"], "--json")[0]) == other
    text, _ = reproduce("show", f"{key(here)}%{MACHINE}")
    assert DEVICE in text
    text, _ = reproduce("cite", f"{key(here)}%{MACHINE}")
    assert f"imported from {MACHINE}: {DEVICE})" in text
    assert rf"@1\%{MACHINE}" in text
    assert DEVICE not in reproduce("cite", key(here))[0]
    text, _ = reproduce("compare", f"{key(here)}%{MACHINE}", key(here), "--json")
    assert json.loads(text)["difference"] == pytest.approx(0.5)
    assert json.loads(text)["width"] is not None, "bits of different hardware are not compared"
    (row,) = json.loads(reproduce("list", "--json")[0])
    assert (row["numbers"], row["machines"]) == (8, {MACHINE: 8})
    assert f"8 from {MACHINE}" in reproduce("list")[0]


def test_verdicts_stay_with_the_own_numbers(here, file):
    reproduce("import", file)
    ledger = column_ledger(here.name, here.parent)
    assert {run.provenance.device_name for run in ledger.runs.values()}.isdisjoint({DEVICE})
    assert find_number(key(here), here.parent).machine == ""


def test_the_same_file_twice_changes_nothing(here, file):
    reproduce("import", file)
    before = tree(here.parents[1])
    assert (
        reproduce("import", file)[1]
        == f"nothing new: 8 numbers of {here.name} from {MACHINE} are here already\n"
    )
    assert tree(here.parents[1]) == before


def rewritten(path, change, *, keep=lambda run: True):
    """Write the file again as the other machine would have with other runs; all digests and keys fit."""
    file = load_ledger(path, "").file
    runs = {name: RunEntry.model_validate(dict(change(run))) for name, run in file.runs.items() if keep(run)}
    ids = {name: run.id for name, run in runs.items()}
    numbers = {
        key: tuple(
            entry.model_copy(update={"runs": tuple(ids[run] for run in entry.runs if run in ids)}).sealed()
            for entry in versions
        )
        for key, versions in file.numbers.items()
    }
    numbers = {key: versions for key, versions in numbers.items() if versions[0].runs}
    whole = LedgerFile(
        format_version=1, column=file.column, runs={r.id: r for r in runs.values()}, numbers=numbers
    )
    Ledger(whole, "").save(path)


def origin(**changes):
    return lambda run: rekeyed(
        run.model_copy(update={"provenance": run.provenance.model_copy(update=changes)})
    )


def other_run(**changes):
    return lambda run: rekeyed(run.model_copy(update={"run": replace(run.run, **changes)}))


def test_new_values_supersede_and_old_files_change_nothing(here, file):
    reproduce("import", file)
    old = file.read_bytes()
    rewritten(file, lambda run: foreign(run, shift=1.0))
    reproduce("import", file)
    number = find_number(f"{key(here)}%{MACHINE}", here.parent)
    first = find_number(f"{key(here)}@1%{MACHINE}", here.parent)
    assert (number.version, first.entry.superseded_by) == (2, 2)
    assert number.mean == pytest.approx(first.mean + 1.0)
    before = tree(here)
    file.write_bytes(old)
    assert "nothing new" in reproduce("import", file)[1]
    assert tree(here) == before


def test_revalidations_of_known_runs_are_taken_over(here, file):
    reproduce("import", file)
    again = Revalidation(
        source="b" * 64, date=datetime(2026, 1, 2, tzinfo=UTC), device_name=DEVICE, difference=0.0
    )
    rewritten(file, lambda run: run.model_copy(update={"revalidated": (again,)}).sealed())
    assert "imported" in reproduce("import", file)[1]
    (ledger,) = machine_ledgers(here.name, here.parent).values()
    assert {run.revalidated for run in ledger.runs.values()} == {(again,)}


def test_a_machine_may_be_given_a_name(here, file):
    reproduce("import", file, "--as", "lab-2")
    assert set(machine_ledgers(here.name, here.parent)) == {"lab-2"}


def test_runs_of_code_that_is_recorded_here_are_taken_in(here, file, monkeypatch):
    """After a change of code the present digest is another one; the runs are shown as stale."""
    monkeypatch.setattr(ledger_module, "source_digest", lambda module: "e" * 64)
    reproduce("import", file)
    assert find_number(f"{key(here)}%{MACHINE}", here.parent).status == "stale"


DIGEST = "f" * 64
REFUSED = {
    "other code": (origin(source=DIGEST), "computed by other code than this (source digest ffffffffffff"),
    "other data": (
        origin(data={"digits/test": DIGEST, "digits/train": DIGEST}),
        "computed on other data: digits/test has digest ffffffffffff, expected",
    ),
    "no data": (origin(data={}), "computed on other data: digits/test has none, expected"),
    "more data": (
        lambda run: origin(data={**run.provenance.data, "extra": DIGEST})(run),
        "computed on other data: extra has digest ffffffffffff, expected none",
    ),
    "configuration": (
        lambda run: rekeyed(run.model_copy(update={"config": run.config | {"arms": ["method"]}})),
        'its configuration has arms = ["method"], expected ["teacher",',
    ),
    "further configuration": (
        lambda run: rekeyed(run.model_copy(update={"config": run.config | {"rate": 1}})),
        "its configuration has rate = 1, expected nothing",
    ),
    "key": (
        lambda run: run.model_copy(update={"key": DIGEST}).sealed(),
        "its key ffffffffffff does not belong",
    ),
    "metric": (
        lambda run: rekeyed(run.model_copy(update={"metrics": run.metrics | {"recall": 1.0}})),
        "has no metric 'recall'",
    ),
    "best": (lambda run: rekeyed(run.model_copy(update={"best": {"recall": 1.0}})), "has no metric 'recall'"),
    "probe": (lambda run: rekeyed(run.model_copy(update={"probe": None})), "it has no probe"),
    "seeds of the training": (origin(seeds=(77,)), "its seed is not among the seeds 77 of its training"),
    "escape sequence": (origin(device_name="a\x1b[2J"), "characters that cannot be printed"),
    "two machines": (
        lambda run: origin(device_name="other" if run.run.arm == "twin" else DEVICE)(run),
        f"come from several machines: method, student, teacher on {DEVICE} (cpu) with 1 threads and",
    ),
    "two numbers of threads": (
        lambda run: origin(threads=2 if run.run.arm == "twin" else 1)(run),
        "twin on NVIDIA H200 (SXM) (cpu) with 2 threads",
    ),
    "a device without a name": (origin(device_name="!"), "machine: got '', expected lower-case letters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_computed_like_this_is_refused(here, file, name):
    change, message = REFUSED[name]
    rewritten(file, change)
    assert message in refusal(["import", str(file)], here.parents[1])


def edited(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def first_number(content):
    return next(iter(content["numbers"].values()))


BROKEN = {
    "nothing": lambda c: c.clear(),
    "format": lambda c: c.update(format_version=2),
    "field": lambda c: c.update(more=1),
    "value": lambda c: next(iter(c["runs"].values()))["metrics"].update(map=99.0),
    "number": lambda c: first_number(c)[0].update(unit="points"),
    "column": lambda c: c.update(column="../pkt"),
    "no numbers": lambda c: c["numbers"].clear(),
    "no run": lambda c: c["runs"].popitem(),
    "shared": lambda c: c["shared"].popitem(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_export_is_refused(here, file, name):
    edited(file, BROKEN[name])
    refusal(["import", str(file)], here.parents[1])


def test_no_damage_is_too_odd(here, file):
    content = json.loads(file.read_text())

    @given(st.data())
    @settings(max_examples=25)
    def refused(data):
        damaged = copy.deepcopy(content)
        place, path = damaged, []
        while isinstance(place, dict | list) and place and (not path or data.draw(st.integers(0, 3))):
            path.append(
                (
                    place,
                    data.draw(
                        st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
                    ),
                )
            )
            place = place[path[-1][1]]
        holder, name = path[-1]
        holder[name] = data.draw(st.sampled_from([None, -1, 1e308, "", "x/y", [], ["x"], {}, {"x": []}]))
        assume(damaged != content)
        file.write_text(json.dumps(damaged))
        refusal(["import", str(file)], here.parents[1])

    refused()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"null", b"[" * 9999, b'{"format_version": 1'])
def test_what_is_no_json_is_refused(here, file, content):
    file.write_bytes(content)
    assert "export.json" in refusal(["import", str(file)], here.parents[1])


def test_columns_and_profiles_must_exist(here, file):
    text = file.read_text()
    rewritten_as(file, column="nothing")
    assert "no column 'nothing'" in refusal(["import", str(file)], here.parents[1])
    file.write_text(text)
    rewritten_as(file, profile="huge")
    assert f"column {here.name!r} has no profile 'huge'" in refusal(["import", str(file)], here.parents[1])
    file.write_text(text)
    rewritten_as(file, data="digits")
    assert "the profile plans no such run" in refusal(["import", str(file)], here.parents[1])


def rewritten_as(path, **changes):
    """Write the file again with all its runs and numbers under another name."""
    file = load_ledger(path, "").file
    runs = {name: other_run(**changes)(run) for name, run in file.runs.items()}
    numbers = {}
    for key, (entry,) in file.numbers.items():
        parts = (
            dict(zip(("column", "profile", "data", "metric", "arm"), key.split("/"), strict=True)) | changes
        )
        renamed = entry.model_copy(update={"runs": tuple(runs[name].id for name in entry.runs)}).sealed()
        numbers["/".join(parts.values())] = (renamed,)
    column = changes.get("column", file.column)
    runs = {run.id: run for run in runs.values()}
    Ledger(LedgerFile(format_version=1, column=column, runs=runs, numbers=numbers), "").save(path)


def test_several_profiles_or_versions_are_refused(here, file, tmp_path):
    here_ledger, there = (load_ledger(path, "").file for path in (here / "ledger.json", file))
    assert "are in reproductions/" in refusal(["import", str(here / "ledger.json")], tmp_path)
    rewritten_as(file, profile="standard")
    standard = load_ledger(file, "").file
    both = LedgerFile(
        format_version=1,
        column=there.column,
        runs=there.runs | standard.runs,
        numbers=there.numbers | standard.numbers,
    )
    Ledger(both, "").save(file)
    assert "expected the latest numbers of one profile" in refusal(["import", str(file)], tmp_path)
    column = load_column(here.name, here.parent)
    later = merged(Ledger(here_ledger, ""), list(there.runs.values()), column)
    later.save(file)
    assert "expected the latest numbers of one profile" in refusal(["import", str(file)], tmp_path)


def test_planned_seeds_must_be_there(here, file):
    rewritten(file, lambda run: run, keep=lambda run: run.run.seed != 3)
    assert "lacks planned seeds: 3" in refusal(["import", str(file)], here.parents[1])


def test_a_file_of_many_megabytes_is_not_read(here, file, monkeypatch):
    monkeypatch.setattr(exchange, "LARGEST_MB", 0.001)
    assert "MB, expected at most 0.001" in refusal(["import", str(file)], here.parents[1])


def test_one_name_is_one_hardware(here, file):
    reproduce("import", file)
    rewritten(file, origin(device_name="another processor"))
    said = refusal(["import", str(file), "--as", MACHINE], here.parents[1])
    assert f"has numbers of {DEVICE} (cpu), these are of another processor (cpu)" in said
    reproduce("import", file)
    assert set(machine_ledgers(here.name, here.parent)) == {MACHINE, "another-processor"}


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a b", "x" * 64])
def test_a_machine_has_a_name_that_a_file_can_have(here, file, name):
    assert "machine: got" in refusal(["import", str(file), f"--as={name}"], here.parents[1])


def test_data_that_is_not_here_is_compared_with_what_is_recorded(here, file, monkeypatch):
    from kdrefs import data

    monkeypatch.setattr(data, "is_cached", lambda name: False)
    reproduce("import", file)
    (here / "ledger.json").unlink()
    shutil.rmtree(here / "elsewhere")
    said = refusal(["import", str(file)], here.parents[1])
    assert "the digests of digits are not known here; `reproduce data get digits` fetches it" in said


def test_an_import_that_is_stopped_leaves_nothing(here, file, monkeypatch):
    def stop(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        assert CliRunner().invoke(cli.app, ["import", str(file)]).exit_code == 1
    assert machine_ledgers(here.name, here.parent) == {}
    assert [path.name for path in (here / "elsewhere").iterdir()] == []
    reproduce("import", file)


def test_export_writes_the_latest_numbers_alone(here, tmp_path):
    column = load_column(here.name, here.parent)
    ledger = load_ledger(here / "ledger.json")
    higher = [foreign(run, 1.0, run.provenance.device_name) for run in ledger.runs.values()]
    later = merged(ledger, higher, column)
    later.save(here / "ledger.json")
    _, said = reproduce("export", here.name, tmp_path / "new.json")
    assert said == f"8 numbers of {here.name}/quick are in {tmp_path / 'new.json'}\n"
    file = load_ledger(tmp_path / "new.json").file
    assert len(file.runs) == 16
    assert {entry.version for (entry,) in file.numbers.values()} == {1}
    exported = Ledger(file, "").number(key(here))
    assert exported.values == later.number(key(here)).values != ledger.number(key(here)).values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["COLUMN", "FOLDER/new.json", "-p", "paper"], "nothing is recorded for COLUMN/paper"),
        (["COLUMN", "FOLDER/new.json", "-p", "papr"], "did you mean 'paper'"),
        (["nothing", "FOLDER/new.json"], "no column 'nothing'"),
        (["COLUMN", "FOLDER/export.json"], "there is such a file already"),
        (["COLUMN", "FOLDER/no/new.json"], "there is no folder"),
        (["COLUMN", "FOLDER/export.json/new.json"], "there is no folder"),
        (["COLUMN"], "Missing argument 'file'"),
    ],
)
def test_what_cannot_be_exported(here, tmp_path, arguments, message):
    words = [word.replace("COLUMN", here.name).replace("FOLDER", str(tmp_path)) for word in arguments]
    assert message.replace("COLUMN", here.name) in refusal(["export", *words], tmp_path)


def test_arms_of_several_machines_are_not_exported(here, tmp_path):
    ledger = load_ledger(here / "ledger.json")
    others = [foreign(run) for run in ledger.runs.values() if run.run.arm == "twin"]
    merged(ledger, others, load_column(here.name, here.parent)).save(here / "ledger.json")
    said = refusal(["export", here.name, str(tmp_path / "new.json")], tmp_path)
    assert "come from several machines: " in said
    assert f"twin on {DEVICE} (cpu)" in said
    assert "method, student, teacher on " in said


def test_wrong_machines_and_missing_files_are_named(here, file):
    reproduce("import", file)
    root = here.parents[1]
    assert f"no machine '' has numbers of {here.name}; there is {MACHINE}" in refusal(
        ["show", f"{key(here)}%"], root
    )
    assert f"did you mean '{MACHINE}'" in refusal(["cite", f"{key(here)}%nvidia-h200"], root)
    assert f"in the ledger of {MACHINE}" in refusal(["show", f"{key(here, 'x')}%{MACHINE}"], root)
    assert "there is no such file" in refusal(["import", str(root / "nothing.json")], root)
    assert "there is no such file" in refusal(["import", str(root)], root)
    (here / "ledger.json").unlink()
    said = refusal(["show", key(here)], root)
    assert said == f"'{key(here)}' was recorded on other machines only; there is {key(here)}%{MACHINE}"


def test_a_damaged_or_misplaced_import_is_named(here, file):
    reproduce("import", file)
    path = here / "elsewhere" / f"{MACHINE}.json"
    text = path.read_text()
    path.write_text(text.replace('"unit": "%"', '"unit": "points"', 1))
    assert f"{here.name}/elsewhere/{MACHINE}.json: numbers → " in refusal(
        ["show", key(here)], here.parents[1]
    )
    found = CliRunner().invoke(cli.app, ["doctor", "--json"])
    checks = {check["name"]: check["ok"] for check in json.loads(found.stdout)}
    assert checks[f"ledger of {here.name}, {MACHINE}"] is False
    path.write_text(text)
    other = make_column(here.parent)
    shutil.copytree(here / "elsewhere", here.parent / other / "elsewhere")
    with pytest.raises(LedgerError, match=f"these are numbers of {here.name}"):
        machine_ledgers(other, here.parent)
