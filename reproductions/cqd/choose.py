"""How the digits' learning rates were chosen: on held-out training images, never on the test set.

``python -m reproductions.cqd.choose`` repeats the choice and prints every trial. A tenth of the training images is held
out. Fine-tuning with the labels and with the teacher's answers get the same number of trials.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

from reproductions.cqd.training import Recipe, evaluate, trained
from reproductions.harness.runs import Context, RunStore

RATES = (0.003, 0.01, 0.03, 0.1)

Trial = Callable[[str, Recipe], float]


def choose(recipe: Recipe, trial: Trial) -> Recipe:
    """The recipe with the best of :data:`RATES` for either kind of training; of equals the smallest.

    The network A has the labels' rate in all trials of the answers.

    Args:
        recipe: Says everything else.
        trial: Held-out accuracy on degraded images of an arm under a recipe.
    """
    labels = {rate: trial("tuned", replace(recipe, rate=rate)) for rate in RATES}
    recipe = replace(recipe, rate=max(RATES, key=labels.__getitem__))
    answers = {rate: trial("a_cqd", replace(recipe, answers_rate=rate)) for rate in RATES}
    return replace(recipe, answers_rate=max(RATES, key=answers.__getitem__))


def trial_on(kind: str, seeds: Sequence[int], context: Context) -> Trial:
    """Trials on a kind of degradation that print the mean held-out accuracy over ``seeds``, in percent."""

    def trial(name: str, recipe: Recipe) -> float:
        held = replace(recipe, held_out=True)
        networks = trained(kind, name, seeds, held, context)
        found = [
            evaluate(network, kind, seed, held, context)["accuracy"]
            for network, seed in zip(networks, seeds, strict=True)
        ]
        mean = sum(found) / len(found)
        print(
            f"{name:6} rate {recipe.rate:g}, with answers {recipe.answers_rate:g}: {mean:.2f} %", flush=True
        )
        return mean

    return trial


if __name__ == "__main__":
    from reproductions.cqd.run import DIGITS

    with tempfile.TemporaryDirectory() as store:
        place = Context(store=RunStore(store), progress=False)
        print(choose(DIGITS, trial_on("digits-lowres", (100, 101, 102), place)))
