"""Small convolutional networks that train within seconds to minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdrefs.nets.output import Output, check_counts, check_images


class ConvBlock(nn.Module):
    """3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling.

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map.
        padding: 1 keeps height and width before the pooling, 0 shrinks both by two.
        bias: Whether the convolution has a bias (which the normalisation then cancels).
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``(B, C, H, W)`` to the pooled map and the maps before and after the ReLU."""
        pre = self.bn(self.conv(maps))
        post = F.relu(pre)
        return F.max_pool2d(post, 2), pre, post


class TinyCNN(nn.Module):
    """The student of the PKT paper: 15,050 parameters in its default form.

    Three blocks of 3x3 convolution without padding, batch normalisation, ReLU and 2x2 max-pooling turn a
    3x32x32 image into 32x2x2 values; one hidden layer with ReLU (the feature that is transferred and used for
    retrieval) and the classifier follow.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
    section 4; layer sizes as in the authors' ``Cifar_Tiny``.

    Features: ``block1`` … ``block3`` and ``block1_pre`` … (maps before pooling), ``fc1`` and ``fc1_pre``.

    Args:
        classes: Number of classes.
        channels: Channels of the blocks.
        feature: Width of the hidden layer.
        in_channels: Channels of the images.
        size: Height and width of the images in pixels.

    Raises:
        ValueError: If a size is not positive, or too small for that many blocks.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: Sequence[int] = (8, 16, 32),
        feature: int = 64,
        *,
        in_channels: int = 3,
        size: int = 32,
    ) -> None:
        super().__init__()
        _check_sizes(classes, channels, feature, in_channels, size)
        side = size
        for _ in channels:
            side = (side - 2) // 2
        if side < 1:
            raise ValueError(f"size must leave at least one pixel after {len(channels)} blocks, got {size}")
        self.in_channels, self.size = in_channels, size
        self.blocks = _blocks(in_channels, channels, padding=0, bias=True)
        self.fc1 = nn.Linear(channels[-1] * side * side, feature)
        self.fc2 = nn.Linear(feature, classes)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, size, size)``."""
        check_images(images, self.in_channels, self.size)
        features: dict[str, Tensor] = {}
        maps = _run_blocks(self.blocks, images, features)
        features["fc1_pre"] = self.fc1(maps.flatten(1))
        features["fc1"] = F.relu(features["fc1_pre"])
        return Output(self.fc2(features["fc1"]), features)


class SmallCNN(nn.Module):
    """Convolution blocks, a linear feature and a linear classifier, for 8- to 32-pixel images.

    Blocks are 3x3 convolution without bias (padding 1), batch normalisation, ReLU, 2x2 max-pooling; the remaining
    map is flattened into the embedding layer, whose signed output is what retrieval uses, and a ReLU and the
    classifier follow. On 1x8x8 digits with a 16-d feature and 10 classes: 1,046 parameters with channels
    ``(4, 8)``, 2,482 with ``(8, 16)``.

    Features: ``block1`` … and ``block1_pre`` … (maps before pooling), ``embedding`` and ``embedding_pre``.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the blocks.
        feature: Width of the embedding.
        classes: Number of classes.
        size: Height and width of the images in pixels.

    Raises:
        ValueError: If a size is not positive, or ``size`` is below ``2 ** len(channels)``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (8, 16),
        feature: int = 16,
        classes: int = 10,
        *,
        size: int = 8,
    ) -> None:
        super().__init__()
        _check_sizes(classes, channels, feature, in_channels, size)
        side = size >> len(channels)
        if side < 1:
            raise ValueError(
                f"size must be at least {2 ** len(channels)} for {len(channels)} blocks, got {size}"
            )
        self.in_channels, self.size = in_channels, size
        self.blocks = _blocks(in_channels, channels, padding=1, bias=False)
        self.embedding = nn.Linear(channels[-1] * side * side, feature)
        self.classifier = nn.Linear(feature, classes)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, size, size)``."""
        check_images(images, self.in_channels, self.size)
        features: dict[str, Tensor] = {}
        maps = _run_blocks(self.blocks, images, features)
        features["embedding_pre"] = self.embedding(maps.flatten(1))
        features["embedding"] = F.relu(features["embedding_pre"])
        return Output(self.classifier(features["embedding"]), features)


class PlainCNN(nn.Module):
    """A thin deep network without normalisation or shortcuts, of the kind that FitNets were made to train.

    ``depth`` convolutions of 3x3 with ReLU in three stages of equal width, 2x2 max-pooling between the stages, average
    pooling and a linear classifier. Weights have PyTorch's default initialisation, under which the signal shrinks
    from layer to layer, or He's, under which it does not.

    Features: ``stage1`` … ``stage3`` and ``stage1_pre`` … (maps before pooling), ``pool``.

    Source of the idea: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015; He et al., "Delving Deep into
    Rectifiers", ICCV 2015, for the second initialisation.

    Args:
        in_channels: Channels of the images.
        width: Channels of every layer.
        depth: Number of convolutions, a multiple of three.
        classes: Number of classes.
        init: ``"default"`` or ``"he"``.

    Raises:
        ValueError: If a size is not positive, ``depth`` is no multiple of three or ``init`` is unknown.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 16,
        depth: int = 18,
        classes: int = 10,
        *,
        init: Literal["default", "he"] = "default",
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, width=width, depth=depth, classes=classes)
        if depth % 3:
            raise ValueError(f"depth must be a multiple of 3, got {depth}")
        if init not in ("default", "he"):
            raise ValueError(f"init must be 'default' or 'he', got {init!r}")
        self.in_channels = in_channels
        widths = [in_channels, *[width] * depth]
        convs = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths)]
        third = depth // 3
        self.stage1 = nn.ModuleList(convs[:third])
        self.stage2 = nn.ModuleList(convs[third : 2 * third])
        self.stage3 = nn.ModuleList(convs[2 * third :])
        self.fc = nn.Linear(width, classes)
        if init == "he":
            for conv in convs:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, H, W)``; the maps have 1, 1/2 and 1/4 of H and W."""
        check_images(images, self.in_channels)
        features: dict[str, Tensor] = {}
        maps = images
        for number, stage in enumerate((self.stage1, self.stage2, self.stage3), start=1):
            if number > 1:
                maps = F.max_pool2d(maps, 2)
            for conv in stage:
                pre = conv(maps)
                maps = F.relu(pre)
            features[f"stage{number}_pre"], features[f"stage{number}"] = pre, maps
        features["pool"] = maps.mean((2, 3))
        return Output(self.fc(features["pool"]), features)


def _check_sizes(classes: int, channels: Sequence[int], feature: int, in_channels: int, size: int) -> None:
    check_counts(classes=classes, feature=feature, in_channels=in_channels, size=size)
    if not channels:
        raise ValueError("channels must name at least one block, got ()")
    for width in channels:
        check_counts(channels=width)


def _blocks(in_channels: int, channels: Sequence[int], *, padding: int, bias: bool) -> nn.ModuleList:
    widths = (in_channels, *channels)
    return nn.ModuleList(
        ConvBlock(before, after, padding=padding, bias=bias) for before, after in pairwise(widths)
    )


def _run_blocks(blocks: nn.ModuleList, maps: Tensor, features: dict[str, Tensor]) -> Tensor:
    for number, block in enumerate(blocks, start=1):
        maps, features[f"block{number}_pre"], features[f"block{number}"] = block(maps)
    return maps
