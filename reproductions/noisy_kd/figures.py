"""Figures of the chapter on noisy collaboration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.methods.noisy_kd import fickle_teacher
from reproductions.harness.runs import Context, Result
from reproductions.harness.statistics import mean_interval
from reproductions.noisy_kd.collaboration import (
    DROPOUTS,
    GUIDES,
    LABEL_NOISES,
    SIGMAS,
    Guide,
    percent,
    splits,
    teachers,
)
from reproductions.noisy_kd.run import METRICS, Config
from reproductions.protocols.pairs import PAIRS
from reproductions.protocols.robustness import Pixels

MEASURES = ("accuracy", "noisy_accuracy", "attacked_accuracy")
# Title of a panel, its axis, and by name of a line the arms at the values of the axis.
SWEEPS = {
    "dropout": (
        "rate of dropout in the teacher",
        (0.0, *DROPOUTS),
        {
            "teacher in eval mode": ("kd", *(f"kd_d{percent(rate)}" for rate in DROPOUTS)),
            "fickle": ("kd", *(f"fickle_d{percent(rate)}" for rate in DROPOUTS)),
            "averaged": ("kd", *(f"averaged_d{percent(rate)}" for rate in DROPOUTS)),
        },
    ),
    "noise": (
        "σ of the noise on the student's input",
        (0.0, *SIGMAS),
        {
            "labels": ("student", *(f"noise_{percent(sigma)}" for sigma in SIGMAS)),
            "soft randomisation": ("kd", *(f"soft_{percent(sigma)}" for sigma in SIGMAS)),
        },
    ),
    "labels": (
        "share of wrong labels",
        (0.0, *LABEL_NOISES),
        {
            "no teacher": ("student", *(f"student_n{percent(rate)}" for rate in LABEL_NOISES)),
            "the student's": ("kd", *(f"messy_s{percent(rate)}" for rate in LABEL_NOISES)),
            "the teacher's": ("kd", *(f"messy_t{percent(rate)}" for rate in LABEL_NOISES)),
            "both": ("kd", *(f"messy_ts{percent(rate)}" for rate in LABEL_NOISES)),
        },
    ),
}


def sweep_figure(results: Sequence[Result], sweep: str) -> Figure:
    """Accuracies on clean, noisy and attacked images over one kind of noise: means and 95 % intervals."""
    label, values, lines = SWEEPS[sweep]
    figure, panels = plt.subplots(1, 3, figsize=(8.4, 2.9), layout="constrained")
    for axes, measure in zip(panels, MEASURES, strict=True):
        for number, (name, arms) in enumerate(lines.items()):
            rows = [mean_interval(of_arm(results, arm, measure)) for arm in arms]
            shift = 0.004 * (number - (len(lines) - 1) / 2)  # so that intervals do not hide each other
            places = [value + shift for value in values]
            axes.plot(
                places, [mean for mean, _, _ in rows], "o-", color=f"C{number}", markersize=3.5, label=name
            )
            for place, (_, low, high) in zip(places, rows, strict=True):
                if low is not None:
                    axes.plot([place, place], [low, high], color=f"C{number}", alpha=0.4, linewidth=3)
        axes.set(xlabel=label, title=f"{METRICS[measure].title}, %", xticks=values)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.2)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def of_arm(results: Sequence[Result], arm: str, metric: str) -> list[float]:
    """A metric of an arm, one value a seed."""
    return [result.metrics[metric] for result in results if result.run.arm == arm]


def fickle_figure(
    results: Sequence[Result], config: Config, *, rate: float = 0.4, images: int = 4, asked: int = 200
) -> Figure:
    """What a fickle teacher says of some test images, asked again and again, and what it says in eval mode."""
    arm = f"teacher_d{percent(rate)}"
    result = next(one for one in results if one.run.arm == arm)
    context = Context.of(result)
    guide: Guide = GUIDES[arm]
    (network,) = teachers(guide, [result.run.seed], config.recipe, context)
    pair, (_, test, _) = PAIRS[config.recipe.pair], splits(config.recipe, context)
    pixels = Pixels.of(test, pair.mean, pair.std, context.device)
    temperature = config.recipe.temperature

    def probabilities(chosen: torch.Tensor) -> torch.Tensor:
        return (pixels.logits(network, pixels.images[chosen]) / temperature).softmax(1)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unsure = probabilities(torch.arange(len(pixels.images))).amax(1).argsort()[:images]
        still = probabilities(unsure)
        with fickle_teacher(network):
            moved = torch.stack([probabilities(unsure) for _ in range(asked)])
    figure, panels = plt.subplots(2, images, figsize=(2.0 * images, 3.4), layout="constrained")
    highest = 1.05 * float(moved.max())
    for column in range(images):
        picture = pixels.images[unsure[column]].permute(1, 2, 0).cpu().numpy()
        panels[0, column].imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
        panels[0, column].set_axis_off()
        axes = panels[1, column]
        axes.violinplot(moved[:, column].cpu().T.tolist(), positions=range(moved.shape[2]), showextrema=False)
        axes.plot(still[column].cpu(), "k_", markersize=7)
        axes.set(ylim=(0, highest), xticks=range(moved.shape[2]), xlabel="class")
        axes.tick_params(labelsize=7)
    panels[1, 0].set_ylabel(f"probability at τ = {temperature:g}")
    return figure
