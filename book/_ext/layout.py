"""Which number stands where in a results table.

Profiles run the same arms on different data. Data names are ``<set>`` or ``<set>-<setting>``
(``digits-10pct``, ``cifar10-10pct``): rows of the same setting, metric and arm stand side by side.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from book._ext import evidence
from reproductions.harness.claims import Verdict, headline
from reproductions.harness.profiles import Column, HarnessError, suggestion
from reproductions.harness.schema import split_key

Place = tuple[str, str, str]  # setting, metric, arm


@dataclass
class Row:
    """One row: an arm and a metric, with a key for each profile that plans it."""

    column: str
    title: str
    keys: dict[str, str] = field(default_factory=dict)
    printed: str = ""
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class ResultsTable:
    """One table: a metric in a setting, with the data set that each profile runs it on."""

    metric: str
    setting: str
    data: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


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


def titles(column: Column, name: str) -> Mapping[str, str]:
    """Return the table ``name`` of titles in the column's ``figures.py``, both of which are optional.

    They are not in its ``run.py``, since a title does not belong to what a result depends on.
    """
    if not (column.folder / "figures.py").is_file():
        return {}
    return dict(getattr(importlib.import_module(f"reproductions.{column.name}.figures"), name, {}))


def results_tables(
    name: str, profiles: Sequence[str], options: Mapping[str, Sequence[str]]
) -> Iterator[ResultsTable]:
    """Yield the tables of a column, metric by metric and setting by setting, in the order of its plan.

    A metric that a setting does not have gets no table: others are recorded of it, and this one elsewhere.

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
    arm_titles, setting_titles = titles(column, "ARM_TITLES"), titles(column, "SETTING_TITLES")
    runs = [run for run in runs if run.data in data and run.arm in arms]
    ledgers = (evidence.ledgers()[name], *evidence.elsewhere(name).values())
    measured = {place_of(key)[:2] for ledger in ledgers for key in ledger.file.numbers}
    settings, found = ({place[k] for place in measured} for k in (0, 1))
    for metric in metrics:
        for setting in dict.fromkeys(setting_of(run.data) for run in runs):
            if setting in settings and metric in found and (setting, metric) not in measured:
                continue
            table = ResultsTable(column.metrics[metric].title or metric, setting_titles.get(setting, setting))
            rows: dict[Place, Row] = {}
            for run in (run for run in runs if setting_of(run.data) == setting):
                place = (setting, metric, run.arm)
                row = rows.setdefault(place, Row(name, arm_titles.get(run.arm, run.arm)))
                row.keys[run.profile] = f"{name}/{run.profile}/{run.data}/{metric}/{run.arm}"
                table.data[run.profile] = run.data
            add_claims(rows, name)
            table.rows.extend(rows.values())
            yield table


def add_claims(rows: Mapping[Place, Row], name: str) -> None:
    """Enter printed values and the verdicts that matter into the rows they are about.

    A printed number counts only where a claim of kind ``value`` says that it is this metric; verdicts are
    those on values and on primary claims, each at the first number that it names.
    """
    for claim in evidence.claims(name):
        if claim.kind != "value" and not claim.primary:
            continue
        verdict = headline(evidence.judged(name)[claim.id])
        for place in {place_of(keys[0]) for keys in claim.keys.values() if keys} & rows.keys():
            if claim.kind == "value":
                rows[place].printed = f"{claim.printed:g}"
            rows[place].verdicts.append(verdict)
