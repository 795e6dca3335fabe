"""The runs of a profile one by one, each with its own command: what a workflow engine makes its jobs of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from reproductions.harness.profiles import HarnessError, column_names, load_column, suggestion
from reproductions.harness.runs import make_jobs
from reproductions.harness.store import Run, RunStore


@dataclass(frozen=True)
class PlannedRun:
    """A run of a profile.

    Attributes:
        run: Which one.
        result: File that its result is written to, last and in one piece. The path has the digest of
            code, configuration, data, device and threads in it: what depends on other code is another file.
        command: Executes this run alone, with its probe; does nothing if the result is there.
    """

    run: Run
    result: Path
    command: str

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self.result.exists()


def plan_runs(
    profile: str,
    *,
    device: str,
    threads: int,
    names: Iterable[str] = (),
    seeds: Iterable[int] | None = None,
    store: RunStore | None = None,
    columns: Path | None = None,
) -> list[PlannedRun]:
    """Return every run of a profile in plan order, column by column.

    Args:
        profile: Name of the profile.
        device: `"cpu"` or `"cuda"`; need not be on this machine.
        threads: torch threads of each run.
        names: Columns; default: all that have the profile.
        seeds: Instead of the profile's.
        store: Default: :class:`RunStore` at its default place.
        columns: Folder that holds the columns; default: the `reproductions` package.

    Raises:
        HarnessError: If a column does not exist or lacks the profile, or no column has it.
        kdrefs.data.DataError: If a data set is not there and cannot be had.
    """
    store = store or RunStore()
    chosen = [load_column(name, columns) for name in dict.fromkeys(names)]
    if not chosen:
        known = [load_column(name, columns) for name in column_names(columns)]
        chosen = [column for column in known if profile in column.profiles]
        if not chosen:
            profiles = {name for column in known for name in column.profiles}
            raise HarnessError(f"no column has a profile {profile!r}{suggestion(profile, profiles)}")
    seeds = None if seeds is None else tuple(seeds)
    jobs = [
        job
        for column in chosen
        for job in make_jobs(column, profile, seeds=seeds, device=device, threads=threads, store=store)
    ]
    return [
        PlannedRun(
            job.run,
            (store.folder(job.run, job.key) / "result.json").absolute(),
            f"{job.command([job.run.seed])} --probe",
        )
        for job in jobs
    ]


def planned_records(planned: Iterable[PlannedRun]) -> list[dict[str, Any]]:
    """Return planned runs as plain data."""
    return [
        {**asdict(item.run), "result": str(item.result), "done": item.done, "command": item.command}
        for item in planned
    ]


def planned_table(planned: Iterable[PlannedRun]) -> Table:
    """Return one row per column, data set and arm: its seeds, and how many of them are done."""
    arms: dict[tuple[str, str, str], list[PlannedRun]] = {}
    for item in planned:
        arms.setdefault((item.run.column, item.run.data, item.run.arm), []).append(item)
    table = Table("column", "data", "arm", "seeds", "done")
    for names, items in arms.items():
        seeds = ", ".join(str(item.run.seed) for item in items)
        table.add_row(*names, seeds, f"{sum(item.done for item in items)} of {len(items)}")
    return table
