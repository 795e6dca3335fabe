"""The drill at chosen places, and that it would notice what it is for."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kdrefs.data import cache
from kdrefs.training import checkpoint
from reproductions.harness import ledger
from tests.drill.__main__ import SHARES, main, shares
from tests.drill.drill import Place, drill
from tests.drill.places import PLACES, download, nothing, run_and_record, write_checkpoints

# Where each process is killed, see tests.training.toy.arm; the process after it goes on from there.
CHOSEN = {
    "training": ["write:7", "rename:20"],
    "checkpoint": ["write:7", "rename:2", "rename:101"],
    # The probe of a result, the ledger with the second arm, the ledger with the third.
    "ledger": ["write:9", "rename:7", "write:13"],
    "download": ["write:3", "rename:5"],
    # The executed chapter, the old site away, the new one in its place.
    "book": ["rename:1", "rename:3"],
}


@pytest.mark.parametrize(
    "place", [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * (p.name == "book")) for p in PLACES]
)
def test_nothing_is_lost_at_chosen_places(place: Place, tmp_path: Path) -> None:
    chosen = CHOSEN[place.name]
    tally = drill(place, len(chosen), iter(chosen), tmp_path / "drill")
    assert (tally.kills, tally.lost, tally.reports) == (len(chosen), 0, [])
    assert tally.resumed >= (0 if place.name == "download" else 1)
    assert list((tmp_path / "drill").iterdir()) == []


def test_random_kills_are_counted_and_the_tally_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "2", "--seed", "5", "--only", "checkpoint"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed 5, in ")
    assert lines[-2].split()[:2] == ["checkpoint", "2"]
    assert lines[-1] == "drill: 2 kills, 0 lost"
    assert not Path(lines[0].removeprefix("seed 5, in ")).exists()


def test_every_place_has_its_share_of_the_kills() -> None:
    assert shares(100, list(SHARES)) == SHARES
    assert sum(shares(7, list(SHARES)).values()) == 7
    assert shares(28, ["ledger", "book"]) == {"ledger": 20, "book": 8}


@pytest.mark.parametrize("arguments", [["--only", "trainings"], ["--kills", "4"], ["--kills", "x"]])
def test_what_cannot_be_drilled_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


# ---------------------------------------------------------------- broken programs


def in_place(path: Path, content: bytes) -> None:
    """How not to write a file."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def careless_checkpoints(folder: Path) -> None:
    write_partial = checkpoint.write_partial

    def write(path, *contents):
        partial = write_partial(path, *contents)
        in_place(path, partial.read_bytes())
        return partial

    checkpoint.write_partial = write
    write_checkpoints(folder)


def careless_ledger(folder: Path) -> None:
    ledger.write_atomic = lambda path, text: in_place(path, text.encode())
    run_and_record(folder)


def careless_download(folder: Path) -> None:
    def write(path, writer):
        content = io.BytesIO()
        writer(content)
        in_place(path, content.getvalue())

    cache.write_atomically = write
    download(folder)


@pytest.mark.parametrize(
    ("name", "program", "moment", "message"),
    [
        # The second call of each checkpoint's three is the careless one.
        ("checkpoint", careless_checkpoints, "write:5", r"stage0\.safetensors is damaged"),
        # A result and its probe come first.
        ("ledger", careless_ledger, "write:3", r"fake_drill/ledger\.json: "),
        ("download", careless_download, "write:5", r"meta\.json is damaged"),
    ],
)
def test_careless_writers_are_caught(name, program, moment, message, tmp_path) -> None:
    (place,) = (place for place in PLACES if place.name == name)
    tally = drill(replace(place, work=program), 1, iter([moment]), tmp_path)
    assert (tally.kills, tally.lost, tally.unharmed) == (1, 1, 0)
    assert re.search(message, tally.reports[0])
    assert [path.name for path in tmp_path.iterdir()] == ["trial0"], "what was lost can be looked at"


def three_files(folder: Path) -> None:
    for name in ("first", "second", "third"):
        in_place(folder / name, b"done")


def other_bits(folder: Path) -> None:
    three_files(folder)
    in_place(folder / "second", str(os.getpid()).encode())


def litter(folder: Path) -> None:
    scratch = folder / f"scratch{os.getpid()}"
    scratch.touch()
    three_files(folder)
    scratch.unlink()


def forget(folder: Path) -> None:
    for name in ("first", "second", "third"):
        (folder / name).unlink(missing_ok=True)
    three_files(folder)


def stay_locked(folder: Path) -> None:
    (folder / "busy").mkdir()
    three_files(folder)
    (folder / "busy").rmdir()


def count_files(folder: Path, end: object) -> int:
    return sum((folder / name).exists() for name in ("first", "second", "third"))


def read_files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("first", "second", "third")]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (three_files, None),
        (other_bits, "the end is not that of the unbroken run"),
        (litter, "the end is not that of the unbroken run"),
        (forget, "of 2 that were done 1 are left"),
        (stay_locked, r"ended with 1:\n(.*\n)*FileExistsError: .*busy"),
    ],
)
def test_what_goes_wrong_after_a_kill_is_caught(program, message, tmp_path) -> None:
    place = Place("files", nothing, program, count_files, read_files)
    tally = drill(place, 2, iter(["write:2", "write:1"] * 2), tmp_path)
    assert tally.lost == len(tally.reports)
    assert bool(tally.lost) == (message is not None)
    assert message is None or re.search(message, tally.reports[0])
