"""KSANC: logits, a discriminator of logits, and layers squeezed by attention; each added to the one before.

``reproduce run ksanc`` (quick, digits) · ``reproduce run ksanc --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run ksanc --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).

Students have the recipe of the shared table. Teacher, student alone and distillation are its rows; the others see the
labels through the discriminator's classes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kdrefs.methods.ksanc import AttentionEstimator
from kdrefs.training import evaluation_mode
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.ksanc.squeezing import Guide, Squeezer, counting_positions, guides_of
from reproductions.ksanc.training import Arm, trained
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches
from reproductions.protocols.rows import BASELINES
from reproductions.protocols.settings import Setting, setting_of
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

COLUMN = "ksanc"
TITLE = "Knowledge Squeezed Adversarial Network Compression"
PAPER = "shu2019ksanc"
METRICS = classification.METRICS | {
    "positions": Metric(
        unit="%", format=".1f", title="positions that count in the teacher's attention", delta=5.0
    ),
}
ROWS = ("ksanc",)  # of the shared table

# Weights of the terms, chosen by `reproductions.ksanc.choose` on held-out training images of the digits.
BACKBONE = 0.02
ADVERSARIAL, MU = 0.03, 0.001
LAYERS = {"lifted": 0.0003, "maps": 0.00003, "average": 0.003}

_GAME = Arm(BACKBONE, ADVERSARIAL, MU)
ARMS = {
    "backbone": Arm(BACKBONE),
    "backbone_adv": _GAME,
    "ksanc": Arm(BACKBONE, ADVERSARIAL, MU, LAYERS["lifted"], "lifted"),
    "ksanc_figure": Arm(BACKBONE, ADVERSARIAL, MU, LAYERS["maps"], "maps"),
    "ksanc_average": Arm(BACKBONE, ADVERSARIAL, MU, LAYERS["average"], "average"),
}

PROFILES: dict[str, Config] = {
    "quick": tables.quick(Setting("digits", DIGITS, ("teacher", *BASELINES, *ARMS))),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", *BASELINES, "backbone", "ksanc", "ksanc_average"),
            ("backbone_adv", "ksanc_figure"),
        )
    ),
    "paper": tables.paper(
        Setting("cifar100", CIFAR100, ("teacher", *BASELINES, "backbone", "ksanc", "ksanc_average")),
        minutes=180,
    ),
}


plan = partial(classification.plan, COLUMN)
relevant_config = classification.relevant_config
together = classification.together


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """See :func:`execute_together`."""
    return execute_together([run], config, context)[0]


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """Train what the runs of one arm need and evaluate it on the test set."""
    arm = runs[0].arm
    if arm not in ARMS:
        return classification.execute_together(runs, config, context, {}, __name__)
    training, seeds = setting_of(runs[0], config).recipe, [run.seed for run in runs]
    found = trained(ARMS[arm], training, seeds, context)
    guides = guides_of(ARMS[arm].reading, training, seeds, context)
    return [
        classification.evaluate(one.student, guide.network, training, context)
        | attention_scores(guide, training, context)
        for one, guide in zip(found, guides, strict=True)
    ]


def attention_scores(guide: Guide, training: Training, context: Context) -> dict[str, float]:
    """How many positions count in the teacher's attention to test images: the mean of the layers, in % of all.

    Nothing for a guide whose layers nobody looks at.
    """
    if guide.squeezer is None:
        return {}
    pair = PAIRS[training.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    batches = make_batches(pair, test, device=context.device, training=False)
    found = []
    with evaluation_mode(guide):
        for batch in batches:
            given = guide.layers.of(guide.network(batch.images))
            for weights in attention_of(guide.squeezer, given):
                found.append(len(weights) * counting_positions(weights))
    return {"positions": sum(found) / (len(guide.layers.maps) * batches.num_samples)}


def attention_of(squeezer: Squeezer, given: Sequence[Tensor]) -> list[Tensor]:
    """The weights of the positions in each layer, equal ones for the plain average.

    Args:
        squeezer: Of either network.
        given: The descriptor and the maps.
    """
    descriptor, *maps = given
    found = []
    for layer, one in zip(squeezer.layers, maps, strict=True):
        if isinstance(layer, AttentionEstimator):
            found.append(layer.attention(one, descriptor))
        else:
            found.append(torch.full_like(one[:, 0], 1 / one[0, 0].numel()))
    return found
