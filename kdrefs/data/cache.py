"""The data cache: one folder per image set, its layout, its digests and its locks.

Layout of ``<root>/<name>/``::

    train_images.npy  test_images.npy    uint8 (N, H, W, C)
    train_labels.npy  test_labels.npy    uint8 (N,)
    train_<extra>.npy test_<extra>.npy   further arrays of N rows, for instance boxes, float32 (N, 4)
    meta.json                            class names, content digest of each split

Images stand in *canonical order*: ascending SHA-256 of (label byte + pixel bytes). The content digest of a
split is the SHA-256 of those sorted digests in a row. Every source of a set therefore gives the same
tensors bit for bit, whatever order it delivers them in. The digest is computed anew at each reading (about
four microseconds an image), so a file that was damaged on disk is never trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

SPLITS = ("train", "test")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class DataError(RuntimeError):
    """A data set cannot be had. The message names the set, the file and the ways to get it."""


class DamagedError(DataError):
    """A file of the cache does not hold what its digest says."""


@dataclass(frozen=True)
class Split:
    """One part of an image set.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: uint8 (N,), class indices.
        extras: further arrays of N rows by name, for instance ``boxes`` or ``masks``.
    """

    images: np.ndarray
    labels: np.ndarray
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """A named image set with its content digests (split -> SHA-256 in hexadecimal)."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digests: Mapping[str, str]


def cache_root(root: Path | str | None = None) -> Path:
    """Folder of the data cache: the argument, else ``$KDREFS_DATA``, else ``~/.cache/kdrefs``."""
    chosen = root or os.environ.get("KDREFS_DATA") or Path("~/.cache/kdrefs")
    return Path(chosen).expanduser()


def image_keys(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """SHA-256 of (label byte + pixel bytes) of every image, in the order given."""
    pixels = np.ascontiguousarray(images).reshape(len(images), -1)
    rows = np.concatenate([labels[:, None], pixels], axis=1)
    return [hashlib.sha256(row).digest() for row in rows]


def canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Order that sorts the images by their digests, and the content digest of the split.

    Args:
        images: uint8 (N, H, W, C).
        labels: uint8 (N,).

    Returns:
        int64 (N,) such that ``images[order]`` is in canonical order, and the digest in hexadecimal.
    """
    keys = image_keys(images, labels)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    digest = hashlib.sha256(b"".join(keys[i] for i in order)).hexdigest()
    return np.array(order, dtype=np.int64), digest


def check_split(split: Split, classes: int, where: str) -> None:
    """Raise ``ValueError`` unless the arrays of a split have the types, shapes and ranges of the layout."""
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{where} images: expected uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where} labels: expected uint8 ({len(images)},), got {labels.dtype} {labels.shape}"
        )
    if int(labels.max()) >= classes:
        raise ValueError(f"{where} labels: largest is {labels.max()}, but there are {classes} class names")
    for key, value in split.extras.items():
        if not _NAME.fullmatch(key) or key in ("images", "labels"):
            raise ValueError(f"{where} extras: {key!r} is no name for an extra")
        if value.dtype.hasobject or value.shape[:1] != images.shape[:1]:
            got = f"{value.dtype} {value.shape}"
            raise ValueError(f"{where} {key}: expected {len(images)} numeric rows, got {got}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{where} {key}: not all values are finite")


def read_set(name: str, root: Path | str | None = None) -> ImageSet:
    """Read a set from the cache and check it against its digests.

    Raises:
        FileNotFoundError: the cache holds no such set.
        DamagedError: a file is missing, cannot be read, or does not agree with its digest.
    """
    folder = set_folder(name, root)
    meta_path = folder / "meta.json"
    if not meta_path.is_file():
        raise FileNotFoundError(f"{name}: no image set in {folder}")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        classes = tuple(str(c) for c in meta["classes"])
        digests = {split: str(meta["content_digest"][split]) for split in SPLITS}
        extra_digests: dict[str, str] = dict(meta.get("extras_digest", {}))
        if meta.get("classes_digest", _text_digest(classes)) != _text_digest(classes):
            raise ValueError("the class names do not agree with their digest")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{name}: {meta_path} is damaged ({error!r})") from error
    train, test = (_read_split(folder, name, s, len(classes), digests[s], extra_digests) for s in SPLITS)
    return ImageSet(name, train, test, classes, digests)


def write_set(
    name: str,
    train: Split,
    test: Split,
    classes: Sequence[str],
    *,
    root: Path | str | None = None,
    expected: Mapping[str, str] | None = None,
) -> ImageSet:
    """Bring a set into canonical order and write it to the cache, atomically and under the set's lock.

    ``meta.json`` comes last: a process that is killed in between leaves no set, or one whose digests do
    not fit, and both are noticed by the next reader.

    Args:
        expected: known content digests by split; nothing is written when one differs.

    Raises:
        ValueError: the arrays do not have the types and shapes of the layout.
        DamagedError: a content digest is not the expected one.
    """
    folder = set_folder(name, root)
    splits: dict[str, Split] = {}
    digests: dict[str, str] = {}
    extra_digests: dict[str, str] = {}
    for key, split in zip(SPLITS, (train, test), strict=True):
        check_split(split, len(classes), f"{name} {key}")
        order, digests[key] = canonical_order(split.images, split.labels)
        if expected and expected.get(key, digests[key]) != digests[key]:
            raise DamagedError(f"{name} {key}: content digest {digests[key]}, expected {expected[key]}")
        extras = {extra: np.ascontiguousarray(rows[order]) for extra, rows in split.extras.items()}
        splits[key] = Split(split.images[order], split.labels[order], extras)
        extra_digests |= {f"{key}_{extra}": _digest(rows) for extra, rows in extras.items()}
    meta: dict[str, object] = {
        "classes": list(classes),
        "classes_digest": _text_digest(classes),
        "content_digest": digests,
    }
    if extra_digests:
        meta["extras_digest"] = extra_digests
    with lock_set(name, root):
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for key, split in splits.items():
            for extra, rows in {"images": split.images, "labels": split.labels, **split.extras}.items():
                arrays[f"{key}_{extra}.npy"] = rows
        for left in folder.iterdir():  # arrays of a former set, and temporary files of a killed process
            if (left.suffix == ".npy" and left.name not in arrays) or left.name.startswith("."):
                left.unlink()
        for file_name, rows in arrays.items():
            write_atomically(folder / file_name, partial(np.save, arr=rows))
        text = json.dumps(meta, indent=1).encode()
        write_atomically(folder / "meta.json", lambda file: file.write(text))
    return ImageSet(name, splits["train"], splits["test"], tuple(classes), digests)


def set_folder(name: str, root: Path | str | None = None) -> Path:
    """Folder of a set; the name may not lead out of the cache."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected lower-case letters, digits, '-' and '_', got {name!r}")
    return cache_root(root) / name


