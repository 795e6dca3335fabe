"""What networks are trained on, and the test images with known objects on which concepts are counted."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdrefs.data import Augment, Split, composite_set, load_set
from kdrefs.data.batches import Batches
from kdrefs.data.cells import box_masks, mask_cells
from kdrefs.data.garments import garment_set
from reproductions.protocols.pairs import labelled_subset

SHARES = (0.05, 0.75)  # of the cells that the object of a measured image covers: neither none nor nearly all
PROBE_IMAGES = 8
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Source:
    """A data set with objects.

    Attributes:
        kind: "composites", "garments", or the name of a set with the extra ``masks`` or ``boxes``.
        size: Height and width of the images in pixels.
        train: Number of training images, of "composites" and "garments".
        every: Of the classes only each so many-th is used.
        measured: Test images on which concepts are counted.
        grid: Rows and columns of the grid.
        mean: Of the pixels, as fractions of 255, a channel each.
        std: Likewise.
        flip: Whether training images are mirrored at random.
        crop: By how many pixels they are shifted.
        held_out: Whether a tenth of the training images, the same share of each class, takes the test images' place.
    """

    kind: str
    size: int
    measured: int
    grid: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: int | None = None
    every: int = 1
    flip: bool = False
    crop: int = 0
    held_out: bool = False


@dataclass(frozen=True)
class Images:
    """A source, loaded: splits, number of classes, and the images that concepts are counted on."""

    train: Split
    test: Split
    classes: int
    measured: Split
    foreground: Tensor  # bool (measured, grid, grid)


@functools.lru_cache(maxsize=4)
def load(source: Source) -> Images:
    """Load or draw a source.

    Measured are the first test images whose object covers a share of the cells between :data:`SHARES`. That is decided
    by the annotation alone, never by a network.

    Raises:
        kdrefs.data.DataError: The set cannot be had; the message names the ways.
        ValueError: Too few test images have such an object.
    """
    train, test, classes = _splits(source)
    cells = _cells(source, test)
    share = cells.mean((1, 2))
    chosen = np.flatnonzero((SHARES[0] <= share) & (share <= SHARES[1]))[: source.measured]
    if len(chosen) < source.measured:
        raise ValueError(
            f"measured: {len(chosen)} test images have a fitting object, {source.measured} are wanted"
        )
    return Images(train, test, classes, _take(test, chosen), torch.from_numpy(cells[chosen]))


def batches(
    source: Source, split: Split, device: torch.device, *, training: bool, size: int, seed: int = 0
) -> Batches:
    """Batches with the source's normalisation; shuffled and augmented for training only."""
    augment = (
        Augment(flip=source.flip, crop=source.crop) if training and (source.flip or source.crop) else None
    )
    return Batches(
        replace(split, extras={}),
        batch_size=size,
        seed=seed,
        augment=augment,
        shuffle=training,
        mean=source.mean,
        std=source.std,
        device=device,
    )


def pixels(source: Source, split: Split, device: torch.device) -> Tensor:
    """All images of a split as the network takes them, ``(N, C, H, W)``."""
    every = batches(source, split, device, training=False, size=len(split))
    images = next(iter(every.epoch(0))).images
    assert images is not None
    return images


def head(images: Images, count: int = PROBE_IMAGES) -> Images:
    """The same with the first measured images only."""
    first = np.arange(min(count, len(images.measured)))
    return replace(images, measured=_take(images.measured, first), foreground=images.foreground[: len(first)])


def _splits(source: Source) -> tuple[Split, Split, int]:
    if source.kind in ("composites", "garments"):
        assert source.train is not None
        small = {"size": source.size, "jitter": source.size // 3}
        if source.kind == "garments":
            data = garment_set(source.train, 1000, garment=2 * source.size // 3, **small)
        else:
            data = composite_set(source.train, 1000, digit=2 * source.size // 3, **small)
    else:
        data = load_set(source.kind)
    kept = np.arange(0, len(data.classes), source.every)
    train, test = (_of_classes(split, kept) for split in (data.train, data.test))
    if source.held_out:
        held = labelled_subset(train.labels, 0.1, HELD_OUT_SEED).numpy()
        train, test = _take(train, np.setdiff1d(np.arange(len(train)), held)), _take(train, held)
    return train, test, len(kept)


def _of_classes(split: Split, kept: np.ndarray) -> Split:
    """Samples of some classes, which are numbered anew."""
    some = _take(split, np.flatnonzero(np.isin(split.labels, kept)))
    return replace(some, labels=np.searchsorted(kept, some.labels).astype(np.uint8))


def _cells(source: Source, split: Split) -> np.ndarray:
    if "masks" in split.extras:
        return mask_cells(split.extras["masks"], source.grid)
    return mask_cells(box_masks(split.extras["boxes"], source.size, source.size), source.grid)


def _take(split: Split, rows: np.ndarray) -> Split:
    return Split(
        split.images[rows], split.labels[rows], {k: values[rows] for k, values in split.extras.items()}
    )
