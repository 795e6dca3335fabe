"""The programs that are drilled: training, checkpoints, the ledger, a download, the book."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch

from book.build import Book, build
from book.notebooks import PARTIAL, digest
from kdrefs.data import sets, sources
from kdrefs.data.cache import read_set
from kdrefs.training import load_tensors
from kdrefs.training.checkpoint import load_checkpoint, previous, save_checkpoint, unflatten
from reproductions import cli
from reproductions.harness.ledger import FILE, load_ledger
from reproductions.harness.profiles import find_columns_in
from reproductions.harness.store import Result
from tests.book.minibook import CELLS, make_book
from tests.data.archives import binary_archive, digests, random_raw, served
from tests.drill.drill import Place, Violation
from tests.harness.fakes import make_column
from tests.training.toy import toy_fit, toy_state

COLUMN = "fake_drill"

# ---------------------------------------------------------------- training and checkpoints

STAGES = (0.0, 0.02, 1e9)  # seconds between the checkpoints of each training
WRITES = 60


def nothing(folder: Path) -> None:
    """There is nothing to begin with."""


def train(folder: Path) -> None:
    """Trainings one after another, with a checkpoint after every step, now and then, and after every epoch."""
    torch.set_num_threads(1)
    for number, every in enumerate(STAGES):
        toy_fit(toy_state(), checkpoint=folder / f"stage{number}.safetensors", checkpoint_every=every)


def write_checkpoints(folder: Path) -> None:
    """A state that changes a little between one checkpoint and the next."""
    path, state = folder / "stage0.safetensors", {"weights": torch.zeros(100_000), "seen": 0}
    for number in range((load_checkpoint(path, state) or 0) + 1, WRITES + 1):
        state["weights"] += torch.arange(100_000) % number
        state["seen"] = number
        save_checkpoint(path, state, number)


def steps_done(folder: Path, end: object) -> int:
    """Steps of all trainings that are in a checkpoint; every checkpoint must be sound."""
    done = 0
    for number in range(len(STAGES)):
        path = folder / f"stage{number}.safetensors"
        # Between two renames there is only the one before.
        found = [load_tensors(file) for file in (path, previous(path)) if file.exists()]
        if found:
            tensors, metadata = found[0]
            progress = unflatten(metadata["progress"], tensors)
            done += progress if isinstance(progress, int) else progress["history"]["steps"]
    return done


def last_checkpoints(folder: Path) -> dict[str, str]:
    """Digests of the checkpoints, which hold every bit of state and history; equal content gives equal files."""
    return {path.name: digest([path], folder) for path in sorted(folder.glob("*.safetensors"))}


# ---------------------------------------------------------------- the ledger

PROFILES = ("quick", "standard")
ARMS = ("teacher", "student", "method", "twin")


def make_columns(folder: Path) -> None:
    """A column that costs nothing."""
    make_column(folder / "columns", COLUMN)


def run_and_record(folder: Path) -> None:
    """``reproduce run --record`` for each arm of each profile."""
    os.environ["KDREFS_RUNS"] = str(folder / "store")
    cli.COLUMNS = folder / "columns"
    for profile, arm in product(PROFILES, ARMS):
        command = ["run", COLUMN, "-p", profile, "--arm", arm, "--record", "--threads", "1"]
        try:
            cli.app(command)
        except SystemExit as end:
            if end.code:
                raise


def results_and_numbers(folder: Path, end: Any) -> int:
    """Results in the store and numbers in the ledger: all valid, with the values of the end."""
    found = recorded(folder)
    if wrong := [key for key, value in found.items() if end is not None and end[key] != value]:
        raise Violation(f"{wrong[0]} is {found[wrong[0]]}, in the end {end[wrong[0]]}")
    return len(found)


def recorded(folder: Path) -> dict[str, object]:
    """The results, and the numbers with their versions, seeds and values; dates and times differ by nature."""
    paths = (folder / "store").rglob("result.json")
    results = [Result.model_validate_json(path.read_bytes()) for path in paths]
    if not all(result.digest for result in results):
        raise Violation("a result has no digest")
    path = folder / "columns" / COLUMN / FILE
    numbers = load_ledger(path, "").numbers if path.exists() else {}
    return {key: (number.version, number.seeds, number.values) for key, number in numbers.items()} | {
        result.run.key: (result.key, result.metrics, result.best) for result in results
    }


# ---------------------------------------------------------------- a download

IMAGES, TEST_IMAGES = 1500, 500


def make_archive(folder: Path) -> None:
    """An archive to download, and what it must become."""
    raw = random_raw(train=IMAGES, test=TEST_IMAGES)
    binary_archive(folder / "archive.tar.gz", raw)
    (folder / "digests.json").write_text(json.dumps(digests(raw)))


def download(folder: Path) -> None:
    """Load a set that has to be fetched first: downloaded, checked, unpacked, brought into order, written."""
    content = (folder / "archive.tar.gz").read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    with served(content, pause=0.001) as url:

        def source(scratch: Path) -> sources.Raw:
            return sources.parse_cifar10_binary(sources.download(url, scratch, md5=md5))

        pinned = json.loads((folder / "digests.json").read_text())
        sets._SETS["toy"] = sets._Entry(sets.set_info("cifar10"), fetch=(source,), digests=pinned)
        sets.load_set("toy", root=folder / "cache")


def images_cached(folder: Path, end: object) -> int:
    """Images in the cache: the whole set, with the right digests, or none; anything else is an error."""
    if not sets.is_cached("toy", folder / "cache"):
        return 0
    found = read_set("toy", folder / "cache")
    if found.digests != json.loads((folder / "digests.json").read_text()):
        raise Violation(f"the cache has a set with the digests {found.digests}")
    return len(found.train) + len(found.test)


def cached_files(folder: Path) -> str:
    """Digest of the cache's files."""
    return digest((folder / "cache").rglob("*"), folder)


