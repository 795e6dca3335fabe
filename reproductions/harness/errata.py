"""Errata: what a source prints, what is right, and a check that proves it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from reproductions.harness.profiles import (
    HarnessError,
    column_names,
    columns_root,
    find_columns_in,
    load_column,
    suggestion,
)

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["note", "paper", "code"]
_KINDS = get_args(Kind)


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers for a check, float64."""
    import torch  # the command line reads this module and is to start without it

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Evidence:
    """What a check found.

    Attributes:
        holds: Whether the erratum stands.
        summary: One sentence with the numbers, Markdown.
        values: The numbers by name.
    """

    holds: bool
    summary: str
    values: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Erratum:
    """A mistake of a source, with its proof. The texts are Markdown with `$maths$`.

    Attributes:
        id: Unique within the column, such as `"P1"`.
        where: Place in the note or paper, or `repository@commit:file`.
        kind: Whose mistake it is.
        printed: What stands there.
        right: What should.
        check: Proves it by symbols or numbers.
    """

    id: str
    where: str
    kind: Kind
    printed: str
    right: str
    check: Callable[[], Evidence]

    def __post_init__(self) -> None:
        for name in ("id", "where", "printed", "right"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}: got {value!r}, expected a text")
        if self.kind not in _KINDS:
            raise ValueError(f"kind of {self.id}: got {self.kind!r}, expected one of {', '.join(_KINDS)}")
        if not callable(self.check):
            raise ValueError(f"check of {self.id}: got {self.check!r}, expected a function")


def load_errata(column: str, root: Path | None = None) -> tuple[Erratum, ...]:
    """Return the errata of `reproductions/<column>/errata.py`, none if there is no such file.

    Args:
        column: Name of the column's folder, or `"toolboxes"`.
        root: Folder that holds the columns; default: the `reproductions` package.

    Raises:
        HarnessError: If there is no such column, or its file has no tuple `ERRATA` of errata with
            ids that differ.
    """
    names = errata_columns(root)
    if column not in names:
        if column in column_names(root):
            return ()
        raise HarnessError(f"no column {column!r}{suggestion(column, (*names, *column_names(root)))}")
    module = importlib.import_module(f"reproductions.{column}.errata")
    errata = getattr(module, "ERRATA", None)
    place = f"reproductions/{column}/errata.py"
    if not isinstance(errata, tuple) or not all(isinstance(item, Erratum) for item in errata):
        raise HarnessError(f"{place}: ERRATA must be a tuple of Erratum")
    ids = [erratum.id for erratum in errata]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise HarnessError(f"{place}: the id {twice[0]!r} stands twice")
    return errata


def errata_title(column: str, root: Path | None = None) -> str:
    """Return what stands above the errata of a column: its title, or the TITLE of a folder without an experiment.

    Raises:
        HarnessError: If there is no such column.
    """
    if column in column_names(root) or column not in errata_columns(root):
        return load_column(column, root).title
    module = importlib.import_module(f"reproductions.{column}.errata")
    return str(getattr(module, "TITLE", column.capitalize()))


def errata_columns(root: Path | None = None) -> tuple[str, ...]:
    """Return the names of the folders that have an `errata.py`, `toolboxes` included."""
    find_columns_in(root)
    folders = columns_root(root)
    names = {path.parent.name for path in folders.glob("*/errata.py")}
    return tuple(sorted(names - {"harness"}))
