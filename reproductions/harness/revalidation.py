"""Whether recorded runs still hold on changed code: their first steps are run again and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from reproductions.harness import torchrun
from reproductions.harness.jobs import Job, help_out, probe
from reproductions.harness.ledger import FILE, Ledger, load_ledger
from reproductions.harness.profiles import Column, HarnessError, get_profile, load_column
from reproductions.harness.provenance import device_name, source_digest
from reproductions.harness.schema import Revalidation, RunEntry
from reproductions.harness.store import RunStore

ROUNDING = 1e-5
Probes = Mapping[int, Mapping[str, float]]  # seed to metrics, of one training


@dataclass(frozen=True)
class Probed:
    """What became of a stale run.

    Attributes:
        id: Its id in the ledger.
        status: `"revalidated"` or `"stale"`.
        reason: Why.
    """

    id: str
    status: str
    reason: str


def revalidate(
    column: str,
    *,
    store: RunStore | None = None,
    columns: Path | None = None,
    on_probe: Callable[[Probed], None] | None = None,
) -> list[Probed]:
    """Probe every stale run that a present number of the column rests on.

    A run whose probe gives what it gave when it was recorded, to one part in 100,000, gets the
    present source digest as *revalidated*; any other stays *stale*. Each outcome is written at once.
    On another kind of processor rounding differs too, and reduced precision carries that into the first digits:
    there a run can stay stale although the code computes the same.
    Runs that shared a training share their probe, too. A training that several processes shared is probed by as
    many, which `torchrun` starts.

    Args:
        column: Name of the column.
        store: Where the probes keep their artifacts.
        columns: Folder that holds the columns; default: the `reproductions` package.
        on_probe: Called with each outcome as it comes.
    """
    known, store = load_column(column, columns), store or RunStore()
    path, source = known.folder / FILE, source_digest(known.module)
    outcomes, probes = [], dict[tuple[Any, ...], Probes]()
    with torchrun.process_group("cuda" if torch.cuda.is_available() else "cpu") as leads:
        if not leads:
            help_out()
            raise SystemExit(0)
        for entry in stale_runs(load_ledger(path, source)):
            difference, reason = _difference(entry, known, source, store, columns, probes)
            if difference <= ROUNDING:
                _write(entry, difference, path, source)
            status = "revalidated" if difference <= ROUNDING else "stale"
            outcomes.append(Probed(entry.id, status, reason))
            if on_probe:
                on_probe(outcomes[-1])
    return outcomes


def stale_runs(ledger: Ledger) -> Iterator[RunEntry]:
    """Yield the stale runs that the latest version of a number rests on."""
    current = {run.id: run for number in ledger.numbers.values() for run in number.runs}
    for name in sorted(current):
        if current[name].status(ledger.source) == "stale":
            yield current[name]


def relative_difference(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Return the largest relative difference of two probes' values; infinite if the names differ or there are none."""
    if not first or first.keys() != second.keys():
        return math.inf
    scales = {name: max(abs(first[name]), abs(second[name])) for name in first}
    return max((abs(first[n] - second[n]) / scale for n, scale in scales.items() if scale), default=0.0)


def _difference(
    entry: RunEntry,
    column: Column,
    source: str,
    store: RunStore,
    columns: Path | None,
    probes: dict[tuple[Any, ...], Probes],
) -> tuple[float, str]:
    """Return how far the probe of a run lies from the recorded one, and a sentence about it.

    `probes` holds those already taken, by training.
    """
    origin, run = entry.provenance, entry.run
    try:
        config = get_profile(column, run.profile)
    except HarnessError:
        return math.inf, "its profile is gone"
    relevant = column.relevant_config(run, config)
    partners = {replace(run, seed=seed) for seed in origin.seeds}
    if not partners.issubset(column.plan(get_profile(column, run.profile, seeds=origin.seeds))):
        return math.inf, "the profile has no such run any more"
    if len(partners) > 1 and column.execute_together is None:
        return math.inf, "its training was shared, which the column no longer does"
    if relevant != entry.config:
        return math.inf, "its configuration changed"
    if column.data_digests(config) != origin.data:
        return math.inf, "its data changed"
    if origin.device == "cuda" and not torch.cuda.is_available():
        return math.inf, "it needs a CUDA device"
    if origin.processes != torchrun.size():
        return math.inf, f"its training was shared by {origin.processes} processes, here by {torchrun.size()}"
    job = Job(
        run,
        config,
        relevant,
        source,
        origin.data,
        origin.device,
        origin.threads,
        store.root,
        columns,
        processes=origin.processes,
    )
    training = (run.arm_key, origin.seeds, origin.device, origin.threads)
    if training not in probes:
        probes[training] = probe(job, origin.seeds)
    difference = relative_difference(entry.probe or {}, probes[training][run.seed])
    reason, here = f"its first steps differ by {difference:.1e} (relative)", device_name(origin.device)
    if here != origin.device_name:
        reason += f"; it was recorded on {origin.device_name}, this is {here}"
    return difference, reason


def _write(entry: RunEntry, difference: float, path: Path, source: str) -> None:
    with FileLock(path.with_name(".ledger.lock")):
        ledger = load_ledger(path, source)
        now = datetime.now(UTC).replace(microsecond=0)
        name = device_name(entry.provenance.device)
        item = Revalidation(source=source, date=now, device_name=name, difference=difference)
        present = ledger.runs[entry.id]
        changed = present.model_copy(update={"revalidated": (*present.revalidated, item)}).sealed()
        ledger.with_run(changed).save(path)