# ---------------------------------------------------------------- the book

NUMBER = "It {verb} {{num}}`COLUMN/quick/synthetic/map/method`."


def mini(folder: Path) -> Book:
    """The book below a folder."""
    return Book(source=folder / "book", output=folder / "build", columns=folder / "columns")


def make_old_book(folder: Path) -> None:
    """A finished book, then other words and other code in its chapter."""
    make_book(folder, NUMBER.format(verb="was"))
    build_book(folder)
    make_book(folder, NUMBER.format(verb="is"), CELLS.replace("6 * 7", "6 * 8"))
    (folder / "old").write_text(site(folder))


def build_book(folder: Path) -> None:
    """Build it: chapter and pages."""
    find_columns_in(folder / "columns")
    build(mini(folder))


def chapters_and_site(folder: Path, end: object) -> int:
    """1 for the executed chapter, 1 for the new site; whoever reads the book finds the old or the new one."""
    book, old = mini(folder), (folder / "old").read_text()
    # Between two renames the old site stands beside its place; the next build puts it back.
    found = site(folder, book.html if book.html.exists() else book.replaced)
    if found not in (old, end) and end is not None:
        raise Violation(f"{book.html} is neither the old site nor the new one")
    entries = [path for path in (book.output / "cache").iterdir() if not path.name.startswith(PARTIAL)]
    return len(entries) - 1 + (found != old)


def site(folder: Path, html: Path | None = None) -> str:
    """Digest of the pages that a reader of the book gets."""
    html = html or mini(folder).html
    return digest(html.rglob("*"), html)


PLACES = (
    Place("training", nothing, train, steps_done, last_checkpoints),
    Place("checkpoint", nothing, write_checkpoints, steps_done, last_checkpoints),
    Place("ledger", make_columns, run_and_record, results_and_numbers, recorded),
    Place("download", make_archive, download, images_cached, cached_files),
    Place("book", make_old_book, build_book, chapters_and_site, site),
)
