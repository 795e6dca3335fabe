"""How results enter a ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from reproductions.harness.ledger import FILE, Ledger, LedgerError, load_ledger
from reproductions.harness.profiles import Column, get_profile
from reproductions.harness.provenance import device_name, source_digest, versions
from reproductions.harness.schema import LedgerFile, NumberEntry, RunEntry
from reproductions.harness.store import Result, Run, RunStore


def record(results: Sequence[Result], column: Column, path: Path | None = None) -> Ledger:
    """Write results into the column's ledger, under its lock.

    Raises:
        LedgerError: If a result has no probe, or an arm lacks seeds that its profile plans: a number
            is recorded with all its seeds or not at all.
    """
    path = path or column.folder / FILE
    for result in results:
        if not result.probe:
            raise LedgerError(f"the run {result.run.key} has no probe, so it could never be revalidated")
    with FileLock(path.with_name(".ledger.lock")):
        source = source_digest(column.module)
        known = load_ledger(path, source) if path.exists() else None
        ledger = merged(known or Ledger.empty(column.name, source), results, column)
        for result in results:
            run = result.run
            number = ledger.number(
                f"{run.column}/{run.profile}/{run.data}/{next(iter(result.metrics))}/{run.arm}"
            )
            require_seeds(column, run, set(number.seeds))
        # Recording what is recorded leaves the file alone: its time says when it last changed.
        if known is None or ledger.file != known.file:
            ledger.save(path)
    return ledger


def require_planned(runs: Sequence[Run], column: Column, ledger: Ledger, device: str) -> None:
    """Raise a `LedgerError` if an arm of `runs`, with the recorded ones that they may join, lacks planned seeds."""
    here = (ledger.source, device, device_name(device), versions())
    found: dict[str, set[Run]] = {}
    for entry in ledger.runs.values():
        origin = entry.provenance
        if (origin.source, origin.device, origin.device_name, origin.versions) == here:
            found.setdefault(entry.run.arm_key, set()).add(entry.run)
    for run in runs:
        found.setdefault(run.arm_key, set()).add(run)
    for key, run in {run.arm_key: run for run in runs}.items():
        require_seeds(column, run, {one.seed for one in found[key]})


def require_seeds(column: Column, run: Run, seeds: set[int]) -> None:
    """Raise a `LedgerError` if `seeds` lack some that the arm of `run` is planned with."""
    missing = planned_seeds(column, run.profile, run.data, run.arm) - seeds
    if missing:
        raise LedgerError(f"{run.arm_key} lacks planned seeds: {', '.join(map(str, sorted(missing)))}")


def stored_results(store: RunStore, column: str, profile: str, source: str) -> list[Result]:
    """Return the latest stored result of each run that was computed by the code of a source digest.

    So results can be recorded although the code has changed since; they are stale until revalidated.

    Args:
        store: Where to look.
        column: Name of the column.
        profile: Name of the profile.
        source: Source digest or its beginning, at least eight digits.

    Raises:
        LedgerError: If there is none, or several digests begin so.
    """
    found: dict[Run, Result] = {}
    every = [r for r in store.results(column, profile) if r.provenance.source.startswith(source)]
    digests = {result.provenance.source for result in every}
    if len(source) < 8 or len(digests) != 1:
        raise LedgerError(f"source: {len(digests)} digests in the store begin with {source!r}, expected one")
    for result in sorted(every, key=lambda result: result.provenance.date):
        found[result.run] = result
    return list(found.values())


def merged(ledger: Ledger, results: Iterable[Result], column: Column) -> Ledger:
    """Return a ledger that has `results` too: each arm's new seeds join, or supersede, the old ones.

    Seeds join a number while code, data, versions, device and threads are the same.
    """
    runs, groups = dict(ledger.file.runs), dict[tuple[str, str, str], list[RunEntry]]()
    for result in results:
        if result.run.column != ledger.column:
            raise LedgerError(f"the run {result.run.key} does not belong to the column {ledger.column}")
        entry = as_known(runs, RunEntry.from_result(result))
        runs[entry.id] = entry
        groups.setdefault((result.run.profile, result.run.data, result.run.arm), []).append(entry)
    numbers = dict(ledger.file.numbers)
    for (profile, data, arm), entries in groups.items():
        planned = planned_seeds(column, profile, data, arm)
        fixed = len(planned) == 1 < len(get_profile(column, profile).seeds)
        for metric in sorted(set.intersection(*(set(entry.metrics) for entry in entries))):
            key = "/".join((ledger.column, profile, data, metric, arm))
            versions = numbers.get(key, ())
            old = [runs[name] for name in versions[-1].runs] if versions else []
            numbers[key] = _extended(versions, _joined(old, entries, fixed), column, metric, fixed)
    used = {name for versions in numbers.values() for entry in versions for name in entry.runs}
    runs = {name: run for name, run in runs.items() if name in used}
    return Ledger(
        LedgerFile(format_version=1, column=ledger.column, runs=runs, numbers=numbers), ledger.source
    )


def as_known(runs: Mapping[str, RunEntry], entry: RunEntry) -> RunEntry:
    """Return the recorded run that is the same computation with the same values, else `entry`."""
    same = ("run", "key", "metrics", "best", "probe")
    for old in runs.values():
        if all(getattr(old, field) == getattr(entry, field) for field in same):
            return old
    return entry


def _joined(old: Sequence[RunEntry], new: Sequence[RunEntry], fixed: bool) -> tuple[str, ...]:
    """Return the ids of the new runs and of those old ones that may stand beside them, by seed.

    An arm that nothing random enters has one run whatever its seed is called.
    """
    first = new[0].provenance
    if not all(first.same_machine(entry.provenance) for entry in new):
        raise LedgerError(
            f"the runs of {new[0].run.arm_key} differ in code, data, versions, device or threads"
        )
    chosen = {entry.run.seed: entry for entry in old if first.same_machine(entry.provenance)}
    if not (fixed and chosen):
        chosen |= {entry.run.seed: entry for entry in new}
    return tuple(chosen[seed].id for seed in sorted(chosen))


def _extended(
    versions: tuple[NumberEntry, ...], runs: tuple[str, ...], column: Column, metric: str, fixed: bool
) -> tuple[NumberEntry, ...]:
    """Return the versions of a number with one more, unless the last one says the same."""
    style = column.metrics[metric]
    entry = NumberEntry(
        version=len(versions) + 1,
        runs=runs,
        unit=style.unit,
        format=style.format,
        title=style.title or metric,
        higher_is_better=style.higher_is_better,
        delta=style.delta,
        fixed=fixed,
        superseded_by=None,
    )
    if versions:
        last = versions[-1]
        if last.model_copy(update={"digest": "", "version": entry.version}) == entry:
            return versions
        versions = (*versions[:-1], last.model_copy(update={"superseded_by": entry.version}).sealed())
    return (*versions, entry.sealed())


def planned_seeds(column: Column, profile: str, data: str, arm: str) -> set[int]:
    """Return the seeds that the profile plans for an arm."""
    plan = column.plan(get_profile(column, profile))
    return {run.seed for run in plan if (run.data, run.arm) == (data, arm)}
