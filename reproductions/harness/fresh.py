"""Numbers that a chapter has just computed: a ledger file in the build folder, never in git."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from reproductions.harness.ledger import Ledger, load_ledger
from reproductions.harness.profiles import get_profile, load_column
from reproductions.harness.provenance import source_digest
from reproductions.harness.recording import merged
from reproductions.harness.store import Result


def write_fresh(
    column: str, profile: str, results: Sequence[Result], root: Path | None = None
) -> Path | None:
    """Write `results` as a ledger to `$KDREFS_FRESH/<column>-<profile>.json`.

    Args:
        column: Name of the column.
        profile: Profile they come from.
        results: What `run_profile` returned.
        root: Folder that holds the columns; default: the `reproductions` package.

    Returns:
        The file, or nothing where `KDREFS_FRESH` is not set, as in a notebook run by hand.
    """
    known = load_column(column, root)
    get_profile(known, profile)
    ledger = merged(Ledger.empty(column, source_digest(known.module)), results, known)
    folder = os.environ.get("KDREFS_FRESH")
    if not folder:
        return None
    path = Path(folder) / f"{column}-{profile}.json"
    ledger.save(path)
    return path


def read_fresh(folder: Path) -> list[Ledger]:
    """Return the ledgers that chapters left in `folder`, in order of name."""
    return [load_ledger(path) for path in sorted(folder.glob("*.json"))]
