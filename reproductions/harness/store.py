"""The run store: results and artifacts outside git, found again by what they depend on.

    <root>/runs/<column>/<profile>/<data>/<arm>/<seed>-<key>/result.json
    <root>/artifacts/<task>/<key>/…

Every write is atomic and every folder has a lock, so that several commands can share one store.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field, FiniteFloat, ValidationError

from reproductions.harness.files import Sealed, content_digest, plain, temporary_prefix, write_atomic
from reproductions.harness.provenance import Provenance

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, order=True)
class Run:
    """One training or evaluation: an arm of a column on some data with one seed."""

    column: str
    profile: str
    data: str
    arm: str
    seed: int

    def __post_init__(self) -> None:
        for field in ("column", "profile", "data", "arm"):
            value = getattr(self, field)
            if not isinstance(value, str) or not _NAME.fullmatch(value):
                raise ValueError(
                    f"{field}: got {value!r}, expected a name of letters, digits, '_', '-', '+' and '.'"
                )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: got {self.seed!r}, expected an integer from 0 on")

    @property
    def arm_key(self) -> str:
        """The run without its seed, such as `pkt/standard/cifar10/pkt`."""
        return f"{self.column}/{self.profile}/{self.data}/{self.arm}"

    @property
    def key(self) -> str:
        """The run with its seed, such as `pkt/standard/cifar10/pkt#0`."""
        return f"{self.arm_key}#{self.seed}"


class Result(Sealed):
    """What a run gave, with everything it depended on.

    `metrics` are those of the last epoch, `best` those of the best one where training selects, and
    `probe` what the same run gives when it is stopped after a few steps.
    """

    run: Run
    key: str
    config: dict[str, Any]
    provenance: Provenance
    metrics: dict[str, FiniteFloat]
    best: dict[str, FiniteFloat] = Field(default_factory=dict)
    probe: dict[str, FiniteFloat] | None = None


def run_key(
    run: Run,
    config: Mapping[str, Any],
    source: str,
    device: str,
    threads: int,
    data: Mapping[str, str],
    processes: int = 1,
) -> str:
    """Return the digest of all that a run's values depend on."""
    several = [processes] if processes > 1 else []
    return content_digest([run, config, source, device, threads, data, *several])


class RunStore:
    """Results and artifacts under one root folder.

    Args:
        root: Default: `$KDREFS_RUNS`, else the folder `runs` in the data cache.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        root = root or os.environ.get("KDREFS_RUNS")
        if not root:
            from kdrefs.data.cache import cache_root  # brings torch, which reading a ledger does not need

            root = cache_root() / "runs"
        self.root = Path(root).expanduser()

    def require_writable(self) -> None:
        """Raise an `OSError` that names the folder unless files can be written into the root, made if it is missing."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()
        except OSError as error:
            problem = f"the run store cannot be written ({error.strerror}); set KDREFS_RUNS to another folder"
            raise OSError(error.errno, problem, str(self.root)) from None

    def folder(self, run: Run, key: str) -> Path:
        """Return where the result of `run` with that `key` lies."""
        return self.root / "runs" / run.arm_key / f"{run.seed}-{key[:20]}"

    def lock(self, run: Run, key: str) -> FileLock:
        """Return the lock that whoever executes the run holds."""
        folder = self.folder(run, key)
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock")

    def get(self, run: Run, key: str) -> Result | None:
        """Return the stored result, or nothing; a damaged file is named and set aside."""
        return self._read(self.folder(run, key) / "result.json")

    def put(self, result: Result) -> None:
        """Store a result, replacing an earlier one of the same run and key."""
        path = self.folder(result.run, result.key) / "result.json"
        write_atomic(path, result.sealed().model_dump_json(indent=1) + "\n")

    def results(self, column: str, profile: str) -> Iterator[Result]:
        """Yield every stored result of a profile, whatever code it came from, in order of path."""
        for path in sorted((self.root / "runs" / column / profile).glob("*/*/*/result.json")):
            result = self._read(path)
            if result is not None:
                yield result

    def _read(self, path: Path) -> Result | None:
        try:
            result = Result.model_validate_json(path.read_bytes())
            if not result.digest:
                raise ValueError("its digest is missing")
            return result
        except FileNotFoundError:
            return None
        except (ValidationError, ValueError) as error:
            aside = _set_aside(path)
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            name = path.relative_to(self.root)
            warnings.warn(f"{name} is damaged ({problem}): set aside as {aside.name}", stacklevel=3)
            return None

    def artifact(
        self, task: str, key: str, make: Callable[[Path], None], about: Mapping[str, Any] | None = None
    ) -> Path:
        """Return the folder of the artifact `key`, made by `make(folder)` if it is not there.

        One process makes it while others wait; processes that share a training make it together.
        `make` finds in its folder what an interrupted attempt left. Each file's digest is checked
        once a process; a damaged artifact is named, set aside and made again.

        Args:
            task: Kind of artifact, such as `"teacher"`.
            key: Digest of all it depends on.
            make: Fills the folder it is given.
            about: Written into the artifact's `artifact.json` for a human reader.
        """
        from kdrefs.training.parallel import agreed, leads  # as above

        if not _NAME.fullmatch(task):
            raise ValueError(f"task: got {task!r}, expected a name of letters, digits, '_', '-', '+' and '.'")
        final = self.root / "artifacts" / task / key[:32]
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f"{final.name}.lock")) if leads() else nullcontext():
            if leads() and final.exists() and not _intact(final):
                aside = _set_aside(final)
                warnings.warn(
                    f"{final.relative_to(self.root)} is damaged: set aside as {aside.name}", stacklevel=3
                )
            if not agreed(final.exists()):
                partial = final.with_name(f"{final.name}.partial")
                partial.mkdir(exist_ok=True)
                make(partial)
                agreed(None)
                if leads():
                    _finish(partial, final, task, key, about or {})
                agreed(None)
        return final

    def size_mb(self) -> float:
        """Return what the store takes on disk, in MB (10**6 bytes)."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file()) / 1e6


_CHECKED: set[Path] = set()


class ArtifactInfo(Sealed):
    """The `artifact.json` of an artifact: what it is and the digests of its files."""

    task: str
    key: str
    about: dict[str, Any]
    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write it into the artifact's folder."""
        write_atomic(folder / "artifact.json", self.sealed().model_dump_json(indent=1) + "\n")


def _finish(partial: Path, final: Path, task: str, key: str, about: Mapping[str, Any]) -> None:
    """Give an artifact that has been made its digests and its place."""
    files = {path.relative_to(partial).as_posix(): _file_digest(path) for path in _files(partial)}
    ArtifactInfo(task=task, key=key, about=plain(about), files=files).write(partial)
    partial.rename(final)
    _CHECKED.add(final)


def _intact(folder: Path) -> bool:
    if folder in _CHECKED:
        return True
    try:
        info = ArtifactInfo.model_validate_json((folder / "artifact.json").read_bytes())
        found = all(_file_digest(folder / name) == digest for name, digest in info.files.items())
    except (OSError, ValueError):
        return False
    if found:
        _CHECKED.add(folder)
    return found


def _files(folder: Path) -> list[Path]:
    info = folder / "artifact.json"  # and what a killed process left of writing it
    found = (path for path in folder.rglob("*") if path.is_file() and path != info)
    return sorted(path for path in found if not path.name.startswith(temporary_prefix(info)))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(path: Path) -> Path:
    """Rename a damaged file or folder so that it is out of the way and can be looked at."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    return aside
