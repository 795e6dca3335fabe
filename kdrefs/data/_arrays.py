"""Conversions and checks of the arguments of :class:`~kdrefs.data.batches.Batches`, and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrefs.data.cache import Split

Array = np.ndarray | Tensor


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed for a purpose; different purposes get independent ones."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def named_arrays(split: Split | Mapping[str, Array] | Array | None) -> dict[str, Array]:
    """The arrays of a split by name."""
    if split is None:
        return {}
    if isinstance(split, Split):
        return {"images": split.images, "labels": split.labels, **split.extras}
    return dict(split) if isinstance(split, Mapping) else {"images": split}


def as_tensor(name: str, value: Any) -> Tensor:
    """A contiguous tensor, in the memory of the array where that is possible."""
    if isinstance(value, np.ndarray):
        # from_numpy wants memory that may be written to; arrays that are read-only are copied.
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an array or a tensor, got {type(value).__name__}")
    if value.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension")
    return value.detach().contiguous()


def as_int64(name: str, value: Tensor | None) -> Tensor | None:
    """Integers as int64; None stays None."""
    if value is not None and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise ValueError(f"{name}: expected integers, got {value.dtype}")
    return None if value is None else value.to(torch.int64)


def as_indices(indices: Array | Sequence[int], samples: int) -> Tensor:
    """Numbers of samples, int64 (M,), each within the set."""
    chosen = as_tensor(
        "indices", torch.tensor(indices) if isinstance(indices, list | tuple | range) else indices
    )
    if len(chosen) == 0:
        raise ValueError("indices: expected at least one")
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"indices: expected integers (M,), got {chosen.dtype} {tuple(chosen.shape)}")
    if int(chosen.min()) < 0 or int(chosen.max()) >= samples:
        raise ValueError(f"indices: expected 0 to {samples - 1}, got {chosen.min()} to {chosen.max()}")
    return chosen.to(torch.int64)


def take(values: Tensor | None, chosen: Tensor) -> Tensor | None:
    """Rows by number; None stays None."""
    return None if values is None else values.index_select(0, chosen)


def check_images(name: str, images: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless these are uint8 images, channels last, of the shape wanted."""
    right = images.dtype == torch.uint8 and images.ndim == 4 and 1 <= images.shape[-1] <= 4
    if not right or (shape is not None and tuple(images.shape) != shape):
        wanted = shape or "(N, H, W, C) with C from 1 to 4"
        raise ValueError(f"{name}: expected uint8 {wanted}, got {images.dtype} {tuple(images.shape)}")


def check_shape(name: str, value: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The tensor, if its first sizes are those given and its values are finite."""
    if tuple(value.shape[: len(leading)]) != leading:
        raise ValueError(f"{name}: expected first sizes {leading}, got {tuple(value.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: not all values are finite")
    return value


def check_int(name: str, value: Any, least: int) -> int:
    """The integer, if it is one and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return int(value)


def per_channel(name: str, values: Sequence[float] | None, default: float, channels: int) -> list[float]:
    """One number a channel."""
    numbers = [default] * channels if values is None else [float(v) for v in values]
    if len(numbers) != channels:
        raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(numbers)}")
    return numbers


def per_view(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    """One entry a view."""
    if values is not None and len(values) != count:
        raise ValueError(f"{name}: expected {count} for these views, got {len(values)}")
    return [None] * count if values is None else list(values)
