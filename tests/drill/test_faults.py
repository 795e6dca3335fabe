"""A full disk, a folder that cannot be written, two processes at once, a clock that goes back: nothing is lost."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from book.notebooks import BookError
from kdrefs.data import sets, sources
from kdrefs.data.cache import read_set, write_set
from kdrefs.training import CheckpointError, load_tensors, save_tensors
from kdrefs.training.checkpoint import load_checkpoint, previous, save_checkpoint
from reproductions.harness import provenance
from reproductions.harness.ledger import FILE, load_ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import record
from reproductions.harness.runs import run_profile
from reproductions.harness.store import RunStore
from tests.data.archives import random_raw, served
from tests.drill import places
from tests.drill.drill import processes
from tests.harness.fakes import make_column, make_result
from tests.training.toy import EPOCHS, STEPS, digest, toy_fit, toy_state


def in_child(function, *arguments):
    """Call a function in a process of its own, so that what hinders it hinders nothing else."""
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


# ---------------------------------------------------------------- what writes, much or little


def checkpoint(folder: Path, much: bool) -> None:
    save_checkpoint(folder / "run.safetensors", {"weights": torch.ones(50_000 if much else 500)}, much)


def weights(folder: Path, much: bool) -> None:
    save_tensors(folder / "weights.safetensors", {"weights": torch.ones(50_000 if much else 500)})


def result(folder: Path, much: bool) -> None:
    probe = {f"loss{number}": 1.0 for number in range(500 if much else 1)}
    RunStore(folder).put(make_result("pkt", "pkt", 0, 51.25, probe=probe))


def ledger(folder: Path, much: bool) -> None:
    column = load_column(places.COLUMN, folder / "columns")
    for arm in ("student", "method", "twin") if much else ("student",):
        record([make_result(column.name, arm, seed, 50 + seed) for seed in range(5)], column)


def artifact(folder: Path, much: bool) -> None:
    def make(unfinished: Path) -> None:
        save_tensors(unfinished / "words.safetensors", {"words": torch.ones(50_000 if much else 500)})

    RunStore(folder).artifact("vocabulary", f"{much:d}" * 64, make)


def image_set(folder: Path, much: bool) -> None:
    raw = random_raw(train=100 if much else 5, test=5)
    write_set("toy", raw.train, raw.test, raw.classes, root=folder)


def download(folder: Path, much: bool) -> None:
    if not much:
        return
    content = bytes(200_000)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    with served(content) as url:

        def source(scratch: Path) -> sources.Raw:
            sources.download(url, scratch, md5=md5)
            return random_raw(train=1, test=1)

        sets._SETS["toy"] = sets._Entry(sets.set_info("cifar10"), fetch=(source,))
        sets.load_set("toy", root=folder)


WRITERS = {
    checkpoint: "run.safetensors",
    weights: "weights.safetensors",
    result: "result.json",
    ledger: FILE,
    artifact: "words.safetensors",
    image_set: "train_images.npy",
    download: "toy: could not be fetched",
}


def attempt(hinder: Callable[[Path], None], write: Callable[[Path, bool], None], folder: Path) -> str:
    """What is said when much is to be written and something hinders it."""
    hinder(folder)
    try:
        write(folder, True)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".pyc"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def full_disk(folder: Path, bytes_a_file: int = 8000) -> None:
    """No file grows beyond some bytes, as if the disk had no more; Python ignores the signal that comes with it."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))


