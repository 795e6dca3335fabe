"""Whether this machine can run the experiments, and what is missing."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdrefs.data import is_cached, set_names
from reproductions.harness.ledger import ELSEWHERE, FILE, load_ledger
from reproductions.harness.profiles import HarnessError, column_names, columns_root
from reproductions.harness.provenance import device_name, git_state, versions
from reproductions.harness.store import RunStore

LEAST_FREE_GB = 2.0


@dataclass(frozen=True)
class Check:
    """One finding; where `ok` is `None` it is for information only."""

    name: str
    ok: bool | None
    detail: str


def examine(store: RunStore, columns: Path | None = None) -> Iterator[Check]:
    """Yield what is found about Python, libraries, devices, disk, data sets and ledgers."""
    yield Check("Python", sys.version_info >= (3, 11), f"{versions()['python']}, 3.11 or later is needed")
    root = Path(__file__).resolve().parents[2]
    yield from _libraries(root / "requirements.lock")
    import torch

    yield Check(
        "processor", None, f"{device_name('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        yield Check("CUDA device", None, device_name("cuda"))
    else:
        yield Check("CUDA device", None, "none; the quick and standard profiles need none")
    yield _store(store)
    for name in set_names():
        yield Check(
            f"data set {name}", None, "present" if is_cached(name) else "will be downloaded when needed"
        )
    commit, dirty = git_state(root)
    yield Check(
        "git", None, f"commit {commit[:12]}{', with changes' if dirty else ''}" if commit else "no commit"
    )
    for name in column_names(columns):
        folder = columns_root(columns) / name
        yield _ledger(f"ledger of {name}", folder / FILE)
        for path in sorted((folder / ELSEWHERE).glob("*.json")):
            yield _ledger(f"ledger of {name}, {path.stem}", path)


def _libraries(lock: Path) -> Iterator[Check]:
    """Compare the installed versions with the lock file, which may pin one library per Python version."""
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    for name, version in versions().items():
        pinned = re.findall(rf"^{re.escape(name)}==([^\s;]+)", text, re.MULTILINE)
        if pinned:
            # A build of torch for one device has a suffix that the lock does not name: 2.15.0+cpu.
            wanted = " or ".join(dict.fromkeys(pinned))
            yield Check(name, version.partition("+")[0] in pinned, f"{version}, locked {wanted}")


def _store(store: RunStore) -> Check:
    try:
        store.require_writable()
    except OSError as error:
        return Check("run store", False, str(error.strerror))
    free = shutil.disk_usage(store.root).free / 1e9
    detail = f"{store.size_mb():.0f} MB used, {free:.1f} GB free, {LEAST_FREE_GB:.0f} GB wanted"
    return Check("run store", free >= LEAST_FREE_GB, detail)


def _ledger(name: str, path: Path) -> Check:
    if not path.exists():
        return Check(name, None, "nothing recorded yet")
    try:
        numbers = load_ledger(path).numbers.values()
    except HarnessError as error:
        return Check(name, False, str(error))
    stale = sum(number.status == "stale" for number in numbers)
    return Check(name, True, f"{len(numbers)} numbers, {stale} of them stale")
