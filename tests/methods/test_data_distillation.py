"""Data distillation: inverse geometry against plain loops, thresholds that give the number wanted, hard labels."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.data_distillation import (
    Transform,
    ensemble_over_transforms,
    hard_labels,
    score_threshold,
    transformed,
    transforms,
)

ALL = transforms((0.5, 1.0, 1.5))


def images(batch: int = 2, channels: int = 3, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    shape = (batch, channels, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Inverse geometry


def test_transforms_are_every_scale_with_and_without_a_mirror():
    assert transforms((0.5, 2.0)) == (
        Transform(0.5), Transform(0.5, True), Transform(2.0), Transform(2.0, True),
    )  # fmt: skip
    assert transforms(flip=False) == (Transform(),)


@pytest.mark.parametrize("size", [(12, 16), (5, 9)])
def test_maps_equal_a_plain_loop(size):
    """Bilinear by hand: the value at a place is the mean of the four pixels around it, weighted by distance."""
    x = images(height=size[0], width=size[1])

    def predict(copy: Tensor) -> Tensor:
        return copy.square()

    found = ensemble_over_transforms(predict, x, ALL, multiple=1)
    expected = torch.zeros_like(x)
    for scale in (0.5, 1.0, 1.5):
        for flip in (False, True):
            copy = transformed(x, Transform(scale, flip))
            height, width = copy.shape[2:]
            assert (height, width) == tuple(max(1, round(n * scale)) for n in size)
            squares = copy.square()
            for row in range(size[0]):
                for column in range(size[1]):
                    # Where the middle of this pixel is in the copy, in pixels from the middle of its first.
                    y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
                    z = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
                    if flip:
                        z = width - 1 - z
                    total = torch.zeros(x.shape[:2], dtype=x.dtype)
                    for i in range(math.floor(y), min(math.floor(y) + 1, height - 1) + 1):
                        for j in range(math.floor(z), min(math.floor(z) + 1, width - 1) + 1):
                            weight = (1 - abs(y - i)) * (1 - abs(z - j))
                            total += weight * squares[:, :, i, j]
                    expected[:, :, row, column] += total / 6
    torch.testing.assert_close(found, expected)


def test_a_prediction_that_moves_with_the_image_is_left_as_it_is():
    """A ramp is linear, so that bilinear resizing is exact inside; mirrored it is mirrored back."""
    x = torch.arange(16, dtype=torch.float64).expand(1, 1, 12, 16).clone()
    found = ensemble_over_transforms(lambda copy: copy, x, ALL)
    torch.testing.assert_close(found[..., 3:-3], x[..., 3:-3])


def spots(places: Tensor, size: tuple[int, int], kinds: int) -> Tensor:
    """Images with one bright pixel a kind at (x, y), both in whole pixels."""
    found = torch.zeros(len(places), kinds, *size, dtype=torch.float64)
    for n, rows in enumerate(places.tolist()):
        for kind, (x, y) in enumerate(rows):
            found[n, kind, y, x] = 1
    return found


def brightest(copy: Tensor) -> Tensor:
    """x, y and height of the brightest place of each channel, by its centre of mass."""
    height, width = copy.shape[2:]
    mass = copy.sum((2, 3))
    x = (copy.sum(2) * (torch.arange(width) + 0.5)).sum(2) / mass
    y = (copy.sum(3) * (torch.arange(height) + 0.5)).sum(2) / mass
    return torch.stack([x, y, mass], 2)


def test_points_come_back_to_their_places():
    places = torch.tensor([[[7, 5], [6, 6]], [[8, 5], [10, 7]]])
    x = spots(places, (12, 16), 2)
    found = ensemble_over_transforms(brightest, x, transforms((0.5, 1.0, 2.0)), output="points")
    torch.testing.assert_close(found[..., :2], places.double() + 0.5, rtol=0, atol=0.02)


def test_kinds_that_tell_left_from_right_change_places_in_a_mirror():
    """Channel 0 is the bright spot on the left, channel 1 the one on the right, whatever the image."""
    x = spots(torch.tensor([[[3, 5], [12, 6]]]), (12, 16), 2).sum(1, keepdim=True)

    def left_and_right(copy: Tensor) -> Tensor:
        half = copy.shape[3] // 2
        side = torch.arange(copy.shape[3]) < half
        return torch.cat([copy * side, copy * ~side], 1)

    expected = left_and_right(x)
    both = transforms((1.0,))
    found = ensemble_over_transforms(left_and_right, x, both, order=(1, 0))
    torch.testing.assert_close(found, expected)
    points = ensemble_over_transforms(
        lambda copy: brightest(left_and_right(copy)), x, both, order=(1, 0), output="points"
    )
    torch.testing.assert_close(points[..., :2], brightest(expected)[..., :2])
    mixed = ensemble_over_transforms(left_and_right, x, both)
    assert (mixed - expected).abs().max() == 0.5


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1)])
def test_orders_that_are_no_swaps_are_undone_too(order):
    x = images(channels=3)

    def renamed(copy: Tensor) -> Tensor:
        # A network that names what it sees in a mirror by the kinds' other names.
        return copy if copy is unmirrored else copy[:, [order.index(k) for k in range(3)]]

    unmirrored = transformed(x, Transform())
    assert unmirrored is x  # so that the plain copy is known again
    found = ensemble_over_transforms(renamed, x, transforms((1.0,)), order=order)
    torch.testing.assert_close(found, x)


def test_one_transform_is_a_plain_prediction_and_none_changes_its_input():
    x = images()
    before = x.clone()
    found = ensemble_over_transforms(lambda copy: copy * 2, x, transforms(flip=False))
    assert torch.equal(found, 2 * x)
    assert torch.equal(x, before)


def test_for_classes_nothing_is_left_but_the_mean():
    x = images()

    def classify(copy: Tensor) -> Tensor:
        return copy.amax((2, 3), keepdim=True).softmax(1)

    found = ensemble_over_transforms(classify, x, ALL)
    mean = torch.stack([classify(transformed(x, one)) for one in ALL]).mean(0)
    torch.testing.assert_close(found, mean.expand_as(found))


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_sizes_are_divisible(multiple):
    for one in transforms((0.3, 0.8, 1.0, 1.3)):
        height, width = transformed(images(height=24, width=32), one, multiple=multiple).shape[2:]
        assert height % multiple == width % multiple == 0
        assert abs(height - 24 * one.scale) <= max(multiple / 2, 1)


def test_smaller_copies_are_smoothed():
    stripes = (torch.arange(16) % 2).double().expand(1, 1, 16, 16)
    small = transformed(stripes, Transform(0.5))[..., 1:-1]
    torch.testing.assert_close(small, torch.full_like(small, 0.5), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    x = images().to(dtype)
    found = ensemble_over_transforms(lambda copy: copy, x, transforms((1.0,)))
    assert found.dtype == dtype
    torch.testing.assert_close(found, x)


# From scores to labels


@pytest.mark.parametrize("instances", [0.5, 1.0, 2.4])
def test_the_threshold_gives_the_number_wanted(instances):
    scores = torch.rand(20, 6)
    threshold = score_threshold(scores, 20, instances)
    assert (scores >= threshold).sum() == round(20 * instances)


def test_ties_and_extremes_of_the_threshold():
    assert score_threshold(torch.rand(4, 3), 4, 0) == math.inf
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    assert score_threshold(scores, 1, 2) == 0.5  # both of the tie count as above
    assert score_threshold(scores, 1, 4) == pytest.approx(0.1)


def test_hard_labels_are_a_plain_loop():
    candidates = torch.cat([torch.rand(5, 4, 2) * 9, torch.randint(3, (5, 4, 1)).float(),
                            torch.rand(5, 4, 1).sort(1, descending=True).values], 2)  # fmt: skip
    found = hard_labels(candidates, 0.5, 3)
    assert found.shape == (5, 3, 3)
    for rows, labels in zip(candidates.tolist(), found.tolist(), strict=True):
        for (x, y, kind, score), label in zip(rows, labels, strict=False):
            assert label == ([x, y, kind] if score >= 0.5 else [0, 0, -1])


def test_labels_do_not_depend_on_how_far_above_the_threshold_a_score_is():
    candidates = torch.tensor([[[1.0, 2.0, 0.0, 0.9], [3.0, 4.0, 1.0, 0.6]]])
    surer = candidates.clone()
    surer[..., 3] = 1.0
    assert torch.equal(hard_labels(candidates, 0.5, 2), hard_labels(surer, 0.5, 2))


# Errors

X = images()
BAD_CALLS = {
    "images: expected a floating tensor": lambda: ensemble_over_transforms(F.relu, X[0], ALL),
    "transforms: expected at least one, got none": lambda: ensemble_over_transforms(F.relu, X, ()),
    "output: expected one of .* got 'boxes'": lambda: ensemble_over_transforms(
        F.relu, X, ALL, output="boxes"
    ),
    "predict: expected maps \\(batch, kinds, h, w\\) of 2 images, got \\(2, 3\\)": lambda: (
        ensemble_over_transforms(lambda x: x.mean((2, 3)), X, ALL)
    ),
    "predict: expected points": lambda: ensemble_over_transforms(F.relu, X, ALL, output="points"),
    "predict: expected x and y": lambda: ensemble_over_transforms(
        lambda x: x[:, :, :1, 0], X, ALL, output="points"
    ),
    "order: expected each of 0 to 2 once, got \\(0, 1\\)": lambda: ensemble_over_transforms(
        F.relu, X, ALL, order=(0, 1)
    ),
    "multiple: expected at least 1, got 0": lambda: ensemble_over_transforms(F.relu, X, ALL, multiple=0),
    "scale: expected a finite number above 0, got -1": lambda: Transform(-1.0),
    "scores: expected at least 8 candidates, 4 an image, got 3": lambda: score_threshold(torch.rand(3), 2, 4),
    "images, instances: expected at least 1 and 0": lambda: score_threshold(torch.rand(3), 0, 1),
    "places: expected 1 to 4, got 5": lambda: hard_labels(torch.rand(2, 4, 4), 0.5, 5),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()
