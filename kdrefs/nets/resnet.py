"""Residual networks for 32x32 images: the CIFAR family of He et al. and the teacher of the PKT paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdrefs.nets.output import Output, check_counts, check_images


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding 1 and without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Shortcut without parameters (option A of He et al.): take every other pixel, add channels of zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.pad = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        return F.pad(maps[:, :, :: self.stride, :: self.stride], self.pad)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation beside a shortcut; ReLU after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            if shortcut == "pad":
                self.downsample = PadShortcut(in_channels, out_channels, stride)
            else:
                self.downsample = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(out_channels),
                )

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum before and after its ReLU."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        pre = residual + (maps if self.downsample is None else self.downsample(maps))
        return pre, F.relu(pre)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images: a 3x3 stem, three stages of n blocks, average pooling.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Wide variants,
    projection shortcuts, initialisation and parameter names follow RepDistiller (Tian et al., "Contrastive
    Representation Distillation", ICLR 2020), whose checkpoints therefore load as they are. Parameters with
    projections and 100 classes: ResNet-20 278,324; ResNet-56 861,620; ResNet-110 1,736,564; ResNet-8x4 1,233,540;
    ResNet-32x4 7,433,860. With ``shortcut="pad"`` (the original) and 10 classes: ResNet-20 269,722; ResNet-56
    853,018; ResNet-110 1,727,962.

    Features: ``stem``, ``layer1`` … ``layer3``, each also ``…_pre``, and ``pool`` (non-negative).

    Args:
        depth: 6n + 2.
        classes: Number of classes.
        widths: Channels of the stem and of the three stages.
        shortcut: ``"projection"`` (1x1 convolution and batch normalisation) or ``"pad"`` where shapes change.
        in_channels: Channels of the images.

    Raises:
        ValueError: If ``depth`` is not 6n + 2, or another argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        widths: Sequence[int] = (16, 16, 32, 64),
        *,
        shortcut: Literal["projection", "pad"] = "projection",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(depth=depth, classes=classes, in_channels=in_channels)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 20, 32, 44, 56, 110), got {depth}")
        if len(widths) != 4:
            raise ValueError(f"widths must name the stem and three stages, got {tuple(widths)}")
        for width in widths:
            check_counts(widths=width)
        if shortcut not in ("projection", "pad"):
            raise ValueError(f"shortcut must be 'projection' or 'pad', got {shortcut!r}")
        if shortcut == "pad" and list(widths) != sorted(widths):
            raise ValueError(f"widths must not decrease with shortcut='pad', got {tuple(widths)}")
        self.in_channels = in_channels
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks = (depth - 2) // 6
        self.layer1 = _stage(blocks, widths[0], widths[1], 1, shortcut)
        self.layer2 = _stage(blocks, widths[1], widths[2], 2, shortcut)
        self.layer3 = _stage(blocks, widths[2], widths[3], 2, shortcut)
        self.fc = nn.Linear(widths[3], classes)
        kaiming_fan_out(self)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, H, W)``; maps have 1, 1/2 and 1/4 of H and W."""
        check_images(images, self.in_channels)
        features = {"stem_pre": self.bn1(self.conv1(images))}
        features["stem"] = maps = F.relu(features["stem_pre"])
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            for block in stage:
                pre, maps = block(maps)
            features[f"layer{number}_pre"], features[f"layer{number}"] = pre, maps
        features["pool"] = maps.mean((2, 3))
        return Output(self.fc(features["pool"]), features)


