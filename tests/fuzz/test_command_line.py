"""Wrong commands, made up or drawn: one line of error, exit code 2, nothing printed and nothing changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reproductions import cli
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import record
from reproductions.harness.runs import RunStore, run_profile
from tests.harness.fakes import REPOSITORY, make_column

WORDS = {known.name or known.callback.__name__ for known in cli.app.registered_commands} | {"data", "get"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recorded column, its store elsewhere."""
    folder, elsewhere = tmp_path_factory.mktemp("columns"), tmp_path_factory.mktemp("elsewhere")
    name = make_column(folder)
    results = run_profile(name, columns=folder, store=RunStore(elsewhere), threads=1, probe=True)
    record(results, load_column(name, folder))
    (folder / name / ".ledger.lock").unlink(missing_ok=True)
    return folder


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A copy that a test may damage: the column's folder."""
    (name,) = (path.parent.name for path in folder.glob("*/run.py"))
    shutil.copytree(folder / name, tmp_path / "columns" / name)
    monkeypatch.setattr(cli, "COLUMNS", tmp_path / "columns")
    monkeypatch.setenv("KDREFS_RUNS", str(tmp_path / "columns" / "store"))
    return tmp_path / "columns" / name


def tree(folder):
    files = (path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts)
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in files}


def refusal(arguments, folder):
    """Call the command line, which must refuse; return what it says."""
    before = tree(folder)
    found = CliRunner().invoke(cli.app, arguments)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 2, f"{arguments}: exit code {found.exit_code}, {found.output}"
    assert found.stdout == ""
    assert found.stderr.endswith("\n")
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stderr.startswith("reproduce: ")
    assert tree(folder) == before
    return found.stderr.removeprefix("reproduce: ").removesuffix("\n")


