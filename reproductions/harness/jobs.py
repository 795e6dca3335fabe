"""Runs: what they need, how those that share one training are executed, and their probes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from kdrefs.training import data_parallel
from reproductions.harness import torchrun
from reproductions.harness.files import content_digest, plain
from reproductions.harness.profiles import HarnessError, load_column
from reproductions.harness.provenance import peak_memory_mb, provenance, reset_peak_memory, source_digest
from reproductions.harness.store import Result, Run, RunStore, run_key

PROBE_STEPS = 50


@dataclass(frozen=True)
class Context:
    """What a column's `execute` gets from the harness.

    Attributes:
        store: Where artifacts are kept.
        device: Where to compute.
        max_steps: In a probe, how many optimisation steps each training takes at most; else `None`.
        progress: Whether trainings show a bar; `None` leaves it to the terminal.
        source_digest: Source digest of the column.
        threads: Number of torch threads.
        processes: Number of processes that share each training.
    """

    store: RunStore = field(default_factory=RunStore)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_steps: int | None = None
    progress: bool | None = None
    source_digest: str = ""
    threads: int = field(default_factory=torch.get_num_threads)
    processes: int = 1

    @classmethod
    def of(cls, result: Result, store: RunStore | None = None) -> Context:
        """Return the context in which `result` was computed, so that its artifacts are found again."""
        origin = result.provenance
        return cls(
            store=store or RunStore(),
            device=torch.device(origin.device),
            source_digest=origin.source,
            threads=origin.threads,
            processes=origin.processes,
        )

    def artifact(
        self, task: str, config: Mapping[str, Any], make: Callable[[Path], None], *, source: str | None = None
    ) -> Path:
        """Return the folder of something trained once and found again by content.

        Args:
            task: Kind of artifact, such as `"teacher"`.
            config: All it depends on beside code, device type, threads, processes and `max_steps`.
            make: Fills the folder it is given; what an interrupted attempt left is still in it, so
                trainings resume from checkpoints there. In a probe it must obey `max_steps`.
            source: Source digest of the code that makes it; default: the column's. Columns share an
                artifact if they give the digest of the module in `protocols/` that makes it.
        """
        depends = {
            "config": config,
            "source": source or self.source_digest,
            "device": self.device.type,
            "threads": self.threads,
            "max_steps": self.max_steps,
            **({"processes": self.processes} if self.processes > 1 else {}),
        }
        return self.store.artifact(task, content_digest([task, depends]), make, about=depends)


@dataclass(frozen=True)
class Job:
    """A run with everything that another process needs to execute it.

    Attributes:
        run: Which run.
        config: The profile, as `execute` gets it.
        relevant: What of the profile the run's values depend on.
        source: Source digest of the column.
        data: Content digest of each input.
        device: `"cpu"` or `"cuda"`.
        threads: Number of torch threads.
        store: Root of the run store.
        columns: Folder that holds the columns; `None` for the `reproductions` package.
        probe: Whether the probe is taken, too.
        progress: As in :class:`Context`.
        together: Runs of one arm with the same text share one training; `None` for a run on its own.
        processes: Number of processes that share each training, those that `torchrun` started.
    """

    run: Run
    config: Any
    relevant: Mapping[str, Any]
    source: str
    data: Mapping[str, str]
    device: str
    threads: int
    store: Path
    columns: Path | None = None
    probe: bool = False
    progress: bool | None = None
    together: str | None = None
    processes: int = 1

    @property
    def key(self) -> str:
        """Digest of all that the run's values depend on."""
        return run_key(
            self.run, self.relevant, self.source, self.device, self.threads, self.data, self.processes
        )

    def command(self, seeds: Sequence[int]) -> str:
        """Return the command that does this run again, with all `seeds` that shared its training."""
        run = self.run
        start = f"torchrun --nproc-per-node {self.processes} --no-python " if self.processes > 1 else ""
        return (
            f"{start}reproduce run {run.column} --profile {run.profile} --data {run.data} --arm {run.arm}"
            f" --seeds {','.join(map(str, seeds))} --device {self.device} --threads {self.threads}"
        )


def groups(jobs: Iterable[Job]) -> list[tuple[Job, ...]]:
    """Return the jobs in groups that share one training, most often of one; each in order of seed."""
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        training = job.run if job.together is None else (job.run.arm_key, job.together)
        found.setdefault(training, []).append(job)
    return [tuple(sorted(group, key=lambda job: job.run)) for group in found.values()]


def execute_group(jobs: Sequence[Job], wait: bool = True) -> list[Result] | None:
    """Return the results of jobs, executing those that are not stored in one training.

    Args:
        jobs: One of the :func:`groups`.
        wait: Whether to wait for another process that works on some of them; else nothing is returned then.

    Raises:
        HarnessError: If the code changed on disk since the command began, or the column does not return the
            metrics it announces for each run.
    """
    store = RunStore(jobs[0].store)
    results = {job.run: store.get(job.run, job.key) for job in jobs}
    left = [job for job in jobs if _lacks(job, results[job.run])]
    try:
        with ExitStack() as locks:
            # In order of seed everywhere: two commands whose groups overlap never wait for each other.
            for job in left:
                locks.enter_context(store.lock(job.run, job.key).acquire(timeout=-1 if wait else 0))
            results |= _completed(left, store)
    except Timeout:
        return None
    except Exception as error:
        error.add_note(f"in the run{'s' * (len(left) > 1)} {', '.join(job.run.key for job in left)}")
        raise
    return [result for result in results.values() if result is not None]