def read_only(folder: Path) -> None:
    """No folder can be written, not by root either: its capability to pass over permissions is given up."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, data)
        data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH among the effective ones
        if libc.capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def folder(tmp_path):
    make_column(tmp_path / "columns", places.COLUMN)
    yield tmp_path
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_full_disk_is_said_and_leaves_the_old_content(folder, write):
    in_child(write, folder, False)
    before = contents(folder)
    message = in_child(attempt, full_disk, write, folder)
    assert "File too large" in message
    assert WRITERS[write] in message
    assert "\n" not in message
    assert contents(folder) == before, "nothing is half-written, and no temporary file remains"
    in_child(write, folder, True)
    assert contents(folder) != before


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root may write anywhere")
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_read_only_folder_is_said_and_can_be_read(folder, write):
    in_child(write, folder, False)
    before = contents(folder)
    message = in_child(attempt, read_only, write, folder)
    assert message.startswith("PermissionError: ")
    assert str(folder) in message
    assert contents(folder) == before
    if write is image_set:
        assert len(read_set("toy", folder).train) == 5


# The folder of a ledger is that of its column's code.
@pytest.mark.parametrize("write", [w for w in WRITERS if w is not ledger], ids=lambda write: write.__name__)
def test_a_file_in_place_of_the_folder_is_said(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((FileExistsError, NotADirectoryError), match=re.escape(str(tmp_path / "file"))):
        write(tmp_path / "file", True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_book(tmp_path):
    in_child(places.make_old_book, tmp_path)
    before = places.site(tmp_path)
    with pytest.raises(BookError, match=r"chapter .* failed|Jupyter Book reported"):
        in_child(limited_build, tmp_path)
    assert places.site(tmp_path) == before
    in_child(places.build_book, tmp_path)
    assert places.site(tmp_path) != before


def limited_build(folder: Path) -> None:
    full_disk(folder, 100_000)
    places.build_book(folder)


# ---------------------------------------------------------------- two processes at once


def test_two_builds_of_a_book_wait_for_each_other(tmp_path):
    with ProcessPoolExecutor(2, mp_context=processes) as pool:
        done = [pool.submit(slow_build, tmp_path, tmp_path / "log") for _ in range(2)]
        assert [one.result(timeout=120) for one in done] == [True, True]
    assert (tmp_path / "log").read_text().split() == ["begins", "ends"] * 2


def slow_build(folder: Path, log: Path) -> bool:
    def step(book: object, force: bool) -> bool:
        for word in ("begins", "ends"):
            with log.open("a") as file:
                file.write(f"{word}\n")
            time.sleep(0.3)
        return True

    module = sys.modules["book.build"]
    module._build = step
    return module.build(places.mini(folder))


def test_a_checkpoint_that_another_process_writes_too_is_refused(tmp_path, monkeypatch):
    path, synchronise = tmp_path / "run.safetensors", os.fsync
    save_checkpoint(path, {"x": 1}, 1)

    def other(descriptor):
        monkeypatch.setattr(os, "fsync", synchronise)
        save_checkpoint(path, {"x": 2}, 2)

    monkeypatch.setattr(os, "fsync", other)
    with pytest.raises(CheckpointError, match=r"run\.safetensors is written by another process"):
        save_checkpoint(path, {"x": 3}, 3)
    found = [load_tensors(file)[1]["progress"] for file in (path, previous(path)) if file.exists()]
    assert 2 in found


# ---------------------------------------------------------------- a clock that goes back


class Backwards:
    """Stands for `time.time` and for `datetime`: goes back an hour whenever it is asked."""

    def __init__(self) -> None:
        self.seconds = 2e9

    def __call__(self) -> float:
        self.seconds -= 3600
        return self.seconds

    def now(self, zone: timezone) -> datetime:
        return datetime.fromtimestamp(self(), zone)


def test_training_and_its_checkpoints_do_not_ask_the_clock(tmp_path, monkeypatch):
    state = toy_state()
    expected = digest(state, toy_fit(state))
    monkeypatch.setattr(time, "time", Backwards())
    training = sys.modules["kdrefs.training.fit"]
    saved, save = [], training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda *args: (saved.append(1), save(*args)))
    state = toy_state()
    history = toy_fit(state, checkpoint=tmp_path / "run.safetensors", checkpoint_every=0)
    assert digest(state, history) == expected
    assert len(saved) == EPOCHS * STEPS + EPOCHS


def test_the_newest_checkpoint_is_the_one_of_the_name_whatever_the_files_dates(tmp_path):
    path = tmp_path / "run.safetensors"
    for number in (1, 2):
        save_checkpoint(path, {"x": number}, number)
    os.utime(previous(path), (4e9, 4e9))
    os.utime(path, (0, 0))
    assert load_checkpoint(path, {"x": 0}) == 2


def test_runs_and_numbers_follow_the_order_of_recording(tmp_path, monkeypatch):
    name, store, log = (
        make_column(tmp_path / "columns"),
        RunStore(tmp_path / "store"),
        tmp_path / "executions",
    )
    known = load_column(name, tmp_path / "columns")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setattr(provenance, "datetime", Backwards())

    def run(where: RunStore):
        return run_profile(
            name, columns=tmp_path / "columns", store=where, threads=1, arms=["student"], probe=True
        )

    first = run(store)
    dates = [result.provenance.date for result in first]
    assert dates == sorted(dates, reverse=True)
    record(first, known)
    executed = log.read_text()
    for seconds in (4e9, 0):
        for path in tmp_path.rglob("*"):
            os.utime(path, (seconds, seconds))
        assert run(store) == first
        assert log.read_text() == executed, "what is done is not done again"
    monkeypatch.setenv("FAKE_SHIFT", "1")
    second = run(RunStore(tmp_path / "other"))
    record(second, known)
    number = load_ledger(known.folder / FILE, "").number(f"{name}/quick/synthetic/map/student")
    assert max(run.provenance.date for run in number.runs) < min(dates)
    assert (number.version, number.values) == (2, tuple(result.metrics["map"] for result in second))
