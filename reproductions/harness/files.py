"""Small files that are never half-written, and JSON with one spelling for one content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


def plain(value: Any) -> Any:
    """Return `value` as what JSON has: dataclasses and mappings as dicts, sequences as lists.

    Raises:
        TypeError: If something else than numbers, strings, booleans, `None`, paths, sets and the
            above is in it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in a configuration")


def canonical_json(value: Any) -> str:
    """Return the JSON of `value` with sorted keys, no spaces, ASCII only; NaN is refused."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_digest(value: Any) -> str:
    """Return the SHA-256 (hexadecimal) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader finds the old or the new content, nothing between.

    Writers of one file must hold a lock: what a killed one left beside it is removed.

    Raises:
        OSError: If it cannot be written (disk full, no permission); the message names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{temporary_prefix(path)}*.tmp"):
        left.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)  # noqa: PTH105 - the atomic rename is the point
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
        raise


def temporary_prefix(path: Path) -> str:
    """Return how the names of the temporary files begin that become `path`."""
    return f".{path.name}."


class Sealed(BaseModel):
    """A record that carries the digest of its other fields, so that an edit by hand is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = ""

    def expected_digest(self) -> str:
        """Return the digest that belongs to the present content."""
        return content_digest(self.model_dump(mode="json", exclude={"digest"}))

    def sealed(self) -> Self:
        """Return a copy with the digest that belongs to its content."""
        return self.model_copy(update={"digest": self.expected_digest()})

    @model_validator(mode="after")
    def _unchanged(self) -> Self:
        if self.digest and self.digest != self.expected_digest():
            raise ValueError(
                f"the digest {self.digest[:12]}… does not belong to this content: it was edited or damaged"
            )
        return self
