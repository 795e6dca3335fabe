"""How the learning rates for the digits were chosen: on training images that neither teacher nor student has seen.

``python -m reproductions.logit_regression.choose`` repeats the choice and prints every trial. A tenth of the training
images, none of them among the labelled ones, is held out. Students learn from the labelled images; each target, with
and without a bottleneck, gets the same number of trials.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kdrefs.data.cache import Split
from reproductions.harness.runs import Context, RunStore
from reproductions.logit_regression.shallow import ARMS, Rates, Recipe, pair_of, scores, trained
from reproductions.protocols.holdout import HELD_OUT, SPLIT_SEED
from reproductions.protocols.pairs import labelled_subset, load_pair_data

RATES = (3e-4, 1e-3, 3e-3, 1e-2)

Trial = Callable[[str, Recipe], float]


def choose(recipe: Recipe, trial: Trial) -> Recipe:
    """The recipe with the best of :data:`RATES` for every target; of equals the smallest.

    Args:
        recipe: Says everything else.
        trial: Held-out accuracy of an arm under a recipe.
    """

    def best(name: str) -> float:
        found = {}
        for rate in RATES:
            every = Rates(rate, rate, rate)
            found[rate] = trial(name, replace(recipe, rates=every, bottleneck_rates=every))
        return max(RATES, key=found.__getitem__)

    plain = Rates(best("labels"), best("mimic"), best("softened"))
    narrow = replace(plain, labels=best("labels_bottleneck"), logits=best("mimic_bottleneck"))
    return replace(recipe, rates=plain, bottleneck_rates=narrow)


def held_out(labels: np.ndarray, labelled: float, seed: int) -> np.ndarray:
    """Numbers of the images held out: a tenth of the set, drawn from those without a label."""
    rest = np.setdiff1d(np.arange(len(labels)), labelled_subset(labels, labelled, seed).numpy())
    share = HELD_OUT * len(labels) / len(rest)
    return rest[labelled_subset(labels[rest], share, SPLIT_SEED).numpy()]


def trial_on(seeds: Sequence[int], context: Context) -> Trial:
    """Trials that train students of ``seeds`` and print their mean held-out accuracy, in percent."""

    def trial(name: str, recipe: Recipe) -> float:
        split, _, _ = load_pair_data(pair_of(recipe), probe=context.max_steps is not None)
        students = trained(recipe, name, seeds, context)
        found = []
        for seed, student in zip(seeds, students, strict=True):
            held = held_out(split.labels, recipe.labelled, seed)
            part = Split(split.images[held], split.labels[held])
            found.append(scores(student, recipe, part, seed, context)["accuracy"])
        rates = recipe.bottleneck_rates if ARMS[name].bottleneck else recipe.rates
        mean = sum(found) / len(found)
        print(f"{name:18} rate {getattr(rates, ARMS[name].target):g}: {mean:.2f} %", flush=True)
        return mean

    return trial


if __name__ == "__main__":
    from reproductions.logit_regression.run import PROFILES

    recipe = PROFILES["quick"].shallow[0].recipe
    with tempfile.TemporaryDirectory() as store:
        place = Context(store=RunStore(store), progress=False)
        print(choose(recipe, trial_on((100, 101, 102, 103, 104), place)))
