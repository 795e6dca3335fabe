"""Figures of the KD chapter; each function draws one from logits or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.kd import kd_loss
from reproductions.harness.runs import Context, Result
from reproductions.kd.errata import centred, draw, squared_gap
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations, teacher
from reproductions.protocols.settings import Setting, setting_of

ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels alone",
    "kd": "KD, T = 4",
    "kd_t1": "KD, T = 1",
    "kd_t2": "KD, T = 2",
    "kd_t20": "KD, T = 20",
    "kd_unscaled": "KD, T = 4, without T²",
}


def arms_figure(results: Sequence[Result], setting: Setting, metric: str, *, label: str) -> Figure:
    """One metric of every student of a setting: one dot a seed, mean and 95 % interval."""
    students = replace(setting, arms=tuple(arm for arm in setting.arms if arm != "teacher"))
    return figures.arms_figure(results, students, ARM_TITLES, metric=metric, label=label, highlight=("kd",))


def limit_figure(temperatures: Sequence[float], classes: int = 10) -> Figure:
    """T² KL against the temperature, with half the squared gap of the logits, centred and not."""
    reference = draw(64, classes, 1)
    student = draw(64, classes, 2) + torch.linspace(0, 2, 64, dtype=torch.float64)[:, None]
    curve = [kd_loss(student, reference, temperature=t).item() for t in temperatures]
    figure, axes = plt.subplots(figsize=(6.0, 3.2))
    axes.semilogx(temperatures, curve, label=r"$T^2\,\mathrm{KL}$")
    for value, style, name in (
        (squared_gap(centred(student), centred(reference)), "--", "centred logits"),
        (squared_gap(student, reference), ":", "logits as they are"),
    ):
        text = rf"$\frac{{1}}{{2K}}\,\Vert s - t\Vert^2$, {name}"
        axes.axhline(value, color="0.35", linestyle=style, label=text)
    axes.set_xlabel("temperature T")
    axes.set_ylabel("loss, nat")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.2)
    return figure


def doubtful_digit(results: Sequence[Result], config: Config) -> tuple[Tensor, Tensor]:
    """The teacher's logits for the test image that it is right about with the least margin, and the image."""
    result = next(result for result in results if result.run.arm == "teacher")
    pair = PAIRS[setting_of(result.run, config).recipe.pair]
    context = Context.of(result)
    _, test, _ = load_pair_data(pair)
    batches = make_batches(pair, test, device=context.device, training=False)
    logits = representations(teacher(context, pair, result.run.seed), batches)["logits"].cpu()
    labels = torch.from_numpy(test.labels).long()
    two = logits.topk(2).values
    margin = torch.where(logits.argmax(1) == labels, two[:, 0] - two[:, 1], torch.inf)
    index = int(margin.argmin())
    return logits[index], torch.from_numpy(np.asarray(test.images[index]))


def softened_figure(logits: Tensor, temperatures: Sequence[float], picture: Tensor) -> Figure:
    """An image and the teacher's probabilities for it, one panel a temperature."""
    figure, panels = plt.subplots(
        1, len(temperatures) + 1, figsize=(2.0 * len(temperatures) + 1.6, 2.1), layout="constrained"
    )
    panels[0].imshow(picture.squeeze().numpy(), cmap="gray_r")
    panels[0].set_axis_off()
    for axes, temperature in zip(panels[1:], temperatures, strict=True):
        axes.bar(range(len(logits)), (logits / temperature).softmax(0).tolist(), color="C0")
        axes.set_title(f"T = {temperature:g}")
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(logits)))
        axes.tick_params(axis="x", labelsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not panels[1]:
            axes.set_yticklabels([])
    panels[1].set_ylabel("probability")
    return figure
