"""Figures of the chapter on structured distillation; each function draws one from what a run produced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from kdrefs.kernels import unit_rows
from kdrefs.methods.structured_kd import Beta
from reproductions.harness.runs import Context, Result
from reproductions.protocols import figures
from reproductions.protocols.dense import dense_batches, dense_outputs, first, load_scenes
from reproductions.structured_kd.run import Config, network_of, setting_of
from reproductions.structured_kd.training import FEATURE

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "pi": "pixels",
    "pi_pa": "pixels and pairs",
    "pi_pa_ho": "pixels, pairs, whole map",
    "pi_double": "pixels, twice the weight",
    "pi_pa_ho_plain": "whole map, image unseen",
    "pi_pa_near": "pairs, 25 nearest nodes",
    "pi_pa_coarse": "pairs, coarse patches",
    "pi_pa_official": "pairs, as in the code",
    "pi_printed": "pixels, as printed",
}
COLOURS = ListedColormap(["0.15", "C0", "C1", "C2", "C3"])


def arms_figure(results: Sequence[Result], setting: Any, metric: str = "miou") -> Figure:
    """A metric of every arm of a setting: one dot a seed, mean and 95 % interval."""
    label = {"miou": "mean intersection over union, %", "affinity_error": "100 times the pair-wise loss"}[
        metric
    ]
    return figures.arms_figure(
        results, setting, ARM_TITLES, metric=metric, label=label, highlight=("pi_pa_ho",)
    )


def maps_figure(results: Sequence[Result], config: Config, count: int = 6) -> Figure:
    """Test images, their masks, and what the networks of some results make of them."""
    recipe = setting_of(results[0].run, config).recipe
    _, test, classes = load_scenes(recipe.scenes)
    some = first(test, count)
    rows: list[tuple[str, np.ndarray]] = [("image", some.images), ("mask", some.extras["masks"])]
    for result in results:
        predicted = _outputs(result, config, count)["logits"].argmax(1)
        rows.append((ARM_TITLES[result.run.arm], predicted.numpy()))
    figure, panels = plt.subplots(
        len(rows), count, figsize=(1.25 * count + 1.3, 1.25 * len(rows)), layout="constrained"
    )
    for line, (title, pictures) in zip(panels, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            colours = {} if picture.ndim == 3 else {"cmap": COLOURS, "vmin": -0.5, "vmax": 4.5}
            axes.imshow(picture, interpolation="nearest", **colours)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize="small")
    figure.suptitle(" · ".join(classes), fontsize="small")
    return figure


def affinities_figure(results: Sequence[Result], config: Config, sample: int = 0) -> Figure:
    """How alike one node is to every other, in the last maps of some results' networks on one test image."""
    recipe = setting_of(results[0].run, config).recipe
    _, test, _ = load_scenes(recipe.scenes)
    mask = torch.from_numpy(test.extras["masks"][sample])
    side = _side(recipe.beta)
    inside = (mask > 0).nonzero().double().mean(0).int()
    inside = (mask > 0).nonzero()[((mask > 0).nonzero() - inside).square().sum(1).argmin()]
    figure, panels = plt.subplots(
        1, 1 + len(results), figsize=(2.0 * (1 + len(results)) + 0.6, 2.3), layout="constrained"
    )
    panels[0].imshow(test.images[sample], interpolation="nearest")
    panels[0].set_title("image", fontsize="small")
    image = None
    for axes, result in zip(panels[1:], results, strict=True):
        maps = _outputs(result, config, sample + 1)[FEATURE][sample : sample + 1]
        found = affinities(maps, recipe.beta, int(inside[0]) // side, int(inside[1]) // side)
        image = axes.imshow(found.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(ARM_TITLES[result.run.arm], fontsize="small")
    for axes, scale in zip(panels, (side, *[1] * len(results)), strict=True):
        axes.plot(int(inside[1]) // side * scale, int(inside[0]) // side * scale, "x", color="k")
        axes.set(xticks=[], yticks=[])
    assert image is not None
    figure.colorbar(image, ax=panels[1:], label="affinity", shrink=0.8)
    return figure


def affinities(maps: Tensor, beta: Beta, row: int, column: int) -> Tensor:
    """Affinity of one node with all others, (rows, columns)."""
    side = _side(beta)
    pooled = F.avg_pool2d(maps, side, ceil_mode=True)[0]
    rows = unit_rows(pooled.flatten(1).mT)
    return (rows @ rows[row * pooled.shape[2] + column]).view(pooled.shape[1:])


def _side(beta: Beta) -> int:
    return beta[0] if isinstance(beta, tuple) else round(beta**0.5)


def _outputs(result: Result, config: Config, count: int) -> dict[str, Tensor]:
    recipe, context = setting_of(result.run, config).recipe, Context.of(result)
    _, test, _ = load_scenes(recipe.scenes)
    batches = dense_batches(recipe.scenes, first(test, count), context.device, training=False)
    found = dense_outputs(network_of(result.run, config, context), batches, FEATURE)
    return {name: value.cpu() for name, value in found.items()}
