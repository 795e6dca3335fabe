"""Claims: what a source says of numbers that the ledger has, read from `claims.toml`.

    [[claim]]
    id = "pkt-over-kd"
    title = "PKT retrieves better than KD"
    kind = "greater"
    keys.quick = ["pkt/quick/digits/map/pkt", "pkt/quick/digits/map/kd"]
    keys.standard = ["pkt/standard/cifar10/map/pkt", "pkt/standard/cifar10/map/kd"]
    delta = 1.0
    primary = true
    source = "result files of passalis/probabilistic_kt@a58fd1b"
    known = "read in the authors' code or result files"

The kinds and their keys, in the order in which the claim names them:

- `value`: one key; `printed` is what the source prints. Elsewhere `printed` may list a number for
  each key: it is shown beside ours, and the verdict is about the comparison.
- `greater`: two keys, the first is greater.
- `order`: two or more keys, each greater than the next.
- `contrast`: four keys a, b, c, d; a - b is greater than c - d.
- `not_worse`: two keys, the first is at most `delta` below the second.
- `identity`: `check` names a function that returns an :class:`~reproductions.harness.errata.Evidence`,
  or the keys' values all lie within `delta` of zero.

A metric of which less is better has its keys the other way round.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from reproductions.harness.profiles import HarnessError, columns_root
from reproductions.harness.schema import split_key

Kind = Literal["value", "greater", "order", "contrast", "not_worse", "identity"]
Known = Literal["read in the authors' code or result files", "read in the paper", "unverified"]

MAX_PRIMARY = 3
_KEYS: dict[str, tuple[int, int | None]] = {
    "value": (1, 1),
    "greater": (2, 2),
    "order": (2, None),
    "contrast": (4, 4),
    "not_worse": (2, 2),
    "identity": (0, None),
}


class ClaimError(HarnessError):
    """A claims file does not follow the schema or the rules."""


class Claim(BaseModel):
    """One claim of a column.

    `delta` is the smallest difference that matters, in the metric's unit, fixed before the run; it
    may differ between profiles. A claim that is not primary is exploratory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = Field(min_length=1)
    kind: Kind
    keys: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    source: str = Field(min_length=1)
    known: Known
    delta: FiniteFloat | dict[str, FiniteFloat] | None = None
    printed: FiniteFloat | tuple[FiniteFloat, ...] | None = None
    check: str | None = Field(default=None, pattern=r"^[a-z0-9_.]+:[A-Za-z0-9_]+$")
    primary: bool = False
    column: str = ""

    def delta_of(self, profile: str) -> float:
        """Return δ for a profile."""
        value = self.delta[profile] if isinstance(self.delta, dict) else self.delta
        return 0.0 if value is None else value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.printed is not None and self.known == "unverified":
            raise ValueError("a number that nobody has read in its source cannot be a target")
        if self.kind == "value" and not isinstance(self.printed, float):
            raise ValueError("a claim of kind 'value' needs the number `printed`")
        if self.kind == "identity" and (self.check is None) == (not self.keys):
            raise ValueError("a claim of kind 'identity' needs either `check` or `keys`")
        if self.kind != "identity" and (self.check is not None or not self.keys):
            raise ValueError(f"a claim of kind {self.kind!r} needs `keys` and no `check`")
        least, most = _KEYS[self.kind]
        for profile, keys in self.keys.items():
            if len(keys) < least or (most is not None and len(keys) > most):
                raise ValueError(f"{len(keys)} keys for {profile!r}, expected {least} for {self.kind!r}")
            if isinstance(self.printed, tuple) and len(self.printed) != len(keys):
                raise ValueError(f"{len(self.printed)} printed numbers for {len(keys)} keys of {profile!r}")
            for key in keys:
                column, of_profile, _, _, _ = split_key(key)
                if of_profile != profile or column != self.column:
                    raise ValueError(f"the key {key!r} does not belong to {self.column}/{profile}")
            if isinstance(self.delta, dict) and profile not in self.delta:
                raise ValueError(f"no delta for {profile!r}")
            if self.kind != "identity" and self.delta_of(profile) <= 0:
                raise ValueError("delta: expected a number above 0, fixed before the run")
        return self


def load_claims(column: str, root: Path | None = None) -> tuple[Claim, ...]:
    """Return the claims of `reproductions/<column>/claims.toml`, none if there is no such file.

    Raises:
        ClaimError: If the file breaks the schema, names an id twice, or has more than three primary
            claims.
    """
    path = columns_root(root) / column / "claims.toml"
    place = f"reproductions/{column}/claims.toml"
    if not path.exists():
        return ()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClaimError(f"{place}: {error}") from None
    unknown = sorted(set(content) - {"claim"})
    if unknown:
        raise ClaimError(f"{place}: unknown table {unknown[0]!r}, expected [[claim]]")
    items = content.get("claim", [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ClaimError(f"{place}: claim: expected tables [[claim]]")
    claims = tuple(_claim(item, column, place) for item in items)
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ClaimError(f"{place}: the id {name!r} stands twice")
    primary = [claim.id for claim in claims if claim.primary]
    if len(primary) > MAX_PRIMARY:
        raise ClaimError(f"{place}: {len(primary)} primary claims, at most {MAX_PRIMARY} are allowed")
    return claims


def _claim(item: dict[str, object], column: str, place: str) -> Claim:
    try:
        return Claim.model_validate({**item, "column": column})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        name = f"claim {item.get('id', '?')!r}" + (f", {where}" if where else "")
        raise ClaimError(f"{place}: {name}: {first['msg']}") from None
