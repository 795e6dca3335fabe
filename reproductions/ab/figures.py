"""Figures of the chapter on activation boundaries; each function draws one from numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.methods.ab import ab_loss
from reproductions.harness.runs import Result
from reproductions.protocols import figures
from reproductions.protocols.settings import Setting

ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels alone",
    "kd": "KD, T = 4",
    "hint": "values of a stage, then labels",
    "ab_middle": "boundaries of a stage, then labels",
    "ab": "boundaries of all, then labels",
    "ab_kd": "boundaries of all, then KD",
    "kd_only": "the authors' KD alone",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("ab",))


def similarity_figure(results: Sequence[Result], setting: Setting, metric: str) -> Figure:
    """Activation similarity as an affine map reads it, of every arm of a setting that has a first stage alone."""
    return figures.arms_figure(
        results,
        setting,
        {arm: title.partition(",")[0] for arm, title in ARM_TITLES.items()},
        metric=metric,
        label="signs read from the student, %",
        highlight=("ab_middle",),
    )


def loss_figure() -> Figure:
    """What one neuron costs: the count of wrong sides, the hinge for an active and an inactive teacher, a hint."""
    values = torch.linspace(-3, 3, 301, dtype=torch.float64)
    points = values.numpy()
    rows = values.unsqueeze(1)
    figure, panels = plt.subplots(1, 2, figsize=(7.0, 3.0), sharey=True, layout="constrained")
    for axes, response in zip(panels, (0.3, -2.0), strict=True):
        teacher = torch.full_like(rows, response)

        def cost(form: str, teacher: torch.Tensor = teacher) -> list[float]:
            pairs = zip(rows.split(1), teacher.split(1), strict=True)
            return [float(ab_loss(s, t, form=form)) for s, t in pairs]

        axes.plot(points, cost("ideal"), color="0.6", label="wrong side, counted")
        axes.plot(points, cost("surrogate"), label="boundary, μ = 1")
        axes.plot(points, (points - response) ** 2, linestyle="--", label="squared distance")
        axes.axvline(response, color="0.8", linewidth=1)
        axes.set_title(f"teacher responds with {response:g}", fontsize=9)
        axes.set_xlabel("student's pre-activation")
        axes.set_ylim(-0.1, 5)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("cost of a neuron")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return figure