@contextlib.contextmanager
def lock_set(name: str, root: Path | str | None = None) -> Iterator[Path]:
    """Hold the lock of a set against other processes; the same thread may take it more than once."""
    try:
        from filelock import FileLock
    except ImportError as error:
        raise DataError(
            f"{name}: writing to the data cache needs the package filelock (pip install filelock)"
        ) from error
    folder = set_folder(name, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock", is_singleton=True):
        yield folder


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all: temporary name, fsync, rename.

    Raises:
        OSError: the file cannot be written (disk full, no permission); the message names it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        # For reading, too: only then does numpy write through Python, whose errors say what is wrong.
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes the file private; a cache may be shared
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
        raise


def _read_split(
    folder: Path, name: str, key: str, classes: int, digest: str, extra_digests: Mapping[str, str]
) -> Split:
    recorded = {f.split("_", 1)[1] for f in extra_digests if f.startswith(f"{key}_")}
    present = {path.stem.split("_", 1)[1] for path in folder.glob(f"{key}_*.npy")}
    arrays = {}
    for part in sorted({"images", "labels"} | recorded | present):
        path = folder / f"{key}_{part}.npy"
        try:
            arrays[part] = np.load(path, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, so damage there can raise anything
            raise DamagedError(f"{name}: {path} is damaged or missing ({error})") from error
        wanted = extra_digests.get(f"{key}_{part}")
        if wanted and _digest(arrays[part]) != wanted:
            raise DamagedError(f"{name}: {path} is damaged: its content digest is not that of meta.json")
    split = Split(arrays.pop("images"), arrays.pop("labels"), arrays)
    try:
        check_split(split, classes, f"{name} {key}")
    except ValueError as error:
        raise DamagedError(f"{name}: {folder} is damaged: {error}") from error
    # Not sorted again: files in another than canonical order are as wrong as files with other pixels.
    if hashlib.sha256(b"".join(image_keys(split.images, split.labels))).hexdigest() != digest:
        raise DamagedError(
            f"{name}: {folder / f'{key}_images.npy'} or {key}_labels.npy is damaged: "
            f"the content digest is not {digest}"
        )
    return split


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def _text_digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
