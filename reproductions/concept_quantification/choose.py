"""How learning rates and thresholds were chosen: on held-out training images, never on the test set.

``python -m reproductions.concept_quantification.choose [composites|tinyimagenet]`` repeats the choice and prints every
trial. A tenth of the training images is held out; baselines of seeds that no profile uses are trained on the rest. The
rate is that of the best held-out accuracy, the same for every arm. The threshold b makes half of the object's cells
concepts in the baseline's last maps, so that their number can move either way; it is rounded to 0.1.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reproductions.concept_quantification.studies import Recipe, Study, studied
from reproductions.harness.runs import Context, RunStore

RATES = (1e-3, 3e-3, 1e-2)
SEEDS = {"composites": (100, 101, 102), "tinyimagenet": (100,)}


def choose(recipe: Recipe, seeds: Sequence[int], context: Context) -> tuple[float, float]:
    """Learning rate and threshold."""
    recipe = replace(recipe, source=replace(recipe.source, held_out=True))
    found: dict[float, list[Study]] = {}
    for rate in RATES:
        found[rate] = [studied(replace(recipe, rate=rate), "baseline", seed, context) for seed in seeds]
        print(
            f"rate {rate:g}: {_accuracy(found[rate]):.2f} %, threshold {threshold(found[rate]):.1f}",
            flush=True,
        )
    rate = max(RATES, key=lambda r: _accuracy(found[r]))
    return rate, threshold(found[rate])


def threshold(studies: Sequence[Study]) -> float:
    """Median over the object's cells of how far their entropy lies below the background's, rounded to 0.1."""
    gaps = torch.cat([gap(study.entropy[:, -1].double(), study.foreground) for study in studies])
    return round(gaps.median().item(), 1)


def gap(entropy: Tensor, foreground: Tensor) -> Tensor:
    """Mean entropy of the image's background less that of each cell of its object, nats."""
    outside = (~foreground).double()
    level = (entropy * outside).sum((1, 2)) / outside.sum((1, 2))
    return (level[:, None, None] - entropy)[foreground]


def _accuracy(studies: Sequence[Study]) -> float:
    return sum(study.accuracy for study in studies) / len(studies)


if __name__ == "__main__":
    from reproductions.concept_quantification.run import COMPOSITES, TINY_IMAGENET

    recipes = {"composites": COMPOSITES, "tinyimagenet": TINY_IMAGENET}
    for name in sys.argv[1:] or recipes:
        with tempfile.TemporaryDirectory() as store:
            print(name, choose(recipes[name], SEEDS[name], Context(store=RunStore(store), progress=False)))
