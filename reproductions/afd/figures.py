"""Figures of the AFD chapter; each function draws one from what a run produced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reproductions.afd.groups import Group, cost
from reproductions.afd.run import Config, trained_of
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result, Run

ARM_TITLES = {
    "independent": "alone",
    "dml": "mutual predictions (DML)",
    "l1": "DML and L1 of the maps",
    "afd": "AFD",
    "afd_simultaneous": "AFD, one forward pass",
    "afd_pairwise": "AFD, all pairs",
}
MONITORS = {
    "discriminator": ("discriminators' loss", 0.5),
    "adversarial": ("adversarial loss", 0.25),
    "channel_gap": ("gap of the channels' statistics", None),
    "cka": ("CKA of the maps", None),
}


def accuracy_figure(results: Sequence[Result], groups: Sequence[Group]) -> Figure:
    """Test accuracy of every network and of the ensemble, a panel a group: dots are seeds."""
    widest = max(len(group.arms) * (len(group.nets) + 1) for group in groups)
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.6 * len(groups), 0.26 * widest + 1.0), squeeze=False
    )
    for axes, group in zip(panels[0], groups, strict=True):
        rows = {}
        for arm in group.arms:
            own = [result for result in results if (result.run.data, result.run.arm) == (group.data, arm)]
            names = [f"accuracy{k + 1}" for k in range(len(group.nets))]
            for name in (*names, "ensemble"):
                what = "ensemble" if name == "ensemble" else f"network {name.removeprefix('accuracy')}"
                rows[f"{ARM_TITLES[arm]}, {what}"] = [result.metrics[name] for result in own]
        interval_plot(
            axes, rows, label="test accuracy, %", highlight=[name for name in rows if name.startswith("AFD,")]
        )
        axes.set_title(group.data, fontsize="medium")
        axes.tick_params(axis="y", labelsize="x-small")
    figure.tight_layout()
    return figure


def monitors_figure(results: Sequence[Result], config: Config, group: Group) -> Figure:
    """What was watched in each epoch, a panel a number, a line an arm: mean over the seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(7.4, 5.2), sharex=True, layout="constrained")
    for number, arm in enumerate(group.arms):
        curves = _curves(results, config, group, arm)
        style = ("-", "--", "-.", ":", (0, (1, 3)))[number % 5]
        for axes, name in zip(panels.flat, MONITORS, strict=True):
            mean = np.mean([curve[name] for curve in curves], axis=0)
            axes.plot(
                range(1, len(mean) + 1), mean, linestyle=style, color=f"C{number}", label=ARM_TITLES[arm]
            )
    for axes, (title, level) in zip(panels.flat, MONITORS.values(), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.2)
        if level is not None:
            axes.axhline(level, color="0.5", linewidth=1, linestyle=":")
            axes.annotate(
                "fooled", (1, level), xytext=(0, 3), textcoords="offset points", color="0.5", fontsize="small"
            )
    for axes in panels[1]:
        axes.set_xlabel("epoch")
    panels[0, 1].legend(frameon=False, fontsize="small")
    return figure


def cost_figure(config: Config, counts: Sequence[int] = (2, 3, 4, 5)) -> Figure:
    """Discriminators and counted operations of a step against the number of equal networks."""
    net = config.groups[0].nets[0]
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
    for number, arm in enumerate(("dml", "afd_simultaneous", "afd", "afd_pairwise")):
        found = [cost(Group("", (net,) * count, (arm,)), config.recipe, arm) for count in counts]
        style = ("-", "--", "-.", ":")[number]
        for axes, name in zip(panels, ("discriminators", "mflop"), strict=True):
            axes.plot(
                counts,
                [one[name] for one in found],
                "o",
                linestyle=style,
                color=f"C{number}",
                label=ARM_TITLES[arm],
            )
    panels[0].set(xlabel="networks K", ylabel="discriminators", xticks=list(counts))
    panels[1].set(xlabel="networks K", ylabel="MFLOP a step and image", xticks=list(counts))
    panels[0].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.2)
    return figure


def _curves(
    results: Sequence[Result], config: Config, group: Group, arm: str
) -> list[dict[str, list[float]]]:
    """What was watched under an arm, one dictionary a seed."""
    found: dict[int, dict[str, list[float]]] = {}
    for result in results:
        if (result.run.data, result.run.arm) != (group.data, arm) or result.run.seed in found:
            continue
        seeds = result.provenance.seeds or (result.run.seed,)
        runs: list[Run] = [replace(result.run, seed=seed) for seed in seeds]
        found |= trained_of(runs, config, Context.of(result)).history
    return list(found.values())
