"""Figures of the NST chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.nst import nst_loss
from reproductions.harness.runs import Result
from reproductions.nst.run import methods
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import STAGES

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 4",
    "nst": "NST, polynomial",
    "nst_linear": "NST, linear",
    "nst_gaussian": "NST, Gaussian",
    "nst_kd": "NST and KD",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("nst",))


def gram_figure(results: Sequence[Result], config: Config) -> Figure:
    """What the polynomial kernel compares: the Gram matrix over positions, averaged over the test images.

    Args:
        results: The teacher's first. Titles give the loss against it, averaged over the test images too.
        config: Their profile.
    """
    maps = [_last_maps(result, config) for result in results]
    grams = [gram(features).mean(0) for features in maps]
    low, high = (float(bound) for bound in torch.stack([torch.stack(grams).min(), torch.stack(grams).max()]))
    figure, panels = plt.subplots(
        1, len(results), figsize=(2.4 * len(results) + 0.6, 2.9), layout="constrained"
    )
    image = None
    for axes, result, features, matrix in zip(panels, results, maps, grams, strict=True):
        image = axes.imshow(matrix.numpy(), vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        title = ARM_TITLES[result.run.arm]
        if features is not maps[0]:
            title += f"\nMMD² {float(nst_loss(features, maps[0])):.4f}"
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    assert image is not None
    figure.colorbar(image, ax=panels, label="mean over channels", shrink=0.8)
    return figure


def gram(features: Tensor) -> Tensor:
    """``(batch, positions, positions)``: products of two positions, averaged over the channels of unit norm."""
    unit = F.normalize(features.flatten(2), dim=2)
    return unit.mT @ unit / unit.shape[1]


def _last_maps(result: Result, config: Config) -> Tensor:
    student, guide = (f"{name}_pre" for name in STAGES[result.run.data][-1])
    name = guide if result.run.arm == "teacher" else student
    network = figures.network_of(result, config, methods(result.run.data), "reproductions.nst.run")
    return figures.test_features(network, result, config, name)[name]
