"""Clipping by the norm: one network as torch does it, members each by their own norm."""

import pytest
import torch
from torch import nn

from kdrefs.training import Members
from kdrefs.training.clipping import clip_gradients


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def gradients(module: nn.Module, scale: float, inputs: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    (scale * module(inputs).square().sum()).backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("largest", [0.1, 1e6])
def test_one_network_is_clipped_as_torch_does(largest):
    module, inputs = network(0), torch.randn(5, 3)
    gradients(module, 1.0, inputs)
    torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    gradients(module, 1.0, inputs)
    clip_gradients(module, largest)
    for parameter, wanted in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_members_are_clipped_as_they_would_be_alone():
    alone, inputs = [network(seed) for seed in range(3)], torch.randn(3, 5, 3)
    scales = torch.tensor([100.0, 1e-3, 1.0])  # the second is far below the limit and must stay as it is
    together = Members(alone)
    (scales[:, None, None] * together(inputs).square()).sum().backward()
    clip_gradients(together, 0.5)
    for k, module in enumerate(alone):
        gradients(module, float(scales[k]), inputs[k])
        before = module[0].weight.grad.clone()
        clip_gradients(module, 0.5)
        assert torch.equal(before, module[0].weight.grad) == (k == 1)
        for one, stacked in zip(module.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(stacked.grad[k], one.grad)


def test_zero_and_missing_gradients_stay():
    module = network(0)
    clip_gradients(module, 1.0)
    assert all(parameter.grad is None for parameter in module.parameters())
    gradients(module, 0.0, torch.randn(5, 3))
    clip_gradients(module, 1.0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize("largest", [0, -1.0, float("nan")])
def test_limit_must_be_positive(largest):
    with pytest.raises(ValueError, match="largest: expected a number above 0"):
        clip_gradients(network(0), largest)
