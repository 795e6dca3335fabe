"""Factor transfer: how much of the factor is the paraphraser's, how wide it should be, and a loss of the same name.

``reproduce run ft`` (quick, digits) · ``reproduce run ft --profile standard`` (CIFAR-10, two CPU cores) ·
``reproduce run ft --profile paper --device cuda`` (ResNet-56 to ResNet-20 on CIFAR-100).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.ft import Paraphraser, Translator, factor_channels, factor_loss, paraphraser_loss
from kdrefs.nets import Output
from kdrefs.training import evaluation_mode
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Context, Run
from reproductions.protocols import classification, tables
from reproductions.protocols.classification import Config
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, teacher
from reproductions.protocols.rows import Method, Shapes, Targets, labels_and
from reproductions.protocols.settings import Setting, setting_of
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS, STAGES
from reproductions.protocols.unsupervised import trained_on_teacher

COLUMN = "ft"
TITLE = "Paraphrasing Complex Network: Network Compression via Factor Transfer"
PAPER = "kim2018ft"
METRICS = classification.METRICS | {
    "reconstruction": Metric(
        unit="%", format=".1f", title="of the map lost by the paraphraser", higher_is_better=False, delta=1.0
    ),
}
ROWS = ("ft",)  # of the shared table


@dataclass(frozen=True)
class Factors:
    """What the student's factor is compared with, and how."""

    rate: float | None = 0.5  # k; None: the teacher's map itself, without a paraphraser
    trained: bool = True
    variant: str = "official"


ARMS = {
    "ft": Factors(),
    "ft_k75": Factors(0.75),
    "ft_k100": Factors(1.0),
    "ft_direct": Factors(None),
    "ft_untrained": Factors(trained=False),
    "ft_repdistiller": Factors(variant="repdistiller"),
}
WEIGHTS = {
    "official": 500.0,  # Jangho-Kim/Factor-Transfer-pytorch@e8d6ac6
    "repdistiller": 200.0,  # HobbitLong/RepDistiller@b84f547
}


@dataclass(frozen=True)
class Paraphrasing:
    """The first stage, and whether its modules and the translator have batch normalisation."""

    epochs: int
    rate: float = 0.1
    variant: str = "official"
    batch_norm: bool = False


# The authors' script. On the digits its five epochs are 60 steps, which teach the mean map and nothing else; there the
# loss is the paper's, and rate, epochs and batch normalisation are what left least of a tenth of the training images
# that was held out, with a teacher of another seed.
PARAPHRASING = {
    "digits": Paraphrasing(10, rate=0.5, variant="mean", batch_norm=True),
    "cifar10": Paraphrasing(5),
    "cifar100": Paraphrasing(5),
}
# The authors read the last group as it is given on; the small networks of the digits still pool it.
POOL = {"digits": 2}


def group(data: str, maps: Tensor) -> Tensor:
    """The output of the last group as the next layer gets it."""
    return F.max_pool2d(maps, POOL[data]) if data in POOL else maps


def target(data: str) -> tuple[str, Callable[[Output], Tensor]]:
    """Name and function of the teacher's map that is paraphrased."""
    guide = STAGES[data][-1][1]
    return f"{guide}_group", lambda output: group(data, output.features[guide])


def paraphraser(data: str, arm: str, training: Training, seed: int, context: Context) -> Paraphraser | None:
    """The first stage of an arm and seed, frozen; None for an arm that has none."""
    factors, stage = ARMS[arm], PARAPHRASING[data]
    if factors.rate is None:
        return None

    def make(shape: tuple[int, ...]) -> Paraphraser:
        assert factors.rate is not None
        return Paraphraser(
            shape[0], factor_channels(shape[0], factors.rate), batch_norm=stage.batch_norm
        ).train()

    def loss(module: nn.Module, maps: Tensor) -> Tensor:
        return paraphraser_loss(module(maps), maps, variant=stage.variant)

    fitted = trained_on_teacher(
        "paraphraser",
        make,
        loss,
        target(data),
        training,
        seed,
        stage.epochs if factors.trained else 0,
        stage.rate,
        context,
        module=__name__,
        about={"rate": factors.rate, "variant": stage.variant, "batch_norm": stage.batch_norm},
    )
    assert isinstance(fitted, Paraphraser)
    return fitted


