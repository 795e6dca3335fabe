"""One run: what it needs, how it is executed, and its probe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

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
    """

    store: RunStore = field(default_factory=RunStore)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_steps: int | None = None
    progress: bool | None = None
    source_digest: str = ""
    threads: int = field(default_factory=torch.get_num_threads)

    @classmethod
    def of(cls, result: Result, store: RunStore | None = None) -> Context:
        """Return the context in which `result` was computed, so that its artifacts are found again."""
        origin = result.provenance
        return cls(
            store=store or RunStore(),
            device=torch.device(origin.device),
            source_digest=origin.source,
            threads=origin.threads,
        )

    def artifact(
        self, task: str, config: Mapping[str, Any], make: Callable[[Path], None], *, source: str | None = None
    ) -> Path:
        """Return the folder of something trained once and found again by content.

        Args:
            task: Kind of artifact, such as `"teacher"`.
            config: All it depends on beside code, device type, threads and `max_steps`.
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

    @property
    def key(self) -> str:
        """Digest of all that the run's values depend on."""
        return run_key(self.run, self.relevant, self.source, self.device, self.threads, self.data)

    @property
    def command(self) -> str:
        """The command that does this run again."""
        run = self.run
        return (
            f"reproduce run {run.column} --profile {run.profile} --arm {run.arm} --seeds {run.seed}"
            f" --device {self.device} --threads {self.threads}"
        )


def execute_job(job: Job, wait: bool = True) -> Result | None:
    """Return the stored result of a job or execute it.

    Args:
        job: What to do.
        wait: Whether to wait for another process that works on it; else nothing is returned then.

    Raises:
        HarnessError: If the code changed on disk since the command began, or a metric is unknown.
    """
    store = RunStore(job.store)
    result = store.get(job.run, job.key)
    if result is not None and (result.probe is not None or not job.probe):
        return result
    try:
        with store.lock(job.run, job.key).acquire(timeout=-1 if wait else 0):
            result = store.get(job.run, job.key)
            if result is None:
                result = _execute(job, store)
                store.put(result)
            if job.probe and result.probe is None:
                result = result.model_copy(update={"probe": probe(job)}).sealed()
                store.put(result)
            return result
    except Timeout:
        return None
    except Exception as error:
        error.add_note(f"in the run {job.run.key}")
        raise


def probe(job: Job) -> dict[str, float]:
    """Return the metrics of the same run stopped after `PROBE_STEPS` steps."""
    last, _, _, _ = _call(job, RunStore(job.store), PROBE_STEPS)
    return last


def _execute(job: Job, store: RunStore) -> Result:
    last, best, seconds, memory = _call(job, store, None)
    origin = provenance(
        source=job.source,
        data=job.data,
        seeds=(job.run.seed,),
        device=job.device,
        threads=job.threads,
        wall_seconds=seconds,
        peak_memory_mb=memory,
        command=job.command,
    )
    relevant = plain(job.relevant)
    return Result(
        run=job.run, key=job.key, config=relevant, provenance=origin, metrics=last, best=best
    ).sealed()


def _call(
    job: Job, store: RunStore, max_steps: int | None
) -> tuple[dict[str, float], dict[str, float], float, float | None]:
    """Call the column's `execute`; return metrics of the last and the best epoch, seconds, memory in MB."""
    column = load_column(job.run.column, job.columns)
    if source_digest(column.module) != job.source:
        raise HarnessError(f"the code of {column.name} changed since this command began; start it again")
    context = Context(store, torch.device(job.device), max_steps, job.progress, job.source, job.threads)
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    reset_peak_memory(job.device)
    start = time.perf_counter()
    try:
        values = column.execute(job.run, job.config, context)
    finally:
        torch.set_num_threads(before)
    last, best = split_metrics(values)
    unknown = sorted((last.keys() | best.keys()) - column.metrics.keys()) if max_steps is None else []
    if unknown:
        raise HarnessError(f"execute returned {', '.join(unknown)}, not in METRICS of {column.name}")
    return last, best, time.perf_counter() - start, peak_memory_mb(job.device)


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
