"""What `ledger.json` holds, and the rules its entries obey."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from reproductions.harness.files import Sealed, content_digest
from reproductions.harness.store import Result, Run


class Revalidation(BaseModel):
    """A probe that gave, on later code, what it gave when the run was recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(pattern=r"^[0-9a-f]{64}$", description="source digest that the entry got")
    date: datetime
    device_name: str
    difference: FiniteFloat = Field(description="largest relative difference of a probe value")


class RunEntry(Result):
    """A recorded run; `revalidated` lists the later source digests on which its probe was equal."""

    revalidated: tuple[Revalidation, ...] = ()

    @classmethod
    def from_result(cls, result: Result) -> RunEntry:
        """Return the entry of a result that has just been computed."""
        return cls.model_validate(result.model_dump(exclude={"digest"})).sealed()

    @property
    def id(self) -> str:
        """Name of the entry: the run and the beginning of the digest of what it depended on and gave."""
        content = self.model_copy(update={"revalidated": ()})
        return f"{self.run.key}@{content.expected_digest()[:12]}"

    def status(self, source: str) -> str:
        """Return `"fresh"`, `"revalidated"` or `"stale"` with regard to the present source digest."""
        if self.provenance.source == source:
            return "fresh"
        return "revalidated" if any(item.source == source for item in self.revalidated) else "stale"


class NumberEntry(Sealed):
    """One version of a number: which runs it is read from and how it is written.

    `fixed` marks an arm that nothing random enters: it is run once and compared as a constant.
    `delta` is the smallest difference that matters, in `unit`.
    """

    version: int = Field(ge=1)
    runs: tuple[str, ...] = Field(min_length=1)
    unit: str
    format: str
    title: str
    higher_is_better: bool
    delta: FiniteFloat | None
    fixed: bool
    superseded_by: int | None


class LedgerFile(BaseModel):
    """The whole file of one column.

    What most runs have in common (configuration, data digests, versions) is written once, under `shared`, and named
    by the runs; an entry's digest covers the value itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    column: str
    runs: dict[str, RunEntry]
    numbers: dict[str, tuple[NumberEntry, ...]]

    @model_validator(mode="before")
    @classmethod
    def _unfolded(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "shared" not in content:
            return content
        content = dict(content)
        shared = content.pop("shared")
        for key, run in content["runs"].items() if isinstance(content.get("runs"), dict) else ():
            for holder, field in _common(run):
                name = holder[field]
                if not isinstance(name, str):
                    continue
                if not isinstance(shared, dict) or name not in shared:
                    raise ValueError(f"run {key}: there is no shared {field} {name!r}")
                holder[field] = shared[name]
        return content

    def folded(self) -> dict[str, Any]:
        """Return the content as JSON values, with what runs have in common under `shared`."""
        content, shared = self.model_dump(mode="json"), {}
        for run in content["runs"].values():
            for holder, field in _common(run):
                value = holder[field]
                holder[field] = content_digest(value)[:12]
                shared[holder[field]] = value
        return content | {"shared": shared}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, run in self.runs.items():
            if not run.digest:
                raise ValueError(f"run {name}: its digest is missing")
            if name != run.id:
                raise ValueError(f"run {name}: its content belongs to {run.id}")
        for key, versions in self.numbers.items():
            self._check_number(key, versions)
        return self

    def _check_number(self, key: str, versions: tuple[NumberEntry, ...]) -> None:
        column, profile, data, metric, arm = split_key(key)
        if column != self.column:
            raise ValueError(f"number {key}: this is the ledger of {self.column}")
        for place, entry in enumerate(versions, 1):
            following = place + 1 if place < len(versions) else None
            if not entry.digest:
                raise ValueError(f"number {key}@{place}: its digest is missing")
            if (entry.version, entry.superseded_by) != (place, following):
                raise ValueError(f"number {key}: its versions do not follow one another")
            seeds = []
            for name in entry.runs:
                if name not in self.runs:
                    raise ValueError(f"number {key}@{place}: the run {name} is not in the ledger")
                run = self.runs[name]
                if run.run != Run(column, profile, data, arm, run.run.seed) or metric not in run.metrics:
                    raise ValueError(f"number {key}@{place}: the run {name} has no such value")
                seeds.append(run.run.seed)
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"number {key}@{place}: two runs have the same seed")


def _common(run: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where in a run, as JSON, the values stand that most runs have in common: the dictionary and the key."""
    if not isinstance(run, dict):
        return
    for holder, fields in ((run, ("config",)), (run.get("provenance"), ("data", "versions"))):
        if isinstance(holder, dict):
            yield from ((holder, field) for field in fields if field in holder)


def split_key(key: str) -> tuple[str, str, str, str, str]:
    """Return the parts of a key `column/profile/data/metric/arm`.

    Raises:
        ValueError: If the key does not have this form.
    """
    parts = key.split("/")
    if len(parts) != 5 or not all(parts):
        raise ValueError(f"key: got {key!r}, expected column/profile/data/metric/arm")
    column, profile, data, metric, arm = parts
    return column, profile, data, metric, arm
