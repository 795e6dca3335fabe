"""How the discriminator's learning rate was chosen: on further training images, never on the test set.

``python -m reproductions.structured_kd.choose`` repeats the choice and prints every trial: the mean intersection over
union of students with all three terms on further images of the training half of the photographs, the mean of a few
seeds. The student's own rate stays what it is without a teacher; the larger recipes take the rate of the small one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kdrefs.data.shapes import CLASSES, shapes
from reproductions.harness.runs import Context, RunStore
from reproductions.protocols.dense import PROBE_TEST, dense_batches, dense_outputs, segmentation_scores
from reproductions.structured_kd.run import SMALL
from reproductions.structured_kd.training import FEATURE, Recipe, student_of

RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
FURTHER = 1000  # images, of another seed than those of the training

Trial = Callable[[float], float]


def choose(trial: Trial) -> float:
    """The best of :data:`RATES`, of equals the first."""
    return max(RATES, key=trial)


def trial_on(recipe: Recipe, seeds: Sequence[int], context: Context) -> Trial:
    """Trials that train a student a seed and print the mean score on further training images, in percent."""
    count = FURTHER if context.max_steps is None else PROBE_TEST
    further = shapes("train", count, size=recipe.scenes.size, seed=recipe.scenes.seed + 1)
    batches = dense_batches(recipe.scenes, further, context.device, training=False)
    masks = torch.from_numpy(further.extras["masks"]).long().to(context.device)

    def trial(rate: float) -> float:
        scores = []
        for seed in seeds:
            net = student_of("pi_pa_ho", replace(recipe, discriminator_rate=rate), seed, context)
            predicted = dense_outputs(net, batches, FEATURE)["logits"].argmax(1)
            scores.append(segmentation_scores(predicted, masks, len(CLASSES))["miou"])
        mean = sum(scores) / len(scores)
        print(f"rate {rate:g}: {mean:.2f} %", flush=True)
        return mean

    return trial


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trial = trial_on(SMALL, (100, 101, 102, 103, 104), Context(store=RunStore(folder), progress=False))
        print(choose(trial))
