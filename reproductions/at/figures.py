"""Figures of the AT chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.at import at_loss, attention_map
from reproductions.at.run import methods
from reproductions.harness.runs import Result
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, load_pair_data
from reproductions.protocols.settings import Setting, setting_of
from reproductions.protocols.tables import STAGES

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 4",
    "at": "AT, sum of squares",
    "at_p1": "AT, sum of magnitudes",
    "at_max": "AT, maximum",
    "at_kd": "AT and KD",
    "at_gradient": "AT, input gradients",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("at",))


def attention_figure(results: Sequence[Result], config: Config, images: int = 4) -> Figure:
    """Attention maps of the first test image of a few classes, a group of columns a stage, a column a network.

    Args:
        results: The teacher's first. Column heads give the distance from its maps, Eq. 2, over all test images.
        config: Their profile.
        images: How many classes.
    """
    setting = setting_of(results[0].run, config)
    _, test, _ = load_pair_data(PAIRS[setting.recipe.pair])
    chosen = [int(np.flatnonzero(test.labels == label)[0]) for label in range(images)]
    stages = STAGES[setting.data]
    widths = [1.0, *([0.25] + [1.0] * len(results)) * len(stages)]
    figure, grid = plt.subplots(
        images,
        len(widths),
        figsize=(0.85 * sum(widths), 0.85 * images + 0.6),
        width_ratios=widths,
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for line, index in zip(grid, chosen, strict=True):
        line[0].imshow(np.squeeze(test.images[index]), cmap="gray")
    grid[0][0].set_title("image", fontsize=8)
    maps = [_stage_maps(result, config) for result in results]
    for stage in range(len(stages)):
        for place, result in enumerate(results):
            column = 2 + stage * (len(results) + 1) + place
            ours, guide = maps[place][stage], maps[0][stage]
            distance = "" if place == 0 else f"\n{float(at_loss(ours, guide)):.2f}"
            title = result.run.arm.replace("_", " ").replace("at", "AT") if place else "teacher"
            grid[0][column].set_title(title + distance, fontsize=8)
            for line, index in zip(grid, chosen, strict=True):
                _show(line[column], ours[index])
    return figure


def _stage_maps(result: Result, config: Config) -> list[Tensor]:
    """Per stage the maps of all test images."""
    student = result.run.arm != "teacher"
    names = [pair[0 if student else 1] for pair in STAGES[result.run.data]]
    network = figures.network_of(result, config, methods(result.run.data), "reproductions.at.run")
    found = figures.test_features(network, result, config, *names)
    return [found[name] for name in names]


def _show(axes: Axes, features: Tensor) -> None:
    attention = attention_map(features.unsqueeze(0)).view(features.shape[1:])
    axes.imshow(attention.numpy(), vmin=0, cmap="magma", interpolation="nearest")
