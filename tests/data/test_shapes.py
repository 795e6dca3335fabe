"""Shapes: masks and landmarks are exact, the two splits share nothing, equal seeds give equal bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdrefs.data.cache import check_split
from kdrefs.data.shapes import CLASSES, LANDMARKS, MIRRORED, PLACES, mirrored_landmarks, shape_set, shapes

FOUND = shapes("train", 60, size=48)
SIDES = ("disc", "bar", "bar", "triangle", "cross")  # the class that each landmark belongs to


def test_arrays_have_the_types_of_the_layout() -> None:
    found = shape_set(train=6, test=4, size=24)
    for split, count in ((found.train, 6), (found.test, 4)):
        check_split(split, len(CLASSES), "shapes")
        assert split.images.shape == (count, 24, 24, 3)
        assert split.extras["masks"].shape == (count, 24, 24)
        assert split.extras["masks"].dtype == np.uint8
        assert split.extras["landmarks"].shape == (count, PLACES, 3)
        assert split.extras["landmarks"].dtype == np.float32
    assert found.digests["train"] != found.digests["test"]


def test_equal_arguments_give_equal_arrays_and_other_seeds_others() -> None:
    again, other = shapes("train", 60, size=48), shapes("train", 60, size=48, seed=1)
    assert (again.images == FOUND.images).all()
    assert all((again.extras[name] == FOUND.extras[name]).all() for name in FOUND.extras)
    assert (other.images != FOUND.images).any()


def test_every_class_and_landmark_occurs_and_images_differ_in_number() -> None:
    assert set(np.unique(FOUND.extras["masks"])) == set(range(len(CLASSES)))
    kinds = FOUND.extras["landmarks"][..., 2]
    assert set(np.unique(kinds)) == {-1.0, *map(float, range(len(LANDMARKS)))}
    assert len(set((kinds >= 0).sum(1))) > 3


def test_labels_are_the_class_of_most_pixels() -> None:
    for mask, label in zip(FOUND.extras["masks"], FOUND.labels, strict=True):
        assert np.bincount(mask.ravel(), minlength=5)[1:].argmax() + 1 == label


def test_landmarks_lie_on_their_shapes() -> None:
    for mask, landmarks in zip(FOUND.extras["masks"], FOUND.extras["landmarks"], strict=True):
        seen = landmarks[landmarks[:, 2] >= 0]
        assert (landmarks[landmarks[:, 2] < 0][:, :2] == 0).all()
        for x, y, kind in seen:
            rows, columns = np.nonzero(mask == CLASSES.index(SIDES[int(kind)]))
            # Ends and tips are corners: the next pixel that is covered by half is a few away.
            assert np.hypot(rows + 0.5 - y, columns + 0.5 - x).min() < 2.5


def test_centres_are_those_of_the_masks_and_ends_point_away_from_them() -> None:
    checked = set()
    for mask, landmarks in zip(FOUND.extras["masks"], FOUND.extras["landmarks"], strict=True):
        for place, rows in enumerate(landmarks.reshape(4, 2, 3)):
            y0, x0 = (24 * half for half in divmod(place, 2))
            own = mask[y0 : y0 + 24, x0 : x0 + 24]
            present = rows[rows[:, 2] >= 0]
            assert bool(len(present)) == bool(own.any())
            if not len(present):
                continue
            ys, xs = np.nonzero(own)
            middle = np.array([xs.mean() + x0 + 0.5, ys.mean() + y0 + 0.5])
            kind = int(present[0, 2])
            checked.add(kind)
            assert set(np.unique(own)) == {0, CLASSES.index(SIDES[kind])}
            if kind in (0, 4):
                assert np.hypot(*(present[0, :2] - middle)) < 0.4
            elif kind == 1:
                left, right = present[:, :2]
                assert left[0] < right[0]
                assert np.hypot(*((left + right) / 2 - middle)) < 0.4
                assert present[1, 2] == 2
            else:
                farthest = np.hypot(xs + x0 + 0.5 - middle[0], ys + y0 + 0.5 - middle[1]).max()
                assert np.hypot(*(present[0, :2] - middle)) > farthest - 0.2
    assert checked == {0, 1, 3, 4}


def test_pixels_outside_of_the_shapes_are_photograph() -> None:
    one, two = shapes("test", 20, size=24, tint=0.0), shapes("test", 20, size=24, tint=1.0)
    outside = one.extras["masks"] == 0
    same = (one.images == two.images).all(-1)
    assert same[outside].mean() > 0.9  # but for the shapes' edges
    assert same[~outside].mean() < 0.01


def test_a_mirror_swaps_left_and_right_and_twice_is_none() -> None:
    landmarks = torch.from_numpy(FOUND.extras["landmarks"])
    mirrored = mirrored_landmarks(landmarks, 48)
    kinds, before = mirrored[..., 2], landmarks[..., 2]
    for kind, other in enumerate(MIRRORED):
        assert torch.equal(before == kind, kinds == other)
    left, right = mirrored[kinds == 1], mirrored[kinds == 2]
    assert len(left) == len(right)
    assert torch.equal(left[:, 0], 48 - landmarks[before == 2][:, 0])
    torch.testing.assert_close(mirrored_landmarks(mirrored, 48), landmarks)
    assert torch.equal(mirrored[before < 0], landmarks[before < 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split: expected 'train' or 'test', got 'val'"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"size": 30}, "size: expected a multiple of 4 from 16 on, got 30"),
        ({"size": 400}, "size: the photographs have .* pixels, got 400"),
        ({"radius": (0.9, 0.5)}, "radius: expected 0 < least <= greatest <= 1"),
        ({"tint": 2.0}, "tint: expected 0 to 1, got 2.0"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(**{"split": "train", "count": 2, **arguments})
