"""Folded normalisation: the same function to rounding, only where that is certain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from kdrefs.nets import FeatureNet, build
from kdrefs.nets.fold import fold_batchnorm, normalised_layers

# name, options, normalisations, those that follow a layer
NETS = [
    ("tiny_cnn", {}, 3, 3),
    ("small_cnn", {"in_channels": 3, "channels": (4, 8), "size": 32}, 2, 2),
    ("resnet8", {}, 9, 9),  # stem, three blocks of two, two projections
    ("resnet8", {"shortcut": "pad"}, 7, 7),
    ("resnet20", {}, 21, 21),
    ("preact_resnet18", {}, 17, 9),  # stem and the second of each block
    ("preact_resnet18", {"shortcut": "identity"}, 17, 9),
    ("wide_resnet", {"depth": 10, "widen": 2, "dropout": 0.3}, 7, 4),  # the stem feeds a normalisation only
    ("wide_resnet", {"depth": 10, "widen": 1}, 7, 3),  # the stem feeds the residual stream too
]


def trained(net: nn.Module) -> nn.Module:
    """As if trained: statistics, scales and shifts that are neither zero nor one."""
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.running_mean, layer.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            for tensor in (layer.running_var, layer.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.2, 2.0)
    return net


def norms(net: nn.Module) -> int:
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in net.modules())


def assert_same_function(net: nn.Module, folded: nn.Module, images: torch.Tensor, tolerance: float) -> None:
    """Differences are at most ``tolerance`` of the largest value of each output."""
    with torch.no_grad():
        expected, output = net(images), folded(images)
    assert type(output) is type(expected)
    assert list(output.features) == list(expected.features)
    for name, value in {"logits": expected.logits, **expected.features}.items():
        got = output.logits if name == "logits" else output.features[name]
        assert (got - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize(("name", "options", "all_norms", "foldable"), NETS)
def test_logits_and_features_stay_the_same(name, options, all_norms, foldable):
    net = trained(build(name, **options)).double().eval()
    folded = fold_batchnorm(net)
    assert (norms(net), norms(folded)) == (all_norms, all_norms - foldable)
    assert len(normalised_layers(net)) == foldable
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert_same_function(net, folded, images, 1e-12)


def test_what_comes_back_is_frozen_and_the_original_untouched():
    net = trained(build("resnet8")).train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_batchnorm(net)
    assert not any(part.training for part in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(part.training for part in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    shared = {parameter.data_ptr() for parameter in net.parameters()}
    assert shared.isdisjoint(parameter.data_ptr() for parameter in folded.parameters())


def test_pairs_are_named():
    pairs = normalised_layers(build("resnet8"))
    assert pairs["bn1"] == "conv1"
    assert pairs["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    assert normalised_layers(build("wide_resnet", depth=10, widen=2))["layer1.0.bn1"] == "conv1"


def test_gradients_reach_the_images():
    net = trained(build("resnet8")).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(images).logits.square().sum(), images)
    (gradient,) = torch.autograd.grad(fold_batchnorm(net)(images).logits.square().sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_single_precision_channels_last_and_folding_twice():
    net = trained(build("resnet8")).to(memory_format=torch.channels_last).eval()
    folded = fold_batchnorm(net)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert_same_function(net, folded, images, 1e-5)
    assert folded.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert folded(images).features["layer2"].is_contiguous(memory_format=torch.channels_last)
    assert_same_function(folded, fold_batchnorm(folded), images, 0.0)


def test_a_torchvision_model():
    models = pytest.importorskip("torchvision").models
    layers = {"layer4_pre": "layer4.1.add", "layer4": "layer4", "pool": "flatten"}
    net = trained(FeatureNet(models.resnet18(num_classes=7), layers)).double().eval()
    folded = fold_batchnorm(net)
    assert (norms(net), norms(folded)) == (20, 0)
    assert_same_function(net, folded, torch.randn(2, 3, 40, 40, dtype=torch.float64), 1e-12)


# ---------------------------------------------------------------- single pairs


class Pair(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, inputs):
        return self.norm(self.layer(inputs))


PAIRS = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d reflected": (
        nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="reflect", bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9),
    ),
    "conv3d dilated": (nn.Conv3d(2, 3, 2, dilation=2), nn.BatchNorm3d(3), (2, 2, 5, 5, 5)),
    "linear": (nn.Linear(5, 3), nn.BatchNorm1d(3), (4, 5)),
    "linear without bias": (nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3, affine=False), (4, 5)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False, eps=0.1), (2, 4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_every_layer_that_can_be_folded(kind):
    layer, norm, shape = PAIRS[kind]
    net = trained(Pair(layer, norm)).double().eval()
    folded = fold_batchnorm(net)
    assert norms(folded) == 0
    inputs = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(folded(inputs), net(inputs), rtol=1e-12, atol=1e-12)


def test_a_linear_layer_that_turns_out_to_map_sequences_is_refused():
    """The normalisation is over positions there, as many as there are features: a rescaled layer would be wrong."""
    folded = fold_batchnorm(Pair(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"takes \(batch, features\), got \(2, 3, 3\) behind it"):
        folded(torch.randn(2, 3, 5))


class Seen(Pair):
    """The layer's own output is returned too."""

    def forward(self, inputs):
        maps = self.layer(inputs)
        return self.norm(maps), maps


class Twice(Pair):
    """One layer, two places."""

    def forward(self, inputs):
        return self.norm(self.layer(inputs)) + self.layer(inputs)


class Penalised(Pair):
    """The weights are read directly."""

    def forward(self, inputs):
        return self.norm(self.layer(inputs)) + self.layer.weight.square().sum()


def hooked() -> nn.Module:
    net = Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


def parametrised() -> nn.Module:
    return Pair(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))


class Scaled(nn.Conv2d):
    def forward(self, inputs):
        return super().forward(inputs).relu()


KEPT = {
    "seen elsewhere": lambda: Seen(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    "used twice": lambda: Twice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    "weights read": lambda: Penalised(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    "hook": hooked,
    "parametrisation": parametrised,
    "subclass": lambda: Pair(Scaled(3, 3, 1), nn.BatchNorm2d(3)),
    "transposed": lambda: Pair(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)),
    "batch statistics": lambda: Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    "activation between": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
    "normalisation first": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_certain_is_left_alone(kind):
    net = trained(KEPT[kind]()).double().eval()
    folded = fold_batchnorm(net)
    assert normalised_layers(net) == {}
    assert norms(folded) == 1
    inputs = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(folded(inputs), net(inputs), rtol=0, atol=0)


def test_tied_weights_keep_their_values_elsewhere():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    net[2].weight = net[0].weight
    net = trained(net).double().eval()
    inputs = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(fold_batchnorm(net)(inputs), net(inputs), rtol=1e-12, atol=1e-12)


def test_a_network_that_cannot_be_traced_is_refused():
    class Branching(nn.Module):
        def forward(self, inputs):
            return inputs if inputs.sum() > 0 else -inputs

    with pytest.raises(ValueError, match=r"module: Branching cannot be traced by torch\.fx"):
        fold_batchnorm(Branching())
