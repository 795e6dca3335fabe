"""Spirals and rings: where their points lie."""

import math

import pytest
import torch

from kdrefs.data.spirals import ring, spirals


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_points_without_noise_lie_on_their_spirals():
    points, labels = spirals(200, generator(), noise=0)
    assert labels.bincount().tolist() == [200] * 3
    radius = points.norm(dim=1)
    assert 0 <= radius.min() < 0.05
    assert 0.95 < radius.max() <= 1 + 1e-6
    assert radius.mean().item() == pytest.approx(0.5, abs=0.05)  # uniform in the share of the area
    angle = 6 * math.pi * radius.sqrt() + 2 * math.pi * labels / 3
    expected = radius.unsqueeze(1) * torch.stack([-angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-4)


def test_noise_grows_towards_the_rim():
    clean, _ = spirals(20_000, generator(), noise=0)
    noisy, _ = spirals(20_000, generator(), noise=0.3)
    radius, off = clean.norm(dim=1), noisy - clean
    for low, high in ((0.05, 0.15), (0.85, 0.95)):
        part = off[(radius > low) & (radius < high)]
        expected = 0.3 * ((low + high) / 2) ** 0.75 / math.sqrt(6 * math.pi)
        assert part.std().item() == pytest.approx(expected, rel=0.05)


def test_same_generator_same_points():
    assert torch.equal(spirals(10, generator(3))[0], spirals(10, generator(3))[0])
    assert not torch.equal(spirals(10, generator(3))[0], spirals(10, generator(4))[0])


def test_ring_is_uniform_in_area():
    points = ring(50_000, 1.0, 2.0, generator())
    radius = points.norm(dim=1)
    assert radius.min() >= 1
    assert radius.max() <= 2
    inner = (radius < math.sqrt(2.5)).float().mean().item()  # the circle that halves the area
    assert inner == pytest.approx(0.5, abs=0.01)
    assert points.mean(0).abs().max() < 0.02


@pytest.mark.parametrize(
    ("count", "noise", "name"), [(0, 0.1, "count"), (1.5, 0.1, "count"), (3, -1, "noise")]
)
def test_wrong_numbers_are_named(count, noise, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        spirals(count, generator(), noise=noise)


@pytest.mark.parametrize("radii", [(1, 1), (-1, 1), (2, 1), (0, math.inf)])
def test_wrong_radii_are_named(radii):
    with pytest.raises(ValueError, match="inner, outer: expected"):
        ring(3, *radii, generator())