KEY = "COLUMN/quick/synthetic/map/method"
WRONG = {
    ("run",): "Missing argument",
    ("run", "COLUMN", "student"): "unexpected extra argument",
    ("run", "COLUMN", "--bogus"): "No such option: --bogus",
    ("run", "COLUMN", "--seeds"): "requires an argument",
    ("run", "../COLUMN"): "no column '../COLUMN'",
    ("run", "COLUMN/"): "no column 'COLUMN/'",
    ("run", ""): "no column ''",
    ("run", "COLUMN", "--profile", ""): "no profile ''",
    ("run", "COLUMN", "--arm", ""): "no arm ''",
    ("run", "COLUMN", "--data", "digits"): "no data 'digits'",
    ("run", "COLUMN", "--source", ""): "expected one",
    ("run", "COLUMN", "--source", "*"): "expected one",
    ("run", "COLUMN", "--jobs", "0"): "--jobs",
    ("run", "COLUMN", "--jobs", "1000000"): "--jobs",
    ("run", "COLUMN", "--jobs", "two"): "--jobs",
    ("run", "COLUMN", "--threads", "0"): "--threads",
    ("run", "COLUMN", "--threads", "-1"): "--threads",
    ("run", "COLUMN", "--threads", "9" * 30): "--threads",
    ("run", "COLUMN", "--device", "tpu"): "device: got 'tpu', expected cpu or cuda",
    ("run", "COLUMN", "--device", ""): "device: got '', expected cpu or cuda",
    ("run", "COLUMN", "--device", "cuda:0"): "device: got 'cuda:0', expected cpu or cuda",
    ("run", "COLUMN", "--device", "cuda"): "device: torch finds no CUDA device",
    ("run", "COLUMN", "--record", "--profile", "paper", "--seeds", "0"): "lacks planned seeds: 1, 2, 3, 4",
    ("verify", "COLUMN", "--profile", "paper"): "nothing is recorded",
    ("verify", "COLUMN", "--device", "tpu"): "device: got 'tpu'",
    ("verify", "COLUMN", "--seeds", "0"): "No such option: --seeds",
    ("revalidate", ""): "no column ''",
    ("show",): "Missing argument",
    ("show", ""): "no number ''",
    ("show", "COLUMN"): "no number 'COLUMN'",
    ("show", f"{KEY}/x"): "no number",
    ("show", f"{KEY}@0"): "has no version '0'; there is 1 to 1",
    ("show", f"{KEY}@x"): "has no version 'x'",
    ("show", f"{KEY}@1@1"): "has no version '1@1'",
    ("show", f"{KEY}\n\x1b[31m"): r"\n\x1b[31m",
    ("compare", KEY): "Missing argument",
    ("compare", KEY, f"{KEY}@2"): "has no version '2'",
    ("cite", "COLUMN/quick"): "no number",
    ("errata", "COLUMN", ""): "no column ''",
    ("errata", "harness"): "no column 'harness'",
    ("errata", "--kind", "Note"): "'Note' is not one of",
    ("data", "get"): "Missing argument",
    ("data", "get", "../digits"): "no data set '../digits'",
    ("data", "get", "digits", "Digits"): "no data set 'Digits'; did you mean 'digits'",
    ("data", "put"): "No such command 'put'",
    ("--bogus",): "No such option: --bogus",
    ("Run", "COLUMN"): "No such command 'Run'",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_command_is_refused_in_one_line(own, arguments):
    if "cuda" in arguments and torch_finds_cuda():
        pytest.skip("this machine has one")
    said = refusal([word.replace("COLUMN", own.name) for word in arguments], own.parent)
    assert WRONG[arguments].replace("COLUMN", own.name) in said


def torch_finds_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.mark.parametrize(
    "seeds",
    ["", "-1", "5-1", "0-", "1e3", "0.5", "1,,2", ",", "0 1", "a", "\u0661", "9" * 5000, "0-9999999999",
     "0-9999,10000-19999", "0--1"],
)  # fmt: skip
def test_wrong_seeds_are_refused(own, seeds):
    assert refusal(["run", own.name, "--seeds", seeds], own.parent).startswith("seeds: got ")


ANY = st.text(max_size=30)
PLACES = [
    ("TEXT",),
    ("run", "TEXT"),
    ("run", "COLUMN", "TEXT"),
    *(("run", "COLUMN", f"--{name}", "TEXT") for name in ("profile", "seeds", "arm", "data", "device", "source")),
    *(("run", "COLUMN", f"--{name}", "TEXT") for name in ("jobs", "threads")),
    ("verify", "TEXT"),
    ("verify", "COLUMN", "--profile", "TEXT"),
    ("revalidate", "TEXT"),
    ("show", "TEXT"),
    ("show", "COLUMN/TEXT"),
    ("show", f"{KEY}@TEXT"),
    ("show", KEY, "TEXT"),
    ("compare", "TEXT", KEY),
    ("compare", KEY, "TEXT"),
    ("cite", "TEXT"),
    ("errata", "TEXT"),
    ("errata", "--kind", "TEXT"),
    ("export", "TEXT", "new.json"),
    ("export", "COLUMN", "new.json", "--profile", "TEXT"),
    ("export", "COLUMN", "new.json", "TEXT"),
    ("import", "TEXT"),
    ("data", "TEXT"),
    ("data", "get", "TEXT"),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_no_text_is_too_odd_for_an_argument(own, place):
    @given(ANY)
    @settings(max_examples=10)
    def refused(text):
        # What is no mistake: a known name, an option for help, the end of options, a number, an empty version.
        assume(text not in WORDS | {"--help", "--json", "--", "--record"} and not text.strip().isdecimal())
        assume(text or not place[-1].endswith("@TEXT"))
        refusal([part.replace("COLUMN", own.name).replace("TEXT", text) for part in place], own.parent)

    refused()


@pytest.mark.parametrize(
    "command", [("show", KEY), ("verify", "COLUMN"), ("list",), ("revalidate", "COLUMN")]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{}", b"[" * 9999, b'{"runs": 3, "shared": 4}', None]
)
def test_a_damaged_ledger_is_named(own, command, content):
    path = own / "ledger.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    assert "ledger.json" in refusal([word.replace("COLUMN", own.name) for word in command], own.parent)


@pytest.mark.parametrize(
    "content", [b"x", b"\xff", b"claim = 3", b"claim = [1]", b"[[claims]]", b"[[claim]]\nid = 1"]
)
def test_damaged_claims_are_named(own, content):
    (own / "claims.toml").write_bytes(content)
    found = CliRunner().invoke(cli.app, ["run", own.name, "--arm", "teacher", "--threads", "1"])
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1].startswith(f"reproduce: reproductions/{own.name}/claims.toml: ")


def test_a_store_that_cannot_be_written_is_named_before_anything_runs(own, monkeypatch):
    (own.parent / "file").touch()
    for place in ("file", "file/store"):
        monkeypatch.setenv("KDREFS_RUNS", str(own.parent / place))
        assert "set KDREFS_RUNS to another folder" in refusal(["run", own.name], own.parent)


def test_data_that_cannot_be_written_name_their_variable(own, monkeypatch):
    file = own.parent / "file"
    file.touch()
    monkeypatch.setenv("KDREFS_DATA", str(file))
    assert refusal(["data", "get", "cifar10"], own.parent).endswith(f"; KDREFS_DATA is {file}")


@pytest.mark.parametrize("name", ["KDREFS_RUNS", "KDREFS_DATA"])
def test_a_home_folder_that_does_not_exist_is_named(own, monkeypatch, name):
    monkeypatch.delenv("KDREFS_RUNS")
    monkeypatch.setenv(name, "~nobody-of-this-name/cache")
    assert refusal(["run", own.name], own.parent) == (
        f"{name}: got '~nobody-of-this-name/cache', a home folder that does not exist"
    )


def test_a_full_disk_is_no_traceback(own, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = CliRunner().invoke(cli.app, ["run", own.name, "--arm", "teacher", "--threads", "1"])
    assert found.exit_code == 2
    last = found.stderr.splitlines()[-1]
    assert re.search(r"^reproduce: .*result\.json: No space left on device.* \(in the run ", last)
    assert not list(own.parent.glob("store/**/*result.json*"))


def test_a_mistake_of_the_program_keeps_its_traceback(own, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a tensor has the wrong shape")

    monkeypatch.setattr(cli, "load_column", broken)
    found = CliRunner().invoke(cli.app, ["run", own.name])
    assert (type(found.exception), found.exit_code, found.stderr) == (RuntimeError, 1, "")


def process(folder, *arguments, stdout=subprocess.PIPE, **environment):
    """Start the command line on the columns in `folder` in a process of its own."""
    code = "import pathlib, sys; from reproductions import cli; cli.COLUMNS = pathlib.Path(sys.argv.pop(1)); cli.main()"
    settings = ("LC_", "LANG", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments],
        cwd=REPOSITORY,
        env=inherited | {"OMP_NUM_THREADS": "1", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_a_locale_without_the_characters_gets_escapes(own):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    key = KEY.replace("COLUMN", own.name)
    commands = (["show", key], ["cite", key, "--json"], ["show", "\N{PLUS-MINUS SIGN}"])
    ended = [
        (p.communicate(timeout=120), p.returncode)
        for p in [process(own.parent, *c, **ascii_only) for c in commands]
    ]
    assert [(code, err) for (_, err), code in ended[:2]] == [(0, b""), (0, b"")]
    (text, _), (data, _), (nothing, said) = (streams for streams, _ in ended)
    assert rb" \xb1 " in text
    assert " \N{PLUS-MINUS SIGN} " in json.loads(data.decode("ascii"))["sentence"]
    assert (ended[2][1], nothing, len(said.decode("ascii").splitlines())) == (2, b"", 1)


def test_a_reader_that_leaves_is_no_error(own):
    # `show` writes as it goes, `cite` when all is said.
    for command in ("show", "cite"):
        leaving = process(own.parent, command, KEY.replace("COLUMN", own.name))
        leaving.stdout.close()
        _, said = leaving.communicate(timeout=120)
        assert (leaving.returncode, said) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_output_that_cannot_be_written_is_one_line(own):
    with Path("/dev/full").open("wb") as full:
        command = process(own.parent, "cite", KEY.replace("COLUMN", own.name), stdout=full)
        _, said = command.communicate(timeout=120)
    assert (command.returncode, said) == (2, b"reproduce: No space left on device\n")
