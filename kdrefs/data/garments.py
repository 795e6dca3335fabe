"""Garments on dark patches of photographs: composites with exact masks, of Fashion-MNIST where it is to be had."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from kdrefs.data._arrays import derive_seed
from kdrefs.data.cache import SPLITS, ImageSet, Split, canonical_order
from kdrefs.data.composites import composites, mask_boxes
from kdrefs.data.sets import load_set

CLOTH = 25  # grey value above which a pixel of Fashion-MNIST is the garment's


def garment_set(
    train: int = 2000,
    test: int = 1000,
    *,
    size: int = 32,
    garment: int = 20,
    jitter: int = 8,
    brightness: float = 0.5,
    seed: int = 0,
) -> ImageSet:
    """Training and test composites of garments as a set; pasted whole, so that no background shines through.

    Args:
        train: number of training composites.
        test: number of test composites.
        size: their height and width in pixels.
        garment: height and width of the garment's picture in pixels.
        jitter: the garment's corner lies anywhere in a square of so many pixels around the middle.
        brightness: factor of the background, 0 to 1.
        seed: of patches, garments and places.

    Returns:
        Images (N, size, size, 1), labels, and the extras ``masks`` and ``boxes`` as of
        :func:`kdrefs.data.composites.composites`.

    Raises:
        DataError: Fashion-MNIST is neither in the cache nor to be had; the message names the ways.
    """
    if garment < 8 or jitter < 0 or garment + jitter > size:
        raise ValueError(
            f"garment, jitter: expected at least 8 and 0, at most size={size} in all, got {garment} and {jitter}"
        )
    source = load_set("fashion_mnist")
    parts = {}
    for split, count in zip(SPLITS, (train, test), strict=True):
        generator = torch.Generator().manual_seed(derive_seed("garments", split, seed))
        cloth: Split = getattr(source, split)
        number = torch.randint(len(cloth), (count,), generator=generator)
        y, x = torch.randint(jitter + 1, (2, count), generator=generator) + (size - garment - jitter) // 2
        whole = torch.from_numpy(cloth.images).permute(0, 3, 1, 2)[number].double()
        small = interpolate(
            whole, size=(garment, garment), mode="bilinear", antialias=True, align_corners=False
        )
        # The digits that these patches come with are covered or left out: only their backgrounds are wanted.
        patches = _backgrounds(split, count, size, brightness, seed)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        each = torch.arange(count)[:, None, None]
        rows, columns = (start[:, None] + torch.arange(garment) for start in (y, x))
        masks[each, rows[:, :, None], columns[:, None]] = small[:, 0] > CLOTH
        picture = torch.zeros(count, size, size, dtype=torch.float64)
        picture[each, rows[:, :, None], columns[:, None]] = small[:, 0]
        images = torch.where(masks, picture, patches).round().to(torch.uint8)
        extras = {"masks": masks.to(torch.uint8).numpy(), "boxes": mask_boxes(masks).numpy()}
        parts[split] = Split(images[..., None].numpy(), cloth.labels[number.numpy()], extras)
    digests = {split: canonical_order(part.images, part.labels)[1] for split, part in parts.items()}
    return ImageSet("garments", parts["train"], parts["test"], source.classes, digests)


def _backgrounds(split: str, count: int, size: int, brightness: float, seed: int) -> torch.Tensor:
    """Patches of a larger composite's left edge, where no digit reaches."""
    margin = 2 * size + 8
    whole = composites(split, count, size=margin, digit=8, jitter=0, brightness=brightness, seed=seed)
    patches = whole.images[:, :size, :size, 0]
    return torch.from_numpy(np.ascontiguousarray(patches)).double()
