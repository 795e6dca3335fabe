"""Landmarks to be found, a part of the images labelled: shapes, or the boxes of photographs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdrefs.data.cache import Split
from kdrefs.data.sets import load_set
from kdrefs.data.shapes import LANDMARKS, MIRRORED, shapes
from reproductions.protocols.dense import first, part_of

BOX = ("upper left corner", "upper right corner", "lower left corner", "lower right corner", "middle")
BOX_MIRRORED = (1, 0, 3, 2, 4)


@dataclass(frozen=True)
class Task:
    """Images with landmarks.

    Attributes:
        kind: "shapes" (:mod:`kdrefs.data.shapes`), or "tinyimagenet32", whose landmarks are the corners and the middle
            of each photograph's box.
        size: Height and width in pixels.
        labelled: Number of training images whose labels are known; which ones, a run's seed says.
        unlabelled: Number of the others.
        test: Number of test images.
        radius: In pixels, within which a landmark is found.
    """

    kind: Literal["shapes", "tinyimagenet32"]
    size: int
    labelled: int
    unlabelled: int
    test: int
    radius: float = 2.0

    @property
    def names(self) -> tuple[str, ...]:
        """What the kinds of landmarks are."""
        return LANDMARKS if self.kind == "shapes" else BOX

    @property
    def order(self) -> tuple[int, ...]:
        """Which kind each becomes in a mirror."""
        return MIRRORED if self.kind == "shapes" else BOX_MIRRORED


@dataclass(frozen=True)
class Parts:
    """Labelled and unlabelled training images, and test images; all have the extra ``landmarks``."""

    labelled: Split
    unlabelled: Split
    test: Split


def parts_of(task: Task, seed: int, *, probe: bool = False) -> Parts:
    """The images of a seed; a probe sees few of each.

    Raises:
        kdrefs.data.DataError: The photographs are neither in the cache nor to be had; the message names the ways.
    """
    train, test = _pool(task, probe=probe)
    labelled = min(task.labelled, len(train) // 2)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).numpy()
    return Parts(part_of(train, order[:labelled]), part_of(train, order[labelled:]), test)


def landmarks_of(split: Split) -> Tensor:
    """Annotated landmarks (N, P, 3), see :mod:`kdrefs.data.landmarks`."""
    return torch.from_numpy(split.extras["landmarks"])


def annotated(split: Split) -> float:
    """Mean number of annotated landmarks of an image."""
    return float((split.extras["landmarks"][..., 2] >= 0).sum() / len(split))


@functools.lru_cache(maxsize=4)
def _pool(task: Task, *, probe: bool) -> tuple[Split, Split]:
    counts = (96, 32) if probe else (task.labelled + task.unlabelled, task.test)
    if task.kind == "shapes":
        train, test = (
            shapes(split, count, size=task.size)
            for split, count in zip(("train", "test"), counts, strict=True)
        )
        return train, test
    data = load_set(task.kind)
    return _with_corners(first(data.train, counts[0])), _with_corners(first(data.test, counts[1]))


def _with_corners(split: Split) -> Split:
    """Photographs in canonical order, which is no order of their classes, with landmarks from their boxes."""
    left, top, right, bottom = split.extras["boxes"].T
    x = np.stack([left, right, left, right, (left + right) / 2], 1)
    y = np.stack([top, top, bottom, bottom, (top + bottom) / 2], 1)
    kinds = np.broadcast_to(np.arange(len(BOX), dtype=np.float32), x.shape)
    return Split(split.images, split.labels, {"landmarks": np.stack([x, y, kinds], 2).astype(np.float32)})
