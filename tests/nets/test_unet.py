"""The U-Net: sizes, features, and what reaches what."""

import pytest
import torch

from kdrefs.nets.fold import fold_batchnorm
from kdrefs.nets.unet import UNet


def test_logits_and_features_have_their_sizes():
    output = UNet(5, (4, 6, 8))(torch.randn(2, 3, 16, 24))
    assert output.logits.shape == (2, 5, 16, 24)
    sizes = {
        "down1": (4, 16, 24),
        "down2": (6, 8, 12),
        "down3": (8, 4, 6),
        "up2": (6, 8, 12),
        "up1": (4, 16, 24),
    }
    assert {name: tuple(output.features[name].shape[1:]) for name in sizes} == sizes
    for name in sizes:
        assert torch.equal(output.features[name], torch.relu(output.features[f"{name}_pre"]))


def test_far_pixels_reach_each_other_by_way_of_the_coarse_map_only():
    torch.manual_seed(0)
    net = UNet(1, (4, 6, 8), in_channels=1).eval()
    images = torch.randn(1, 1, 32, 32).requires_grad_()
    net(images).logits[0, 0, 16, 16].backward()
    reached = (images.grad[0, 0] != 0).nonzero()
    # Two 3x3 convolutions at full size reach 2 pixels; by way of the coarse map more.
    assert (reached - 16).abs().max() > 5
    last = net(torch.randn(1, 1, 32, 32))
    assert last.features["up1"].shape[1] == 4


def test_the_classifier_reads_up1():
    net = UNet(3, (4, 6)).eval()
    output = net(torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(net.classifier(output.features["up1"]), output.logits)


def test_a_frozen_one_folds_its_normalisation():
    torch.manual_seed(0)
    net = UNet(3, (4, 6, 8))
    net(torch.randn(8, 3, 16, 16))  # moves the running statistics
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(
        fold_batchnorm(net.eval())(images).logits, net(images).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UNet(0), "classes must be a positive integer, got 0"),
        (lambda: UNet(2, (4,)), "widths must name at least two steps"),
        (lambda: UNet(2, (4, 0)), "widths must be a positive integer, got 0"),
        (lambda: UNet(2, (4, 6, 8))(torch.randn(1, 3, 10, 8)), "images must have .* divisible by 4"),
        (lambda: UNet(2)(torch.randn(1, 1, 8, 8)), "images must have shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
