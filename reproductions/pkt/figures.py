"""Figures of the PKT chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from kdrefs.kernels import cosine_kernel
from kdrefs.methods.pkt import nystrom_pkt_loss, pkt_loss
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result
from reproductions.pkt.errata import equiangular
from reproductions.protocols.embeddings import ARM_TITLES, Config, Setting, trained
from reproductions.protocols.figures import pick as pick
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations

SETTING_TITLES = {"": "all labels", "10pct": "a tenth of the labels", "hog": "from HoG, no labels"}


def retrieval_figure(results: Sequence[Result], setting: Setting, metric: str = "map") -> Figure:
    """mAP of every arm of a setting: one dot a seed, mean and 95 % interval."""
    rows = {
        ARM_TITLES[arm]: [
            result.metrics[metric]
            for result in results
            if (result.run.data, result.run.arm) == (setting.data, arm)
        ]
        for arm in setting.arms
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    interval_plot(axes, rows, label="mAP on test queries, %", highlight=[ARM_TITLES["pkt"]])
    return figure


def test_features(result: Result, config: Config) -> tuple[Tensor, Tensor]:
    """The test set's representation by the network of one result, and its labels."""
    context = Context.of(result)
    pair = PAIRS[config.pair]
    module, feature = trained(result.run, config, context)
    _, test, _ = load_pair_data(pair)
    batches = make_batches(pair, test, device=context.device, training=False)
    return representations(module, batches, feature)[feature].cpu(), torch.from_numpy(test.labels).long()


def kernel_figure(results: Sequence[Result], config: Config, each: int = 8) -> Figure:
    """Cosine kernel matrices of test images sorted by class, one panel a result, with the loss against the first.

    Args:
        results: The teacher's first.
        config: Their profile.
        each: Images of each class.
    """
    figure, panels = plt.subplots(
        1, len(results), figsize=(2.5 * len(results) + 0.6, 2.9), layout="constrained"
    )
    reference: Tensor | None = None
    image = None
    for axes, result in zip(panels, results, strict=True):
        features, labels = test_features(result, config)
        rows = torch.cat([(labels == label).nonzero()[:each, 0] for label in labels.unique()])
        chosen = features[rows].double()
        reference = chosen if reference is None else reference
        image = axes.imshow(
            cosine_kernel(chosen).numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
        )
        loss = pkt_loss(chosen, reference).item()
        axes.set_title(
            ARM_TITLES[result.run.arm] + ("" if chosen is reference else f"\nloss {1000 * loss:.1f} mnat")
        )
        axes.set_xticks([])
        axes.set_yticks([])
    assert image is not None
    figure.colorbar(image, ax=panels, label="cosine kernel", shrink=0.8)
    return figure


def neighbours_figure(results: Sequence[Result], config: Config, queries: int = 5, shown: int = 5) -> Figure:
    """The nearest test images of a few query images by each result; neighbours of another class are framed.

    The queries are those on which the first and last result differ most in the number of right neighbours, so
    the picture shows where a representation changed, not how often.
    """
    _, test, _ = load_pair_data(PAIRS[config.pair])
    ranked: dict[str, Tensor] = {}
    labels = torch.from_numpy(test.labels).long()
    arms = [result.run.arm for result in results]
    for result in results:
        features, _ = test_features(result, config)
        similarity = F.normalize(features) @ F.normalize(features).T
        ranked[result.run.arm] = similarity.fill_diagonal_(-2).topk(shown).indices
    right = torch.stack([(labels[near] == labels[:, None]).sum(1) for near in ranked.values()])
    chosen = (right[-1] - right[0]).abs().argsort(descending=True, stable=True)[:queries]
    # One narrow empty column before each group keeps the pictures of all groups the same size.
    widths = [1.0, *([0.25] + [1.0] * shown) * len(arms)]
    figure, grid = plt.subplots(
        queries,
        len(widths),
        figsize=(0.62 * sum(widths), 0.66 * queries + 0.5),
        width_ratios=widths,
        squeeze=False,
    )
    for line, query in zip(grid, chosen.tolist(), strict=True):
        pictures = [query]
        for arm in arms:
            pictures += [None, *ranked[arm][query].tolist()]
        for axes, index in zip(line, pictures, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            wrong = index is not None and labels[index] != labels[query]
            for spine in axes.spines.values():
                spine.set_visible(bool(wrong))
                spine.set(color="C1", linewidth=3)
            if index is not None:
                axes.imshow(np.squeeze(test.images[index]), cmap="gray")
    grid[0][0].set_title("query", fontsize=9)
    for number, arm in enumerate(arms):
        grid[0][2 + number * (shown + 1) + shown // 2].set_title(ARM_TITLES[arm], fontsize=9)
    return figure


def diagonal_figure(cosines: Sequence[float], samples: int = 8) -> Figure:
    """Loss of a student whose samples all have one pairwise cosine against an orthonormal teacher (erratum P1)."""
    figure, axes = plt.subplots(figsize=(5.6, 2.8))
    for diagonal, style, label in ((True, "-", "diagonal included"), (False, "--", "diagonal left out")):
        losses = [
            float(pkt_loss(equiangular(samples, rho), equiangular(samples, 0.0), diagonal=diagonal))
            for rho in cosines
        ]
        axes.plot(cosines, losses, style, label=label)
    axes.set_xlabel("cosine between any two student features (teacher: 0)")
    axes.set_ylabel("PKT loss, nat")
    axes.legend()
    return figure


def nystrom_figure(student: Tensor, teacher: Tensor, counts: Sequence[int], draws: int = 20) -> Figure:
    """Relative error of the landmark approximation of the loss against the number of landmarks."""
    exact = float(pkt_loss(student, teacher))
    generator = torch.Generator().manual_seed(0)
    errors: Mapping[int, list[float]] = {
        count: [
            abs(float(nystrom_pkt_loss(student, teacher, count, generator=generator)) / exact - 1)
            for _ in range(draws)
        ]
        for count in counts
    }
    figure, axes = plt.subplots(figsize=(5.6, 2.8))
    middle = [float(np.median(errors[count])) for count in counts]
    low, high = (np.array([np.quantile(errors[count], q) for count in counts]) for q in (0.1, 0.9))
    axes.plot(counts, [100 * value for value in middle], "o-", label="median of the draws")
    axes.fill_between(counts, 100 * low, 100 * high, alpha=0.25, label="10 % to 90 %")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"landmarks (of {len(student)} samples)",
        ylabel="relative error of the loss, %",
    )
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()
    return figure
