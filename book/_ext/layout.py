"""Which number stands where in a results table.

Profiles run the same arms on different data. Data names are ``<set>`` or ``<set>-<setting>``
(``digits-10pct``, ``cifar10-10pct``): rows of the same setting, metric and arm stand side by side.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from book._ext import evidence
from reproductions.harness.claims import Claim, Verdict
from reproductions.harness.profiles import Column, HarnessError, suggestion
from reproductions.harness.schema import split_key

Place = tuple[str, str, str]  # setting, metric, arm


@dataclass
class Row:
    """One row: an arm and a metric, with a key for each profile that plans it."""

    column: str
    title: str
    keys: dict[str, str] = field(default_factory=dict)
    printed: str = "–"
    verdicts: list[Verdict] = field(default_factory=list)


def setting_of(data: str) -> str:
    """Return the setting in the name of a data set, empty for the plain set."""
    return data.partition("-")[2]


def place_of(key: str) -> Place:
    """Return where a key belongs, whatever its profile."""
    _, _, data, metric, arm = split_key(key)
    return setting_of(data), metric, arm


def chosen(wanted: Sequence[str] | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the wanted ones of ``known``, all if none are named; ``HarnessError`` for an unknown one."""
    for name in wanted or ():
        if name not in known:
            raise HarnessError(f"no {what} {name!r}{suggestion(name, known)}")
    return tuple(wanted or known)


def arm_titles(column: Column) -> Mapping[str, str]:
    """Return the column's ``ARM_TITLES``, which are optional."""
    return dict(getattr(importlib.import_module(column.module), "ARM_TITLES", {}))


def setting_titles(column: Column) -> Mapping[str, str]:
    """Return the column's ``SETTING_TITLES`` by setting, which are optional."""
    return dict(getattr(importlib.import_module(column.module), "SETTING_TITLES", {}))


def results_rows(
    name: str, profiles: Sequence[str], options: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    """Yield the tables of a column: title, data set of each profile, rows.

    Args:
        name: Name of the column.
        profiles: Profiles shown.
        options: Lists under ``data``, ``metrics`` and ``arms`` that restrict what is shown; without
            ``metrics``, the column's first one.

    Raises:
        HarnessError: No such column, profile, data set, metric or arm.
    """
    column = evidence.column(name)
    profiles = chosen(profiles, list(column.profiles), "profile")
    runs = [run for profile in profiles for run in column.plan(column.profiles[profile])]
    data = chosen(options.get("data"), list(dict.fromkeys(run.data for run in runs)), "data set")
    arms = chosen(options.get("arms"), list(dict.fromkeys(run.arm for run in runs)), "arm")
    metrics = chosen(options.get("metrics", list(column.metrics)[:1]), list(column.metrics), "metric")
    titles, heads = arm_titles(column), setting_titles(column)
    settings = dict.fromkeys(setting_of(run.data) for run in runs if run.data in data)
    for metric in metrics:
        for setting in settings:
            sets: dict[str, str] = {}
            rows: dict[Place, Row] = {}
            for run in runs:
                if setting_of(run.data) == setting and run.arm in arms:
                    place = (setting, metric, run.arm)
                    row = rows.setdefault(place, Row(name, titles.get(run.arm, run.arm)))
                    row.keys[run.profile] = f"{name}/{run.profile}/{run.data}/{metric}/{run.arm}"
                    sets[run.profile] = run.data
            add_claims(rows, name)
            title = ", ".join(filter(None, [heads.get(setting, setting), column.metrics[metric].title]))
            yield title, sets, list(rows.values())


def add_claims(rows: Mapping[Place, Row], name: str) -> None:
    """Enter printed numbers and verdicts into the rows that claims are about, a claim at its first key."""
    for claim in evidence.claims(name):
        for place, text in printed(claim).items():
            if place in rows:
                rows[place].printed = text
        for verdict in evidence.judged(name)[claim.id]:
            keys = claim.keys.get(verdict.profile, ())
            if keys and place_of(keys[0]) in rows and verdict.verdict not in evidence.UNDECIDED:
                rows[place_of(keys[0])].verdicts.append(verdict)


def printed(claim: Claim) -> dict[Place, str]:
    """Return what the source prints, by place: one number for a value, one for each key otherwise."""
    values = claim.printed if isinstance(claim.printed, tuple) else (claim.printed,)
    found: dict[Place, str] = {}
    for keys in claim.keys.values():
        if len(keys) == len(values):
            found |= {place_of(key): f"{v:g}" for key, v in zip(keys, values, strict=True) if v is not None}
    return found
