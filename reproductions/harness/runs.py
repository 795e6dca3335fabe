"""Run what is missing of a profile, keep every result, share the work with other processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from reproductions.harness import torchrun
from reproductions.harness.jobs import PROBE_STEPS, Context, Job, execute_group, groups, help_out, probe
from reproductions.harness.profiles import (
    Column,
    HarnessError,
    find_columns_in,
    get_profile,
    load_column,
    suggestion,
)
from reproductions.harness.provenance import source_digest
from reproductions.harness.store import Result, Run, RunStore

__all__ = ["PROBE_STEPS", "Context", "Job", "Result", "Run", "RunStore", "make_jobs", "probe", "run_profile"]


def run_profile(
    column: str,
    profile: str = "quick",
    *,
    seeds: Iterable[int] | None = None,
    arms: Iterable[str] | None = None,
    data: Iterable[str] | None = None,
    jobs: int = 1,
    device: str | None = None,
    threads: int | None = None,
    store: RunStore | None = None,
    probe: bool | None = None,
    progress: bool | None = None,
    on_result: Callable[[Result], None] | None = None,
    columns: Path | None = None,
) -> list[Result]:
    """Execute what is missing of a profile and return all its results in plan order.

    Interrupted, it keeps every finished run, and the trainings go on from their checkpoints next
    time. Several commands may work on one profile: each run is executed by one of them. Where the
    column allows it, the missing runs of an arm share one training; `provenance.seeds` of each names
    all that did, `wall_seconds` is its equal part of the time and `peak_memory_mb` that of them all.

    In the processes that `torchrun` started, all of which call this, each training is shared by all of
    them and is of one run; the first returns, the others end when it is done.

    Args:
        column: Name of the column's folder.
        profile: Name of the profile.
        seeds: Instead of the profile's.
        arms: Only these.
        data: Only runs on these.
        jobs: Number of processes.
        device: `"cpu"` or `"cuda"`; default `"cpu"`. A result belongs to its kind of device.
        threads: torch threads of each process; default: torch's number divided by `jobs`.
        store: Default: :class:`RunStore` at its default place.
        probe: Whether to take each run's probe too, which `revalidate` needs; default: not in `quick`.
        progress: Whether trainings show a bar.
        on_result: Called with each result as it comes.
        columns: Folder that holds the columns; default: the `reproductions` package.

    Raises:
        HarnessError: If the column, the profile, an arm or a data set does not exist, or several `jobs`
            are asked for under `torchrun`.
    """
    with torchrun.process_group(device or "cpu") as leads:
        if not leads:
            help_out()
            raise SystemExit(0)
        if jobs > 1 and torchrun.size() > 1:
            raise HarnessError(
                f"jobs: got {jobs}, expected 1 where {torchrun.size()} processes share trainings"
            )
        store = store or RunStore()
        tasks = make_jobs(
            load_column(column, columns),
            profile,
            seeds=seeds,
            arms=arms,
            data=data,
            device=device or "cpu",
            threads=threads or max(1, torch.get_num_threads() // jobs),
            store=store,
            probe=profile != "quick" if probe is None else probe,
            progress=progress if jobs == 1 else False,
            columns=columns,
        )
        return _results(tasks, jobs, columns, on_result)


def _results(
    tasks: Sequence[Job], jobs: int, columns: Path | None, on_result: Callable[[Result], None] | None
) -> list[Result]:
    """Return the results of tasks in their order, executing those that are not stored."""
    results: dict[Run, Result] = {}

    def keep(result: Result) -> None:
        results[result.run] = result
        if on_result:
            on_result(result)

    with _workers(jobs, columns) as each:
        # First what nobody works on, then what others had begun, waiting for them.
        for wait in (False, True):
            left = [task for task in tasks if task.run not in results]
            for found in each(execute_group, [(group, wait) for group in groups(left)]):
                for result in found or ():
                    keep(result)
    return [results[task.run] for task in tasks]


def chosen_runs(
    column: Column, config: Any, arms: Iterable[str] | None = None, data: Iterable[str] | None = None
) -> list[Run]:
    """Return the runs of a profile in plan order, those of some arms or on some data only.

    Raises:
        HarnessError: If the plan has a run twice, or there is no such arm, data or run.
    """
    where, everything = f"{column.name}/{config.profile}", column.plan(config)
    if len(set(everything)) < len(everything):
        raise HarnessError(f"the plan of {where} has a run twice")
    plan = everything
    for field, names in (("arm", arms), ("data", data)):
        if names is None:
            continue
        wanted, known = set(names), {getattr(run, field) for run in everything}
        for name in sorted(wanted - known):
            raise HarnessError(f"{where} has no {field} {name!r}{suggestion(name, known)}")
        plan = [run for run in plan if getattr(run, field) in wanted]
    if not plan:
        raise HarnessError(f"{where} has none of the arms on this data")
    return plan


def make_jobs(
    column: Column,
    profile: str,
    *,
    seeds: Iterable[int] | None = None,
    arms: Iterable[str] | None = None,
    data: Iterable[str] | None = None,
    **settings: Any,
) -> list[Job]:
    """Return the jobs of a profile in plan order; `settings` are further fields of :class:`Job`."""
    config = get_profile(column, profile, seeds)
    plan = chosen_runs(column, config, arms, data)
    source, digests = source_digest(column.module), column.data_digests(config)
    store: RunStore = settings.pop("store")
    alone = torchrun.size() == 1
    return [
        Job(
            run,
            config,
            column.relevant_config(run, config),
            source,
            digests,
            store=store.root,
            together=column.together(run, config, settings["device"]) if column.together and alone else None,
            processes=torchrun.size(),
            **settings,
        )
        for run in plan
    ]


Each = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterator[Any]]


@contextmanager
def _workers(jobs: int, columns: Path | None) -> Iterator[Each]:
    """Give a function that calls another for each tuple of arguments, here or in `jobs` processes."""
    if jobs == 1:
        yield lambda function, arguments: (function(*item) for item in arguments)
        return
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(columns,)
    )
    try:
        yield (
            lambda function, arguments: (
                pool.map(function, *zip(*arguments, strict=True)) if arguments else iter(())
            )
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(columns: Path | None) -> None:
    """Make the columns importable; end this process when the one that started it is gone, even if killed."""
    find_columns_in(columns)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
