"""What each setting trains on, what it calls foreign, and what it is tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrefs.data.batches import Augment, Batches
from kdrefs.data.cache import Split
from kdrefs.data.sets import load_set
from kdrefs.data.spirals import ring, spirals
from reproductions.protocols.pairs import CIFAR_MEAN, CIFAR_STD

AROUND = (1.1, 2.0)  # radii of the ring around the spirals
PROBE = 512  # samples of each part that a probe sees


@dataclass(frozen=True)
class Sets:
    """The four parts of a setting. All but the labels may be images (N, H, W, C) or points (N, 2).

    Attributes:
        train: What the members are trained on, and every student is distilled on.
        train_labels: Of it; the students do not see them.
        foreign: What the arms with auxiliary data are distilled on beside it; has no labels.
        test: Like ``train``.
        test_labels: Of it.
        outside: What has to be told from ``test``; of other kinds than ``foreign``.
        options: Arguments of :class:`kdrefs.data.batches.Batches` that images need.
        augment: In training.
    """

    train: np.ndarray
    train_labels: np.ndarray
    foreign: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    outside: np.ndarray
    options: Mapping[str, Any]
    augment: Augment | None = None

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def load(data: str, *, probe: bool = False) -> Sets:
    """The parts of a setting; a probe sees the first samples of each only.

    Raises:
        kdrefs.data.DataError: A set is neither in the cache nor to be had; the message names the ways.
    """
    sets = {"spirals": _spirals, "digits": _digits, "cifar10": _cifar}[data]()
    if not probe:
        return sets
    parts = {name: getattr(sets, name)[:PROBE] for name in ("foreign", "test", "test_labels", "outside")}
    # Every third or tenth sample of sets that are sorted by class.
    chosen = np.linspace(0, len(sets.train) - 1, PROBE).astype(int)
    return Sets(
        sets.train[chosen], sets.train_labels[chosen], **parts, options=sets.options, augment=sets.augment
    )


def batches(
    sets: Sets, inputs: np.ndarray, labels: np.ndarray | None = None, *, training: bool, **options: Any
) -> Batches:
    """Batches of some of the inputs; augmented and shuffled only for training."""
    settings = {"shuffle": training, "batch_size": 512, **options}
    if inputs.ndim == 2:
        return Batches(None, labels, extras={"points": inputs}, **settings)
    return Batches(
        Split(inputs, labels if labels is not None else np.zeros(len(inputs), dtype=np.int64)),
        augment=sets.augment if training else None,
        **sets.options,
        **settings,
    )


def inputs_of(batch: Any) -> Tensor:
    """Images or points of a batch."""
    return batch.images if batch.images is not None else batch.extras["points"]


def _spirals() -> Sets:
    """900 points to train, 3,000 to test; foreign points and those to be told are of one ring around the spirals."""
    generator = torch.Generator().manual_seed(100)
    train, labels = spirals(300, generator, noise=0.2)
    test, test_labels = spirals(1000, generator, noise=0.2)
    foreign, outside = ring(900, *AROUND, generator), ring(3000, *AROUND, generator)
    return Sets(
        train.numpy(), labels.numpy(), foreign.numpy(), test.numpy(), test_labels.numpy(), outside.numpy(), {}
    )


def _digits() -> Sets:
    """Zeros to fives are the task, sixes and sevens foreign, eights and nines have to be told from the task's."""
    data = load_set("digits")
    return _by_class(
        data.train,
        data.test,
        data.train,
        data.test,
        range(6),
        (6, 7),
        (8, 9),
        {"mean": (0.5,), "std": (0.5,)},
    )


def _cifar() -> Sets:
    """CIFAR-10 is the task; CIFAR-100's classes of even number are foreign, of those of odd number tells the test."""
    ten, hundred = load_set("cifar10"), load_set("cifar100")
    options = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    return _by_class(
        ten.train, ten.test, hundred.train, hundred.test, range(10), range(0, 100, 2), range(1, 100, 2), options,
        Augment(flip=True, crop=4),
    )  # fmt: skip


def _by_class(
    train: Split, test: Split, foreign: Split, outside: Split, task: Any, aside: Any, told: Any,
    options: Mapping[str, Any], augment: Augment | None = None,
) -> Sets:  # fmt: skip
    def of(split: Split, classes: Any) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.isin(split.labels, list(classes))
        return split.images[chosen], split.labels[chosen].astype(np.int64)

    return Sets(
        *of(train, task),
        of(foreign, aside)[0],
        *of(test, task),
        of(outside, told)[0],
        options=options,
        augment=augment,
    )
