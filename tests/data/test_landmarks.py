"""Landmarks, heat maps, maxima and their precision against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from kdrefs.data.landmarks import average_precision, heat_maps, matches, peaks
from kdrefs.data.shapes import mirrored_landmarks, shapes

ROWS = torch.tensor(
    [[[3.2, 4.6, 0.0], [5.0, 4.0, 0.0], [7.9, 0.1, 2.0], [0.0, 0.0, -1.0]],
     [[0.0, 0.0, -1.0], [1.5, 6.5, 1.0], [0.0, 0.0, -1.0], [0.0, 0.0, -1.0]]],
)  # fmt: skip


@pytest.mark.parametrize("snap", [False, True])
def test_heat_maps_equal_a_plain_loop(snap: bool) -> None:
    found = heat_maps(ROWS, 3, (7, 9), sigma=1.3, snap=snap)
    assert found.shape == (2, 3, 7, 9)
    for n in range(2):
        for kind in range(3):
            own = [(x, y) for x, y, k in ROWS[n].tolist() if k == kind]
            if snap:
                own = [(math.floor(x) + 0.5, math.floor(y) + 0.5) for x, y in own]
            for row in range(7):
                for column in range(9):
                    hills = [
                        math.exp(-((x - column - 0.5) ** 2 + (y - row - 0.5) ** 2) / (2 * 1.3**2))
                        for x, y in own
                    ]
                    assert found[n, kind, row, column] == pytest.approx(
                        max(hills, default=0.0), rel=1e-5, abs=1e-7
                    )


def test_snapped_hills_have_one_top_a_landmark() -> None:
    found = heat_maps(ROWS, 3, (7, 9), snap=True)
    assert (found == 1).sum() == 4
    edge = heat_maps(torch.tensor([[[9.0, 7.0, 0.0]]]), 1, (7, 9), snap=True)  # on the far edge
    assert edge[0, 0, 6, 8] == 1


def test_maxima_are_the_landmarks() -> None:
    data = shapes("train", 20, size=48)
    landmarks = torch.from_numpy(data.extras["landmarks"])
    found = peaks(heat_maps(landmarks, 5, (48, 48)), 12)
    for rows, truth in zip(found, landmarks, strict=True):
        own = truth[truth[:, 2] >= 0]
        kept = rows[rows[:, 3] > 0.7]
        assert len(kept) == len(own)
        for x, y, kind in own.tolist():
            near = kept[kept[:, 2] == kind][:, :2] - torch.tensor([x, y])
            assert near.norm(dim=1).min() < 0.5
    assert (found[:, :-1, 3] >= found[:, 1:, 3]).all()


def test_a_maximum_leans_towards_its_higher_neighbour() -> None:
    maps = torch.zeros(1, 1, 3, 5)
    maps[0, 0, 1] = torch.tensor([0.0, 0.2, 0.9, 0.5, 0.0])
    maps[0, 0, 0, 2] = 0.3
    assert peaks(maps, 1)[0, 0].tolist() == pytest.approx([2.75, 1.25, 0.0, 0.9])
    corner = torch.zeros(1, 1, 3, 5)
    corner[0, 0, 0, 0] = 1
    assert peaks(corner, 1)[0].tolist() == [[0.5, 0.5, 0.0, 1.0]]


def test_mirrored_maps_are_maps_of_mirrored_landmarks() -> None:
    order = (1, 0, 2)
    maps = heat_maps(ROWS, 3, (7, 9))
    mirrored = heat_maps(mirrored_landmarks(ROWS, 9, order), 3, (7, 9))
    torch.testing.assert_close(mirrored, maps.flip(-1)[:, list(order)])


def rows(*found: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor([found])


def test_each_landmark_is_found_once_and_by_the_surest() -> None:
    truth = torch.tensor([[[5.0, 5.0, 0.0], [9.0, 5.0, 0.0], [0.0, 0.0, -1.0]]])
    found = rows(
        (5.5, 5, 0, 0.9), (5, 5, 0, 0.8), (9, 6, 1, 0.7), (9, 6.5, 0, 0.6), (0, 0, 0, 0.5), (9, 5, 0, 0.0)
    )
    assert matches(found, truth, 2.0)[0].tolist() == [True, False, False, True, False, False]


def test_precision_equals_counting() -> None:
    truth = torch.tensor([[[5.0, 5.0, 0.0], [9.0, 5.0, 0.0]], [[5.0, 5.0, 0.0], [2.0, 2.0, 1.0]]])
    found = torch.tensor(
        [[[5.0, 5.0, 0.0, 0.9], [1.0, 1.0, 0.0, 0.8], [9.0, 5.0, 0.0, 0.3]],
         [[2.0, 2.0, 1.0, 0.7], [5.0, 4.0, 0.0, 0.5], [8.0, 8.0, 1.0, 0.9]]]
    )  # fmt: skip
    # Kind 0 by score: right, wrong, right, right of three: precision 1, 3/4, 3/4 at recall 1/3, 2/3, 1.
    # Kind 1: wrong, right of one: precision 1/2 at recall 1. Kind 2 is annotated nowhere.
    expected = 100 * ((1 + 3 / 4 + 3 / 4) / 3 + 1 / 2) / 2
    assert average_precision(found, truth, 3, 2.0) == pytest.approx(expected)
    nothing = found.clone()
    nothing[..., 3] = 0
    assert average_precision(nothing, truth, 3, 2.0) == 0
    perfect = torch.cat([truth, torch.ones(2, 2, 1)], 2)
    assert average_precision(perfect, truth, 3, 2.0) == pytest.approx(100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heat_maps(ROWS[0], 3, (4, 4)), "landmarks: expected floating"),
        (lambda: heat_maps(ROWS, 3, (4, 4), sigma=0), "sigma: expected a number above 0"),
        (lambda: peaks(torch.zeros(3, 4, 4), 1), "maps: expected floating"),
        (lambda: peaks(torch.zeros(1, 1, 2, 2), 5), "count: expected 1 to 4, got 5"),
        (
            lambda: average_precision(torch.zeros(1, 1, 4), torch.full((1, 1, 3), -1.0), 2, 1.0),
            "at least one",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
