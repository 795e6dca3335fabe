"""Images in two qualities: the same image clean and degraded, both uint8 of one shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.data.cache import Split
from kdrefs.data.composites import composites
from kdrefs.data.sets import load_set


class Qualities(NamedTuple):
    """One part of a set in both qualities; images ``(N, H, W, C)``, uint8."""

    clean: np.ndarray
    degraded: np.ndarray
    labels: np.ndarray


def low_resolution(images: Tensor, seed: int, *, size: int) -> Tensor:
    """Averaged down to ``size`` x ``size`` pixels and brought back to the old size bilinearly.

    Args:
        images: float ``(N, C, H, W)`` in [0, 1].
        seed: Not used; the degradation is the same for all.
        size: Height and width that are left.
    """
    small = F.interpolate(images, size=(size, size), mode="area")
    return F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)


def edges(images: Tensor, seed: int) -> Tensor:
    """Length of the gradient (Sobel) of the mean of the channels, the same in every channel.

    Stands in for the paper's learned edge detector. Arguments as in :func:`low_resolution`.
    """
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return both.square().sum(1, keepdim=True).sqrt().clamp(max=1).expand_as(images)


def distorted(images: Tensor, seed: int, *, knots: int, strength: float) -> Tensor:
    """Moved along a smooth random field, another one for each image.

    Displacements are normal on a grid of ``knots`` x ``knots`` points with standard deviation ``strength`` times half
    the image, bicubic between them; the paper jitters a grid of points too and lets thin-plate splines follow.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = strength * torch.randn(len(images), 2, knots, knots, generator=generator)
    field = F.interpolate(coarse, size=images.shape[2:], mode="bicubic", align_corners=True)
    identity = F.affine_grid(
        torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    grid = identity + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


Degradation = Callable[[Tensor, int], Tensor]

# Sides of 8 pixels are reduced to 3, of 32 to 8; an object of 12 pixels lies anywhere in a picture of 32.
KINDS: dict[str, tuple[str, Degradation]] = {
    "digits-lowres": ("digits", partial(low_resolution, size=3)),
    "digits-edges": ("digits", edges),
    "digits-distorted": ("digits", partial(distorted, knots=4, strength=0.15)),
    "cifar10-lowres": ("cifar10", partial(low_resolution, size=8)),
    "cifar10-edges": ("cifar10", edges),
    "cifar10-distorted": ("cifar10", partial(distorted, knots=8, strength=0.1)),
}
LOCALISED = "composites-localised"
COMPOSITES = (4000, 2000)  # images to train and to test on


def load(kind: str, *, probe: tuple[int, int] | None = None) -> tuple[Qualities, Qualities, int]:
    """Training and test images of a kind in both qualities, and the number of classes.

    Args:
        kind: One of :data:`KINDS`, or :data:`LOCALISED`: digits on photographs, cut out by their boxes for the teacher.
        probe: How many training and test images are taken at most; None for all.

    Raises:
        ValueError: There is no such kind.
        kdrefs.data.DataError: The set cannot be had; the message names the ways.
    """
    if kind == LOCALISED:
        counts = probe or COMPOSITES
        return _localised("train", counts[0]), _localised("test", counts[1]), 10
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {[*KINDS, LOCALISED]}, got {kind!r}")
    name, degrade = KINDS[kind]
    data = load_set(name)
    counts = probe or (len(data.train), len(data.test))
    train, test = (
        _degraded(Split(part.images[:count], part.labels[:count]), degrade, seed)
        for seed, (part, count) in enumerate(zip((data.train, data.test), counts, strict=True))
    )
    return train, test, len(data.classes)


def _degraded(split: Split, degrade: Degradation, seed: int) -> Qualities:
    parts = []
    for number, start in enumerate(range(0, len(split), 5000)):
        pixels = torch.from_numpy(np.ascontiguousarray(split.images[start : start + 5000]))
        changed = degrade(pixels.permute(0, 3, 1, 2).float() / 255, 1000 * seed + number)
        parts.append((255 * changed).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return Qualities(split.images, torch.cat(parts).contiguous().numpy(), split.labels)


def _localised(split: str, count: int) -> Qualities:
    """Whole pictures, and their objects cut out by their boxes and enlarged to the picture's size."""
    whole = composites(split, count, size=32, digit=12, jitter=20)
    pixels = torch.from_numpy(whole.images).permute(0, 3, 1, 2).float()
    boxes = torch.from_numpy(whole.extras["boxes"])
    size = pixels.shape[-1]
    low, high = boxes[:, :2], boxes[:, 2:]
    # affine_grid wants where [-1, 1] of the cut lies in the picture's [-1, 1].
    half, centre = (high - low) / size, (high + low) / size - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = half[:, 0], half[:, 1], centre
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    cut = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images = cut.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return Qualities(images, whole.images, whole.labels)
