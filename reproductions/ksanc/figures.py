"""Figures of the KSANC chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.training import evaluation_mode
from reproductions.harness.runs import Context, Result
from reproductions.ksanc.run import ARMS, attention_of
from reproductions.ksanc.squeezing import guides_of, layers_of
from reproductions.ksanc.training import trained
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches
from reproductions.protocols.settings import Setting, setting_of

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 4",
    "backbone": "logits",
    "backbone_adv": "logits, adversary",
    "ksanc": "KSANC",
    "ksanc_figure": "KSANC, figure's reading",
    "ksanc_average": "KSANC, plain average",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm of a setting: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("ksanc",))


def attention_figure(results: Sequence[Result], config: Config, images: int = 6) -> Figure:
    """Where the estimators look: test images, and below them the weights of each layer of teacher and student.

    Args:
        results: One of an arm with attention, or of several, of one seed.
        config: Their profile.
        images: How many test images, the first of as many classes.
    """
    pair = PAIRS[setting_of(results[0].run, config).recipe.pair]
    _, test, _ = load_pair_data(pair)
    _, chosen = torch.from_numpy(test.labels).unique(return_inverse=True)
    first = [int((chosen == label).nonzero()[0]) for label in range(images)]
    rows: dict[str, Tensor] = {}
    for result in results:
        for name, weights in attention_maps(result, config, first).items():
            rows[f"{ARM_TITLES[result.run.arm]}\n{name}"] = weights
    figure, panels = plt.subplots(
        1 + len(rows), images, figsize=(0.85 * images + 1.8, 0.85 * (1 + len(rows))), layout="constrained"
    )
    for axes, number in zip(panels[0], first, strict=True):
        axes.imshow(test.images[number].squeeze(), cmap="gray")
    for line, (name, weights) in zip(panels[1:], rows.items(), strict=True):
        for axes, one in zip(line, weights, strict=True):
            axes.imshow(one.numpy() * one.numel(), cmap="viridis", vmin=0, vmax=4, interpolation="nearest")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    panels[0, 0].set_ylabel("image", rotation=0, ha="right", va="center", fontsize=8)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def attention_maps(result: Result, config: Config, images: Sequence[int]) -> dict[str, Tensor]:
    """The weights ``(images, height, width)`` of each layer of the teacher and of the student of a result."""
    run, context = result.run, Context.of(result)
    training, arm = setting_of(run, config).recipe, ARMS[run.arm]
    seeds = list(result.provenance.seeds or (run.seed,))
    place = seeds.index(run.seed)
    guide = guides_of(arm.reading, training, seeds, context)[place]
    own = trained(arm, training, seeds, context)[place]
    assert own.squeezer is not None
    assert guide.squeezer is not None
    pair = PAIRS[training.pair]
    _, test, _ = load_pair_data(pair)
    chosen = torch.tensor(images)
    batches = make_batches(pair, test, device=context.device, training=False, indices=chosen)
    batch = next(iter(batches))
    found = {}
    layers = layers_of(training)
    for name, network, squeezer, of in (
        ("teacher", guide.network, guide.squeezer, layers[1]),
        ("student", own.student, own.squeezer, layers[0]),
    ):
        with evaluation_mode(network), evaluation_mode(squeezer):
            weights = attention_of(squeezer, of.of(network(batch.images)))
        for layer, one in zip(of.maps, weights, strict=True):
            found[f"{name}, {layer}"] = one.cpu()
    return found
