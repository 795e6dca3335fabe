"""Attacks in image space: what a step is, what is never left, and what normalisation must not change."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdrefs.data.cache import Split
from kdrefs.nets import Output
from reproductions.protocols import robustness
from reproductions.protocols.robustness import (
    Pixels,
    accuracy_on,
    noisy_accuracy,
    projected_gradient_descent,
)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(3 * 4, 5), nn.Dropout(0.5)

    def forward(self, images):
        return Output(self.layer(self.dropout(images.flatten(1))), {})


def pixels(mean=(0.0,) * 3, std=(1.0,) * 3, count=None) -> Pixels:
    generator = np.random.default_rng(0)
    split = Split(
        generator.integers(0, 256, (20, 2, 2, 3), dtype=np.uint8),
        generator.integers(0, 5, 20).astype(np.uint8),
    )
    return Pixels.of(split, mean, std, "cpu", count=count)


def test_images_are_shares_of_the_range():
    one = pixels()
    assert one.images.shape == (20, 3, 2, 2)
    assert one.images.min() >= 0
    assert one.images.max() <= 1
    some = pixels(count=5)
    assert len(some.images) == len(some.labels) == 5
    assert torch.equal(some.images[-1], one.images[-1])


def test_one_step_on_a_linear_network_is_the_sign_of_the_gradient():
    network, one = Linear().eval(), pixels()
    found = projected_gradient_descent(network, one, radius=0.05, steps=1, step_size=0.05)
    weight, logits = network.layer.weight, network(one.images).logits
    slope = (logits.softmax(1) - F.one_hot(one.labels, 5)) @ weight
    expected = (one.images + 0.05 * slope.sign().view_as(one.images)).clamp(0, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("start", [None, 0])
def test_ball_and_range_are_never_left(start):
    generator = None if start is None else torch.Generator().manual_seed(start)
    one = pixels()
    found = projected_gradient_descent(Linear(), one, radius=0.1, steps=7, generator=generator)
    assert (found - one.images).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


def test_the_attack_raises_the_loss_and_radius_zero_does_nothing():
    network, one = Linear().eval(), pixels()

    def loss(images):
        return F.cross_entropy(one.logits(network, images), one.labels).item()

    near, far = (projected_gradient_descent(network, one, radius=r) for r in (0.05, 0.2))
    assert loss(one.images) < loss(near) < loss(far)
    assert torch.equal(projected_gradient_descent(network, one, radius=0), one.images)


def test_normalisation_does_not_change_the_radius():
    # The same function of the image, once with the normalisation inside of the network.
    class Inside(Linear):
        def forward(self, images):
            return super().forward((images - 0.5) / 0.1)

    outside = pixels((0.5,) * 3, (0.1,) * 3)
    one = projected_gradient_descent(Linear().eval(), outside, radius=0.03)
    other = projected_gradient_descent(Inside().eval(), pixels(), radius=0.03)
    torch.testing.assert_close(one, other)


def test_chunks_change_nothing(monkeypatch):
    network, one = Linear().eval(), pixels()
    whole = projected_gradient_descent(network, one, radius=0.1)
    logits = one.logits(network, one.images)
    monkeypatch.setattr(robustness, "CHUNK", 7)
    assert [len(part.images) for part in one.chunks()] == [7, 7, 6]
    torch.testing.assert_close(projected_gradient_descent(network, one, radius=0.1), whole)
    torch.testing.assert_close(one.logits(network, one.images), logits)


def test_modes_and_gradients_are_left_as_they_were():
    network, one = Linear().train(), pixels()
    projected_gradient_descent(network, one, radius=0.1)
    assert accuracy_on(network, one, one.images) == accuracy_on(network, one, one.images)
    assert network.training
    assert network.dropout.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_accuracies_are_shares():
    network, one = Linear().eval(), pixels()
    expected = (network(one.images).logits.argmax(1) == one.labels).double().mean().item()
    assert accuracy_on(network, one, one.images) == expected
    assert noisy_accuracy(network, one, 0.0, torch.Generator().manual_seed(0), draws=3) == pytest.approx(
        expected
    )
    noisy = [noisy_accuracy(network, one, 0.5, torch.Generator().manual_seed(k), draws=2) for k in (0, 0, 1)]
    assert noisy[0] == noisy[1]


@pytest.mark.parametrize(
    "wrong", [{"radius": -1}, {"radius": 0.1, "steps": 0}, {"radius": 0.1, "step_size": 0}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="radius, step_size, steps: expected"):
        projected_gradient_descent(Linear(), pixels(), **wrong)
