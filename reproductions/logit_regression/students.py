"""The shallow student: one hidden layer, with or without linear units or a convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kdrefs.methods.logit_regression import FactorizedLinear, LogitStatistics
from kdrefs.nets import Output
from kdrefs.training import evaluation_mode


class ShallowNet(nn.Module):
    """Pixels, one wide hidden layer with ReLU, logits.

    Features: ``hidden``, and ``outputs``, the logits on the scale of :meth:`standardise`.

    Args:
        in_channels: Channels of the images.
        size: Height and width of the images.
        classes: Number of classes.
        hidden: Units of the hidden layer.
        rank: Linear units before it; None for none.
        conv: Channels of a 5x5 convolution with ReLU and 4x4 max-pooling before everything else; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        classes: int,
        hidden: int,
        *,
        rank: int | None = None,
        conv: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = None if conv is None else nn.Conv2d(in_channels, conv, 5, padding=2)
        inputs = in_channels * size**2 if conv is None else conv * (size // 4) ** 2
        self.hidden: nn.Module
        if rank is None:
            self.hidden = nn.Linear(inputs, hidden)
        else:
            self.hidden = FactorizedLinear(inputs, hidden, rank)
        self.classifier = nn.Linear(hidden, classes)
        self.register_buffer("mean", torch.zeros(classes))
        self.register_buffer("std", torch.ones(classes))

    def standardise(self, statistics: LogitStatistics) -> None:
        """Make ``outputs`` stand for logits of that mean and standard deviation."""
        self.get_buffer("mean").copy_(statistics.mean)
        self.get_buffer("std").copy_(statistics.std)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, size, size)``."""
        maps = images if self.conv is None else F.max_pool2d(F.relu(self.conv(images)), 4)
        hidden = F.relu(self.hidden(maps.flatten(1)))
        outputs = self.classifier(hidden)
        scale = LogitStatistics(self.get_buffer("mean"), self.get_buffer("std"))
        return Output(scale.restored(outputs), {"hidden": hidden, "outputs": outputs})


def cost(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Parameters in thousands, and operations of a forward pass in MFLOP an image, counted on ``images``."""
    with evaluation_mode(network), FlopCounterMode(display=False) as counter:
        network(images)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()) / 1000,
        "mflop": counter.get_total_flops() / len(images) / 1e6,
    }
