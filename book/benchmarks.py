"""What ``make bench`` measures, as ``benchmarks.json`` keeps it and a page shows it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from book.paths import ROOT
from reproductions.harness.files import Sealed, write_atomic

RECORD = ROOT / "book" / "benchmarks.json"
STEPS = "Shared table"  # the group of the training steps
OWN = "Own recipes"  # that of the steps of columns that train otherwise
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def times(ratio: float) -> str:
    """A ratio as it is printed."""
    return f"{ratio:.3g} ×"


def duration(seconds: float) -> str:
    """A time as it is printed, in three digits."""
    unit, factor = next((one for one in UNITS if seconds >= one[1]), UNITS[-1])
    return f"{float(f'{seconds / factor:.3g}'):g} {unit}"


class Part(BaseModel):
    """What every part of a record has: named fields only, and no change after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Side(Part):
    """One of the two that are compared."""

    seconds: float = Field(gt=0, description="median time of a call")
    peak_mib: float = Field(
        ge=0, description="largest tensor memory in a call, beyond what was there before it"
    )


class Ratio(Part):
    """Of the times of the two sides, taken in each round anew."""

    low: float = Field(gt=0, description="lower quartile of the rounds")
    median: float = Field(gt=0)
    high: float = Field(gt=0, description="upper quartile")


class Goal(Part):
    """A bound that was set before anything was measured."""

    quantity: Literal["time", "memory", "peak MiB"] = Field(
        description="ratio of the times, of the peaks, or our peak itself"
    )
    sense: Literal["at least", "at most"]
    bound: float

    def text(self) -> str:
        """The goal as it is printed."""
        name = self.quantity.removesuffix(" MiB")
        return f"{name} {'≥' if self.sense == 'at least' else '≤'} {self.printed(self.bound)}"

    def printed(self, value: float) -> str:
        """A value of its quantity as it is printed."""
        return f"{value:,.0f} MiB" if self.quantity == "peak MiB" else times(value)


class Row(Part):
    """One comparison.

    ``"rival"``: the other side is a straightforward form of the same function, and the ratio says how many times
    faster ours is. ``"cost"``: it is a part of the work that nothing can do without, and the ratio says how many
    times as long ours takes.
    """

    group: str
    name: str
    size: str
    device: str
    threads: int = Field(ge=1)
    comparison: Literal["rival", "cost"]
    ours: Side
    theirs: Side
    ratio: Ratio = Field(description="theirs / ours for a rival, ours / theirs for a cost")
    rounds: int = Field(ge=1)
    images: int | None = Field(default=None, description="images that a call works through")
    goals: tuple[Goal, ...] = ()

    @property
    def title(self) -> str:
        """The name, with the device where that is not the CPU."""
        return self.name if self.device == "cpu" else f"{self.name} ({self.device})"

    @property
    def memory_ratio(self) -> float | None:
        """Of the peaks, in the direction of ``ratio``; None where one of them is nothing."""
        ours, theirs = self.ours.peak_mib, self.theirs.peak_mib
        if not ours or not theirs:
            return None
        return theirs / ours if self.comparison == "rival" else ours / theirs

    def value(self, goal: Goal) -> float | None:
        """What was measured of a goal's quantity."""
        return {"time": self.ratio.median, "memory": self.memory_ratio, "peak MiB": self.ours.peak_mib}[
            goal.quantity
        ]

    def met(self, goal: Goal) -> bool:
        """Whether a goal is reached."""
        value = self.value(goal)
        if value is None:
            return False
        return value >= goal.bound if goal.sense == "at least" else value <= goal.bound

    @property
    def behind(self) -> bool:
        """Whether ours is not faster than its rival beyond the spread: in one round of four or more it is not."""
        return self.comparison == "rival" and self.ratio.low <= 1

    @property
    def heavier(self) -> bool:
        """Whether ours needs more memory than its rival."""
        return self.comparison == "rival" and self.ours.peak_mib > self.theirs.peak_mib

    def cells(self) -> dict[str, str]:
        """The row as it is printed, by the heads of its columns."""
        rates = [self.images / side.seconds for side in (self.ours, self.theirs)] if self.images else []
        return {
            "Case": self.title,
            "Size": self.size,
            "Ours": duration(self.ours.seconds),
            "Theirs": duration(self.theirs.seconds),
            "Ratio": f"{times(self.ratio.median)} [{self.ratio.low:.3g}, {self.ratio.high:.3g}]",
            "Images/s": " / ".join(f"{rate:,.0f}" for rate in rates),
            "Peak, MiB": f"{self.ours.peak_mib:,.1f} / {self.theirs.peak_mib:,.1f}",
            "Goals": "; ".join(f"{'✓' if self.met(goal) else '✗'} {goal.text()}" for goal in self.goals),
        }


class Machine(Part):
    """Where it was measured; no name of a host or a user."""

    processor: str
    cores: int
    accelerator: str | None
    system: str
    versions: dict[str, str]
    load: float | None = Field(description="processes that wanted a core in the minute before, where known")


class Record(Sealed):
    """One run of all benchmarks."""

    date: datetime
    commit: str | None
    dirty: bool
    seconds: float = Field(ge=0, description="what the whole run took")
    machine: Machine
    rows: tuple[Row, ...]

    @property
    def missed(self) -> list[tuple[Row, Goal]]:
        """The goals that are not met, each with its row."""
        return [(row, goal) for row in self.rows for goal in row.goals if not row.met(goal)]

    def save(self, path: Path) -> None:
        """Write to ``path``, which is either replaced as a whole or left as it was."""
        write_atomic(path, self.sealed().model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what :meth:`save` wrote; an edit by hand is an error."""
        return cls.model_validate_json(path.read_text(encoding="utf8"))


def steps(group: str = STEPS) -> dict[tuple[str, str], Row]:
    """Training steps beside the student's by name and device: rows of the shared table, or :data:`OWN` of columns."""
    rows = Record.load(RECORD).rows if RECORD.is_file() else ()
    return {(row.name, row.device): row for row in rows if row.group == group}
