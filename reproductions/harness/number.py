"""A recorded number as it is read: value, interval, how much it is worth today."""

from __future__ import annotations

from dataclasses import dataclass

from reproductions.harness.schema import NumberEntry, RunEntry, split_key
from reproductions.harness.statistics import mean_interval


def difference_unit(unit: str) -> str:
    """Return the unit of a difference with a space before it: percentages differ by points."""
    return {"": "", "%": " points"}.get(unit, f" {unit}")


@dataclass(frozen=True)
class Number:
    """One version of a recorded number, read against the present code.

    Attributes:
        key: `column/profile/data/metric/arm`.
        entry: Version, unit and format as recorded.
        runs: The runs it is read from, in order of seed.
        source: Present source digest of the column.
        machine: Name of the machine it was imported from; empty for a number of the column's own ledger.
    """

    key: str
    entry: NumberEntry
    runs: tuple[RunEntry, ...]
    source: str
    machine: str = ""

    @property
    def version(self) -> int:
        return self.entry.version

    @property
    def unit(self) -> str:
        return self.entry.unit

    @property
    def format(self) -> str:
        return self.entry.format

    @property
    def metric(self) -> str:
        return split_key(self.key)[3]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.run.seed for run in self.runs)

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each seed at the last epoch, in `unit`."""
        return tuple(run.metrics[self.metric] for run in self.runs)

    @property
    def best_values(self) -> tuple[float, ...] | None:
        """The value of each seed at its best epoch, where the training selects one."""
        values = [run.best.get(self.metric) for run in self.runs]
        return tuple(v for v in values if v is not None) if None not in values else None

    @property
    def by_seed(self) -> dict[int, float]:
        return dict(zip(self.seeds, self.values, strict=True))

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def mean(self) -> float:
        return mean_interval(self.values)[0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t interval of the mean at 95 %; none for a single run."""
        _, low, high = mean_interval(self.values)
        return None if low is None or high is None else (low, high)

    @property
    def status(self) -> str:
        """The worst of its runs: `"fresh"`, `"revalidated"` or `"stale"`."""
        states = {run.status(self.source) for run in self.runs}
        return next(state for state in ("stale", "revalidated", "fresh") if state in states)

    @property
    def named(self) -> str:
        """The key, with `%machine` if it was imported."""
        return f"{self.key}%{self.machine}" if self.machine else self.key

    @property
    def full_key(self) -> str:
        """The key with the version, and with `%machine` if it was imported: it never changes its meaning."""
        return f"{self.key}@{self.version}" + self.named.removeprefix(self.key)

    def text(self) -> str:
        """Return mean and half width of the interval with the unit, such as `51.2 ± 0.4 %`."""
        unit = f" {self.unit}" if self.unit else ""
        if self.interval is None:
            return f"{self.mean:{self.format}}{unit}"
        half = (self.interval[1] - self.interval[0]) / 2
        return f"{self.mean:{self.format}} ± {half:{self.format}}{unit}"