def probe(job: Job, seeds: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return the metrics of a job's run and its partners stopped after `PROBE_STEPS` steps.

    Args:
        job: A run.
        seeds: The seeds that share the training, in order; its own among them.

    Returns:
        Seed to metrics.
    """
    runs = [replace(job.run, seed=seed) for seed in seeds]
    values, _, _ = _call(job, runs, RunStore(job.store), PROBE_STEPS)
    return {seed: last for seed, (last, _) in zip(seeds, values, strict=True)}


def help_out() -> None:
    """Take part in the trainings of the process that leads, until it is done."""
    for job, runs, max_steps in torchrun.tasks():
        _call(job, runs, RunStore(job.store), max_steps)


def _lacks(job: Job, result: Result | None) -> bool:
    return result is None or (job.probe and result.probe is None)


def _completed(jobs: Sequence[Job], store: RunStore) -> dict[Run, Result]:
    """Return the results of jobs whose locks are held, each stored as soon as it is there."""
    stored = {job.run: store.get(job.run, job.key) for job in jobs}
    results = {run: result for run, result in stored.items() if result is not None}
    missing = [job for job in jobs if job.run not in results]
    for result in _execute(missing, store) if missing else ():
        store.put(result)
        results[result.run] = result
    unprobed = [job for job in jobs if _lacks(job, results[job.run])]
    # A probe is comparable only if the run has the partners it was trained with, whoever is asked for today.
    for seeds in dict.fromkeys(results[job.run].provenance.seeds for job in unprobed):
        probes = probe(unprobed[0], seeds)
        for run in [job.run for job in unprobed if results[job.run].provenance.seeds == seeds]:
            results[run] = results[run].model_copy(update={"probe": probes[run.seed]}).sealed()
            store.put(results[run])
    return results


def _execute(jobs: Sequence[Job], store: RunStore) -> list[Result]:
    """Execute jobs in one training; each gets an equal part of its time and all of its peak memory."""
    seeds = tuple(job.run.seed for job in jobs)
    values, seconds, memory = _call(jobs[0], [job.run for job in jobs], store, None)
    results = []
    for job, (last, best) in zip(jobs, values, strict=True):
        origin = provenance(
            source=job.source,
            data=job.data,
            seeds=seeds,
            device=job.device,
            threads=job.threads,
            processes=job.processes,
            wall_seconds=seconds / len(jobs),
            peak_memory_mb=memory,
            command=job.command(seeds),
        )
        config = plain(job.relevant)
        result = Result(run=job.run, key=job.key, config=config, provenance=origin, metrics=last, best=best)
        results.append(result.sealed())
    return results


def _call(
    job: Job, runs: Sequence[Run], store: RunStore, max_steps: int | None
) -> tuple[list[tuple[dict[str, float], dict[str, float]]], float, float | None]:
    """Call the column for `runs`; return each one's metrics of the last and best epoch, seconds, memory in MB."""
    torchrun.lead((job, runs, max_steps))
    column = load_column(job.run.column, job.columns)
    if source_digest(column.module) != job.source:
        raise HarnessError(f"the code of {column.name} changed since this command began; start it again")
    device = torch.device(job.device)
    context = Context(store, device, max_steps, job.progress, job.source, job.threads, job.processes)
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    reset_peak_memory(job.device)
    start = time.perf_counter()
    try:
        with data_parallel():
            values = [split_metrics(value) for value in column.execute_all(runs, job.config, context)]
    finally:
        torch.set_num_threads(before)
    seconds = time.perf_counter() - start
    names = {name for last, best in values for name in (*last, *best)}
    unknown = sorted(names - column.metrics.keys()) if max_steps is None else []
    if unknown:
        raise HarnessError(f"execute returned {', '.join(unknown)}, not in METRICS of {column.name}")
    return values, seconds, peak_memory_mb(job.device)


def split_metrics(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the values of the last and of the best epoch.

    Args:
        values: `{"map": 51.2, "map@best": 51.4}`, or `{"last": {"map": 51.2}, "best": {"map": 51.4}}`.

    Raises:
        ValueError: If a value is not finite.
    """
    if values and all(isinstance(value, Mapping) for value in values.values()):
        values = dict(values["last"]) | {f"{name}@best": v for name, v in values.get("best", {}).items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"metric {name!r}: got {value}, expected a finite number")
    best = {name.removesuffix("@best"): float(v) for name, v in values.items() if name.endswith("@best")}
    return {name: float(v) for name, v in values.items() if not name.endswith("@best")}, best
