"""Landmarks as heat maps and back: rows of x, y and kind, as of :mod:`kdrefs.data.shapes`, and one map a kind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def heat_maps(
    landmarks: Tensor, kinds: int, size: tuple[int, int], *, sigma: float = 1.0, snap: bool = False
) -> Tensor:
    r"""One map a kind with a Gaussian hill of height 1 on every landmark; hills that meet are not added.

    Args:
        landmarks: floating (B, P, 3), x and y in pixels (the middle of the first pixel is 0.5, 0.5) and kind, -1 in
            rows without one.
        kinds: number of kinds.
        size: height and width of the maps in pixels.
        sigma: width of the hills in pixels.
        snap: whether hills stand on the middle of the landmark's pixel, so that their tops are exactly 1.

    Returns:
        (B, kinds, height, width).

    Raises:
        ValueError: a shape or an argument does not fit.
    """
    _check_rows(landmarks)
    if sigma <= 0:
        raise ValueError(f"sigma: expected a number above 0, got {sigma}")
    if snap:
        places = landmarks[..., :2].floor().clamp(min=0) + 0.5
        limits = landmarks.new_tensor([size[1] - 0.5, size[0] - 0.5])
        landmarks = torch.cat([torch.minimum(places, limits), landmarks[..., 2:]], -1)
    y, x = (torch.arange(n, device=landmarks.device, dtype=landmarks.dtype) + 0.5 for n in size)
    hills = [
        torch.exp(-(places - landmarks[..., column, None]).square() / (2 * sigma**2))
        for column, places in ((0, x), (1, y))
    ]
    of_kind = landmarks[..., 2, None] == torch.arange(kinds, device=landmarks.device)
    columns = hills[0][:, :, None] * of_kind[..., None]  # (B, P, kinds, width)
    maps = hills[1][:, 0, None, :, None] * columns[:, 0, :, None]
    for place in range(1, landmarks.shape[1]):  # one after the other: all at once take as many maps as rows
        maps = torch.maximum(maps, hills[1][:, place, None, :, None] * columns[:, place, :, None])
    return maps


def peaks(maps: Tensor, count: int) -> Tensor:
    """The highest local maxima of heat maps, all kinds together.

    A maximum is a pixel that no neighbour exceeds. Its place is refined by a quarter of a pixel towards the higher
    neighbour in each direction, as is usual for heat maps of landmarks; at an edge it stays in the middle of its pixel.

    Args:
        maps: floating (B, kinds, height, width), scores from 0 on.
        count: how many to return; where there are fewer, the rest have the score 0.

    Returns:
        (B, count, 4): x, y, kind and score, from the highest score down.
    """
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ValueError(f"maps: expected floating (B, kinds, h, w), got {maps.dtype} {tuple(maps.shape)}")
    if not 1 <= count <= maps[0].numel():
        raise ValueError(f"count: expected 1 to {maps[0].numel()}, got {count}")
    height, width = maps.shape[2:]
    top = maps == F.max_pool2d(maps, 3, stride=1, padding=1)
    scores, places = (maps * top).flatten(1).topk(count)
    kind, pixel = places // (height * width), places % (height * width)
    y, x = pixel // width, pixel % width
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate").flatten(1)

    def at(dy: int, dx: int) -> Tensor:
        return padded.gather(1, (kind * (height + 2) + y + 1 + dy) * (width + 2) + x + 1 + dx)

    inside_x, inside_y = (x > 0) & (x < width - 1), (y > 0) & (y < height - 1)
    shift_x = 0.25 * (at(0, 1) - at(0, -1)).sign() * inside_x
    shift_y = 0.25 * (at(1, 0) - at(-1, 0)).sign() * inside_y
    return torch.stack([x + 0.5 + shift_x, y + 0.5 + shift_y, kind.to(maps.dtype), scores], -1)


def matches(found: Tensor, landmarks: Tensor, radius: float) -> Tensor:
    """Which found landmarks are right: each annotated one goes to the highest score of its kind within a radius.

    Args:
        found: (B, count, 4) as of :func:`peaks`, in descending order of score.
        landmarks: (B, P, 3).
        radius: in pixels.

    Returns:
        bool (B, count).
    """
    _check_rows(landmarks)
    distance = torch.cdist(found[..., :2], landmarks[..., :2])
    same = found[..., 2, None] == landmarks[:, None, :, 2]
    possible = (distance <= radius) & same & (found[..., 3, None] > 0)
    right = torch.zeros(found.shape[:2], dtype=torch.bool, device=found.device)
    free = landmarks[..., 2] >= 0
    for row in range(found.shape[1]):
        candidates = possible[:, row] & free
        nearest = distance[:, row].masked_fill(~candidates, torch.inf).argmin(1)
        right[:, row] = candidates.any(1)
        taken = F.one_hot(nearest, landmarks.shape[1]).bool() & candidates.any(1, keepdim=True)
        free = free & ~taken
    return right


def average_precision(found: Tensor, landmarks: Tensor, kinds: int, radius: float) -> float:
    """Mean over kinds of the area under precision over recall, in percent.

    Precision is made to fall with recall, as in Pascal VOC since 2010 and COCO. Kinds that are annotated nowhere are
    left out.

    Args:
        found: (B, count, 4), see :func:`peaks`.
        landmarks: (B, P, 3).
        kinds: number of kinds.
        radius: within which a landmark is found, in pixels.
    """
    right, areas = matches(found, landmarks, radius), []
    for kind in range(kinds):
        annotated = int((landmarks[..., 2] == kind).sum())
        if not annotated:
            continue
        of_kind = (found[..., 2] == kind) & (found[..., 3] > 0)
        order = found[..., 3][of_kind].argsort(descending=True, stable=True)
        hits = right[of_kind][order].double().cumsum(0)
        precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
        precision = precision.flip(0).cummax(0).values.flip(0)
        steps = torch.diff(hits, prepend=hits.new_zeros(1)) / annotated
        areas.append(float((precision * steps).sum()))
    if not areas:
        raise ValueError("landmarks: expected at least one, got none")
    return 100 * sum(areas) / len(areas)


def _check_rows(landmarks: Tensor) -> None:
    if landmarks.ndim != 3 or landmarks.shape[2] != 3 or not landmarks.is_floating_point():
        raise ValueError(
            f"landmarks: expected floating (B, P, 3), got {landmarks.dtype} {tuple(landmarks.shape)}"
        )
