"""Figures of the FitNets chapter; each function draws one from numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.methods.fitnets import teacher_weight
from reproductions.fitnets.run import TEMPERATURE
from reproductions.harness.runs import Result
from reproductions.protocols import figures
from reproductions.protocols.settings import Setting

ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels alone",
    "kd": "KD, T = 4",
    "second_stage": "second stage alone",
    "hint": "hint, then labels",
    "fitnets": "FitNets: hint, then KD",
    "joint": "hint beside the labels",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("fitnets",))


def weight_figure(hint_share: float) -> Figure:
    """The teacher's weight in units of the loss with the factor T², over both stages."""
    figure, axes = plt.subplots(figsize=(6.0, 2.6))
    axes.axvspan(0, hint_share, color="0.92")
    axes.text(hint_share / 2, 0.55, "hint", ha="center")
    shares = [place / 50 for place in range(51)]
    axes.plot(
        [hint_share + (1 - hint_share) * share for share in shares],
        [teacher_weight(share) / TEMPERATURE**2 for share in shares],
    )
    axes.set_xlabel("share of the epochs")
    axes.set_ylabel(r"$\lambda / T^2$")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 0.65)
    axes.grid(alpha=0.2)
    return figure
