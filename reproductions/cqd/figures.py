"""Figures of the chapter on cross quality distillation."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reproductions.cqd.degradations import load
from reproductions.cqd.training import Recipe
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Result
from reproductions.protocols.settings import Setting

ARM_TITLES = {
    "a": "A, tested on A",
    "b": "B",
    "a_on_b": "A, tested on B",
    "tuned": "A, then tuned on B",
    "cqd": "CQD from scratch",
    "a_cqd": "CQD from A",
    "mixed": "A and B mixed",
    "b_long": "B, twice as long",
    "a_cqd_50": "CQD from A, a quarter of the weight",
    "a_self": "from A, answers of B to B",
    "a_cqd_other": "CQD from A, moved otherwise",
    "a_cqd_still": "CQD from A, answers stored once",
}
KIND_TITLES = {
    "lowres": "low resolution",
    "edges": "edges",
    "distorted": "distorted",
    "localised": "not localised",
}


def arms_figure(results: Sequence[Result], setting: Setting[Recipe]) -> Figure:
    """Test accuracy of a setting's arms: one dot a seed, mean and 95 % interval."""
    rows = {
        ARM_TITLES[arm]: [
            result.metrics["accuracy"]
            for result in results
            if (result.run.data, result.run.arm) == (setting.data, arm)
        ]
        for arm in (*setting.arms, *setting.few)
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    interval_plot(axes, rows, label="test accuracy, %", highlight=[ARM_TITLES["a_cqd"]])
    return figure


def qualities_figure(kinds: Sequence[str], count: int = 6) -> Figure:
    """The first test images of each kind, clean above degraded."""
    figure, panels = plt.subplots(
        2 * len(kinds),
        count,
        figsize=(1.0 * count + 1.2, 2.0 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for row, kind in enumerate(kinds):
        _, test, _ = load(kind, probe=(1, count))
        for place, (name, images) in enumerate((("clean", test.clean), ("degraded", test.degraded))):
            for axes, image in zip(panels[2 * row + place], images, strict=True):
                axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
                axes.set_xticks([])
                axes.set_yticks([])
            title = KIND_TITLES[kind.partition("-")[2]] if place else name
            panels[2 * row + place][0].set_ylabel(
                title, fontsize="small", rotation=0, ha="right", va="center"
            )
    return figure
