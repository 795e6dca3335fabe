"""How far a target moves when the teacher's features are disturbed: soft assignments against the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.quest import mean_largest_assignment, nearest_word, soft_assignment
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations, teacher

IMAGES = 1000  # of the test set, at most
# Set before anything was measured. Noise in units of the features' standard deviation; share of the values that
# are dropped; largest change of contrast, as a share, and of brightness, in units of the range of pixels.
STRENGTHS = {"noise": 0.5, "dropout": 0.3, "photometric": 0.3}

Target = Callable[
    [Tensor], Tensor
]  # of feature vectors (vectors, channels): the target's values, one row a vector


def hint_target(rows: Tensor) -> Tensor:
    """The features themselves, which a hint is compared with."""
    return rows


def soft_target(words: Tensor, beta: float) -> Target:
    """QUEST's target."""
    return lambda rows: soft_assignment(rows, words, beta)


def hard_target(words: Tensor) -> Target:
    """The nearest word alone, as a distribution."""
    return lambda rows: F.one_hot(nearest_word(rows, words), len(words)).to(rows.dtype)


def relative_change(clean: Tensor, disturbed: Tensor, generator: torch.Generator) -> float:
    r"""How far rows moved, in % of how far apart two of them are.

    .. math:: 100 \, \frac{\sum_i \lVert t(f_i) - t(\tilde f_i) \rVert^2}{\sum_i \lVert t(f_i) - t(f_{\pi(i)}) \rVert^2}

    with a random permutation. 0 for a target that does not move, about 100 for one that tells nothing of its
    vector any more; a pure number, which targets of different scale and dimension can be compared in.
    """
    other = clean[torch.randperm(len(clean), generator=generator).to(clean.device)]
    return 100 * ((disturbed - clean).square().sum() / (other - clean).square().sum()).item()


def noisy(rows: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise, ``strength`` in units of the standard deviation of all values."""
    return rows + strength * rows.std() * torch.randn(rows.shape, generator=generator).to(rows.device)


def dropped(rows: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share ``strength`` of the values set to 0, the others scaled up, as dropout does."""
    kept = torch.rand(rows.shape, generator=generator).to(rows.device) >= strength
    return rows * kept / (1 - strength)


def changes(
    target: Target, clean: Tensor, photometric: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Relative change of a target for each disturbance of :data:`STRENGTHS`."""
    disturbed = {
        "noise": noisy(clean, STRENGTHS["noise"], generator),
        "dropout": dropped(clean, STRENGTHS["dropout"], generator),
        "photometric": photometric,
    }
    before = target(clean)
    return {
        f"{name}_change": relative_change(before, target(rows), generator) for name, rows in disturbed.items()
    }


def evaluate(
    context: Context, pair: str, layer: str, seed: int, words: Tensor | None, beta: float | None
) -> dict[str, float]:
    """Changes of one target on test images: the hint without ``words``, the hard assignment without ``beta``."""
    clean, photometric = test_vectors(context, pair, layer, seed)
    # One generator state for every target, so that all of them see the same disturbances.
    generator = torch.Generator().manual_seed(seed)
    if words is None:
        return changes(hint_target, clean, photometric, generator)
    target = hard_target(words) if beta is None else soft_target(words, beta)
    largest = 1.0 if beta is None else mean_largest_assignment(clean, words, beta)
    return changes(target, clean, photometric, generator) | {"mean_largest": largest}


def test_vectors(context: Context, pair: str, layer: str, seed: int) -> tuple[Tensor, Tensor]:
    """The teacher's vectors on test images, as they are and with another contrast and brightness."""
    given = PAIRS[pair]
    _, test, _ = load_pair_data(given, probe=context.max_steps is not None)
    count = min(IMAGES, len(test.labels))
    test = replace(test, images=test.images[:count], labels=test.labels[:count], extras={})

    def change(images: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(2, len(images), 1, 1, 1, generator=generator, device=images.device)
        contrast, brightness = (2 * drawn - 1) * STRENGTHS["photometric"]
        return (images * (1 + contrast) + brightness).clamp(0, 1)

    guide = teacher(context, given, seed)
    found = []
    for photometric in (None, [change]):
        batches = make_batches(
            given, test, device=context.device, training=False, photometric=photometric, seed=seed
        )
        found.append(representations(guide, batches, layer)[layer].movedim(1, -1).flatten(0, -2))
    return found[0], found[1]


def by_strength(
    targets: Mapping[str, Target], clean: Tensor, strengths: Sequence[float], seed: int
) -> dict[str, list[float]]:
    """Relative change of several targets for noise of growing strength."""
    return {
        name: [
            relative_change(target(clean), target(noisy(clean, strength, generator)), generator)
            for strength in strengths
            for generator in [torch.Generator().manual_seed(seed)]
        ]
        for name, target in targets.items()
    }
