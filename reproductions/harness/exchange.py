"""Recorded runs carried from one machine to another: a file written there, checked here and kept apart.

The file has the form of a ledger with the latest numbers of one profile. Imported, they lie in
`reproductions/<column>/elsewhere/<machine>.json` and are shown beside the column's own numbers; verdicts on
claims are computed from the column's own alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from reproductions.harness.files import canonical_json
from reproductions.harness.ledger import (
    ELSEWHERE,
    FILE,
    Ledger,
    LedgerError,
    all_ledgers,
    column_ledger,
    load_ledger,
)
from reproductions.harness.profiles import Column, Config, get_profile, load_column
from reproductions.harness.recording import as_known, merged, require_seeds
from reproductions.harness.schema import LedgerFile, NumberEntry, RunEntry, split_key
from reproductions.harness.store import run_key

LARGEST_MB = 50
_MACHINE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        column: Name of the column.
        machine: Name under which its numbers are found, as `key%machine`.
        numbers: How many numbers the file has.
        changed: Whether any of them is new.
    """

    column: str
    machine: str
    numbers: int
    changed: bool


def export_profile(ledger: Ledger, profile: str, path: Path) -> int:
    """Write the latest numbers of a profile, and the runs they are read from, into a new file; return how many.

    Raises:
        LedgerError: If nothing is recorded, the runs come from several machines, or the file cannot be a new one.
    """
    where = f"{ledger.column}/{profile}"
    numbers = [number for key, number in ledger.numbers.items() if split_key(key)[1] == profile]
    if not numbers:
        raise LedgerError(f"nothing is recorded for {where}; `reproduce run --record` does that")
    if path.exists():
        raise LedgerError(f"{path}: there is such a file already")
    if not path.parent.is_dir():
        raise LedgerError(f"{path}: there is no folder {path.parent}")
    runs = {run.id: run for number in numbers for run in number.runs}
    _one_machine(runs.values(), where)
    entries: dict[str, tuple[NumberEntry, ...]] = {
        number.key: (number.entry.model_copy(update={"version": 1}).sealed(),) for number in numbers
    }
    file = LedgerFile(format_version=1, column=ledger.column, runs=runs, numbers=entries)
    Ledger(file, ledger.source).save(path)
    return len(numbers)


def import_file(path: Path, name: str | None = None, root: Path | None = None) -> Imported:
    """Check an exported file and take its runs into the ledger of their machine; twice is the same as once.

    Args:
        path: What `reproduce export` wrote on the other machine.
        name: Name of the machine; default: made from its device's.
        root: Folder that holds the columns; default: the `reproductions` package.

    Raises:
        LedgerError: If the file is no such file, or its runs were not computed by this code, configuration and
            data, lack planned seeds or a probe, come from several machines, are the column's own, or belong to
            other hardware than what was imported under this name. Nothing is written then.
        HarnessError: If the column or the profile does not exist.
    """
    if not path.is_file():
        raise LedgerError(f"{path}: there is no such file")
    if path.stat().st_size > LARGEST_MB * 1e6:
        raise LedgerError(f"{path}: got {path.stat().st_size / 1e6:.0f} MB, expected at most {LARGEST_MB}")
    file = load_ledger(path, "").file
    column, ledger = load_column(file.column, root), column_ledger(file.column, root)
    profile, runs = _contents(file, path)
    config = get_profile(column, profile)
    _check_runs(runs, column, config, ledger, root)
    if all(as_known(ledger.runs, run) is not run for run in runs):
        raise LedgerError(f"{path}: these runs are in reproductions/{column.name}/{FILE} already")
    machine = _slug(runs[0].provenance.device_name) if name is None else name
    if not _MACHINE.fullmatch(machine):
        raise LedgerError(f"machine: got {machine!r}, expected lower-case letters, digits and '-'; see --as")
    target = column.folder / ELSEWHERE / f"{machine}.json"
    if changed := _together(target, runs, column, ledger.source) is not None:
        with FileLock(column.folder / ".ledger.lock"):
            together = _together(target, runs, column, ledger.source)
            if together is not None:
                together.save(target)
    return Imported(column.name, machine, len(file.numbers), changed)


def _contents(file: LedgerFile, path: Path) -> tuple[str, list[RunEntry]]:
    """Return the profile and the runs of an exported file, which has one version of each number and nothing else."""
    profiles = {split_key(key)[1] for key in file.numbers}
    used = {name for versions in file.numbers.values() for entry in versions for name in entry.runs}
    single = all(len(versions) == 1 for versions in file.numbers.values())
    if len(profiles) != 1 or not single or used != file.runs.keys():
        raise LedgerError(
            f"{path}: expected the latest numbers of one profile and their runs, as `reproduce export` writes them"
        )
    return profiles.pop(), [file.runs[name] for name in sorted(file.runs)]


def _check_runs(
    runs: list[RunEntry], column: Column, config: Config, ledger: Ledger, root: Path | None
) -> None:
    """Raise a `LedgerError` that names the first run that is not one of this column, or the arm that is incomplete."""
    planned = {run.arm_key for run in column.plan(config)}
    sources = {ledger.source} | {source for run in ledger.runs.values() for source in _sources(run)}
    for run in runs:
        problem = _stranger(run, planned, column) or _other_code(run, sources, column, config)
        if problem:
            raise LedgerError(f"{run.run.key}: {problem}")
    data = _data_digests(column, config, ledger, root)
    seeds: dict[str, set[int]] = {}
    for run in runs:
        if run.provenance.data != data:
            raise LedgerError(f"{run.run.key}: {_other_data(run.provenance.data, data)}")
        seeds.setdefault(run.run.arm_key, set()).add(run.run.seed)
    for arm in {entry.run.arm_key: entry.run for entry in runs}.values():
        require_seeds(column, arm, seeds[arm.arm_key])
    _one_machine(runs, f"{column.name}/{config.profile}")


