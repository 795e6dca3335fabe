"""Features that nothing trains: raw pixels and histograms of oriented gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.feature import hog
from torch import Tensor

from kdrefs.data.cache import Split
from kdrefs.training import load_tensors, save_tensors
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import Pair, make_batches


def hog_features(images: np.ndarray, cell: int) -> Tensor:
    """Histograms of oriented gradients: 9 orientations, blocks of 2 x 2 cells (Dalal and Triggs 2005).

    Args:
        images: ``(N, H, W, C)`` uint8; the strongest channel's gradient counts where there are three.
        cell: Side of a cell in pixels.

    Returns:
        ``(N, features)`` float32.
    """
    rows = [
        hog(
            image if image.shape[-1] == 3 else image[..., 0],
            orientations=9,
            pixels_per_cell=(cell, cell),
            cells_per_block=(2, 2),
            channel_axis=-1 if image.shape[-1] == 3 else None,
        )
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).float()


def fixed_features(
    arm: str, cell: int, pair: Pair, context: Context, train: Split, test: Split
) -> tuple[Tensor, Tensor]:
    """Features for database and queries: raw pixels (arm ``"pixels"``), or HoG (kept as an artifact)."""
    if arm == "pixels":
        return _pixels(train, pair), _pixels(test, pair)

    def make(folder: Path) -> None:
        sides = {name: hog_features(split.images, cell) for name, split in (("train", train), ("test", test))}
        save_tensors(folder / "hog.safetensors", sides)

    options: dict[str, Any] = {"data": pair.data, "cell": cell, "max_steps": context.max_steps}
    folder = context.artifact("hog", options, make, source=source_digest(__name__))
    sides, _ = load_tensors(folder / "hog.safetensors")
    return sides["train"], sides["test"]


def _pixels(split: Split, pair: Pair) -> Tensor:
    batches = make_batches(pair, split, device=torch.device("cpu"), training=False)
    return torch.cat([batch.images.flatten(1) for batch in batches if batch.images is not None])
