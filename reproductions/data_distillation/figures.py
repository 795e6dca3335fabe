"""Figures of the chapter on data distillation; each function draws one from what a run produced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.data_distillation.run import Config, setting_of
from reproductions.data_distillation.tasks import landmarks_of, parts_of
from reproductions.data_distillation.training import ARMS, pseudo_labels
from reproductions.harness.runs import Context, Result
from reproductions.harness.statistics import mean_interval
from reproductions.protocols import figures

ARM_TITLES = {
    "teacher": "teacher",
    "labelled": "labelled images alone",
    "single": "labels from one view",
    "multi": "labels from transforms",
    "finetune": "the same, teacher trained further",
    "all": "all true labels",
    "multi_half": "half as many labels",
    "multi_double": "twice as many labels",
}


def arms_figure(results: Sequence[Result], setting: Any) -> Figure:
    """Average precision of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(
        results, setting, ARM_TITLES, metric="ap", label="average precision, %", highlight=("multi",)
    )


def labels_figure(result: Result, config: Config, count: int = 6) -> Figure:
    """Unlabelled images with the teacher's labels from one view and from transforms, and the true ones."""
    recipe, seed, context = setting_of(result.run, config).recipe, result.run.seed, Context.of(result)
    parts = parts_of(recipe.task, seed)
    rows = [
        (f"{ARM_TITLES[arm]}", pseudo_labels(ARMS[arm], recipe, seed, context)[0].cpu())
        for arm in ("single", "multi")
    ]
    rows.append(("true", landmarks_of(parts.unlabelled)))
    figure, panels = plt.subplots(
        len(rows), count, figsize=(1.4 * count + 1.4, 1.4 * len(rows) + 0.4), layout="constrained"
    )
    for line, (title, labels) in zip(panels, rows, strict=True):
        for axes, image, own in zip(line, parts.unlabelled.images, labels.numpy(), strict=False):
            axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="nearest")
            _mark(axes, own)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize="small")
    for kind, name in enumerate(recipe.task.names):
        figure.axes[0].plot([], [], "o", color=f"C{kind}", label=name)
    figure.legend(loc="outside lower center", ncols=len(recipe.task.names), fontsize="small", frameon=False)
    return figure


def threshold_figure(results: Sequence[Result], setting: Any) -> Figure:
    """Gain over labelled images alone, and precision and recall of the labels, against their number."""
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
    own = [result for result in results if result.run.data == setting.data]
    alone = {result.run.seed: result.metrics["ap"] for result in own if result.run.arm == "labelled"}
    for arm in ("multi_half", "multi", "multi_double"):
        found = [result for result in own if result.run.arm == arm]
        number = float(np.mean([result.metrics["labels"] for result in found]))
        gains = [result.metrics["ap"] - alone[result.run.seed] for result in found]
        panels[0].plot([number] * len(gains), gains, ".", color="0.6")
        mean, low, high = mean_interval(gains)
        panels[0].plot([number], [mean], "o", color="C0")
        if low is not None and high is not None:
            panels[0].vlines(number, low, high, color="C0")
        for name, colour in (("label_precision", "C2"), ("label_recall", "C1")):
            panels[1].plot(number, np.mean([result.metrics[name] for result in found]), "o", color=colour)
    panels[0].axhline(0, color="0.5", linewidth=1)
    panels[0].set_ylabel("gain in average precision, points")
    panels[1].plot([], [], "o", color="C2", label="right")
    panels[1].plot([], [], "o", color="C1", label="landmarks labelled")
    panels[1].set_ylabel("%")
    panels[1].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.set_xlabel("labels an unlabelled image")
        axes.grid(alpha=0.2)
    return figure


def _mark(axes: Axes, landmarks: np.ndarray) -> None:
    for x, y, kind in landmarks:
        if kind >= 0:
            axes.plot(
                x, y, "o", color=f"C{int(kind)}", markersize=5, markeredgecolor="w", markeredgewidth=0.8
            )
