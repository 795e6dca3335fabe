"""The recipes of the shared table: which students, teachers and schedules its rows are compared on."""

from __future__ import annotations

from dataclasses import replace

from reproductions.protocols.classification import Config
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import PAIRS, Net, weights_digest
from reproductions.protocols.settings import Setting

DIGITS = Training(
    pair="digits",
    epochs=20,
    rate=0.03,
    views=1,
    evaluate_every=1,
    student=Net("small_cnn", "embedding_pre", {"channels": (4, 8), "feature": 16}),
)

CIFAR10 = Training(pair="cifar10-small", epochs=8, rate=0.05, views=2, precision="bf16")

# Thin deep students that have neither normalisation nor shortcuts, below the same teachers.
DIGITS_DEEP = Training(
    pair="digits",
    epochs=24,
    rate=0.003,
    optimizer="adam",
    weight_decay=0.0,
    views=1,
    evaluate_every=1,
    student=Net("plain_cnn", "pool", {"in_channels": 1, "width": 8, "depth": 12}),
)

DIGITS_DEEP_HE = replace(
    DIGITS_DEEP,
    student=Net("plain_cnn", "pool", {"in_channels": 1, "width": 8, "depth": 12, "init": "he"}),
)

# Which map of the student faces which of the teacher's, from the image upwards; pre-activations have `_pre` added.
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "digits": (("block1", "block1"), ("block2", "block2")),
    "digits-deep": (("stage1", "block1"), ("stage2", "block2")),
    "digits-deep-he": (("stage1", "block1"), ("stage2", "block2")),
    "cifar10": (("block1", "layer1"), ("block2", "layer2"), ("block3", "layer3")),
    "cifar100": (("layer1", "layer1"), ("layer2", "layer2"), ("layer3", "layer3")),
}

# RepDistiller's schedule and batch size on its first pair.
CIFAR100 = Training(
    pair="cifar100-resnet",
    epochs=240,
    rate=0.05,
    batch_size=64,
    nesterov=False,
    milestones=(150, 180, 210),
    evaluate_every=1,
)


def quick(*settings: Setting[Training], seeds: int = 10) -> Config:
    """A column's profile on the digits."""
    return Config(
        profile="quick", settings=settings, seeds=tuple(range(seeds)), data=("digits",), budget_minutes=1
    )


def standard(*settings: Setting[Training], minutes: float = 40, disk_mb: float = 3000) -> Config:
    """A column's profile on CIFAR-10, below the committed teacher."""
    return Config(
        profile="standard",
        settings=settings,
        seeds=(0, 1, 2, 3, 4),
        data=("cifar10",),
        budget_minutes=minutes,
        download_mb=170,
        disk_mb=disk_mb,
        teacher_weights=weights_digest(PAIRS["cifar10-small"]),
    )


def paper(*settings: Setting[Training], minutes: float, disk_mb: float = 700) -> Config:
    """A column's profile on CIFAR-100, on a GPU."""
    return Config(
        profile="paper",
        settings=settings,
        seeds=(0, 1, 2, 3, 4),
        data=("cifar100",),
        budget_minutes=minutes,
        download_mb=170,
        disk_mb=disk_mb,
    )
