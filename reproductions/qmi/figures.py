"""Figures of the QMI chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.qmi import mean_squared_distance, quadratic_mutual_information
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result
from reproductions.protocols.embeddings import ARM_TITLES
from reproductions.protocols.pairs import PAIRS, load_pair_data
from reproductions.qmi.run import KERNEL_TITLES, Config, Setting, features_of


def arms_figure(results: Sequence[Result], setting: Setting, metric: str, *, label: str) -> Figure:
    """One metric of every network of a setting that has it: one dot a seed, mean and 95 % interval."""
    rows = {
        ARM_TITLES[arm]: values
        for arm in setting.arms
        if (
            values := [
                result.metrics[metric] for result in _of(results, setting, arm) if metric in result.metrics
            ]
        )
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    interval_plot(axes, rows, label=label, highlight=[ARM_TITLES["pkt"]])
    return figure


def potentials_figure(results: Sequence[Result], setting: Setting, kernel: str = "cosine") -> Figure:
    """V_IN against V_ALL of every network, one dot a seed; the QMI of balanced classes is the height over the line."""
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    low, high = np.inf, -np.inf
    for number, arm in enumerate(arm for arm in setting.arms if arm != "across"):
        points = [
            (result.metrics[f"all_{kernel}"], result.metrics[f"within_{kernel}"])
            for result in _of(results, setting, arm)
        ]
        horizontal, vertical = np.array(points).T
        axes.plot(
            horizontal, vertical, "*" if arm == "teacher" else "o", color=f"C{number}", label=ARM_TITLES[arm]
        )
        low, high = min(low, horizontal.min()), max(high, horizontal.max())
    axes.plot([low, high], [low, high], "--", color="0.5", label="no information")
    axes.set(xlabel=r"$V_{ALL}$", ylabel=r"$V_{IN}$", title=KERNEL_TITLES[kernel])
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.2)
    return figure


def correlation_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """QMI against mAP, one panel a kernel, one dot a student and seed; the mean rank correlation in the title."""
    figure, panels = plt.subplots(2, 2, figsize=(7.4, 6.0), sharey=True, layout="constrained")
    across = _of(results, setting, "across")
    for axes, (kernel, title) in zip(panels.flat, KERNEL_TITLES.items(), strict=True):
        for number, arm in enumerate(arm for arm in setting.arms if arm not in ("teacher", "across")):
            points = [
                (result.metrics[f"qmi_{kernel}"], result.metrics["map"])
                for result in _of(results, setting, arm)
            ]
            axes.plot(*np.array(points).T, "o", color=f"C{number}", markersize=4, label=ARM_TITLES[arm])
        mean = np.mean([result.metrics[f"rank_{kernel}"] for result in across])
        axes.set_title(f"{title}\nrank correlation {mean:.2f}", fontsize="medium")
        axes.set_xlabel("QMI")
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.2)
    for axes in panels[:, 0]:
        axes.set_ylabel("mAP, %")
    panels[0, 0].legend(frameon=False, fontsize="x-small")
    return figure


def bandwidth_figure(
    spaces: Sequence[tuple[str, Tensor]], labels: Tensor, factors: Sequence[float]
) -> Figure:
    """QMI of feature spaces against the bandwidth, in units of each space's mean squared distance.

    Args:
        spaces: Arm and features ``(N, width)``.
        labels: Classes ``(N,)``.
        factors: Bandwidths over the mean squared distance.
    """
    figure, axes = plt.subplots(figsize=(6.0, 3.2))
    for arm, features in spaces:
        scale = float(mean_squared_distance(features))
        curve = [
            float(quadratic_mutual_information(features.double(), labels, factor * scale))
            for factor in factors
        ]
        axes.semilogx(factors, curve, label=ARM_TITLES[arm])
    axes.set_xlabel("bandwidth over the mean squared distance")
    axes.set_ylabel("QMI")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    return figure


def spaces_of(
    results: Sequence[Result], config: Config, setting: Setting, arms: Sequence[str], seed: int = 0
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """The test images' features by some networks of one seed, and their labels."""
    _, test, _ = load_pair_data(PAIRS[config.pair])
    spaces = []
    for arm in arms:
        result = next(result for result in _of(results, setting, arm) if result.run.seed == seed)
        (features,) = features_of(result.run, config, Context.of(result), test)
        spaces.append((arm, features))
    return spaces, torch.from_numpy(test.labels).long()


def _of(results: Sequence[Result], setting: Setting, arm: str) -> list[Result]:
    return [result for result in results if (result.run.data, result.run.arm) == (setting.data, arm)]
