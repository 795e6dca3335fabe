"""Composites: masks and boxes are exact, the two splits share nothing, equal seeds give equal bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from skimage.transform import resize

from kdrefs.data import composite_set, composites, load_set
from kdrefs.data.cache import check_split
from kdrefs.data.composites import mask_boxes


def dark_halves(split: str) -> np.ndarray:
    """Grey, halved and darkened photograph halves, by plain slicing."""
    photos = getattr(load_set("photos"), split).images.astype(np.float64)
    grey = photos @ np.array([0.299, 0.587, 0.114])
    height, width = grey.shape[1] // 2 * 2, grey.shape[2] // 2 * 2
    grey = grey[:, :height, :width]
    return (grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]) / 8


def is_patch(patch: np.ndarray, known: np.ndarray, backgrounds: np.ndarray) -> bool:
    """Whether the known pixels of a patch occur at some place of the backgrounds, to rounding."""
    for background in backgrounds:
        windows = np.lib.stride_tricks.sliding_window_view(background, patch.shape)
        if bool((np.abs(windows[..., known] - patch[known]) <= 0.51).all(axis=-1).any()):
            return True
    return False


def test_arrays_have_the_types_of_the_layout() -> None:
    found = composite_set(train=30, test=10, size=24, digit=16, jitter=8)
    for split, count in ((found.train, 30), (found.test, 10)):
        check_split(split, 10, "composites")
        assert split.images.shape == (count, 24, 24, 1)
        assert split.extras["masks"].shape == (count, 24, 24)
        assert split.extras["masks"].dtype == np.uint8
        assert split.extras["boxes"].shape == (count, 4)
        assert split.extras["boxes"].dtype == np.float32
    assert found.classes == tuple("0123456789")
    assert set(found.digests) == {"train", "test"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_background_is_of_its_own_half(split: str) -> None:
    other = {"train": "test", "test": "train"}[split]
    found = composites(split, 8, size=24, digit=16, jitter=0)
    border = np.ones((24, 24), dtype=bool)
    border[4:20, 4:20] = False  # nothing of the digit lies outside of these
    own, foreign = dark_halves(split), dark_halves(other)
    assert all(is_patch(image[..., 0].astype(float), border, own) for image in found.images)
    textured = [im for im in found.images if im[border].std() > 8]
    assert len(textured) >= 2
    assert not any(is_patch(image[..., 0].astype(float), border, foreign) for image in textured)


@pytest.mark.parametrize("split", ["train", "test"])
def test_digit_is_an_enlarged_one_of_the_split_with_its_label(split: str) -> None:
    digits = getattr(load_set("digits"), split)
    found = composites(split, 15, size=24, digit=16, jitter=0, brightness=0.0)
    enlarged = np.stack(
        [
            resize(d[..., 0] / 255.0, (16, 16), order=1, mode="edge", anti_aliasing=False)
            for d in digits.images
        ]
    )
    for image, label in zip(found.images, found.labels, strict=True):
        distance = np.abs(enlarged * 255 - image[4:20, 4:20, 0]).max(axis=(1, 2))
        assert distance.min() <= 0.51
        assert digits.labels[distance.argmin()] == label


def test_mask_is_where_the_digit_covers_half_of_a_pixel() -> None:
    options: dict[str, Any] = {"size": 32, "digit": 20, "jitter": 12, "seed": 4}
    black = composites("train", 50, brightness=0.0, **options)  # on black, the image is the cover
    np.testing.assert_array_equal(black.extras["masks"], black.images[..., 0] >= 128)
    usual = composites("train", 50, **options)
    for name in ("masks", "boxes"):
        np.testing.assert_array_equal(black.extras[name], usual.extras[name])
    np.testing.assert_array_equal(black.labels, usual.labels)
    inside = usual.extras["masks"].astype(bool)
    assert usual.images[..., 0][inside].min() >= 127
    assert usual.images[..., 0][black.images[..., 0] == 0].max() <= 128


def test_boxes_are_the_smallest_around_the_masks() -> None:
    found = composites("test", 40, jitter=12)
    for mask, box in zip(found.extras["masks"], found.extras["boxes"], strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_box_of_an_empty_mask_is_zero() -> None:
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[1] = True
    masks[2, 3, 4] = True
    assert mask_boxes(masks).tolist() == [[0, 0, 0, 0], [0, 0, 5, 4], [4, 3, 5, 4]]


def test_jitter_is_the_width_of_the_square_of_places() -> None:
    found = composites("train", 600, size=24, digit=16, jitter=4, brightness=0.0)
    boxes = found.extras["boxes"]
    assert boxes[:, :2].min() >= 2
    assert boxes[:, 2:].max() <= 22
    cover = found.images[..., 0] > 0
    assert int(np.nonzero(cover.any(axis=(0, 2)))[0].min()) == 2  # the square is used up to its edges
    assert int(np.nonzero(cover.any(axis=(0, 2)))[0].max()) == 21
    still = composites("train", 100, size=24, digit=16, jitter=0, brightness=0.0).images[..., 0] > 0
    assert not still[:, :4].any()
    assert not still[:, 20:].any()


def test_same_seed_same_bits_other_seed_others() -> None:
    one, two = composites("train", 20, seed=1), composites("train", 20, seed=1)
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.extras["boxes"], two.extras["boxes"])
    assert not np.array_equal(one.images, composites("train", 20, seed=2).images)
    assert not np.array_equal(one.labels, composites("test", 20, seed=1).labels)


def test_thread_count_does_not_change_the_bits() -> None:
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from kdrefs.data import composite_set\n"
        "print(composite_set(200, 100).digests['train'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == composite_set(200, 100).digests["train"]


def test_all_classes_occur() -> None:
    assert set(composites("train", 300).labels.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "split"),
        ({"count": 0}, "count"),
        ({"digit": 4}, "digit"),
        ({"jitter": -1}, "jitter"),
        ({"digit": 20, "jitter": 13}, "size: digit and jitter need 33 pixels, got 32"),
        ({"size": 200, "digit": 20}, "size: the backgrounds have"),
        ({"brightness": 1.5}, "brightness"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composites(**{"split": "train", "count": 5, **options})
