"""The recipes of the shared table: which students, teachers and schedules its rows are compared on."""

from __future__ import annotations

from dataclasses import replace

from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import Net

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
