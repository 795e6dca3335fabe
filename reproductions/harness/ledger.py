"""The ledger: recorded runs and the numbers read from them.

The file holds values of single runs only. Means, intervals and verdicts are computed when they are
read. A number that is recorded anew gets a new version; the old one stays and says what superseded
it, so that a citation `key@version` never changes its meaning. Numbers imported from another machine lie
in files of their own, `elsewhere/<machine>.json`, and are called `key%machine`.
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
    "ELSEWHERE",
    "FILE",
    "Ledger",
    "LedgerError",
    "Number",
    "all_ledgers",
    "column_ledger",
    "find_number",
    "load_ledger",
    "machine_ledgers",
]

FILE = "ledger.json"
ELSEWHERE = "elsewhere"


class LedgerError(HarnessError):
    """A ledger is damaged, a key is unknown, or what is to be recorded is incomplete."""


class Ledger:
    """The numbers of one column.

    Args:
        file: Content of the ledger file.
        source: Present source digest of the column, against which statuses are read.
        machine: Name of the machine that the numbers were imported from; empty for the column's own.
    """

    def __init__(self, file: LedgerFile, source: str, machine: str = "") -> None:
        self.file = file
        self.source = source
        self.machine = machine

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
            where = f"the ledger{f' of {self.machine}' if self.machine else ''}"
            raise LedgerError(f"no number {name!r} in {where}{suggestion(name, self.file.numbers)}")
        wanted = version or str(len(versions))
        if not wanted.isdecimal() or not 1 <= int(wanted) <= len(versions):
            raise LedgerError(f"{name!r} has no version {wanted!r}; there is 1 to {len(versions)}")
        entry = versions[int(wanted) - 1]
        runs = sorted((self.runs[run] for run in entry.runs), key=lambda run: run.run.seed)
        return Number(name, entry, tuple(runs), self.source, self.machine)

    def with_run(self, entry: RunEntry) -> Ledger:
        """Return a ledger in which the run of the same id is replaced."""
        file = self.file.model_copy(update={"runs": {**self.runs, entry.id: entry}})
        return Ledger(file, self.source, self.machine)

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
    place = "/".join(path.parts[-3 if path.parent.name == ELSEWHERE else -2 :])
    try:
        file = LedgerFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise LedgerError(f"{place}: there is no such ledger") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = " → ".join(str(part) for part in first["loc"])
        raise LedgerError(f"{place}: {where}: {first['msg']}") from None
    if source is None:
        source = source_digest(f"reproductions.{file.column}.run")
    return Ledger(file, source)


def all_ledgers(root: Path | None = None) -> dict[str, Ledger]:
    """Return the ledger of every column that has one."""
    find_columns_in(root)
    folders = [columns_root(root) / name for name in column_names(root)]
    return {folder.name: load_ledger(folder / FILE) for folder in folders if (folder / FILE).exists()}


def machine_ledgers(name: str, root: Path | None = None) -> dict[str, Ledger]:
    """Return the numbers of a column that were imported, by machine.

    Raises:
        LedgerError: If a file is damaged or belongs to another column.
    """
    find_columns_in(root)
    ledgers = {}
    for path in sorted((columns_root(root) / name / ELSEWHERE).glob("*.json")):
        found = load_ledger(path)
        if found.column != name:
            raise LedgerError(f"{name}/{ELSEWHERE}/{path.name}: these are numbers of {found.column}")
        ledgers[path.stem] = Ledger(found.file, found.source, path.stem)
    return ledgers


def find_number(key: str, root: Path | None = None) -> Number:
    """Return the number of a key from its column's ledger, that of `key%machine` from what was imported.

    Raises:
        LedgerError: If there is none; the message names close matches.
    """
    find_columns_in(root)
    name, imported, machine = key.partition("%")
    column = name.split("/")[0]
    if column not in column_names(root):
        names = [name for ledger in all_ledgers(root).values() for name in ledger.file.numbers]
        raise LedgerError(f"no number {key!r}{suggestion(key, names)}")
    elsewhere = machine_ledgers(column, root)
    if imported:
        if machine not in elsewhere:
            raise LedgerError(
                f"no machine {machine!r} has numbers of {column}{suggestion(machine, elsewhere)}"
            )
        return elsewhere[machine].number(name)
    path = columns_root(root) / column / FILE
    ledger = load_ledger(path) if path.exists() else Ledger.empty(column)
    others = [f"{name}%{known}" for known, found in elsewhere.items() if name in found]
    if others and name not in ledger:
        raise LedgerError(f"{name!r} was recorded on other machines only; there is {', '.join(others)}")
    return ledger.number(name)


def column_ledger(name: str, root: Path | None = None) -> Ledger:
    """Return the ledger of a column, an empty one if nothing is recorded."""
    column = load_column(name, root)
    path, source = column.folder / FILE, source_digest(column.module)
    return load_ledger(path, source) if path.exists() else Ledger.empty(name, source)
