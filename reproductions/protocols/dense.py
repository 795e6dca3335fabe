"""Dense prediction that several columns share: images with a class or landmarks at every place, and U-Nets on them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdrefs.data.batches import Augment, Batches
from kdrefs.data.cache import DataError, Split, cache_root, canonical_order
from kdrefs.data.folders import masked_images
from kdrefs.data.shapes import CLASSES, shapes
from kdrefs.nets.unet import UNet
from kdrefs.training import evaluation_mode

PROBE_TRAIN, PROBE_TEST = 64, 32  # images that a probe trains and evaluates on
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)
SAMPLE = "coco128seg"
SAMPLE_CLASSES = ("stuff", "thing", "person")


@dataclass(frozen=True)
class Scenes:
    """A set of images with dense annotation.

    Attributes:
        kind: "shapes" (:mod:`kdrefs.data.shapes`), or "coco128seg", a sample of 200 photographs of COCO with a mask.
        size: Height and width in pixels.
        train: Number of training images of "shapes".
        test: Number of its test images.
        seed: Of what is drawn; other seeds draw other images from the same halves of the photographs.
        flip: Whether training images are mirrored at random.
        crop: By how many pixels they are shifted.
    """

    kind: Literal["shapes", "coco128seg"]
    size: int
    train: int = 0
    test: int = 0
    seed: int = 0
    flip: bool = False
    crop: int = 0


@functools.lru_cache(maxsize=4)
def load_scenes(scenes: Scenes, *, probe: bool = False) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and names of the classes; a probe sees the first images of each only.

    Raises:
        kdrefs.data.DataError: The photographs are not in the data cache; the message names the way.
    """
    if scenes.kind == "shapes":
        counts = (PROBE_TRAIN, PROBE_TEST) if probe else (scenes.train, scenes.test)
        train, test = (
            shapes(split, count, size=scenes.size, seed=scenes.seed)
            for split, count in zip(("train", "test"), counts, strict=True)
        )
        return train, test, CLASSES
    train, test = (photographs(part, scenes.size) for part in ("train2017", "val2017"))
    if probe:
        train, test = first(train, PROBE_TRAIN), first(test, PROBE_TEST)
    return train, test, SAMPLE_CLASSES


def photographs(part: str, size: int) -> Split:
    """The photographs of a part of the sample that have a mask: stuff, things, persons.

    Raises:
        DataError: The sample is not in the data cache.
    """
    folder = cache_root() / SAMPLE
    sources = folder / "images" / part, folder / "semantic_segmentation" / "masks" / part
    try:
        things = list(masked_images(*sources, size, objects=(1, 90)))
        persons = list(masked_images(*sources, size, objects=(1, 1)))
    except DataError as error:
        raise DataError(
            f"{SAMPLE}: {error}. Put images/{part} and semantic_segmentation/masks/{part} (COCO's panoptic "
            f"categories) of a COCO sample into {folder}"
        ) from error
    masks = np.stack([one.mask + other.mask for one, other in zip(things, persons, strict=True)])
    labels = np.array([np.bincount(mask.ravel(), minlength=3).argmax() for mask in masks], dtype=np.uint8)
    return Split(np.stack([one.image for one in things]), labels, {"masks": masks})


def scene_digests(every: Sequence[Scenes]) -> dict[str, str]:
    """Content digests of the photographs among some scenes, by name and part."""
    found = {}
    for scenes in every:
        if scenes.kind == SAMPLE:
            for name, split in zip(("train", "test"), load_scenes(scenes)[:2], strict=True):
                digest = canonical_order(split.images, split.labels)[1]
                found[f"{SAMPLE}-{scenes.size}/{name}"] = digest
    return found


def first(split: Split, count: int) -> Split:
    """The first samples."""
    return part_of(split, np.arange(min(count, len(split))))


def part_of(split: Split, rows: np.ndarray) -> Split:
    """Some samples, numbered anew."""
    extras = {name: values[rows] for name, values in split.extras.items()}
    return replace(split, images=split.images[rows], labels=split.labels[rows], extras=extras)


def dense_batches(
    scenes: Scenes,
    split: Split,
    device: torch.device,
    *,
    training: bool,
    batch_size: int = 64,
    **options: Any,
) -> Batches:
    """Batches of a split, normalised; shuffled and augmented for training only."""
    moved = training and (scenes.flip or scenes.crop)
    return Batches(
        split,
        device=device,
        batch_size=batch_size,
        shuffle=training,
        augment=Augment(flip=scenes.flip, crop=scenes.crop, pad_mode="reflect") if moved else None,
        mean=MEAN,
        std=STD,
        **options,
    )


def initial_unet(classes: int, widths: Sequence[int], seed: int, device: torch.device) -> UNet:
    """A U-Net with the seed's weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(classes, widths)
    return net.to(memory_format=torch.channels_last).to(device)


def dense_outputs(net: nn.Module, batches: Batches, *names: str) -> dict[str, Tensor]:
    """Logits and the named feature maps of every sample in order, in eval mode."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("logits", *names)}
    with evaluation_mode(net):
        for batch in batches:
            output = net(batch.images)
            parts["logits"].append(output.logits)
            for name in names:
                parts[name].append(output.features[name])
    return {name: torch.cat(maps) for name, maps in parts.items()}


def segmentation_scores(predicted: Tensor, masks: Tensor, classes: int) -> Mapping[str, float]:
    """Mean intersection over union, and accuracy of the pixels, in percent.

    Args:
        predicted: Class of every pixel ``(N, H, W)``.
        masks: The right ones, same shape.
        classes: Number of classes. One that occurs on neither side is left out of the mean.
    """
    if predicted.shape != masks.shape:
        raise ValueError(
            f"masks: expected the shape of predicted {tuple(predicted.shape)}, got {tuple(masks.shape)}"
        )
    pairs = masks.long().flatten() * classes + predicted.long().flatten()
    table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    met = union > 0
    return {
        "miou": 100 * (table.diagonal()[met] / union[met]).mean().item(),
        "pixel_accuracy": 100 * (table.diagonal().sum() / table.sum()).item(),
    }
