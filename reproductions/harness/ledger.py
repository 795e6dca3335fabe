"""The ledger: recorded runs and the numbers read from them.

The file holds values of single runs only. Means, intervals and verdicts are computed when they are
read. A number that is recorded anew gets a new version; the old one stays and says what superseded
it, so that a citation `key@version` never changes its meaning.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from reproductions.harness.files import write_atomic
from reproductions.harness.number import Number
from reproductions.harness.profiles import (
    HarnessError,
    column_names,
    columns_root,
    find_columns_in,
    load_column,
    suggestion,
)
from reproductions.harness.provenance import source_digest
from reproductions.harness.schema import LedgerFile, RunEntry

__all__ = [
    "FILE",
    "Ledger",
    "LedgerError",
    "Number",
    "all_ledgers",
    "column_ledger",
    "find_number",
    "load_ledger",
]

FILE = "ledger.json"


class LedgerError(HarnessError):
    """A ledger is damaged, a key is unknown, or what is to be recorded is incomplete."""


class Ledger:
    """The numbers of one column.

    Args:
        file: Content of the ledger file.
        source: Present source digest of the column, against which statuses are read.
    """

    def __init__(self, file: LedgerFile, source: str) -> None:
        self.file = file
        self.source = source

    @classmethod
    def empty(cls, column: str, source: str = "") -> Ledger:
        """Return a ledger without entries."""
        return cls(LedgerFile(format_version=1, column=column, runs={}, numbers={}), source)

    @property
    def column(self) -> str:
        return self.file.column

    @property
    def runs(self) -> dict[str, RunEntry]:
        """The recorded runs by id, those of superseded numbers included."""
        return self.file.runs

    @property
    def numbers(self) -> dict[str, Number]:
        """The latest version of every number by key."""
        return {key: self.number(key) for key in sorted(self.file.numbers)}

    def __contains__(self, key: str) -> bool:
        return key.partition("@")[0] in self.file.numbers

    def number(self, key: str) -> Number:
        """Return the number of a key, the latest version unless the key ends in `@version`.

        Raises:
            LedgerError: If there is no such number; the message names close matches.
        """
        name, _, version = key.partition("@")
        versions = self.file.numbers.get(name)
        if versions is None:
            raise LedgerError(f"no number {name!r} in the ledger{suggestion(name, self.file.numbers)}")
        wanted = version or str(len(versions))
        if not wanted.isdecimal() or not 1 <= int(wanted) <= len(versions):
            raise LedgerError(f"{name!r} has no version {wanted!r}; there is 1 to {len(versions)}")
        entry = versions[int(wanted) - 1]
        runs = sorted((self.runs[run] for run in entry.runs), key=lambda run: run.run.seed)
        return Number(name, entry, tuple(runs), self.source)

    def with_run(self, entry: RunEntry) -> Ledger:
        """Return a ledger in which the run of the same id is replaced."""
        return Ledger(self.file.model_copy(update={"runs": {**self.runs, entry.id: entry}}), self.source)

    def save(self, path: Path) -> None:
        """Write the ledger atomically."""
        write_atomic(path, _text(self.file.folded()))


def _text(content: dict[str, Any]) -> str:
    """Return JSON with a line for each run and each number, so that files stay small and changes can be read."""

    def line(value: Any) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)

    fields = []
    for name, value in sorted(content.items()):
        if isinstance(value, dict):
            entries = ",\n".join(f"{line(key)}: {line(entry)}" for key, entry in sorted(value.items()))
            fields.append(f"{line(name)}: {{\n{entries}\n}}")
        else:
            fields.append(f"{line(name)}: {line(value)}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def load_ledger(path: Path, source: str | None = None) -> Ledger:
    """Read and check a ledger file.

    Args:
        path: Such as `reproductions/pkt/ledger.json`.
        source: Present source digest of the column; default: computed.

    Raises:
        LedgerError: If the file is missing, does not follow the schema, or an entry was edited.
    """
    try:
        file = LedgerFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise LedgerError(f"{path.parent.name}/{path.name}: there is no such ledger") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(str(part) for part in first["loc"])
        raise LedgerError(f"{path.parent.name}/{path.name}: {where}: {first['msg']}") from None
    if source is None:
        source = source_digest(f"reproductions.{file.column}.run")
    return Ledger(file, source)


def all_ledgers(root: Path | None = None) -> dict[str, Ledger]:
    """Return the ledger of every column that has one."""
    find_columns_in(root)
    folders = [columns_root(root) / name for name in column_names(root)]
    return {folder.name: load_ledger(folder / FILE) for folder in folders if (folder / FILE).exists()}


def find_number(key: str, root: Path | None = None) -> Number:
    """Return the number of a key from its column's ledger.

    Raises:
        LedgerError: If there is none; the message names close matches.
    """
    find_columns_in(root)
    column = key.split("/")[0]
    if column in column_names(root):
        path = columns_root(root) / column / FILE
        return (load_ledger(path) if path.exists() else Ledger.empty(column)).number(key)
    names = [name for ledger in all_ledgers(root).values() for name in ledger.file.numbers]
    raise LedgerError(f"no number {key!r}{suggestion(key, names)}")


def column_ledger(name: str, root: Path | None = None) -> Ledger:
    """Return the ledger of a column, an empty one if nothing is recorded."""
    column = load_column(name, root)
    path, source = column.folder / FILE, source_digest(column.module)
    return load_ledger(path, source) if path.exists() else Ledger.empty(name, source)
