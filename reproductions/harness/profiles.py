"""Columns, their profiles and what a profile costs."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reproductions
from reproductions.harness.files import plain
from reproductions.harness.provenance import data_digests
from reproductions.harness.store import Run

DEFAULT = "quick"
_NAMED = 30  # how many names an error message lists
_BOOKKEEPING = {"seeds", "budget_minutes", "download_mb", "disk_mb"}


class HarnessError(RuntimeError):
    """Something the user named is not there, or a file of a column is not as it must be."""


@dataclass(frozen=True)
class Metric:
    """How a metric is written.

    Attributes:
        unit: Unit in which the column returns it, such as `"%"`.
        format: Format of a value, such as `".1f"`.
        title: Name in tables and figures.
        higher_is_better: Which way is good.
        delta: Smallest difference that matters, in `unit`; decides when two recordings agree.
    """

    unit: str = ""
    format: str = ".3g"
    title: str = ""
    higher_is_better: bool = True
    delta: float | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every profile of a column has; a column's own derives from it and adds what decides the values of its runs.

    Attributes:
        profile: Its name, the second part of keys.
        seeds: Of every arm, unless the column plans otherwise.
        budget_minutes: What it takes on two cores, or on a GPU if it is made for one.
        data: Data sets, by their names in the cache.
        download_mb: What is fetched if none of them is there.
        disk_mb: What its runs leave in the store.
    """

    profile: str
    seeds: tuple[int, ...]
    budget_minutes: float
    data: tuple[str, ...]
    download_mb: float = 0
    disk_mb: float = 20


@dataclass(frozen=True)
class Column:
    """A column's folder and the names of its `run.py` that the harness uses."""

    name: str
    folder: Path
    title: str
    paper: str
    profiles: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    plan: Callable[[Any], list[Run]]
    execute: Callable[[Run, Any, Any], Mapping[str, Any]]
    narrow: Callable[[Run, Any], Any] | None = None
    inputs: Callable[[Any], Mapping[str, str]] | None = None
    together: Callable[[Run, Any, str], str | None] | None = None
    execute_together: Callable[[Sequence[Run], Any, Any], Sequence[Mapping[str, Any]]] | None = None

    @property
    def module(self) -> str:
        """Dotted name of the column's `run.py`."""
        return f"reproductions.{self.name}.run"

    def relevant_config(self, run: Run, config: Any) -> dict[str, Any]:
        """Return the part of a profile that decides a run's values: all but seeds, budget and sizes.

        A column narrows it with a function `relevant_config(run, config)` in its `run.py`, so that
        a change of one arm leaves the runs of the others valid.
        """
        chosen = self.narrow(run, config) if self.narrow else config
        return {name: value for name, value in plain(chosen).items() if name not in _BOOKKEEPING}

    def execute_all(self, runs: Sequence[Run], config: Any, context: Any) -> Sequence[Mapping[str, Any]]:
        """Execute `runs` of one arm, in one training if they are several, and return the metrics of each.

        Raises:
            HarnessError: If the column cannot train several together, or did not return the metrics of each.
        """
        if len(runs) == 1:
            return [self.execute(runs[0], config, context)]
        if self.execute_together is None:
            raise HarnessError(
                f"{self.name} has no execute_together for {', '.join(run.key for run in runs)}"
            )
        values = self.execute_together(runs, config, context)
        if len(values) != len(runs):
            raise HarnessError(
                f"execute_together of {self.name} returned metrics of {len(values)} runs, expected {len(runs)}"
            )
        return values

    def data_digests(self, config: Config) -> dict[str, str]:
        """Return the content digest of every input of a profile, name to digest.

        These are the splits of its data sets, and what the column's function `inputs(config)` names
        beside them, such as committed weights.
        """
        return data_digests(config.data) | dict(self.inputs(config) if self.inputs else {})


def column_names(root: Path | None = None) -> tuple[str, ...]:
    """Return the names of the folders that have a `run.py`, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in columns_root(root).glob("*/run.py")))


def columns_root(root: Path | None = None) -> Path:
    """Return the folder that holds the columns."""
    return root or Path(reproductions.__file__).parent


def load_column(name: str, root: Path | None = None) -> Column:
    """Import a column by the name of its folder.

    Its `run.py` has TITLE, PAPER (key in the bibliography), PROFILES, METRICS, `plan(config)` and
    `execute(run, config, context)`; it may have `relevant_config(run, config)` and `inputs(config)`.

    It may also have both of `together(run, config, device)` and `execute_together(runs, config, context)`:
    runs of one arm for which the first returns the same text, not `None`, share one training, in which
    the second executes several; it returns the metrics in the order of `runs`.

    Args:
        name: Such as `"pkt"`.
        root: Folder that holds the columns; default: the `reproductions` package.

    Raises:
        HarnessError: If there is no such column, or its `run.py` lacks one of the names or one of the two.
    """
    names = column_names(root)
    if name not in names:
        raise HarnessError(f"no column {name!r}{suggestion(name, names)}")
    find_columns_in(root)
    module = importlib.import_module(f"reproductions.{name}.run")
    needed = ("TITLE", "PAPER", "PROFILES", "METRICS", "plan", "execute")
    missing = [attribute for attribute in needed if not hasattr(module, attribute)]
    if missing:
        raise HarnessError(f"reproductions/{name}/run.py has no {', '.join(missing)}")
    pair = [hasattr(module, attribute) for attribute in ("together", "execute_together")]
    if any(pair) and not all(pair):
        raise HarnessError(f"reproductions/{name}/run.py has one of together and execute_together, not both")
    return Column(
        name=name,
        folder=columns_root(root) / name,
        title=module.TITLE,
        paper=module.PAPER,
        profiles=module.PROFILES,
        metrics=module.METRICS,
        plan=module.plan,
        execute=module.execute,
        narrow=getattr(module, "relevant_config", None),
        inputs=getattr(module, "inputs", None),
        together=getattr(module, "together", None),
        execute_together=getattr(module, "execute_together", None),
    )


def find_columns_in(root: Path | None) -> None:
    """Let `import reproductions.<column>` look into `root` too."""
    folder = str(columns_root(root))
    if folder not in reproductions.__path__:
        reproductions.__path__.append(folder)


def get_profile(column: Column, profile: str = DEFAULT, seeds: Iterable[int] | None = None) -> Any:
    """Return a profile's configuration, with other seeds if they are given.

    Raises:
        HarnessError: If the column has no such profile; no other one is taken instead.
    """
    if profile not in column.profiles:
        raise HarnessError(
            f"column {column.name!r} has no profile {profile!r}{suggestion(profile, column.profiles)}"
        )
    config = column.profiles[profile]
    return config if seeds is None else dataclasses.replace(config, seeds=tuple(seeds))


def announcement(config: Config) -> str:
    """Return what a run of the profile costs, in one line."""
    parts = [f"about {duration(60 * config.budget_minutes)}"]
    parts.append(f"download {config.download_mb:.0f} MB" if config.download_mb else "no download")
    parts.append(f"{config.disk_mb:.0f} MB on disk")
    texts = getattr(config, "texts", ())  # files that are no image sets
    parts.append(f"data: {', '.join([*config.data, *texts]) or 'synthetic'}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Return a time as `12 s`, `3 min` or `1.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that names what is near `name`, or the first of all there is."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(match) for match in close)}?"
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"; there is {', '.join(names[:_NAMED]) or 'nothing yet'}{rest}"
