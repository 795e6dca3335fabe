"""Flips and crops of whole batches by one gather, and the same motion for masks and boxes.

An image is first padded and cropped, then flipped. The parameters of all samples are drawn beforehand, so
that an image, its other views, its mask and its boxes can be moved alike at any later time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What happens to an image at random.

    Attributes:
        flip: flip left to right with probability one half.
        crop: pad by so many pixels on every side and crop the original size anywhere in it.
        pad_mode: what the padding holds: zeros (black before normalisation) or the reflected image.
    """

    flip: bool = False
    crop: int = 0
    pad_mode: Literal["zeros", "reflect"] = "zeros"

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int):
            raise TypeError(f"crop: expected an int, got {self.crop!r}")
        if self.crop < 0:
            raise ValueError(f"crop: expected 0 or more pixels, got {self.crop}")
        if self.pad_mode not in ("zeros", "reflect"):
            raise ValueError(f"pad_mode: expected 'zeros' or 'reflect', got {self.pad_mode!r}")


class Geometry(NamedTuple):
    """Parameters of a motion, one row a sample.

    Attributes:
        flip: bool (N,).
        offset: int64 (N, 2), top and left corner of the crop in the padded image, 0 to twice the padding.
    """

    flip: Tensor
    offset: Tensor

    def select(self, indices: Tensor) -> Geometry:
        """Rows of some samples."""
        return Geometry(self.flip.index_select(0, indices), self.offset.index_select(0, indices))


def draw_geometry(samples: int, augment: Augment, generator: torch.Generator) -> Geometry:
    """Draw the parameters of all samples on the CPU, so that every device gets the same ones."""
    flip = torch.zeros(samples, dtype=torch.bool)
    if augment.flip:
        flip = torch.rand(samples, generator=generator) < 0.5
    offset = torch.randint(0, 2 * augment.crop + 1, (samples, 2), generator=generator)
    return Geometry(flip, offset)


def move_images(images: Tensor, geometry: Geometry, augment: Augment) -> Tensor:
    """Crop and flip a batch.

    Args:
        images: (B, H, W, C) of any type, contiguous.
        geometry: B rows.

    Returns:
        (B, H, W, C) of the same type.
    """
    batch, height, width, channels = images.shape
    pad = augment.crop
    rows = torch.arange(height, device=images.device) + geometry.offset[:, :1]
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = torch.where(geometry.flip[:, None], width - 1 - columns, columns) + geometry.offset[:, 1:]
    if pad and augment.pad_mode == "zeros":
        padded = images.new_zeros(batch, height + 2 * pad, width + 2 * pad, channels)
        padded[:, pad:-pad, pad:-pad] = images
        images = padded
    elif pad:
        rows, columns = _reflect(rows - pad, height), _reflect(columns - pad, width)
    # One gather of whole pixels: their numbers in the flattened (padded) batch.
    first_row = torch.arange(batch, device=images.device)[:, None] * images.shape[1]
    pixels = ((first_row + rows) * images.shape[2])[:, :, None] + columns[:, None, :]
    moved = images.reshape(-1, channels).index_select(0, pixels.reshape(-1))
    return moved.view(batch, height, width, channels)


def move_boxes(boxes: Tensor, geometry: Geometry, augment: Augment, height: int, width: int) -> Tensor:
    """Move boxes as :func:`move_images` moves their images, and clip them to the image.

    Args:
        boxes: floating (B, ..., 4), xmin ymin xmax ymax in pixels; the maxima are exclusive edges. A box
            that leaves the image entirely is left with no area.
    """
    shape = (-1,) + (1,) * (boxes.ndim - 2)
    shift = (augment.crop - geometry.offset).to(boxes.dtype)
    dy, dx = shift[:, 0].view(shape), shift[:, 1].view(shape)
    left, top, right, bottom = boxes.unbind(-1)
    left, right = left + dx, right + dx
    flip = geometry.flip.view(shape)
    left, right = torch.where(flip, width - right, left), torch.where(flip, width - left, right)
    x = torch.stack([left, right], -1).clamp(0, width)
    y = torch.stack([top + dy, bottom + dy], -1).clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Positions outside of 0 … size-1 mirrored at the first and the last pixel, which are not repeated."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()
