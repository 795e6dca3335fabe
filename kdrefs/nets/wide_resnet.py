"""Wide residual networks for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdrefs.nets.output import Output, check_counts, check_images
from kdrefs.nets.resnet import conv3x3, kaiming_fan_out, preact_stage, run_preact_stages


class WideResNet(nn.Module):
    """WRN-depth-widen: three stages of pre-activation blocks, widened, with a final BN and ReLU.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, section 2 and table 1; initialisation as
    in RepDistiller. Parameters with 100 classes: WRN-16-2 703,284; WRN-40-1 569,780; WRN-40-2 2,255,156. With 10
    classes: WRN-28-10 36,479,194.

    Features: ``layer1_sum`` … ``layer3_sum`` (the residual stream, what attention transfer and RepDistiller take),
    ``layer1`` … ``layer3`` and their ``…_pre`` (the stream after the normalisation that follows), ``pool``
    (non-negative).

    Args:
        depth: 6n + 4.
        widen: Factor on the channels 16, 32, 64 of the stages.
        classes: Number of classes.
        dropout: Probability of dropping a value between the convolutions of a block.
        in_channels: Channels of the images.

    Raises:
        ValueError: If ``depth`` is not 6n + 4, or another argument is out of range.
    """

    def __init__(
        self, depth: int, widen: int, classes: int = 10, *, dropout: float = 0.0, in_channels: int = 3
    ) -> None:
        super().__init__()
        check_counts(depth=depth, widen=widen, classes=classes, in_channels=in_channels)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 40), got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.in_channels = in_channels
        blocks = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv3x3(in_channels, widths[0])
        self.layer1, self.layer2, self.layer3 = (
            preact_stage(
                blocks, widths[k], widths[k + 1], 1 if k == 0 else 2, shortcut="identity", dropout=dropout
            )
            for k in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        kaiming_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Output:
        """Classify ``images`` ``(B, in_channels, H, W)``; maps have 1, 1/2 and 1/4 of H and W."""
        check_images(images, self.in_channels)
        features: dict[str, Tensor] = {}
        maps = run_preact_stages((self.layer1, self.layer2, self.layer3), self.conv1(images), features)
        features["layer3_pre"] = self.bn1(maps)
        features["layer3"] = F.relu(features["layer3_pre"])
        features["pool"] = features["layer3"].mean((2, 3))
        return Output(self.fc(features["pool"]), features)
