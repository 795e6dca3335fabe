"""The closed form beside optimised maps of the same network and images: ranks, counts, entropies, passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from kdrefs.methods.concept_quantification import concept_counts, entropy_map
from reproductions.concept_quantification import sources
from reproductions.concept_quantification.studies import Recipe, studied
from reproductions.harness.runs import Context

CONVERGED = {"method": "optimise", "steps": 300, "draws": 16}
# The authors' trade-off is 7 for VGG and AlexNet and 6 for ResNets; 96 draws a step, which only make it less noisy.
OFFICIAL = {"method": "optimise", "variant": "official", "draws": 16}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "closed-form": {},
    "converged": CONVERGED,
    "converged-small": CONVERGED | {"sigma": 0.003, "trade_off": 1.0},  # the optimum at a tenth of the noise
    "official": OFFICIAL,
    "official-3": OFFICIAL | {"trade_off": 3.0},
    "official-6": OFFICIAL | {"trade_off": 6.0},
}


@dataclass(frozen=True)
class Maps:
    """Entropy maps of some images by one of the ways, and how many images went through the network for each."""

    entropy: Tensor
    passes: float


class Counted(nn.Module):
    """A network that counts the images that go through it forwards; backward passes are added by the caller."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.images = net, 0

    def forward(self, images: Tensor) -> Any:
        """Run the network."""
        self.images += len(images)
        return self.net(images)


def maps(
    net: nn.Module, images: Tensor, recipe: Recipe, way: str, *, seed: int = 0, max_steps: int | None = None
) -> Maps:
    """Entropy maps of ``images`` by a way of :data:`WAYS`.

    A pass is one image forwards or backwards. In closed form that is one forwards and one a probe backwards; an
    optimisation goes back once for each image forwards but the undisturbed ones.
    """
    options = dict(WAYS[way])
    if max_steps is not None and options:
        options["steps"] = max_steps
    counted = Counted(net)
    generator = torch.Generator().manual_seed(seed)
    entropy = entropy_map(
        counted, images, recipe.net.feature, recipe.source.grid,
        probes=recipe.probes, chunk=128, generator=generator, **options,
    ).entropy.double()  # fmt: skip
    forwards = counted.images / len(images)
    with torch.no_grad():
        width = net.eval()(images[:1]).features[recipe.net.feature].numel()
    backwards = min(width, recipe.probes) if not options else forwards - 1
    return Maps(entropy, forwards + backwards)


def compared(
    recipe: Recipe, way: str, seed: int, threshold: float, count: int, context: Context
) -> dict[str, float]:
    """What a way finds on the first ``count`` measured images of a seed's baseline, and how it agrees."""
    study = studied(recipe, "baseline", seed, context)
    images = sources.load(recipe.source)
    chosen = sources.head(images, min(count, len(study.foreground)))
    pixels = sources.pixels(recipe.source, chosen.measured, context.device)
    exact, found = (
        maps(study.network, pixels, recipe, one, seed=seed, max_steps=context.max_steps)
        for one in ("closed-form", way)
    )
    counts, wanted = (concept_counts(e, chosen.foreground, threshold) for e in (found.entropy, exact.entropy))
    concepts, expected = (c.concepts.double().sum((1, 2)).mean().item() for c in (counts, wanted))
    return {
        "foreground": counts.foreground.double().mean().item(),
        "background": counts.background.double().mean().item(),
        "concepts": concepts,
        "count_gap": abs(concepts - expected) / max(expected, 1.0),
        "rank_gap": 1 - rank_correlation(found.entropy, exact.entropy),
        "mean_entropy": found.entropy.mean().item(),
        "passes": found.passes,
    }


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two maps' cells, mean over the images; 1 where both are constant, else 0 if one is."""
    found = []
    for a, b in zip(one.flatten(1).cpu(), other.flatten(1).cpu(), strict=True):
        constant = [bool((x == x[0]).all()) for x in (a, b)]
        found.append(float(all(constant)) if any(constant) else float(spearmanr(a, b).statistic))
    return sum(found) / len(found)
