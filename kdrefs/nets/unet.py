"""A small U-Net for dense prediction: logits at every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kdrefs.nets.output import Output, check_counts, check_images


class UNet(nn.Module):
    """Convolutions down to a coarse map and up again, with the maps of the way down beside those of the way up.

    Each step is a 3x3 convolution without bias, batch normalisation and ReLU. The way down halves height and width by
    max-pooling, the way up doubles them by repeating pixels; a 1x1 convolution gives the logits. Fully convolutional:
    any height and width that can be halved often enough.

    Features: ``down1`` … (the last is the coarsest) and ``up1`` (full size) …, each with its ``_pre``.

    Source of the idea: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI
    2015, with one convolution a step, padding, and batch normalisation.

    Args:
        classes: Channels of the logits.
        widths: Channels of the steps down, finest first, at least two.
        in_channels: Channels of the images.

    Raises:
        ValueError: If a number is not positive, or there are fewer than two widths.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (8, 16, 32), in_channels: int = 3) -> None:
        super().__init__()
        check_counts(classes=classes, in_channels=in_channels)
        if len(widths) < 2:
            raise ValueError(f"widths must name at least two steps, got {tuple(widths)}")
        for width in widths:
            check_counts(widths=width)
        self.in_channels = in_channels
        self.down = nn.ModuleList(_Step(before, after) for before, after in pairwise((in_channels, *widths)))
        self.up = nn.ModuleList(_Step(fine + coarse, fine) for fine, coarse in pairwise(widths))
        self.classifier = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Output:
        """Label the pixels of ``images`` ``(B, in_channels, H, W)``; the logits are ``(B, classes, H, W)``."""
        check_images(images, self.in_channels)
        _check_divisible(images, 2 ** (len(self.down) - 1))
        features: dict[str, Tensor] = {}
        maps, kept = images, []
        for number, layer in enumerate(self.down, start=1):
            features[f"down{number}_pre"], maps = layer(F.max_pool2d(maps, 2) if number > 1 else maps)
            features[f"down{number}"] = maps
            kept.append(maps)
        for number in range(len(self.up), 0, -1):
            finer = F.interpolate(maps, scale_factor=2.0, mode="nearest")
            features[f"up{number}_pre"], maps = self.up[number - 1](torch.cat([kept[number - 1], finer], 1))
            features[f"up{number}"] = maps
        return Output(self.classifier(maps), features)


class _Step(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.bn(self.conv(maps))
        return pre, F.relu(pre)


def _check_divisible(images: Tensor, step: int) -> None:
    if images.shape[2] % step or images.shape[3] % step:
        raise ValueError(
            f"images must have a height and width divisible by {step}, got {tuple(images.shape)}"
        )


fx.wrap("_check_divisible")  # a check, not a part of the computation that a tracer is to look into
