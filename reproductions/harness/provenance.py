"""Where a number comes from: code, data, versions, machine, time."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from reproductions.harness.source import SourceError, source_closure, source_digest

__all__ = ["Provenance", "SourceError", "data_digests", "provenance", "source_closure", "source_digest"]

LIBRARIES = ("numpy", "scikit-image", "scikit-learn", "scipy", "torch", "torchvision")


class Provenance(BaseModel):
    """What a run depended on and what it took.

    Names of users, hosts and folders have no place in it: it is published with the number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(pattern=r"^[0-9a-f]{64}$", description="source digest")
    commit: str | None = Field(description="git commit of the checkout, where there is one")
    dirty: bool = Field(description="whether tracked files other than ledgers differed from the commit")
    data: dict[str, str] = Field(description="content digest of each input, e.g. 'cifar10/train'")
    seeds: tuple[int, ...]
    versions: dict[str, str] = Field(description="Python and the libraries that compute")
    device: str = Field(description="'cpu' or 'cuda'")
    device_name: str
    threads: int = Field(ge=1, description="of each process")
    processes: int = Field(default=1, ge=1, description="processes that shared the training")
    wall_seconds: float = Field(ge=0)
    peak_memory_mb: float | None = Field(
        description="largest resident memory of the process, or device memory"
    )
    date: datetime = Field(description="UTC, when the run ended")
    command: str

    @model_serializer(mode="wrap")
    def _without_one_process(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # One process is not written down: digests of entries do not change with the field.
        return {name: value for name, value in content(self).items() if (name, value) != ("processes", 1)}

    @property
    def parallel(self) -> str:
        """Threads, and processes where there are several, in words."""
        several = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return f"{self.threads} threads{several}"

    def same_machine(self, other: Provenance) -> bool:
        """Whether equal bits are to be expected: same code, data, versions, device, threads and processes."""
        fields = ("source", "data", "versions", "device", "device_name", "threads", "processes")
        return all(getattr(self, field) == getattr(other, field) for field in fields)


def provenance(
    *,
    source: str,
    data: Mapping[str, str],
    seeds: Iterable[int],
    device: str,
    threads: int,
    processes: int = 1,
    wall_seconds: float,
    peak_memory_mb: float | None,
    command: str,
) -> Provenance:
    """Return the provenance of a run that has just ended on this machine."""
    commit, dirty = _checkout()
    return Provenance(
        source=source,
        commit=commit,
        dirty=dirty,
        data=dict(data),
        seeds=tuple(seeds),
        versions=versions(),
        device=device,
        device_name=device_name(device),
        threads=threads,
        processes=processes,
        wall_seconds=round(wall_seconds, 3),
        peak_memory_mb=None if peak_memory_mb is None else round(peak_memory_mb, 1),
        date=datetime.now(UTC).replace(microsecond=0),
        command=command,
    )


def data_digests(names: Iterable[str]) -> dict[str, str]:
    """Return the content digest of each split of the named sets, `"cifar10/train"` and so on.

    Raises:
        kdrefs.data.DataError: If a set is not there and cannot be had; the message says what to do.
    """
    from kdrefs.data import load_set

    sets = {name: load_set(name) for name in sorted(set(names))}
    return {
        f"{name}/{split}": digest for name, data in sets.items() for split, digest in data.digests.items()
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the version of Python and of each library in `LIBRARIES` that is installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def device_name(device: str) -> str:
    """Return the kind of processor or accelerator, such as "Intel(R) Xeon(R) Platinum 8375C"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path | None = None) -> tuple[str | None, bool]:
    """Return the commit of the checkout and whether tracked files other than ledgers differ from it.

    No value depends on a ledger, and recording one column must not make the next one's runs look changed.
    """

    def git(*arguments: str) -> str:
        where = folder or Path(__file__).resolve().parents[2]
        done = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=30
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        ledgers = (":!reproductions/*/ledger.json", ":!reproductions/*/elsewhere/*.json")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *ledgers)
        return git("rev-parse", "HEAD") or None, bool(changed)
    except (OSError, subprocess.TimeoutExpired):
        return None, False


@functools.cache
def _checkout() -> tuple[str | None, bool]:
    """Return the state of the checkout when this process first asked: that of the code it imported."""
    return git_state()


def reset_peak_memory(device: str) -> None:
    """Start counting peak memory anew, where the system allows it."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb(device: str) -> float | None:
    """Return the largest memory use in MB (2**20 bytes): of the device on CUDA, else of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM"):
                return float(line.split()[1]) / 2**10
    if sys.platform == "win32":
        return None
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
