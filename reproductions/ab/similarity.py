"""How much of a teacher's activation boundaries a student's layers hold, whatever it was trained with.

A student that was trained without connectors has none to compare its neurons by, and one that had them has lost them
since. So every student gets the same reading: the best affine map of its channels to the teacher's signs, by least
squares, fitted on training images and judged on test images. A teacher read from itself is the ceiling, which is below
100 %: the least squares to signs put a boundary near where it was, not exactly there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.methods.ab import activation_similarity
from kdrefs.training import evaluation_mode
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import Pair, load_pair_data, make_batches

IMAGES = 2000  # of the training set to fit and of the test set to judge, at most
RIDGE = 1e-6  # times the mean square of the inputs, for channels that are copies of each other


def similarities(
    student: nn.Module, guide: nn.Module, pair: Pair, stages: Sequence[tuple[str, str]], context: Context
) -> list[float]:
    """Activation similarity of each stage on test images, in %, as far as an affine map reads it from the student.

    Args:
        student: A network in eval mode.
        guide: Its teacher.
        pair: The data.
        stages: Names of the features that face each other, student's and teacher's.
        context: What the harness gives.
    """
    train, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    fitting, judging = (
        make_batches(
            pair, split, device=context.device, training=False, indices=range(min(IMAGES, len(split.labels)))
        )
        for split in (train, test)
    )
    readings = [
        read_signs(inputs, outputs)
        for inputs, outputs in zip(*_products(student, guide, fitting, stages), strict=True)
    ]
    found = torch.zeros(len(stages), dtype=torch.float64)
    for batch in judging:
        for place, (rows, targets) in enumerate(_rows(student, guide, batch, stages)):
            found[place] += len(batch) * activation_similarity(rows @ readings[place], targets).item()
    return (100 * found / judging.num_samples).tolist()


def read_signs(inputs: Tensor, outputs: Tensor) -> Tensor:
    r"""The map with least squares, from :math:`X^\top X` and :math:`X^\top Y` of inputs and signs."""
    ridge = RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs)).to(inputs)
    return torch.linalg.solve(inputs + ridge, outputs)


def _products(
    student: nn.Module, guide: nn.Module, batches: Batches, stages: Sequence[tuple[str, str]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each stage, the sums over all positions that :func:`read_signs` needs."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for number, batch in enumerate(batches):
        for place, (rows, targets) in enumerate(_rows(student, guide, batch, stages)):
            signs = torch.where(targets > 0, 1.0, -1.0).to(targets)
            squares, products = rows.mT @ rows, rows.mT @ signs
            if number == 0:
                inputs.append(squares)
                outputs.append(products)
            else:
                inputs[place] += squares
                outputs[place] += products
    return inputs, outputs


def _rows(
    student: nn.Module, guide: nn.Module, batch: Batch, stages: Sequence[tuple[str, str]]
) -> list[tuple[Tensor, Tensor]]:
    """Of each stage, a row a position: the student's channels with a 1, and the teacher's."""
    with evaluation_mode(student), evaluation_mode(guide):
        ours, theirs = student(batch.images).features, guide(batch.images).features
    pairs = [
        [maps.double().movedim(1, -1).flatten(0, -2) for maps in (ours[one], theirs[other])]
        for one, other in stages
    ]
    return [(nn.functional.pad(rows, (0, 1), value=1.0), targets) for rows, targets in pairs]