def _stranger(run: RunEntry, planned: set[str], column: Column) -> str | None:
    """Return what is wrong with a run whatever its code and data, if anything is."""
    origin = run.provenance
    unknown = sorted((run.metrics.keys() | run.best.keys()) - column.metrics.keys())
    texts = (origin.device, origin.device_name, origin.command, *origin.versions, *origin.versions.values())
    if run.run.arm_key not in planned:
        return "the profile plans no such run"
    if unknown:
        return f"{column.name} has no metric {unknown[0]!r}"
    if not run.probe:
        return "it has no probe"
    if run.run.seed not in origin.seeds:
        return f"its seed is not among the seeds {', '.join(map(str, origin.seeds))} of its training"
    if not all(text.isprintable() for text in texts):
        return "its provenance has characters that cannot be printed"
    if run.key != run_key(
        run.run, run.config, origin.source, origin.device, origin.threads, origin.data, origin.processes
    ):
        return f"its key {run.key[:12]} does not belong to its content"
    return None


def _other_code(run: RunEntry, sources: set[str], column: Column, config: Config) -> str | None:
    """Return how a run's code or configuration differs from the column's, if it does."""
    if sources.isdisjoint(_sources(run)):
        commit = f", commit {run.provenance.commit[:12]}" if run.provenance.commit else ""
        return f"computed by other code than this (source digest {run.provenance.source[:12]}{commit})"
    ours = column.relevant_config(run.run, config)
    differing = [name for name in {**ours, **run.config} if _text(ours, name) != _text(run.config, name)]
    if differing:
        name = min(differing)
        return f"its configuration has {name} = {_text(run.config, name)}, expected {_text(ours, name)}"
    return None


def _text(config: Mapping[str, Any], name: str) -> str:
    text = canonical_json(config[name]) if name in config else "nothing"
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


def _sources(run: RunEntry) -> set[str]:
    """Return the digests of all code that gave a run's values."""
    return {run.provenance.source, *(item.source for item in run.revalidated)}


def _data_digests(column: Column, config: Config, ledger: Ledger, root: Path | None) -> dict[str, str]:
    """Return the digests of a profile's inputs: of the sets on this machine, else as they are recorded.

    Raises:
        LedgerError: If neither can be had; nothing is fetched.
    """
    from kdrefs.data import is_cached, load_set

    digests: dict[str, str] = {}
    for name in config.data:
        if is_cached(name):
            found = {
                f"{name}/{split}": digest for split, digest in load_set(name, download=False).digests.items()
            }
        else:
            found = _recorded_digests(name, ledger) or next(
                (known for other in all_ledgers(root).values() if (known := _recorded_digests(name, other))),
                {},
            )
        if not found:
            raise LedgerError(
                f"the digests of {name} are not known here; `reproduce data get {name}` fetches it"
            )
        digests |= found
    if column.inputs:
        runs = [run for number in ledger.numbers.values() for run in number.runs]
        data = next((run.provenance.data for run in runs if run.run.profile == config.profile), None)
        others = column.inputs(config) if data is None else data
        digests |= {name: digest for name, digest in others.items() if name.split("/")[0] not in config.data}
    return digests


def _recorded_digests(name: str, ledger: Ledger) -> dict[str, str]:
    """Return the digests of a set as the latest numbers of a ledger have them, none if it is not in their data."""
    for number in ledger.numbers.values():
        found = {k: v for k, v in number.runs[0].provenance.data.items() if k.split("/")[0] == name}
        if found:
            return found
    return {}


def _other_data(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    name = min(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
    got, expected = (f"digest {of[name][:12]}" if name in of else "none" for of in (theirs, ours))
    return f"computed on other data: {name} has {got}, expected {expected}"


def _together(path: Path, runs: list[RunEntry], column: Column, source: str) -> Ledger | None:
    """Return the ledger of a machine with `runs` too, nothing if it has them already."""
    old = load_ledger(path, source) if path.exists() else Ledger.empty(column.name, source)
    known, came = {_hardware(run) for run in old.runs.values()}, _hardware(runs[0])
    if known - {came}:
        theirs = ", ".join(sorted(known))
        raise LedgerError(
            f"{ELSEWHERE}/{path.name} has numbers of {theirs}, these are of {came}; give another name with --as"
        )
    together = old
    # Runs that are all here already may be those of an earlier export, which does not supersede a later one.
    if any(as_known(old.runs, run) is run for run in runs):
        together = merged(old, runs, column)
    for run in runs:
        here = together.runs.get(run.id)
        if here is not None and set(here.revalidated) < set(run.revalidated):
            together = together.with_run(run)
    return None if together.file == old.file else together


def _hardware(run: RunEntry) -> str:
    return f"{run.provenance.device_name} ({run.provenance.device})"


def _one_machine(runs: Iterable[RunEntry], where: str) -> None:
    """Raise a `LedgerError` that names the machines if runs come from several."""
    machines: dict[str, set[str]] = {}
    for run in runs:
        versions = " ".join(f"{name} {version}" for name, version in sorted(run.provenance.versions.items()))
        text = f"{_hardware(run)} with {run.provenance.parallel} and {versions}"
        machines.setdefault(text, set()).add(run.run.arm)
    if len(machines) > 1:
        texts = (f"{', '.join(sorted(arms))} on {text}" for text, arms in sorted(machines.items()))
        raise LedgerError(f"the runs of {where} come from several machines: {'; '.join(texts)}")


def _slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")[:63].strip("-")