class PreActBlock(nn.Module):
    """Two convolutions, each behind batch normalisation and ReLU; nothing follows the sum.

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map.
        stride: Of the first convolution and the shortcut.
        shortcut: What an unchanged shape carries past the block: ``"identity"`` the input itself,
            ``"activated"`` the normalised, rectified input.
        dropout: Probability of dropping a value between the convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shortcut: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.activated = shortcut == "activated"
        self.dropout = dropout
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum, and the input after normalisation, before and after the ReLU."""
        pre = self.bn1(maps)
        post = F.relu(pre)
        carried = self.shortcut(post) if len(self.shortcut) or self.activated else maps
        hidden = F.relu(self.bn2(self.conv1(post)))
        hidden = F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        return self.conv2(hidden) + carried, pre, post


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 for 32x32 images, the teacher of the PKT paper: 11,171,274 parameters.

    Stages of two blocks with 64, 128, 256 and 512 channels. Neither normalisation nor ReLU follows the last
    block, so the pooled 512-d feature is signed. With the default ``shortcut="activated"`` the network computes
    what the authors' code does: an unchanged shape carries the rectified input past the block, where He et al.
    carry the input itself (``"identity"``). Parameter names are the authors'.

    Sources: Passalis and Tefas, ECCV 2018, section 4, and the authors' ``models/resnet.py``; He et al., "Identity
    Mappings in Deep Residual Networks", ECCV 2016.

    Features: ``stem`` and ``stem_pre``; ``layer1_sum`` … ``layer4_sum`` (the residual stream), ``layer1`` …
    ``layer3`` and their ``…_pre`` (the stream after the next stage's first normalisation); ``pool``.

    Args:
        classes: Number of classes.
        shortcut: ``"activated"`` or ``"identity"``.
        in_channels: Channels of the images.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        shortcut: Literal["activated", "identity"] = "activated",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(classes=classes, in_channels=in_channels)
        if shortcut not in ("activated", "identity"):
            raise ValueError(f"shortcut must be 'activated' or 'identity', got {shortcut!r}")
        self.in_channels = in_channels
        self.conv1 = conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = preact_stage(2, 64, 64, 1, shortcut=shortcut)
        self.layer2 = preact_stage(2, 64, 128, 2, shortcut=shortcut)
        self.layer3 = preact_stage(2, 128, 256, 2, shortcut=shortcut)
        self.layer4 = preact_stage(2, 256, 512, 2, shortcut=shortcut)
        self.linear = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, H, W)``; maps have 1, 1/2, 1/4 and 1/8 of H and W."""
        check_images(images, self.in_channels)
        features = {"stem_pre": self.bn1(self.conv1(images))}
        features["stem"] = F.relu(features["stem_pre"])
        maps = run_preact_stages(
            (self.layer1, self.layer2, self.layer3, self.layer4), features["stem"], features
        )
        features["pool"] = maps.mean((2, 3))
        return Output(self.linear(features["pool"]), features)


def preact_stage(
    blocks: int, in_channels: int, out_channels: int, stride: int, *, shortcut: str, dropout: float = 0.0
) -> nn.Sequential:
    """Build a stage of pre-activation blocks; only the first changes channels and resolution."""
    first = PreActBlock(in_channels, out_channels, stride, shortcut=shortcut, dropout=dropout)
    rest = (
        PreActBlock(out_channels, out_channels, 1, shortcut=shortcut, dropout=dropout)
        for _ in range(1, blocks)
    )
    return nn.Sequential(first, *rest)


def run_preact_stages(stages: Sequence[nn.Sequential], maps: Tensor, features: dict[str, Tensor]) -> Tensor:
    """Run pre-activation stages and name their maps in ``features``; return the last residual sum.

    The normalised and rectified map of a stage is the one that the next stage's first block computes anyway, so
    that running statistics are updated once a step.
    """
    for number, stage in enumerate(stages, start=1):
        for position, block in enumerate(stage):
            maps, pre, post = block(maps)
            if position == 0 and number > 1:
                features[f"layer{number - 1}_pre"], features[f"layer{number - 1}"] = pre, post
        features[f"layer{number}_sum"] = maps
    return maps


def kaiming_fan_out(module: nn.Module) -> None:
    """Draw every convolution of ``module`` from N(0, 2 / (kernel area x output channels))."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, shortcut: str) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(1, blocks))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride, shortcut), *rest)


def resnet8(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-8: one block a stage."""
    return CifarResNet(8, classes, **options)


def resnet20(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-20: three blocks a stage."""
    return CifarResNet(20, classes, **options)


def resnet32(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-32: five blocks a stage."""
    return CifarResNet(32, classes, **options)


def resnet44(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-44: seven blocks a stage."""
    return CifarResNet(44, classes, **options)


def resnet56(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-56: nine blocks a stage."""
    return CifarResNet(56, classes, **options)


def resnet110(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-110: eighteen blocks a stage."""
    return CifarResNet(110, classes, **options)


def resnet8x4(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-8 with four times the channels: stem 32, stages 64, 128, 256."""
    return CifarResNet(8, classes, (32, 64, 128, 256), **options)


def resnet32x4(classes: int = 10, **options: Any) -> CifarResNet:
    """ResNet-32 with four times the channels: stem 32, stages 64, 128, 256."""
    return CifarResNet(32, classes, (32, 64, 128, 256), **options)
