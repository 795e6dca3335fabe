"""Run all benchmarks, print one table, write ``build/bench.json``; with ``--record`` also what the book shows.

    python -m tests.benchmarks [--record] [--only TEXT] [--seconds 1.5] [--output build/bench.json]

One torch thread on the CPU; where there is a CUDA device, everything that says something there runs on it too. Each
case has a process of its own: what an allocator keeps of one case decides whether the next one pays for fresh pages.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from book.benchmarks import RECORD, Machine, Record, Row
from book.paths import ROOT
from reproductions.harness.provenance import device_name, git_state, versions
from tests.benchmarks.case import Case, run, settle
from tests.benchmarks.columns import COLUMNS
from tests.benchmarks.concepts import CONCEPTS
from tests.benchmarks.losses import LOSSES, METRICS, PAIR_SUMS
from tests.benchmarks.training import BATCHES, JACOBIANS, SEEDS, TABLE, TRAINING

CASES: list[Case] = [
    *LOSSES,
    *METRICS,
    *BATCHES,
    *TRAINING,
    *TABLE,
    *COLUMNS,
    *JACOBIANS,
    *CONCEPTS,
    *SEEDS,
    *PAIR_SUMS,
]
WIDTH = 200  # of the table where the output is no terminal


def machine() -> Machine:
    """Describe this machine."""
    return Machine(
        processor=device_name("cpu"),
        cores=os.cpu_count() or 1,
        accelerator=device_name("cuda") if torch.cuda.is_available() else None,
        system=platform.system(),
        versions=versions(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def measure(cases: Sequence[Case], seconds: float, console: Console) -> Record:
    """Run ``cases`` on every device, each for about ``seconds``."""
    started, where = time.perf_counter(), machine()
    commit, dirty = git_state()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    jobs = [(device, case) for device in devices for case in cases if case.cuda or device.type == "cpu"]
    rows = []
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(
            [Case.__module__, "tests.benchmarks.training", "tests.benchmarks.losses"]
        )
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=settle, max_tasks_per_child=1)
    with console.status("") as status, pool:
        for number, (device, case) in enumerate(jobs, start=1):
            title = f"{case.group}: {case.name}, {case.size}"
            status.update(f"{number} of {len(jobs)} on {device.type} · {title}")
            try:
                rows.append(pool.submit(run, case, device, seconds).result())
            except Exception as error:
                error.add_note(f"in the benchmark {title!r} on {device.type}")
                raise
    return Record(
        date=datetime.now(UTC).replace(microsecond=0),
        commit=commit,
        dirty=dirty,
        seconds=round(time.perf_counter() - started, 1),
        machine=where,
        rows=tuple(rows),
    )


def table(rows: Sequence[Row]) -> Table:
    """All rows in one table, group by group."""
    cells = [row.cells() for row in rows]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in cells[0]:
        made.add_column(head, no_wrap=True, justify="left" if head in ("Case", "Size", "Goals") else "right")
    for group, members in itertools.groupby(zip(rows, cells, strict=True), key=lambda pair: pair[0].group):
        made.add_row(f"[bold]{group}[/]")
        for _, texts in members:
            made.add_row(*texts.values())
        made.add_row()
    return made


def report(record: Record, console: Console) -> None:
    """Print the table, what is behind, and the goals that were missed."""
    console.print(table(record.rows))
    console.print(
        "Ratio: theirs / ours, in the shared table and the pair sums ours / theirs; quartiles of the rounds."
    )
    behind = [f"{row.title} ({row.size})" for row in record.rows if row.behind]
    console.print(f"Not faster: {'; '.join(behind) or 'none'}.")
    missed = [
        f"{row.title} ({row.size}) {goal.text()}, measured {goal.printed(row.value(goal) or 0)}"
        for row, goal in record.missed
    ]
    console.print(f"Goals missed: {'; '.join(missed) or 'none'}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Run the benchmarks.")
    parser.add_argument("--record", action="store_true", help=f"also write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose group, name or size has it")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the rounds of each case")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench.json", help="the record")
    options = parser.parse_args(arguments)
    chosen = [
        case for case in CASES if options.only.lower() in f"{case.group} {case.name} {case.size}".lower()
    ]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its group, name or size")
    if options.record and options.only:
        parser.error("--record: a record holds all cases, so not with --only")
    record = measure(chosen, options.seconds, Console(stderr=True))
    console = Console(soft_wrap=True)
    report(record, console if console.is_terminal else Console(width=WIDTH))
    for path in (options.output, *([RECORD] if options.record else [])):
        record.save(path)
        print(f"written: {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
