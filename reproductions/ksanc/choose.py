"""How the weights of the terms were chosen: on held-out training images of the digits, never on the test set.

``python -m reproductions.ksanc.choose`` repeats the choice and prints every trial. A tenth of the training images, the
same share of each class, is held out from the students of a few seeds. Each step has nine trials: the weight of the
logits; weight and regularisers of the game; the weight of the layers, for the attention, the figure's reading and the
plain average alike. What was chosen before stays. Teachers and their estimators have seen the held-out images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from kdrefs.metrics import accuracy
from reproductions.harness.runs import Context, RunStore
from reproductions.ksanc.squeezing import Reading
from reproductions.ksanc.training import Arm, initial, train
from reproductions.protocols.holdout import held_out
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations

BACKBONES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
GAMES = tuple((adversarial, mu) for adversarial in (0.03, 0.1, 0.3) for mu in (1e-4, 1e-3, 1e-2))
LAYERS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

Trial = Callable[[Arm], float]


def choose(trial: Trial) -> dict[str, Arm]:
    """The best of the trials of each step, of equals the first.

    Args:
        trial: Held-out accuracy of an arm.
    """
    backbone = _best(trial, [Arm(weight) for weight in BACKBONES])
    game = _best(trial, [replace(backbone, adversarial=weight, mu=mu) for weight, mu in GAMES])
    readings = {
        reading: _best(
            trial, [replace(game, reading=cast(Reading, reading), intermediate=weight) for weight in LAYERS]
        )
        for reading in ("lifted", "maps", "average")
    }
    return {"backbone": backbone, "game": game, **readings}


def _best(trial: Trial, arms: Sequence[Arm]) -> Arm:
    scores = [trial(arm) for arm in arms]
    return arms[scores.index(max(scores))]


def trial_on(training: Training, seeds: Sequence[int], context: Context) -> Trial:
    """Trials that train a student a seed and print the mean held-out accuracy, in percent; 0 where one diverges."""
    pair = PAIRS[training.pair]
    split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    kept, held = held_out(torch.from_numpy(split.labels))
    wanted = torch.from_numpy(split.labels).long()[held].to(context.device)
    batches = make_batches(pair, split, device=context.device, training=False, indices=held)

    def trial(arm: Arm) -> float:
        found = initial(arm, training, seeds, context)
        mean = 0.0
        try:
            with tempfile.TemporaryDirectory() as folder:
                train(found, arm, training, seeds, context, Path(folder), indices=kept)
        except FloatingPointError:
            print(f"{arm}: diverges", flush=True)
            return mean
        for one in found:
            logits = representations(one.student, batches)["logits"]
            mean += 100 * accuracy(logits, wanted) / len(found)
        print(f"{arm}: {mean:.2f} %", flush=True)
        return mean

    return trial


if __name__ == "__main__":
    from reproductions.protocols.tables import DIGITS

    with tempfile.TemporaryDirectory() as store:
        for name, arm in choose(
            trial_on(DIGITS, (100, 101, 102, 103, 104), Context(store=RunStore(store), progress=False))
        ).items():
            print(name, arm)
