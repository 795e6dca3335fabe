"""How learning rates, epochs and ramp were chosen: on held-out training images, never on the test set.

``python -m reproductions.afd.choose`` repeats the choice for the digits and prints every trial. A tenth of the
training images, the same share of each class, is held out; two equal networks of a few seeds are trained on the rest.
Adversarial matching and the alignment of maps get the same number of trials.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reproductions.afd.groups import Group, Recipe, initial_networks, scores, train
from reproductions.harness.runs import Context, RunStore
from reproductions.protocols.holdout import held_out
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches

RATES = (0.03, 0.1)  # of networks trained alone
SCHEDULES = ((8, 0.0), (8, 0.5), (8, 1.0), (12, 1.0))  # (epochs, ramp), the cheapest first
SECOND_RATES = (1e-4, 5e-4, 2e-3)  # of adversarial matching and of L1

Trial = Callable[[str, Recipe], float]


def choose(recipe: Recipe, trial: Trial) -> Recipe:
    """The recipe with chosen rates, epochs and ramp.

    The networks' rate is the one with which they are best alone in the fewest epochs. Epochs and ramp are the first of
    :data:`SCHEDULES` with which mutual learning is no worse than training alone for as long, or, if it always is, those
    with which it is least so. The rate of either second step is the best of :data:`SECOND_RATES`. Of equals the first
    is taken.

    Args:
        recipe: Says everything else.
        trial: Held-out accuracy of an arm under a recipe.
    """
    few = SCHEDULES[0][0]
    rates = {rate: trial("independent", replace(recipe, rate=rate, epochs=few)) for rate in RATES}
    recipe = replace(recipe, rate=max(RATES, key=rates.__getitem__))
    alone = {few: max(rates.values())}
    gains: dict[tuple[int, float], float] = {}
    for epochs, ramp in SCHEDULES:
        tried = replace(recipe, epochs=epochs, ramp=ramp)
        if epochs not in alone:
            alone[epochs] = trial("independent", tried)
        gains[epochs, ramp] = trial("dml", tried) - alone[epochs]
        if gains[epochs, ramp] >= 0:
            break
    epochs, ramp = max(gains, key=gains.__getitem__)
    recipe = replace(recipe, epochs=epochs, ramp=ramp)
    adversarial = {rate: trial("afd", replace(recipe, adversarial_rate=rate)) for rate in SECOND_RATES}
    distance = {rate: trial("l1", replace(recipe, l1_rate=rate)) for rate in SECOND_RATES}
    return replace(
        recipe,
        adversarial_rate=max(SECOND_RATES, key=adversarial.__getitem__),
        l1_rate=max(SECOND_RATES, key=distance.__getitem__),
    )


def trial_on(group: Group, seeds: Sequence[int], context: Context) -> Trial:
    """Trials that train ``group`` and print the mean held-out accuracy of its networks, in percent."""

    def trial(arm: str, recipe: Recipe) -> float:
        pair = PAIRS[recipe.pair]
        split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
        kept, held = held_out(torch.from_numpy(split.labels))
        networks = initial_networks(group, recipe, seeds, context)
        with tempfile.TemporaryDirectory() as folder:
            train(networks, group, recipe, arm, seeds, context, Path(folder), indices=kept)
        batches = make_batches(pair, split, device=context.device, training=False, indices=held)
        found = [
            scores([members[m] for members in networks], batches, split.labels[held.numpy()])["accuracy"]
            for m in range(len(seeds))
        ]
        mean = sum(found) / len(found)
        rate = recipe.l1_rate if arm == "l1" else recipe.adversarial_rate
        print(
            f"{arm:12} {recipe.epochs:3} epochs, ramp {recipe.ramp:g}, rate {rate:g}: {mean:.2f} %",
            flush=True,
        )
        return mean

    return trial


if __name__ == "__main__":
    from reproductions.afd.run import PROFILES

    profile = PROFILES["quick"]
    with tempfile.TemporaryDirectory() as store:
        place = Context(store=RunStore(store), progress=False)
        print(choose(profile.recipe, trial_on(profile.groups[0], (100, 101, 102), place)))
