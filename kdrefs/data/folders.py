"""Folders of images with a folder of segmentations beside them: CUB-200-2011, Pascal VOC, COCO and the like.

``python -m kdrefs.data.folders NAME --images DIR --masks DIR`` brings such a pair into the data cache, from where
:func:`kdrefs.data.load_set` reads it by its name. Segmentations are greyscale or palette images of the same size and
name; their values tell objects apart. CUB has soft masks, 1 to 255, in folders named after the classes; VOC has the
classes 1 to 20 and 255 on borders; COCO's panoptic maps have things from 1 to 90 and stuff above.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kdrefs.data.cache import DataError, ImageSet, Split, write_set

SUFFIXES = (".jpg", ".jpeg", ".png")


class Masked(NamedTuple):
    """An image with its object.

    Attributes:
        name: Path below the folder of images, without suffix.
        image: uint8 (size, size, 3).
        mask: uint8 (size, size), 1 on the object.
        label: Class by name.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    label: str


def masked_images(
    images: Path | str,
    masks: Path | str,
    size: int,
    *,
    objects: tuple[int, int] = (1, 255),
    labels: Literal["folder", "mask"] = "folder",
    margin: float | None = None,
) -> Iterator[Masked]:
    """Read the images that have a segmentation, in the order of their names.

    Args:
        images: Folder with images at any depth.
        masks: Folder with a PNG of the same relative name for some of them.
        size: Height and width that images (bilinear) and masks (nearest) are brought to.
        objects: Least and greatest value of the segmentation that is an object: (1, 255) for CUB, (1, 20) for VOC,
            (1, 90) for COCO.
        labels: The class is the name of the image's folder, or the object that covers most pixels.
        margin: Crop to the object's box enlarged by this factor, as far as the image goes; 1.2 with the
            authors for VOC.

    Raises:
        DataError: A folder is missing, nothing is segmented, an image cannot be read, or a segmentation has another
            size than its image.
        ValueError: An argument is out of range.
    """
    from PIL import Image

    if size < 1 or (margin is not None and margin < 1):
        raise ValueError(f"size, margin: expected at least 1 each, got {size} and {margin}")
    if not 1 <= objects[0] <= objects[1] <= 255:
        raise ValueError(f"objects: expected 1 to 255 in order, got {objects}")
    if labels not in ("folder", "mask"):
        raise ValueError(f"labels: expected 'folder' or 'mask', got {labels!r}")
    for folder in (Path(images), Path(masks)):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    pairs = []
    for path in sorted(Path(images).rglob("*")):
        mask = Path(masks) / path.relative_to(images).with_suffix(".png")
        if path.suffix.lower() in SUFFIXES and mask.is_file():
            pairs.append((path, mask))
    if not pairs:
        raise DataError(f"{images}: no image has a segmentation of its name in {masks}")
    for path, mask_path in pairs:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            with Image.open(mask_path) as opened:
                values = np.asarray(opened if opened.mode in ("L", "P") else opened.convert("L"))
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow's decoders raise them
            raise DataError(f"{path} or its segmentation cannot be read: {error}") from error
        if values.shape != picture.size[::-1]:
            raise DataError(f"{mask_path}: {values.shape[::-1]} pixels, but {picture.size} in {path}")
        inside = (objects[0] <= values) & (values <= objects[1])
        label = path.parent.name
        if labels == "mask":
            if not inside.any():
                continue
            label = str(np.bincount(values[inside]).argmax())
        box = (0, 0, *picture.size) if margin is None else _enlarged(inside, margin)
        small = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        shape = Image.fromarray(inside.astype(np.uint8)).resize(
            (size, size), Image.Resampling.NEAREST, box=box
        )
        yield Masked(
            path.relative_to(images).with_suffix("").as_posix(), np.asarray(small), np.asarray(shape), label
        )


def _enlarged(inside: np.ndarray, margin: float) -> tuple[int, int, int, int]:
    """The object's box, enlarged around its middle and cut at the image's edges; all without an object."""
    height, width = inside.shape
    if not inside.any():
        return 0, 0, width, height
    edges = []
    for axis, limit in ((0, width), (1, height)):
        places = np.flatnonzero(inside.any(axis))
        middle, half = (places[0] + places[-1] + 1) / 2, margin * (places[-1] + 1 - places[0]) / 2
        edges.append((max(0, round(middle - half)), min(limit, round(middle + half))))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def import_folder(
    name: str,
    images: Path | str,
    masks: Path | str,
    size: int,
    *,
    test: Sequence[str] | None = None,
    root: Path | str | None = None,
    objects: tuple[int, int] = (1, 255),
    labels: Literal["folder", "mask"] = "folder",
    margin: float | None = None,
) -> ImageSet:
    """Bring a folder into the data cache as the set ``name`` with the extra ``masks``.

    Args:
        name: Of the set in the cache.
        images: As of :func:`masked_images`, like ``masks``, ``size``, ``objects``, ``labels`` and ``margin``.
        masks: See there.
        size: See there.
        test: Names of the test images, with or without suffix; default: a fifth of all, chosen by their names' digest.
        root: Folder of the cache.
        objects: See :func:`masked_images`.
        labels: See there.
        margin: See there.

    Raises:
        DataError: See there; or there are more than 256 classes, or a split would be empty.
    """
    found = list(masked_images(images, masks, size, objects=objects, labels=labels, margin=margin))
    classes = sorted({item.label for item in found})
    if len(classes) > 256:
        raise DataError(f"{images}: {len(classes)} classes, expected at most 256")
    chosen = None if test is None else {_without_suffix(line) for line in test}
    parts: dict[bool, list[Masked]] = {True: [], False: []}
    for item in found:
        parts[_is_test(item.name) if chosen is None else item.name in chosen].append(item)
    if not parts[True] or not parts[False]:
        raise DataError(
            f"{images}: {len(parts[False])} training and {len(parts[True])} test images, expected both"
        )

    def split(items: Sequence[Masked]) -> Split:
        numbers = np.array([classes.index(item.label) for item in items], dtype=np.uint8)
        extras = {"masks": np.stack([item.mask for item in items])}
        return Split(np.stack([item.image for item in items]), numbers, extras)

    return write_set(name, split(parts[False]), split(parts[True]), tuple(classes), root=root)


def _without_suffix(name: str) -> str:
    name = name.strip()
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name


def _is_test(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kdrefs.data.folders", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--masks", required=True, type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 255), metavar=("LEAST", "GREATEST"))
    parser.add_argument("--labels", choices=("folder", "mask"), default="folder")
    parser.add_argument("--margin", type=float)
    parser.add_argument("--test", type=Path, help="file with the name of a test image in each line")
    options = vars(parser.parse_args(arguments))
    options["objects"] = tuple(options["objects"])
    if options["test"] is not None:
        options["test"] = options["test"].read_text(encoding="utf-8").split()
    data = import_folder(**options)
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes"
    )


if __name__ == "__main__":
    main()
