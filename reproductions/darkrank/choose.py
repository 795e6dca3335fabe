"""How the weights of the losses were chosen: on classes held out of the training, never on unseen ones.

``python -m reproductions.darkrank.choose`` repeats the choice for the digits and prints every trial. Teacher and
students are trained on the first three of the five seen classes; a quarter of the other two's training images look for
their class among the rest. Soft and hard transfer and distillation get the same number of trials.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from reproductions.darkrank import heldout
from reproductions.darkrank.heldout import Parts, Recipe
from reproductions.darkrank.run import DIGITS, WEIGHTS, Weights, methods
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context, RunStore
from reproductions.protocols.pairs import load_pair_data

TRIALS: dict[str, tuple[float, ...]] = {
    "soft": (1.0, 3.0, 10.0, 30.0),
    "hard": (1.0, 3.0, 10.0, 30.0),
    "kd": (0.3, 0.5, 0.9, 0.98),
}
TRAINED = 3  # of the seen classes

Trial = Callable[[str, Weights], float]


def choose(weights: Weights, trial: Trial) -> Weights:
    """The weights with the highest mean average precision, each arm by itself; of equals the first."""
    for arm, values in TRIALS.items():
        scores = {value: trial(arm, replace(weights, **{arm: value})) for value in values}
        weights = replace(weights, **{arm: max(values, key=scores.__getitem__)})
    return weights


def held_out(recipe: Recipe) -> tuple[Recipe, Parts]:
    """The recipe on fewer classes, and the parts of the training set that take the place of seen and unseen classes."""
    training, _, _ = load_pair_data(recipe.pair)
    shown = replace(recipe, seen=TRAINED, unseen=(TRAINED, recipe.seen))
    known, kept = heldout.part(training, 0, TRAINED), heldout.part(training, *shown.unseen)
    asked = np.arange(len(kept)) % 4 == 0
    return shown, Parts(known, known, heldout.chosen(kept, ~asked), heldout.chosen(kept, asked))


def trial_on(recipe: Recipe, seeds: Sequence[int], context: Context) -> Trial:
    """Trials that train students of several seeds and print their mean average precision in percent."""
    shown, parts = held_out(recipe)
    pair, source = shown.pair, source_digest("reproductions.darkrank.run")

    def trial(arm: str, weights: Weights) -> float:
        identity = {"arm": arm, "weights": asdict(weights)}
        method = methods(shown, weights)[arm]
        students = heldout.students_of(shown, parts.training, method, identity, seeds, context, source)
        found = []
        for seed, student in zip(seeds, students, strict=True):
            guide = heldout.teacher_of(shown, parts.training, seed, context)
            aims = heldout.embedded(guide, pair.teacher.feature, shown, parts.queries, context)
            scores = heldout.measure(student, pair.student.feature, aims, parts, shown, context)
            found.append(scores["map"])
        mean = sum(found) / len(found)
        print(f"{arm:5} {getattr(weights, arm):g}: {mean:.2f} %", flush=True)
        return mean

    return trial


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        place = Context(store=RunStore(store), progress=False)
        print(choose(WEIGHTS, trial_on(DIGITS, (100, 101, 102, 103, 104), place)))
