"""Columns that cost nothing, and results without running anything."""

import itertools
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from reproductions.harness.files import content_digest
from reproductions.harness.provenance import Provenance
from reproductions.harness.store import Result, Run

REPOSITORY = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


def make_column(folder: Path, name: str | None = None) -> str:
    """Copy `fake_run.py` to a column of a new name below `folder`; return the name.

    Python imports a module once: no two tests in one process may share a name.
    """
    name = name or f"fake{os.getpid()}x{next(_numbers)}"
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    shutil.copyfile(Path(__file__).with_name("fake_run.py"), folder / name / "run.py")
    return name


def make_result(
    column: str,
    arm: str,
    seed: int,
    value: float,
    *,
    profile: str = "quick",
    source: str = "a" * 64,
    versions: dict[str, str] | None = None,
    threads: int = 1,
    probe: dict[str, float] | None = None,
) -> Result:
    """Return a result with the metric `map`, as if it had been run."""
    run = Run(column, profile, "synthetic", arm, seed)
    origin = Provenance(
        source=source,
        commit="c" * 40,
        dirty=False,
        data={"digits/train": "d" * 64},
        seeds=(seed,),
        versions=versions or {"torch": "2.15.0"},
        device="cpu",
        device_name="a processor",
        threads=threads,
        wall_seconds=1.5,
        peak_memory_mb=100,
        date=datetime(2026, 1, 2, tzinfo=UTC),
        command=f"reproduce run {column}",
    )
    values = {"map": value}
    return Result(
        run=run,
        key=content_digest([run, source, threads]),
        config={"rate": 0.1},
        provenance=origin,
        metrics=values,
        probe=probe or {"loss": 1.0},
    ).sealed()


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start another Python with `code`, which Ctrl-C stops even where this one was started in the background."""
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", heed + code],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait for processes, which must succeed, and return what they printed."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        printed.append(out)
    return printed


def meeting(folder: Path, processes: int = 2) -> str:
    """Return code that waits in each process until all have come there, so that they work at the same time."""
    folder.mkdir()
    return (
        "import os, time; from pathlib import Path\n"
        f"Path({str(folder)!r}, str(os.getpid())).touch()\n"
        f"while len(list(Path({str(folder)!r}).iterdir())) < {processes}: time.sleep(0.01)\n"
    )
