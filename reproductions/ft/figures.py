"""Figures of the chapter on factor transfer; each function draws one from a run's numbers or from the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.methods.ft import factor_loss
from reproductions.harness.runs import Result
from reproductions.protocols import figures
from reproductions.protocols.settings import Setting

ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels alone",
    "kd": "KD, T = 4",
    "ft": "FT, k = 0.5",
    "ft_k75": "FT, k = 0.75",
    "ft_k100": "FT, k = 1",
    "ft_direct": "the map itself",
    "ft_untrained": "untrained paraphraser",
    "ft_repdistiller": "RepDistiller's loss",
}
PARAPHRASED = ("ft", "ft_k75", "ft_k100", "ft_untrained")


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("ft",))


def reconstruction_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """What paraphrasers lose of the teacher's map, by width of the factor."""
    arms = tuple(arm for arm in PARAPHRASED if arm in (*setting.arms, *setting.few))
    part = Setting(setting.data, setting.recipe, arms)
    return figures.arms_figure(
        results, part, ARM_TITLES, metric="reconstruction", label="lost of the map, %", highlight=("ft",)
    )


def blindness_figure() -> Figure:
    """Both losses of a teacher's factor in which a growing share of the signs, or of the channels, is changed."""
    generator = torch.Generator().manual_seed(0)
    shape = (32, 64, 4, 4)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks = torch.rand(shape, generator=generator)
    shares = [step / 16 for step in range(17)]
    figure, panels = plt.subplots(1, 2, figsize=(7.0, 3.0), sharey=True, layout="constrained")
    for axes, title in zip(panels, ("signs turned", "channels exchanged"), strict=True):
        for variant, label in (("official", "paper and authors"), ("repdistiller", "RepDistiller")):
            unrelated = float(factor_loss(other, teacher, variant=variant))
            costs = []
            for share in shares:
                changed = teacher.clone()
                if title == "signs turned":
                    changed[ranks < share] *= -1
                else:
                    count = round(share * shape[1])
                    changed[:, :count] = changed[:, :count].roll(1, dims=1)
                costs.append(float(factor_loss(changed, teacher, variant=variant)) / unrelated)
            axes.plot(shares, costs, label=label)
        axes.axhline(1, color="0.8", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share")
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("cost, unrelated factor = 1")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure
