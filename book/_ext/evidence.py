"""What pages are allowed to say: ledgers, fresh numbers, claims with verdicts, errata with their evidence.

Each is read once in a build. The folders come from the environment, since pages are built from a copy of the
book: ``KDREFS_COLUMNS`` (the columns) and ``KDREFS_FRESH`` (numbers that this build's chapters have computed).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from book.paths import ROOT
from reproductions.harness.agreement import agree_all
from reproductions.harness.claims import Claim, Verdict, headline, load_claims, verdicts_by_claim
from reproductions.harness.errata import Erratum, Evidence, errata_columns, load_errata
from reproductions.harness.fresh import read_fresh
from reproductions.harness.ledger import (
    Ledger,
    LedgerError,
    Number,
    column_ledger,
    find_number,
    machine_ledgers,
)
from reproductions.harness.profiles import Column, HarnessError, column_names, load_column, suggestion
from reproductions.harness.recording import planned_seeds
from reproductions.harness.schema import split_key


def columns_root() -> Path:
    """Return the folder that holds the columns."""
    return Path(os.environ.get("KDREFS_COLUMNS") or ROOT / "reproductions")


@cache
def columns() -> dict[str, Column]:
    """Return every column by name."""
    root = columns_root()
    return {name: load_column(name, root) for name in column_names(root)}


def column(name: str) -> Column:
    """Return a column; ``HarnessError`` with close matches if there is none."""
    return load_column(name, columns_root())


@cache
def ledgers() -> dict[str, Ledger]:
    """Return the committed ledger of every column, an empty one where nothing is recorded."""
    return {name: column_ledger(name, columns_root()) for name in columns()}


@cache
def elsewhere(name: str) -> dict[str, Ledger]:
    """Return the numbers of a column that were imported from other machines, by machine."""
    return machine_ledgers(name, columns_root())


@cache
def agreements(name: str, machine: str) -> dict[str, str]:
    """Return by key whether a machine's numbers agree with the column's own, for those that it has, too.

    As in `reproduce verify`, the level is corrected for the number of comparisons in a profile.
    """
    own, pairs = ledgers()[name], dict[str, list[tuple[Number, Number]]]()
    for key, number in elsewhere(name)[machine].numbers.items():
        if key in own:
            pairs.setdefault(split_key(key)[1], []).append((number, own.number(key)))
    return {item.key: item.verdict for compared in pairs.values() for item in agree_all(compared)}


@cache
def fresh_ledgers() -> tuple[Ledger, ...]:
    """Return the ledgers that this build's chapters wrote."""
    folder = os.environ.get("KDREFS_FRESH")
    return tuple(read_fresh(Path(folder))) if folder and Path(folder).is_dir() else ()


def find(key: str, *, fresh: bool = False) -> Number:
    """Return a number by its key; `key%machine` is one that was imported.

    Raises:
        LedgerError: No such number; the message names close matches.
    """
    if "%" in key and not fresh:
        return find_number(key, columns_root())
    among = fresh_ledgers() if fresh else tuple(ledgers().values())
    for ledger in among:
        if key in ledger:
            return ledger.number(key)
    known = [name for ledger in among for name in ledger.numbers]
    kind = "number computed in this build" if fresh else "recorded number"
    raise LedgerError(f"no {kind} {key!r}{suggestion(key.partition('@')[0], known)}")


def awaits_recording(key: str) -> bool:
    """Return whether a key is one that its column plans, of a profile of which nothing has been recorded."""
    name, *rest = key.split("/")
    if name not in columns() or len(rest) != 4:
        return False
    profile, data, metric, arm = rest
    one = column(name)
    recorded = any(known.startswith(f"{name}/{profile}/") for known in ledgers()[name].numbers)
    if recorded or profile not in one.profiles or metric not in one.metrics:
        return False
    return bool(planned_seeds(one, profile, data, arm))


def find_fresh(key: str) -> Number | None:
    """Return a number that this build computed, or None."""
    return next((ledger.number(key) for ledger in fresh_ledgers() if key in ledger), None)


@cache
def claims(name: str) -> tuple[Claim, ...]:
    """Return the claims of a column, primary ones first."""
    column(name)
    return tuple(sorted(load_claims(name, columns_root()), key=lambda claim: not claim.primary))


@cache
def judged(name: str) -> dict[str, tuple[Verdict, ...]]:
    """Return the verdicts of a column by claim, one for each profile that the claim names."""
    return verdicts_by_claim(name, ledgers()[name], columns_root())


def find_verdict(text: str) -> Verdict:
    """Return the verdict named ``column/claim`` (the headline) or ``column/profile/claim``.

    Raises:
        HarnessError: No such column, claim or profile; the message names close matches.
    """
    name, *profile, claim = text.split("/")
    column(name)
    found = judged(name)
    if not found.get(claim):
        raise HarnessError(f"no claim {claim!r} in {name}{suggestion(claim, found)}")
    if not profile:
        return headline(found[claim])
    by_profile = {verdict.profile: verdict for verdict in found[claim]}
    if profile != [wanted := profile[0]] or wanted not in by_profile:
        raise HarnessError(
            f"claim {claim!r} has no profile {'/'.join(profile)!r}{suggestion(wanted, by_profile)}"
        )
    return by_profile[wanted]


@cache
def errata(name: str) -> tuple[tuple[Erratum, Evidence], ...]:
    """Return the errata of a column, each with the evidence of its check, which is run here."""
    return tuple((erratum, erratum.check()) for erratum in load_errata(name, columns_root()))


def with_errata() -> tuple[str, ...]:
    """Return the columns (and ``toolboxes``) that have errata."""
    known = {*columns(), "toolboxes"}
    return tuple(name for name in errata_columns(columns_root()) if name in known)
