"""Images a second of ``Batches`` beside torchvision's per-image pipeline, both on one core."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kdrefs.data import Augment, Batches

IMAGES, BATCH = 10_000, 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LEAST_RATIO = 8.0


@pytest.fixture(autouse=True)
def only_on_demand(request: pytest.FixtureRequest) -> Iterator[None]:
    """Benchmarks run with `make bench`; one torch thread, so that numbers are those of one core."""
    options = request.config.option
    if not (getattr(options, "benchmark_only", False) or getattr(options, "benchmark_enable", False)):
        pytest.skip("a benchmark: runs with --benchmark-only")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)


def per_image_pipeline(images: np.ndarray) -> Any:
    """What torchvision's CIFAR10 class and reference scripts do, in one process."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    class Images(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return steps(Image.fromarray(images[index])), index % 10

    return DataLoader(Images(), batch_size=BATCH, shuffle=True)


def test_batches_beside_the_per_image_pipeline(benchmark: Any) -> None:
    images = random_images()
    labels = torch.arange(IMAGES) % 10
    batches = Batches(
        images, labels, batch_size=BATCH, augment=Augment(flip=True, crop=4), mean=MEAN, std=STD
    )

    def one_epoch() -> int:
        return sum(len(batch) for batch in batches.epoch(0))

    assert benchmark.pedantic(one_epoch, rounds=10, warmup_rounds=1) == IMAGES

    loader = per_image_pipeline(images)
    started = time.perf_counter()
    assert sum(len(labels) for _, labels in loader) == IMAGES
    theirs = IMAGES / (time.perf_counter() - started)
    ours = IMAGES / benchmark.stats.stats.median
    benchmark.extra_info.update(batches=round(ours), per_image=round(theirs), ratio=round(ours / theirs, 1))
    print(f"\nimages/s on one core: Batches {ours:,.0f}, per image {theirs:,.0f}, ratio {ours / theirs:.1f}")
    assert ours / theirs >= LEAST_RATIO
