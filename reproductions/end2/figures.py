"""Figures of the EnD² chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdrefs.methods.end2 import dirichlet_uncertainty, ensemble_uncertainty
from kdrefs.training import evaluation_mode
from reproductions.end2 import sets
from reproductions.end2.distillation import Setting, ensemble
from reproductions.end2.divergence import CLASSES, SPREADS, deficit, growth, members_of
from reproductions.end2.run import METRICS, Config, judged, logits_of, networks_of
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result, Run
from reproductions.protocols.figures import pick

ARM_TITLES = {
    "single": "one member",
    "ensemble": "ensemble",
    "end": "EnD",
    "end_aux": "EnD + AUX",
    "end2": "EnD²",
    "end2_aux": "EnD² + AUX",
    "end2_unsmoothed": "EnD², no smoothing",
    "end2_unannealed": "EnD², no annealing",
    "end2_bare": "EnD², neither",
}
KINDS = ("total", "data", "knowledge")


def detection_figure(results: Sequence[Result], setting: Setting, metric: str) -> Figure:
    """A metric of every arm of a setting: one dot a seed, mean and 95 % interval."""
    rows = {
        ARM_TITLES[arm]: [
            result.metrics[metric]
            for result in results
            if (result.run.data, result.run.arm) == (setting.data, arm)
        ]
        for arm in (*setting.arms, *setting.few)
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    known = METRICS[metric]
    highlight = [ARM_TITLES[arm] for arm in ("end2", "end2_aux")]
    interval_plot(axes, rows, label=f"{known.title}, {known.unit}", highlight=highlight)
    return figure


def grid(points: int = 121, half: float = 2.0) -> Tensor:
    """``(points², 2)``: rows from top to bottom, as images are drawn."""
    line = torch.linspace(-half, half, points)
    y, x = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def maps_of(networks: Sequence[nn.Module], points: Tensor) -> dict[str, np.ndarray]:
    """Uncertainties of one network or of an ensemble on a square grid, by kind."""
    logits = []
    for network in networks:
        with evaluation_mode(network):
            logits.append(network(points).logits)
    found = (
        ensemble_uncertainty(torch.stack(logits, 1)) if len(logits) > 1 else dirichlet_uncertainty(logits[0])
    )
    side = round(len(points) ** 0.5)
    return {kind: getattr(found, kind).view(side, side).numpy() for kind in KINDS}


def maps_figure(results: Sequence[Result], config: Config, arms: Sequence[str]) -> Figure:
    """Total, data and knowledge uncertainty over the plane: a row an arm, of one seed of the spirals."""
    setting = next(one for one in config.settings if one.data == "spirals")
    points = grid()
    maps = {
        result.run.arm: maps_of(_networks(result, config), points) for result in pick(results, setting, arms)
    }
    return draw_maps(maps)


def draw_maps(maps: Mapping[str, Mapping[str, np.ndarray]], half: float = 2.0) -> Figure:
    """Draw what :func:`maps_of` returns, a row an arm, with one colour scale a column."""
    figure, panels = plt.subplots(
        len(maps), 3, figsize=(6.4, 1.95 * len(maps)), layout="constrained", squeeze=False
    )
    for column, kind in enumerate(KINDS):
        highest = max(float(one[kind].max()) for one in maps.values())
        for row, (arm, one) in enumerate(maps.items()):
            axes = panels[row, column]
            image = axes.imshow(
                one[kind], extent=(-half, half, -half, half), vmin=0, vmax=highest, cmap="viridis"
            )
            axes.add_patch(plt.Circle((0, 0), 1.0, fill=False, color="white", linewidth=0.6, linestyle=":"))
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"{kind} uncertainty", fontsize=9)
            if column == 0:
                axes.set_ylabel(ARM_TITLES[arm], fontsize=9)
        figure.colorbar(image, ax=panels[:, column], location="bottom", shrink=0.85, label="nat")
    return figure


def agreement_figure(results: Sequence[Result], config: Config, data: str, arms: Sequence[str]) -> Figure:
    """Knowledge uncertainty of students against that of their ensemble, input by input, of one seed."""
    setting = next(one for one in config.settings if one.data == data)
    figure, panels = plt.subplots(
        1, len(arms), figsize=(2.5 * len(arms) + 0.4, 2.8), sharex=True, sharey=True, layout="constrained"
    )
    for axes, result in zip(panels, pick(results, setting, arms), strict=True):
        context = Context.of(result)
        parts = sets.load(data)
        networks, members = _networks(result, config), ensemble(setting, result.run.seed, context)
        for name, inputs, colour in (("outside", parts.outside, "C3"), ("test set", parts.test, "C0")):
            ours, theirs = (
                judged(logits_of(one, setting, inputs, context))[1].knowledge.clamp(min=1e-8).cpu()
                for one in (networks, members)
            )
            axes.loglog(theirs, ours, ".", color=colour, markersize=2, alpha=0.5, label=name)
        axes.axline((1e-3, 1e-3), (1e-1, 1e-1), color="0.5", linewidth=0.8)
        axes.set(xlim=(1e-6, 3), ylim=(1e-6, 3), xlabel="ensemble, nat", title=ARM_TITLES[result.run.arm])
    panels[0].set_ylabel("student, nat")
    panels[0].legend(frameon=False, fontsize=8, markerscale=4)
    return figure


def precision_figure() -> Figure:
    """Precision of a free Dirichlet over the steps of Adam, for members further and further apart."""
    figure, axes = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    for number, (name, curves) in enumerate(growth().items()):
        for smoothing, style in ((0.0, "-"), (1e-3, ":")):
            label = name if smoothing == 0 else None
            axes.semilogy(curves[smoothing], style, color=f"C{number}", label=label)
        best = float((CLASSES - 1) / (2 * deficit(members_of(SPREADS[name]))))
        if best < 1e5 and SPREADS[name] > 0:
            axes.axhline(best, color=f"C{number}", linewidth=0.6, linestyle="--")
    axes.set(xlabel="step", ylabel="precision α₀")
    axes.legend(frameon=False, fontsize=8, loc="center right")
    return figure


def _networks(result: Result, config: Config) -> list[nn.Module]:
    run = result.run
    seeds = list(result.provenance.seeds or (run.seed,))
    runs = [Run(run.column, run.profile, run.data, run.arm, seed) for seed in seeds]
    return networks_of(runs, config, Context.of(result))[seeds.index(run.seed)]
