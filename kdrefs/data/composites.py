"""White digits on dark patches of photographs: an embedded set with exact masks and boxes.

Backgrounds are patches of scikit-learn's two photographs, in grey, halved in size and darkened; training
patches come from their left halves, test patches from their right halves. Digits are those of the set
``digits``, bilinearly enlarged; training composites show training digits, test composites test digits.
"""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d, interpolate

from kdrefs.data._arrays import derive_seed
from kdrefs.data.cache import SPLITS, ImageSet, Split, canonical_order
from kdrefs.data.sets import load_set

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def composites(
    split: str,
    count: int,
    *,
    size: int = 32,
    digit: int = 20,
    jitter: int = 4,
    brightness: float = 0.5,
    seed: int = 0,
) -> Split:
    """Draw composites of one split; equal arguments give equal arrays.

    Args:
        split: "train" or "test".
        count: number of composites.
        size: their height and width in pixels.
        digit: height and width of the enlarged digit in pixels.
        jitter: the digit's corner lies anywhere in a square of so many pixels around the middle.
        brightness: factor of the background, 0 to 1.
        seed: of patches, digits and places.

    Returns:
        Images (N, size, size, 1), labels of the digits, and the extras ``masks``, uint8 (N, size, size), 1
        where the digit covers half of a pixel or more, and ``boxes``, float32 (N, 4), the smallest boxes
        around the masks (xmin ymin xmax ymax, maxima exclusive).
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if count < 1 or digit < 8 or jitter < 0:
        raise ValueError(
            f"count, digit, jitter: expected at least 1, 8 and 0, got {count}, {digit}, {jitter}"
        )
    if digit + jitter > size:
        raise ValueError(f"size: digit and jitter need {digit + jitter} pixels, got {size}")
    if not 0 <= brightness <= 1:
        raise ValueError(f"brightness: expected 0 to 1, got {brightness}")
    generator = torch.Generator().manual_seed(derive_seed("composites", split, seed))

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    # In float64, so that rounding to grey levels does not depend on the order of a sum.
    photos = torch.from_numpy(getattr(load_set("photos"), split).images).double()
    grey = photos @ torch.tensor(_LUMA, dtype=torch.float64)
    backgrounds = avg_pool2d(grey[:, None], 2)[:, 0] * brightness
    _, height, width = backgrounds.shape
    if size > min(height, width):
        raise ValueError(f"size: the backgrounds have {height}x{width} pixels, got {size}")
    photo, top, left = draw(len(backgrounds)), draw(height - size + 1), draw(width - size + 1)
    patches = backgrounds[photo[:, None, None], _square(top, size)[:, :, None], _square(left, size)[:, None]]

    digits: Split = getattr(load_set("digits"), split)
    ink = torch.from_numpy(digits.images).double().permute(0, 3, 1, 2) / 255
    enlarged = interpolate(ink, size=(digit, digit), mode="bilinear", align_corners=False)[:, 0]
    number, y, x = draw(len(digits)), draw(jitter + 1), draw(jitter + 1)
    margin = (size - digit - jitter) // 2
    cover = torch.zeros(count, size, size, dtype=torch.float64)
    each = torch.arange(count)[:, None, None]
    cover[each, _square(y + margin, digit)[:, :, None], _square(x + margin, digit)[:, None]] = enlarged[
        number
    ]

    images = (patches * (1 - cover) + 255 * cover).round().to(torch.uint8)
    masks = (255 * cover).round() >= 128
    extras = {"masks": masks.to(torch.uint8).numpy(), "boxes": mask_boxes(masks).numpy()}
    return Split(images[..., None].numpy(), digits.labels[number.numpy()], extras)


def composite_set(
    train: int = 2000,
    test: int = 1000,
    *,
    size: int = 32,
    digit: int = 20,
    jitter: int = 4,
    brightness: float = 0.5,
    seed: int = 0,
) -> ImageSet:
    """Training and test composites as a set; arguments as in :func:`composites`."""
    parts = {
        split: composites(
            split, count, size=size, digit=digit, jitter=jitter, brightness=brightness, seed=seed
        )
        for split, count in zip(SPLITS, (train, test), strict=True)
    }
    digests = {split: canonical_order(part.images, part.labels)[1] for split, part in parts.items()}
    return ImageSet("composites", parts["train"], parts["test"], tuple("0123456789"), digests)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Smallest boxes around masks.

    Args:
        masks: bool (N, H, W); zeros where a mask is empty.

    Returns:
        float32 (N, 4), xmin ymin xmax ymax in pixels, maxima exclusive.
    """
    edges = []
    for axis in (1, 2):  # over rows: extent in x; over columns: extent in y
        line = masks.any(dim=axis)
        first, last = (row.to(torch.uint8).argmax(1) for row in (line, line.flip(1)))
        edges.append((first, torch.where(line.any(1), line.shape[1] - last, 0)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


def _square(start: torch.Tensor, length: int) -> torch.Tensor:
    return start[:, None] + torch.arange(length)
