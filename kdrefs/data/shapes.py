"""Textured shapes on patches of photographs: an embedded set with exact masks and landmarks.

Objects are discs, bars, triangles and crosses of any turn, at most one in each quarter of an image, so that none hides
another. Backgrounds and textures are patches of scikit-learn's two photographs, halved in size; those of training
images come from their left halves, those of test images from their right halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kdrefs.data._arrays import derive_seed
from kdrefs.data.cache import SPLITS, ImageSet, Split, canonical_order
from kdrefs.data.sets import load_set

CLASSES = ("background", "disc", "bar", "triangle", "cross")
LANDMARKS = ("disc's centre", "bar's left end", "bar's right end", "triangle's tip", "cross's centre")
MIRRORED = (0, 2, 1, 3, 4)  # which landmark each becomes in a mirror
PLACES = 8  # rows of landmarks an image has room for: two an object
_GRAIN = 3  # a pixel's cover is counted on so many points squared
_THICKNESS = 0.3  # of bars and crosses, half of it, in units of the radius


def shapes(
    split: str,
    count: int,
    *,
    size: int = 32,
    radius: tuple[float, float] = (0.6, 0.95),
    tint: float = 0.5,
    seed: int = 0,
) -> Split:
    """Draw images of one split; equal arguments give equal arrays.

    Args:
        split: "train" or "test".
        count: number of images.
        size: their height and width in pixels, a multiple of 4.
        radius: least and greatest radius of an object, as a fraction of a quarter's half side.
        tint: how much of an object's colour is one random colour; the rest is texture. 0 to 1.
        seed: of everything that is drawn.

    Returns:
        Images (N, size, size, 3); labels, the class in :data:`CLASSES` of the largest object; and the extras ``masks``,
        uint8 (N, size, size), the class of every pixel (an object's where it covers half of the pixel or more), and
        ``landmarks``, float32 (N, PLACES, 3) with x and y in pixels (the middle of the first pixel is 0.5, 0.5) and the
        number in :data:`LANDMARKS`, which is -1 in rows without one.

    Raises:
        ValueError: an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if size < 16 or size % 4:
        raise ValueError(f"size: expected a multiple of 4 from 16 on, got {size}")
    if not 0 < radius[0] <= radius[1] <= 1:
        raise ValueError(f"radius: expected 0 < least <= greatest <= 1, got {radius}")
    if not 0 <= tint <= 1:
        raise ValueError(f"tint: expected 0 to 1, got {tint}")
    generator = torch.Generator().manual_seed(derive_seed("shapes", split, seed))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    kinds = torch.randint(1, len(CLASSES), (count, 4), generator=generator)
    objects = torch.randint(1, 5, (count, 1), generator=generator)
    kinds = torch.where(uniform(4).argsort(1) < objects, kinds, 0)
    extent = (radius[0] + (radius[1] - radius[0]) * uniform(4)) * size / 4
    slack = size / 4 - extent
    quarter = torch.tensor([[1, 1], [3, 1], [1, 3], [3, 3]]) * size / 4
    centres = quarter + (2 * uniform(4, 2) - 1) * slack[..., None]
    # A bar that stands upright has no left end.
    reach = torch.where(kinds == 2, math.pi / 3, math.pi)
    turns = (2 * uniform(4) - 1) * reach

    cover = _cover(kinds, centres, extent, turns, size)
    photographs = _photographs(split)
    canvas = _patches(photographs, count, size, generator)
    for place in range(4):
        texture = _patches(photographs, count, size, generator)
        colour = 255 * uniform(1, 1, 3)
        ink = cover[:, place, :, :, None]
        canvas = canvas * (1 - ink) + (texture * (1 - tint) + colour * tint) * ink
    masks = ((cover >= 0.5) * kinds[:, :, None, None]).sum(1)
    areas = torch.stack([(masks == kind).sum((1, 2)) for kind in range(1, len(CLASSES))], 1)
    extras = {
        "masks": masks.to(torch.uint8).numpy(),
        "landmarks": _landmarks(kinds, centres, extent, turns).float().numpy(),
    }
    labels = (areas.argmax(1) + 1).to(torch.uint8)
    return Split(canvas.round().to(torch.uint8).numpy(), labels.numpy(), extras)


def shape_set(train: int = 2000, test: int = 1000, *, size: int = 32, seed: int = 0) -> ImageSet:
    """Training and test images as a set; arguments as in :func:`shapes`."""
    parts = {
        split: shapes(split, count, size=size, seed=seed)
        for split, count in zip(SPLITS, (train, test), strict=True)
    }
    digests = {split: canonical_order(part.images, part.labels)[1] for split, part in parts.items()}
    return ImageSet("shapes", parts["train"], parts["test"], CLASSES, digests)


def mirrored_landmarks(landmarks: Tensor, width: float, order: Sequence[int] = MIRRORED) -> Tensor:
    """Landmarks of the images seen in a mirror.

    Args:
        landmarks: (..., 3), x, y and kind, -1 where there is none.
        width: of the images in pixels.
        order: which kind each becomes.
    """
    x, y, kind = landmarks.unbind(-1)
    table = torch.tensor([*order, -1], dtype=landmarks.dtype, device=landmarks.device)
    return torch.stack([torch.where(kind < 0, x, width - x), y, table[kind.long()]], -1)


def _cover(kinds: Tensor, centres: Tensor, extent: Tensor, turns: Tensor, size: int) -> Tensor:
    """Share of each pixel that each object covers, (N, 4, size, size), counted on a fine grid."""
    steps = (torch.arange(size * _GRAIN, dtype=torch.float64) + 0.5) / _GRAIN
    found = torch.zeros(*kinds.shape, size, size, dtype=torch.float64)
    for place in range(4):
        # Only the object's own quarter of the image is looked at.
        y0, x0 = (half * size // 2 for half in divmod(place, 2))
        span = size // 2 * _GRAIN
        y = steps[y0 * _GRAIN :][:span, None] - centres[:, place, 1, None, None]
        x = steps[x0 * _GRAIN :][:span] - centres[:, place, 0, None, None]
        turn, radius = turns[:, place, None, None], extent[:, place, None, None]
        along = (x * turn.cos() + y * turn.sin()) / radius
        across = (y * turn.cos() - x * turn.sin()) / radius
        kind = kinds[:, place, None, None]
        inside = (kind > 0) & torch.where(
            kind == 1,
            along.square() + across.square() <= 1,
            torch.where(kind == 2, _bar(along, across), _third(kind, along, across)),
        )
        fine = inside.view(len(kinds), size // 2, _GRAIN, size // 2, _GRAIN)
        found[:, place, y0 : y0 + size // 2, x0 : x0 + size // 2] = fine.double().mean((2, 4))
    return found


def _bar(along: Tensor, across: Tensor) -> Tensor:
    return (along.abs() <= math.sqrt(1 - _THICKNESS**2)) & (across.abs() <= _THICKNESS)


def _third(kind: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """A slim triangle whose tip is at (1, 0) and whose base is at -0.6, or two crossed bars."""
    triangle = (along >= -0.6) & (across.abs() <= 0.35 * (1 - along))
    return torch.where(kind == 3, triangle, _bar(along, across) | _bar(across, along))


def _landmarks(kinds: Tensor, centres: Tensor, extent: Tensor, turns: Tensor) -> Tensor:
    direction = torch.stack([turns.cos(), turns.sin()], -1) * extent[..., None]
    end = direction * math.sqrt(1 - _THICKNESS**2)
    found = torch.full((len(kinds), 4, 2, 3), -1.0, dtype=torch.float64)
    for kind, number, shift in ((1, 0, 0), (2, 1, -end), (3, 3, direction), (4, 4, 0)):
        point = torch.cat([centres + shift, torch.full_like(extent, number)[..., None]], -1)
        found[:, :, 0] = torch.where((kinds == kind)[..., None], point, found[:, :, 0])
    right = torch.cat([centres + end, torch.full_like(extent, 2)[..., None]], -1)
    found[:, :, 1] = torch.where((kinds == 2)[..., None], right, found[:, :, 1])
    found[..., :2] = torch.where(found[..., 2:] < 0, 0.0, found[..., :2])
    return found.view(len(kinds), PLACES, 3)


def _photographs(split: str) -> Tensor:
    """Halves of the photographs, halved in size; in float64, so that rounding to a byte has one result."""
    photos = torch.from_numpy(getattr(load_set("photos"), split).images).double()
    return avg_pool2d(photos.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _patches(photographs: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    number, height, width, _ = photographs.shape
    if size > min(height, width):
        raise ValueError(f"size: the photographs have {height}x{width} pixels, got {size}")
    which, top, left = (
        torch.randint(high, (count, 1), generator=generator)
        for high in (number, height - size + 1, width - size + 1)
    )
    places = torch.arange(size)
    rows, columns = (top + places)[:, :, None], (left + places)[:, None, :]
    return photographs[which[..., None], rows, columns]
