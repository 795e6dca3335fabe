"""Figures of the QUEST chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.quest import nearest_word
from reproductions.harness.runs import Context, Result
from reproductions.harness.statistics import mean_interval
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations, teacher
from reproductions.protocols.settings import Setting, setting_of
from reproductions.quest import targets
from reproductions.quest.run import ARMS, base, stages, words_of

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 4",
    "hint": "features (hint)",
    "quest": "QUEST",
    "quest_k16": "QUEST, 16 words",
    "quest_k256": "QUEST, 256 words",
    "quest_k1024": "QUEST, 1024 words",
    "quest_p90": "QUEST, softer (0.9)",
    "quest_p70": "QUEST, softer (0.7)",
    "quest_hard": "QUEST, nearest word",
}
COLOURS = {"hint": "0.35", "quest": "C0", "quest_p70": "C2", "quest_hard": "C3"}
DISTURBANCES = {"noise": "noise", "dropout": "dropout", "photometric": "contrast, brightness"}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("quest",))


def inverse_temperatures(
    results: Sequence[Result], setting: Setting, config: Config
) -> dict[str, tuple[float, float]]:
    r"""By arm with soft assignments, the mean largest probability asked for and the :math:`\beta` that gives it."""
    asked = {arm: words.mean_largest for arm, words in ARMS[base(setting.data)].items()}
    found: dict[str, tuple[float, float]] = {}
    for result in results:
        run, wanted = result.run, asked.get(result.run.arm)
        if run.data == setting.data and run.arm not in found and wanted is not None:
            _, beta = words_of(run, config, Context.of(result))
            assert beta is not None
            found[run.arm] = wanted, beta
    return found


def changes_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Relative change of the targets for each disturbance: mean and 95 % interval over the seeds."""
    figure, axes = plt.subplots(figsize=(6.6, 3.0), layout="constrained")
    for number, (arm, colour) in enumerate(COLOURS.items()):
        for place, name in enumerate(DISTURBANCES):
            values = [
                result.metrics[f"{name}_change"]
                for result in results
                if (result.run.data, result.run.arm) == (setting.data, arm)
            ]
            mean, low, high = mean_interval(values)
            errors = [[mean - (mean if low is None else low)], [(mean if high is None else high) - mean]]
            label = ARM_TITLES[arm] if place == 0 else None
            x = place + 0.16 * (number - 1.5)
            axes.errorbar(x, mean, errors, fmt="os^D"[number], color=colour, capsize=3, label=label)
    axes.set_xticks(range(len(DISTURBANCES)), list(DISTURBANCES.values()))
    axes.set_ylabel("change of the target, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
    return figure


def noise_figure(
    results: Sequence[Result],
    config: Config,
    strengths: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
) -> Figure:
    """Relative change against the noise, both on logarithmic axes; for one seed's teacher and vocabulary.

    Args:
        results: One of each arm of :data:`COLOURS`, of one seed.
        config: Their profile.
        strengths: Standard deviations of the noise, in units of the features'.
    """
    chosen: dict[str, targets.Target] = {}
    for result in results:
        words, beta = words_of(result.run, config, Context.of(result))
        if words is None:
            chosen[result.run.arm] = targets.hint_target
        else:
            chosen[result.run.arm] = (
                targets.hard_target(words) if beta is None else targets.soft_target(words, beta)
            )
    run = results[0].run
    pair, layer = setting_of(run, config).recipe.pair, stages(run.data)[1]
    clean, _ = targets.test_vectors(Context.of(results[0]), pair, layer, run.seed)
    found = targets.by_strength(chosen, clean, strengths, run.seed)
    figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    for number, (arm, colour) in enumerate(COLOURS.items()):
        axes.loglog(
            strengths, found[arm], marker="os^D"[number], markersize=4, color=colour, label=ARM_TITLES[arm]
        )
    axes.set_xlabel("noise, standard deviations of the features")
    axes.set_ylabel("change of the target, %")
    axes.grid(alpha=0.2, which="both")
    axes.legend(frameon=False, fontsize="small")
    return figure


def words_figure(
    result: Result, config: Config, count: int = 8, patches: int = 8, images: int = 1000
) -> Figure:
    """Image patches whose feature vectors are nearest to the most used words, one row a word.

    Args:
        result: Of an arm with words; its seed's teacher and vocabulary are shown.
        config: Its profile.
        count: Number of words, the most used first.
        patches: Number of patches a word, nearest first, each of another image.
        images: Training images that are searched.
    """
    run, context = result.run, Context.of(result)
    given, layer = PAIRS[setting_of(run, config).recipe.pair], stages(run.data)[1]
    words, _ = words_of(run, config, context)
    assert words is not None
    train, _, _ = load_pair_data(given)
    indices = torch.arange(min(images, len(train.labels)))
    batches = make_batches(given, train, device=context.device, training=False, indices=indices)
    maps = representations(teacher(context, given, run.seed), batches, layer)[layer]
    used, places = most_used(maps, words, count, patches)
    pictures = torch.from_numpy(train.images[: len(indices)])
    stride = pictures.shape[1] // maps.shape[2]
    figure, panels = plt.subplots(len(used), patches, figsize=(0.62 * patches + 1.4, 0.66 * len(used)))
    for row, (share, of_word) in zip(np.atleast_2d(panels), zip(used, places, strict=True), strict=True):
        for axes in row:
            axes.set_axis_off()
        row[0].set_title(f"{100 * share:.1f} %", x=-0.55, y=0.25, fontsize=8)
        for axes, (image, y, x) in zip(row, of_word, strict=False):
            axes.imshow(patch(pictures[image], y, x, stride), cmap="gray", vmin=0, vmax=255)
    return figure


def most_used(
    maps: Tensor, words: Tensor, count: int, patches: int
) -> tuple[list[float], list[list[tuple[int, int, int]]]]:
    """Shares of the most used words, and for each the image, row and column of the vectors nearest to it."""
    nearest = nearest_word(maps, words).flatten()
    uses = torch.bincount(nearest, minlength=len(words))
    chosen = uses.argsort(descending=True, stable=True)[:count]
    rows = maps.movedim(1, -1).flatten(0, -2)
    height, width = maps.shape[2:]
    places = []
    for word in chosen.tolist():
        own = (nearest == word).nonzero().flatten()
        order = own[(rows[own] - words[word]).square().sum(1).argsort(stable=True)]
        of_word: dict[int, tuple[int, int, int]] = {}
        for position in order.tolist():
            image, y, x = position // (height * width), position // width % height, position % width
            of_word.setdefault(image, (image, y, x))
            if len(of_word) == patches:
                break
        places.append(list(of_word.values()))
    return (uses[chosen] / uses.sum()).tolist(), places


def patch(picture: Tensor, y: int, x: int, stride: int) -> np.ndarray:
    """Three strides around the middle of a position's cell, black beyond the picture: (height, width[, 3])."""
    padded = torch.nn.functional.pad(picture, (0, 0, stride, stride, stride, stride))
    cut = padded[stride * y : stride * (y + 3), stride * x : stride * (x + 3)]
    return cut.squeeze(-1).numpy()


def best_minus_last(results: Sequence[Result], setting: Setting) -> dict[str, float]:
    """By arm, how much the epoch with the best *test* accuracy is ahead of the last one, mean over seeds."""
    gaps: dict[str, list[float]] = {}
    for result in results:
        if result.run.data == setting.data and "accuracy" in result.best:
            gap = result.best["accuracy"] - result.metrics["accuracy"]
            gaps.setdefault(result.run.arm, []).append(gap)
    return {arm: sum(values) / len(values) for arm, values in gaps.items()}