def method(data: str, arm: str, frozen: Paraphraser | None) -> Method:
    """The second stage: labels, and the factor of a frozen paraphraser or the teacher's map itself."""
    factors = ARMS[arm]
    student, (name, ask) = STAGES[data][-1][0], target(data)

    def regressors(features: Shapes, targets: Shapes) -> dict[str, nn.Module]:
        channels = targets[name][0]
        translator = Translator(
            features[student][0],
            channels if factors.rate is None else factor_channels(channels, factors.rate),
            batch_norm=PARAPHRASING[data].batch_norm,
        )
        pooled = [nn.MaxPool2d(POOL[data])] if data in POOL else []
        return {student: nn.Sequential(*pooled, translator)}

    def term(output: Output, given: Targets) -> Tensor:
        maps = given[name].float()
        factor = maps if frozen is None else frozen.encode(maps)
        return factor_loss(output.features[f"{student}_regressed"], factor, variant=factors.variant)

    return labels_and(WEIGHTS[factors.variant], term, {name: ask}, regressors=regressors)


def lost(frozen: Paraphraser, guide: nn.Module, data: str, training: Training, context: Context) -> float:
    """Share of the squares of the teacher's map on test images that the reconstruction leaves, in %."""
    pair = PAIRS[training.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    left = size = 0.0
    with evaluation_mode(guide), torch.no_grad():
        for batch in make_batches(pair, test, device=context.device, training=False):
            maps = target(data)[1](guide(batch.images)).float()
            left += float((frozen(maps) - maps).double().square().sum())
            size += float(maps.double().square().sum())
    return 100 * left / size


def execute(run: Run, config: Config, context: Context) -> dict[str, float]:
    """Train the paraphraser of the run, then its student, and evaluate both on the test set."""
    if run.arm not in ARMS:
        return classification.execute_together([run], config, context, {}, __name__)[0]
    training = setting_of(run, config).recipe
    frozen = paraphraser(run.data, run.arm, training, run.seed, context)
    methods = {run.arm: method(run.data, run.arm, frozen)}
    (scores,) = classification.execute_together([run], config, context, methods, __name__)
    if frozen is not None:
        guide = teacher(context, PAIRS[training.pair], run.seed)
        scores["reconstruction"] = lost(frozen, guide, run.data, training, context)
    return scores


def execute_together(runs: Sequence[Run], config: Config, context: Context) -> list[dict[str, float]]:
    """The baselines of several seeds share a training; each paraphraser has a run of its own."""
    if runs[0].arm in ARMS:
        return [execute(run, config, context) for run in runs]
    return classification.execute_together(runs, config, context, {}, __name__)


def together(run: Run, config: Config, device: str) -> str | None:
    """Baselines as in every column; a student with a paraphraser of its own trains alone."""
    return None if run.arm in ARMS else classification.together(run, config, device)


PROFILES: dict[str, Config] = {
    "quick": tables.quick(
        Setting(
            "digits",
            DIGITS,
            ("teacher", "student", "kd", "ft"),
            ("ft_direct", "ft_k75", "ft_k100", "ft_untrained", "ft_repdistiller"),
        ),
        seeds=5,
    ),
    "standard": tables.standard(
        Setting(
            "cifar10",
            CIFAR10,
            ("teacher", "student", "kd", "ft"),
            ("ft_direct", "ft_k75", "ft_k100", "ft_untrained", "ft_repdistiller"),
        )
    ),
    "paper": tables.paper(
        Setting(
            "cifar100",
            CIFAR100,
            (
                "teacher",
                "student",
                "kd",
                "ft",
                "ft_direct",
                "ft_k75",
                "ft_k100",
                "ft_untrained",
                "ft_repdistiller",
            ),
        ),
        minutes=300,
        disk_mb=900,
    ),
}


plan = partial(classification.plan, COLUMN)
relevant_config = classification.relevant_config
