r"""Data distillation (Radosavovic, Dollár, Girshick, Gkioxari and He, CVPR 2018, arXiv:1712.04440).

Not a loss but a way to labels: a model that was trained on labelled images predicts every unlabelled one under several
transforms, the predictions are mapped back and averaged (:func:`ensemble_over_transforms`), those above a threshold
become hard labels (:func:`score_threshold`, :func:`hard_labels`), and a student is trained on both kinds of images for
longer, with a fixed share of each in every mini-batch (:class:`kdrefs.data.mixture.MixedBatches`). The loss is the
task's own.

For the classification of images there is no geometry to undo, and what is left is pseudo-labels from test-time
augmentation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import at_least_float32, check_choice, check_floating, check_positive
from kdrefs._maps import check_maps
from kdrefs._typing import Float


@dataclass(frozen=True)
class Transform:
    """How an image is changed before it is predicted.

    Attributes:
        scale: Factor of height and width, above 0.
        flip: Whether it is mirrored left to right, after it was scaled.
    """

    scale: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)


def transforms(scales: Sequence[float] = (1.0,), *, flip: bool = True) -> tuple[Transform, ...]:
    """Every scale, with ``flip`` each also mirrored. The paper has 400 to 1200 pixels in steps of 100, and mirrors."""
    return tuple(
        Transform(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))
    )


def transformed(
    images: Float[Tensor, "batch channels h w"], transform: Transform, *, multiple: int = 1
) -> Float[Tensor, "batch channels _h _w"]:
    """Images under a transform: bilinear, smoothed where they shrink, at sizes divisible by ``multiple``.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
    """
    check_maps("images", images)
    size = _size(images, transform, multiple)
    if size != tuple(images.shape[2:]):
        # The antialiased kernel is there for single precision and double only.
        scaled = F.interpolate(
            at_least_float32(images), size=size, mode="bilinear", align_corners=False, antialias=True
        )
        images = scaled.to(images.dtype)
    return images.flip(-1) if transform.flip else images


def ensemble_over_transforms(
    predict: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch channels h w"],
    transforms: Sequence[Transform],
    *,
    output: str = "maps",
    order: Sequence[int] | None = None,
    multiple: int = 1,
) -> Tensor:
    r"""Mean prediction over transformed copies of the images, each mapped back before it is averaged.

    .. math:: \hat y(x) = \frac1T \sum_t g_t^{-1}\big(f(g_t(x))\big)

    Detectron@04155a0 averages the heat maps of landmarks so (``KPS_AUG`` with ``HM_AVG``). Average scores, not logits,
    if labels are to be thresholded scores.

    Args:
        predict: From images ``(batch, channels, h', w')`` of any size to what is averaged, in eval mode and without
            gradients if none are wanted.
        images: ``(batch, channels, h, w)``.
        transforms: At least one.
        output: ``"maps"``: predictions are maps ``(batch, kinds, ·, ·)`` of a score a place; they are mirrored back and
            brought to the size of ``images``, bilinearly. ``"points"``: predictions are
            ``(batch, kinds, 2 + n)``, x and y in pixels of the copy (the middle of its first pixel is 0.5, 0.5) and n
            numbers to be averaged as they are.
        order: Which kind each kind becomes in a mirror, for kinds that tell left from right. None: all stay.
        multiple: What heights and widths must be divisible by for ``predict``.

    Returns:
        Maps ``(batch, kinds, h, w)`` or points ``(batch, kinds, 2 + n)`` in the frame of ``images``.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
    """
    check_maps("images", images)
    check_choice("output", output, ("maps", "points"))
    if not transforms:
        raise ValueError("transforms: expected at least one, got none")
    total: Tensor | None = None
    for transform in transforms:
        copy = transformed(images, transform, multiple=multiple)
        found = predict(copy)
        if found.ndim != (4 if output == "maps" else 3) or len(found) != len(images):
            wanted = "(batch, kinds, h, w)" if output == "maps" else "(batch, kinds, 2 or more)"
            raise ValueError(
                f"predict: expected {output} {wanted} of {len(images)} images, got {tuple(found.shape)}"
            )
        if transform.flip and order is not None:
            found = found[:, _checked(order, found.shape[1])]
        found = (
            _maps_back(found, transform, images)
            if output == "maps"
            else _points_back(found, transform, copy, images)
        )
        total = found if total is None else total + found
    assert total is not None
    return total / len(transforms)


def score_threshold(scores: Float[Tensor, "*instances"], images: int, instances: float) -> float:
    """The score above which unlabelled images have as many instances, on average, as labelled ones.

    Scores of exactly the threshold count as above it, see :func:`hard_labels`.

    Args:
        scores: Of all candidates in the unlabelled images, any shape.
        images: Number of unlabelled images.
        instances: Mean number of annotated instances of a labelled image.

    Returns:
        A score; infinity where no instance is wanted.

    Raises:
        ValueError: The scores are not floating, a number is out of range, or there are fewer candidates than instances
            wanted.
    """
    check_floating("scores", scores)
    if images < 1 or instances < 0:
        raise ValueError(f"images, instances: expected at least 1 and 0, got {images} and {instances}")
    wanted = round(images * instances)
    if wanted > scores.numel():
        raise ValueError(
            f"scores: expected at least {wanted} candidates, {instances} an image, got {scores.numel()}"
        )
    if wanted == 0:
        return torch.inf
    return float(scores.detach().flatten().topk(wanted).values[-1])


def hard_labels(
    candidates: Float[Tensor, "images candidates 4"], threshold: float, places: int
) -> Float[Tensor, "images places 3"]:
    """Landmarks from scored candidates: those whose score is at least the threshold, and no trace of the score.

    Args:
        candidates: x, y, kind and score ``(images, candidates, 4)``, in descending order of score.
        threshold: Of :func:`score_threshold`.
        places: Rows an image has room for; what is beyond is the least certain and left out.

    Returns:
        x, y and kind ``(images, places, 3)``, with 0, 0 and -1 in the rows that are left.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
    """
    check_floating("candidates", candidates, "(images, candidates, 4)")
    if candidates.ndim != 3 or candidates.shape[2] != 4:
        raise ValueError(f"candidates: expected (images, candidates, 4), got {tuple(candidates.shape)}")
    if not 1 <= places <= candidates.shape[1]:
        raise ValueError(f"places: expected 1 to {candidates.shape[1]}, got {places}")
    rows = candidates[:, :places, :3]
    kept = candidates[:, :places, 3:] >= threshold
    return torch.where(kept, rows, rows.new_tensor([0.0, 0.0, -1.0]))


def _size(images: Tensor, transform: Transform, multiple: int) -> tuple[int, int]:
    if multiple < 1:
        raise ValueError(f"multiple: expected at least 1, got {multiple}")
    height, width = (
        max(multiple, multiple * round(n * transform.scale / multiple)) for n in images.shape[2:]
    )
    return height, width


def _checked(order: Sequence[int], kinds: int) -> list[int]:
    """The kind that shows each kind in a mirror."""
    if sorted(order) != list(range(kinds)):
        raise ValueError(f"order: expected each of 0 to {kinds - 1} once, got {tuple(order)}")
    return list(order)


def _maps_back(found: Tensor, transform: Transform, images: Tensor) -> Tensor:
    if transform.flip:
        found = found.flip(-1)
    size = images.shape[2:]
    return (
        found
        if found.shape[2:] == size
        else F.interpolate(found, size=size, mode="bilinear", align_corners=False)
    )


def _points_back(found: Tensor, transform: Transform, copy: Tensor, images: Tensor) -> Tensor:
    if found.shape[2] < 2:
        raise ValueError(f"predict: expected x and y of each point, got {tuple(found.shape)}")
    x, y, rest = found[..., :1], found[..., 1:2], found[..., 2:]
    if transform.flip:
        x = copy.shape[3] - x
    return torch.cat([x * (images.shape[3] / copy.shape[3]), y * (images.shape[2] / copy.shape[2]), rest], -1)
