"""Numbers, results and verdicts as tables for the terminal and as plain data for machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from reproductions.harness.agreement import Agreement
from reproductions.harness.claims import Verdict
from reproductions.harness.number import Number
from reproductions.harness.schema import split_key
from reproductions.harness.statistics import mean_interval


def number_record(number: Number) -> dict[str, Any]:
    """Return a number with its provenance as plain data."""
    return {
        "key": number.full_key,
        "machine": number.machine or None,
        "text": number.text(),
        "mean": number.mean,
        "interval": number.interval,
        "level": 0.95,
        "n": number.n,
        "values": number.by_seed,
        "best": mean_interval(number.best_values)[0] if number.best_values else None,
        "unit": number.unit,
        "status": number.status,
        "superseded_by": number.entry.superseded_by,
        "runs": [run.id for run in number.runs],
        "provenance": [run.provenance.model_dump(mode="json") for run in number.runs],
    }


def number_lines(number: Number) -> list[tuple[str, str]]:
    """Return what a reader wants to know of a number, as (name, text)."""
    origins = [run.provenance for run in number.runs]
    first = origins[0]
    interval = number.interval
    lines = [("number", number.full_key), ("value", number.text())]
    if interval:
        low, high = (f"{bound:{number.format}}" for bound in interval)
        lines.append(("95 % interval", f"{low} to {high} (Student t, n = {number.n})"))
    values = ", ".join(f"{value:{number.format}} (seed {seed})" for seed, value in number.by_seed.items())
    lines.append(("seeds", values))
    if number.best_values:
        lines.append(("best epoch", f"{mean_interval(number.best_values)[0]:{number.format}} on average"))
    lines.append(("status", number.status))
    if number.entry.superseded_by:
        lines.append(("superseded by", f"{number.key}@{number.entry.superseded_by}"))
    commit = f"{first.commit[:12]}{' with changes' if first.dirty else ''}" if first.commit else "none"
    memory = [origin.peak_memory_mb for origin in origins if origin.peak_memory_mb is not None]
    return [
        *lines,
        ("source digest", first.source[:12]),
        ("commit", commit),
        ("data", ", ".join(f"{name} {digest[:12]}" for name, digest in first.data.items()) or "synthetic"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in first.versions.items())),
        ("device", f"{first.device_name} ({first.device}), {first.parallel}"),
        ("time", f"{sum(origin.wall_seconds for origin in origins):.0f} s in all"),
        ("peak memory", f"{max(memory):.0f} MB" if memory else "unknown"),
        ("recorded", f"{max(origin.date for origin in origins):%Y-%m-%d}"),
        ("command", first.command),
    ]


def numbers_table(numbers: Iterable[Number]) -> Table:
    """Return one row per data set and arm and one column per metric, or the other way round if that is narrower."""
    numbers = list(numbers)
    metrics = list(dict.fromkeys(number.metric for number in numbers))
    titles = {number.metric: escape(number.entry.title) for number in numbers}
    arms = list(dict.fromkeys(split_key(number.key)[4] for number in numbers))
    by_arm = len(metrics) <= len(arms)
    cells: dict[tuple[str, str], dict[str, Number]] = {}
    for number in numbers:
        _, _, data, metric, arm = split_key(number.key)
        row, column = (arm, metric) if by_arm else (metric, arm)
        cells.setdefault((data, row), {})[column] = number
    columns = metrics if by_arm else arms
    table = Table("data", "arm" if by_arm else "metric", "n", *(titles.get(c, c) for c in columns))
    for (data, row), found in cells.items():
        count = str(max(number.n for number in found.values()))
        table.add_row(
            data, titles.get(row, row), count, *(found[c].text() if c in found else "" for c in columns)
        )
    return table


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Return one row per claim; primary claims are marked."""
    table = Table("claim", "verdict", "why")
    for item in verdicts:
        title = item.claim.title + ("" if item.primary else " (exploratory)")
        table.add_row(escape(title), item.verdict + (" (stale)" if item.stale else ""), escape(item.text))
    return table


def agreements_table(agreements: Sequence[Agreement]) -> Table:
    """Return one row per compared number, those that differ first."""
    order = {"differs": 0, "cannot tell": 1, "agrees": 2}
    table = Table("number", "verdict", "why")
    for item in sorted(agreements, key=lambda item: order[item.verdict]):
        table.add_row(item.key, item.verdict, item.text)
    return table
