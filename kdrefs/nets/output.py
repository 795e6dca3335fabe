"""What every network of :mod:`kdrefs.nets` returns: logits and named intermediate features."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """Result of one forward pass.

    Names are the same everywhere: ``layer1`` (or ``block1``, ``fc1``, ``embedding``) is taken after the
    activation and ``layer1_pre`` before it, so that ``relu(features["layer1_pre"]) == features["layer1"]``
    wherever both exist. ``layer1_sum`` is the residual stream of a pre-activation network, which no
    normalisation or activation has touched. ``pool`` is the vector that the classifier sees after global
    average pooling; pooling has no activation of its own, so there is no ``pool_pre``.

    Attributes:
        logits: Class scores before the softmax, ``(B, classes)``.
        features: Vectors ``(B, D)`` and maps ``(B, C, H, W)`` by name.
    """

    logits: Tensor
    features: dict[str, Tensor]


def check_images(images: Tensor, channels: int, size: int | None = None) -> None:
    """Check the shape of a batch of images before the first layer does so less clearly.

    Args:
        images: What came.
        channels: Expected number of channels.
        size: Expected height and width in pixels; ``None`` for any.

    Raises:
        ValueError: If ``images`` is not ``(B, channels, size, size)``.
    """
    if (
        images.ndim == 4
        and images.shape[1] == channels
        and (size is None or images.shape[2:] == (size, size))
    ):
        return
    side = "H, W" if size is None else f"{size}, {size}"
    raise ValueError(f"images must have shape (B, {channels}, {side}), got {tuple(images.shape)}")


def check_counts(**values: int) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
