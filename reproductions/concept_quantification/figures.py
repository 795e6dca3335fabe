"""Figures of the chapter on concept quantification; each function draws one from what a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.concept_quantification import ConceptMetrics, concept_counts, concept_metrics
from reproductions.concept_quantification import sources
from reproductions.concept_quantification.agreement import WAYS, maps
from reproductions.concept_quantification.run import Config, Setting
from reproductions.concept_quantification.studies import Study, studied
from reproductions.harness.runs import Context, Result
from reproductions.harness.statistics import mean_interval

ARM_TITLES = {
    "teacher": "teacher",
    "baseline": "labels (B)",
    "student": "features (S)",
    "kd": "predictions (KD)",
}
WAY_TITLES = {
    "closed-form": "closed form",
    "converged": "optimised to convergence",
    "converged-small": "the same, small noise",
    "official": "official stop, λ = 7",
    "official-6": "official stop, λ = 6",
    "official-3": "official stop, λ = 3",
}
STYLES = {"teacher": ("C7", ":"), "baseline": ("C0", "-"), "student": ("C3", "--"), "kd": ("C2", "-.")}


def epochs_figure(results: Sequence[Result], config: Config) -> Figure:
    """λ and the counts after every epoch, mean over the seeds, a line an arm; chance dotted."""
    setting = config.settings[0]
    figure, panels = plt.subplots(1, 3, figsize=(9.0, 2.9), layout="constrained")
    titles = {"ratio": "λ", "foreground": "concepts on the object", "background": "concepts off the object"}
    chance = 0.0
    for arm in setting.arms:
        found = [_metrics(one, setting) for one in _studies(results, setting, arm)]
        colour, style = STYLES[arm]
        chance = float(np.mean([one.chance for one in found]))
        for axes, name in zip(panels, titles, strict=True):
            mean = torch.stack([getattr(one, name) for one in found]).nanmean(0)
            epochs = setting.recipe.every * np.arange(1, len(mean) + 1)
            axes.plot(epochs, mean, color=colour, linestyle=style, label=ARM_TITLES[arm])
    panels[0].axhline(chance, color="0.5", linewidth=1, linestyle=":")
    panels[0].annotate(
        "chance", (1, chance), xytext=(0, 3), textcoords="offset points", color="0.5", fontsize="small"
    )
    for axes, title in zip(panels, titles.values(), strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.2)
    panels[1].legend(frameon=False, fontsize="small")
    return figure


def sweep_figure(results: Sequence[Result], config: Config) -> Figure:
    """Differences of student and of KD to the baseline against b: mean and 95 % interval over paired seeds."""
    data = config.settings[0].data
    swept = sorted(
        (s for s in config.settings if s.kind in ("all", "sweep") and s.data.partition("-b")[0] == data),
        key=lambda s: s.threshold,
    )
    figure, panels = plt.subplots(1, 3, figsize=(9.0, 2.9), layout="constrained")
    for axes, (name, title) in zip(
        panels, {"ratio": "λ", "d_mean": "D_mean", "rho": "ρ"}.items(), strict=True
    ):
        for number, arm in enumerate(("student", "kd")):
            for place, setting in enumerate(swept):
                differences = _differences(results, setting.data, name, arm)
                if not differences:
                    continue
                mean, low, high = mean_interval(differences)
                error = [[mean - (mean if low is None else low)], [(mean if high is None else high) - mean]]
                axes.errorbar(
                    place + 0.16 * (number - 0.5),
                    mean,
                    error,
                    fmt="os"[number],
                    color=STYLES[arm][0],
                    capsize=3,
                    label=ARM_TITLES[arm] if place == 0 else None,
                )
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set_xticks(range(len(swept)), [f"{setting.threshold:g}" for setting in swept])
        axes.set(title=f"{title}, less the baseline's", xlabel="b, nats")
        axes.grid(axis="y", alpha=0.2)
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def maps_figure(results: Sequence[Result], config: Config, count: int = 4) -> Figure:
    """Images, and how far each cell's entropy lies below the background's, an arm a column; concepts are framed."""
    setting = config.settings[0]
    studies = {arm: _studies(results, setting, arm)[0] for arm in ("baseline", "student", "kd")}
    images = sources.load(setting.recipe.source)
    figure, panels = plt.subplots(
        count,
        1 + len(studies),
        figsize=(1.7 * (1 + len(studies)), 1.75 * count),
        layout="constrained",
        squeeze=False,
    )
    for row in range(count):
        show_image(panels[row, 0], images.measured.images[row], images.foreground[row])
        for axes, study in zip(panels[row, 1:], studies.values(), strict=True):
            show_map(axes, study.entropy[row, -1], study.foreground[row], setting.threshold)
    for axes, title in zip(panels[0], ["image", *(ARM_TITLES[arm] for arm in studies)], strict=True):
        axes.set_title(title, fontsize="medium")
    return figure


def ways_figure(results: Sequence[Result], config: Config, count: int = 3) -> Figure:
    """The same images and network, a way of making the map a column; concepts are framed."""
    setting = next(setting for setting in config.settings if setting.kind == "ways")
    study = _studies(results, config.settings[0], "baseline")[0]
    images = sources.head(sources.load(setting.recipe.source), count)
    pixels = sources.pixels(setting.recipe.source, images.measured, torch.device("cpu"))
    ways = ("closed-form", "converged", "official-3", "official")
    assert set(ways) <= WAYS.keys()
    figure, panels = plt.subplots(
        count,
        1 + len(ways),
        figsize=(1.7 * (1 + len(ways)), 1.75 * count),
        layout="constrained",
        squeeze=False,
    )
    for column, way in enumerate(ways, start=1):
        found = maps(study.network, pixels, setting.recipe, way).entropy
        panels[0, column].set_title(WAY_TITLES[way], fontsize="small")
        for row in range(count):
            show_map(panels[row, column], found[row], images.foreground[row], setting.threshold)
    for row in range(count):
        show_image(panels[row, 0], images.measured.images[row], images.foreground[row])
    return figure


def show_image(axes: Axes, image: np.ndarray, foreground: Tensor) -> None:
    """An image (H, W, C) with the outline of its object's cells."""
    axes.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
    rows, columns = foreground.shape
    height, width = image.shape[:2]
    outline = foreground.numpy().repeat(height // rows, 0).repeat(width // columns, 1).astype(float)
    axes.contour(outline, levels=[0.5], colors="C1", linewidths=1)
    axes.set_axis_off()


def show_map(axes: Axes, entropy: Tensor, foreground: Tensor, threshold: float) -> None:
    """How far entropies lie below the background's mean; concepts are framed."""
    below = (entropy[~foreground].mean() - entropy).numpy()
    concepts = concept_counts(entropy[None], foreground, threshold).concepts[0]
    axes.imshow(below, cmap="magma", vmin=-1, vmax=2)
    for row, column in concepts.nonzero().tolist():
        axes.add_patch(
            plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=0.8)
        )
    axes.set_axis_off()


def _metrics(study: Study, setting: Setting) -> ConceptMetrics:
    return concept_metrics(study.entropy.double(), study.foreground, study.by_epoch, setting.threshold)


def _studies(results: Sequence[Result], setting: Setting, arm: str) -> list[Study]:
    own = [result for result in results if (result.run.data, result.run.arm) == (setting.data, arm)]
    return [studied(setting.recipe, arm, result.run.seed, Context.of(result)) for result in own]


def _differences(results: Sequence[Result], data: str, metric: str, arm: str) -> list[float]:
    values = {
        (result.run.arm, result.run.seed): result.metrics[metric]
        for result in results
        if result.run.data == data and metric in result.metrics
    }
    return [
        value - values["baseline", seed]
        for (own, seed), value in values.items()
        if own == arm and ("baseline", seed) in values
    ]
