"""Figures of the Jacobian-matching chapter; each draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.sets import load_set
from kdrefs.nets.fold import fold_batchnorm
from reproductions.harness.runs import Context, Result
from reproductions.harness.statistics import mean_interval
from reproductions.jacobian_matching.expansions import (
    Loss,
    Net,
    as_printed,
    at_the_kink,
    averaged_over_kinks,
    cross_entropy,
    kept_and_whole,
    monte_carlo,
    second_coefficient,
    softmax_of,
    squared_error,
)
from reproductions.jacobian_matching.few_images import ARMS, train
from reproductions.jacobian_matching.run import Config, images_of
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, teacher

SETTING_TITLES = {
    "": "teacher, all images",
    "1": "1 image a class",
    **{str(size): f"{size} images a class" for size in (5, 10, 50, 100, 500)},
}
ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels",
    "kd": "labels, outputs",
    "jacobian": "labels, Jacobians",
    "both": "labels, outputs, Jacobians",
    "noise": "labels, outputs with noise",
    "jacobian_squared": "labels, Jacobians of the logits",
    "jacobian_top": "labels, top class's unit gradient",
}
STYLES = {"student": "0.35", "kd": "C1", "jacobian": "C0", "both": "C2", "noise": "C3"}


def curves_figure(results: Sequence[Result], config: Config, metric: str, *, label: str) -> Figure:
    """A metric against the number of training images a class, one curve an arm, 95 % intervals over seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for place, (arm, colour) in enumerate(STYLES.items()):
        shift = 1.03 ** (place - 2)  # so that intervals do not hide each other
        points = []
        for size in config.sizes:
            values = [
                result.metrics[metric]
                for result in results
                if result.run.arm == arm and images_of(result.run) == size
            ]
            mean, low, high = mean_interval(values)
            points.append((shift * size, mean, mean if low is None else low, mean if high is None else high))
        x, mean, low, high = np.array(points).T
        errors = [mean - low, high - mean]
        axes.errorbar(
            x, mean, errors, color=colour, marker="o", markersize=4, capsize=2, label=ARM_TITLES[arm]
        )
    axes.set_xscale("log")
    axes.set_xticks(config.sizes, [str(size) for size in config.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images a class")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
    return figure


def forms_figure(results: Sequence[Result], config: Config) -> Figure:
    """Test accuracy with the three forms of the Jacobian term, and without it: dots are seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 1.9))
    arms = ("student", "jacobian", "jacobian_squared", "jacobian_top")
    for place, arm in enumerate(arms):
        values = [
            result.metrics["accuracy"]
            for result in results
            if result.run.arm == arm and images_of(result.run) == config.forms_at
        ]
        axes.plot(
            values, [-place] * len(values), "o", color="C0" if arm == "jacobian" else "0.55", markersize=4
        )
        axes.plot([np.mean(values)], [-place], "|", color="black", markersize=14)
    axes.set_yticks([-place for place in range(len(arms))], [ARM_TITLES[arm] for arm in arms])
    axes.set_xlabel(f"test accuracy with {config.forms_at} images a class, %")
    axes.grid(axis="x", alpha=0.2)
    return figure


def smooth_digits(hidden: int, seed: int, steps: int = 60) -> Net:
    """Logits of a tanh network of one hidden layer, trained on the digits' labels in float64."""
    split = load_set("digits").train
    x, labels = flat_digits(split.images), torch.from_numpy(split.labels).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.requires_grad_(False)


def flat_digits(images: np.ndarray) -> Tensor:
    """Pixels from -1 to 1 as rows, float64."""
    return torch.from_numpy(images.reshape(len(images), -1) / 127.5 - 1)


def expansion_figure(
    sigmas: Sequence[float] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25), images: int = 60, draws: int = 200
) -> Figure:
    """Expected loss of two trained smooth networks against σ: exact, as the note has it, with all terms."""
    guide, student = softmax_of(smooth_digits(32, 0)), softmax_of(smooth_digits(8, 1))
    x = flat_digits(load_set("digits").test.images[:images])
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    for axes, name, loss in (
        (panels[0], "squared error", squared_error(guide, student)),
        (panels[1], "cross-entropy", cross_entropy(guide, student)),
    ):
        printed = as_printed(guide, student, x)[name].mean().item()
        _expected_loss(axes, loss, x, sigmas, draws, printed)
        axes.set_title(f"{name}, tanh networks")
    panels[0].set_ylabel("expected loss")
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def trained_figure(
    result: Result, config: Config, sigmas: Sequence[float] = (0.02, 0.05, 0.1, 0.15, 0.2), images: int = 60
) -> Figure:
    """The same for a student of the run and its teacher, which have kinks: squared error of the logits."""
    run, recipe = result.run, config.recipe
    pair, context = PAIRS[recipe.pair], Context.of(result)
    seeds = result.provenance.seeds or (run.seed,)
    students = train(ARMS[run.arm], images_of(run), seeds, recipe, context, name=run.arm)
    _, test, _ = load_pair_data(pair)
    batch = next(iter(make_batches(pair, test, device=context.device, training=False, batch_size=images)))
    assert batch.images is not None
    shape = batch.images.shape[1:]
    guide = _of_rows(fold_batchnorm(teacher(context, pair, run.seed)), shape)
    student = _of_rows(students[list(seeds).index(run.seed)], shape)
    x = batch.images.double().flatten(1)
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    printed = as_printed(guide, student, x)["squared error"].mean().item()
    _expected_loss(axes, squared_error(guide, student), x, sigmas, 30, printed, repaired=False)
    axes.set_ylabel("expected loss")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _of_rows(network: nn.Module, shape: torch.Size) -> Net:
    """A network's logits from flattened images, in float64."""
    network = network.double().requires_grad_(False)
    return lambda rows: network(rows.unflatten(1, shape)).logits


def _expected_loss(
    axes: Axes,
    loss: Loss,
    x: Tensor,
    sigmas: Sequence[float],
    draws: int,
    printed: float,
    *,
    repaired: bool = True,
) -> None:
    generator = torch.Generator().manual_seed(0)
    found = np.array([monte_carlo(loss, x, sigma, draws, generator) for sigma in sigmas])
    clean = loss(x).mean().item()
    line = np.linspace(0, max(sigmas), 60)
    axes.errorbar(
        sigmas, found[:, 0], 2 * found[:, 1], fmt="o", color="black", markersize=4, label="Monte Carlo"
    )
    axes.plot(line, clean + line**2 * printed, "--", color="C3", label="the note's term")
    if repaired:
        second = second_coefficient(loss, x).mean().item()
        axes.plot(line, clean + line**2 * second, color="C0", label="all terms of σ²")
    axes.set_xlabel("σ")
    axes.grid(alpha=0.2)


def unbounded_figure() -> Figure:
    """The note's cross-entropy term against the size of the student's Jacobian, alone and with the dropped square."""
    scales = np.linspace(-1, 4, 51)
    kept, whole = kept_and_whole(scales.tolist())
    figure, axes = plt.subplots(figsize=(5.2, 3.0))
    axes.plot(scales, kept, "--", color="C3", label="what the note keeps")
    axes.plot(scales, whole, color="C0", label="with the dropped square")
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set_xlabel("student's Jacobian in units of the teacher's")
    axes.set_ylabel("coefficient of σ²")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure


def kink_figure() -> Figure:
    """(1 + relu)² under noise: first order in σ on the kink, second on average, with half of it from the kink."""
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.9), layout="constrained")
    sigmas = np.linspace(0.01, 0.3, 30)
    on_kink = [at_the_kink(sigma) * sigma for sigma in sigmas]
    average = [averaged_over_kinks(sigma) * sigma**2 for sigma in sigmas]
    panels[0].plot(sigmas, on_kink, color="black", label="exact")
    panels[0].plot(sigmas, sigmas**2 / 2, "--", color="C3", label="σ² of the Jacobians (mean slope²)")
    panels[0].plot(sigmas, 2 * sigmas / np.sqrt(2 * np.pi), ":", color="C0", label="kink, first order")
    panels[0].set_title("input on the kink")
    panels[1].plot(sigmas, average, color="black", label="exact")
    panels[1].plot(sigmas, sigmas**2 / 2, "--", color="C3", label="σ² of the Jacobians")
    panels[1].plot(sigmas, sigmas**2, ":", color="C0", label="and of the kink")
    panels[1].set_title("average over inputs")
    for axes in panels:
        axes.set_xlabel("σ")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("change of the loss")
    return figure
