"""The paper's largest network with the layers that it looks at by name."""

from __future__ import annotations

import torch
from torch import nn

from kdrefs.nets import FeatureNet

LAYERS = {"conv": "features.29", "fc1": "classifier.1", "fc2": "classifier.4"}


def vgg16(classes: int, seed: int, size: int = 224) -> FeatureNet:
    """VGG-16 for images of 224 pixels, with ``conv``, ``fc1`` and ``fc2`` behind their ReLUs as features.

    Args:
        classes: Number of classes.
        seed: Of the initial weights.
        size: Height and width of the images in pixels, a multiple of 32.
    """
    from torchvision.models import vgg16 as build

    if size < 32 or size % 32:
        raise ValueError(f"size: expected a multiple of 32, got {size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = build(weights=None, num_classes=classes)
    return FeatureNet(net, LAYERS)
