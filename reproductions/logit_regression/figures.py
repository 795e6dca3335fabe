"""Figures of the logit regression chapter; each draws what a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result
from reproductions.logit_regression.rates import EXPLODED, swept
from reproductions.logit_regression.run import Shallow, Swept

ARM_TITLES = {
    "student": "labels alone",
    "kd": "KD, T = 4",
    "logit_regression": "logit regression",
    "logit_regression_labels": "logit regression and labels",
    "teacher": "teacher",
    "labels": "labels",
    "mimic": "logits",
    "mimic_more": "logits, more inputs",
    "labels_more": "labels of all those inputs",
    "softened": "softened probabilities, T = 4",
    "mimic_raw": "logits, not standardised",
    "labels_bottleneck": "labels, bottleneck",
    "mimic_bottleneck": "logits, bottleneck",
    "mimic_more_bottleneck": "logits, more inputs, bottleneck",
    "labels_conv": "labels, convolution",
    "mimic_more_conv": "logits, more inputs, convolution",
}
LAYERS = {"full": "one matrix", "bottleneck": "two factors"}


def shallow_figure(results: Sequence[Result], part: Shallow) -> Figure:
    """Test accuracy of teacher and students: one dot a seed, mean and 95 % interval."""
    rows = {
        ARM_TITLES[arm]: [
            result.metrics["accuracy"]
            for result in results
            if (result.run.data, result.run.arm) == (part.data, arm)
        ]
        for arm in ("teacher", *part.arms)
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    interval_plot(
        axes, rows, label="test accuracy, %", highlight=[ARM_TITLES["mimic"], ARM_TITLES["mimic_more"]]
    )
    return figure


def rates_figure(results: Sequence[Result], part: Swept) -> Figure:
    """Training loss against the learning rate after equal steps, and over the steps at the best rate of each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.0), layout="constrained")
    for arm, title in LAYERS.items():
        curves = _curves(results, part, arm)  # (seeds, rates, epochs)
        last = curves[:, :, -1]
        middle = np.median(last, 0)
        (line,) = left.loglog(part.sweep.rates, np.minimum(middle, 10), marker="o", markersize=3, label=title)
        best = np.take_along_axis(curves, last.argmin(1)[:, None, None], axis=1)[:, 0]
        right.semilogy(np.arange(1, best.shape[1] + 1), best.mean(0), color=line.get_color(), label=title)
    left.axhline(1, color="0.35", linestyle=":", linewidth=1)
    left.set_xlabel("learning rate")
    left.set_ylabel("training loss")
    left.set_title("after equal steps", fontsize="medium")
    right.set_xlabel("epoch")
    right.set_title("each at its best rate", fontsize="medium")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.2)
    return figure


def _curves(results: Sequence[Result], part: Swept, arm: str) -> np.ndarray:
    """Losses ``(seeds, rates, epochs)`` of the runs as they were trained."""
    chosen = [result for result in results if (result.run.data, result.run.arm) == (part.data, arm)]
    found = []
    for result in chosen:
        seeds = result.provenance.seeds or (result.run.seed,)
        curves = swept(part.recipe, part.sweep, arm, seeds, Context.of(result))
        found.append(curves[result.run.seed])
    return np.minimum(np.asarray(found), EXPLODED)
