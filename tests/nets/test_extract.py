"""A user's model as a network with named features."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from kdrefs.nets import FeatureNet

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "bn": "layer4.1.bn2",
    "layer4_pre": "layer4.1.add",
    "layer4": "layer4",
    "last": "layer4",
    "pool": "flatten",
}


@pytest.mark.parametrize("training", [False, True])
def test_resnet18_keeps_its_logits(training):
    torch.manual_seed(0)
    model = resnet18(weights=None).train(training)
    expected = model(IMAGES)
    output = FeatureNet(model, LAYERS)(IMAGES)
    assert torch.equal(output.logits, expected)
    assert list(output.features) == list(LAYERS)
    assert output.features["pool"].shape == (2, 512)
    assert output.features["layer4"].shape == (2, 512, 2, 2)


def test_preactivations_are_not_overwritten():
    """torchvision's ResNet adds and rectifies in place; the features asked for come from before that."""
    model = resnet18(weights=None).eval()
    seen = {}
    model.layer4[1].bn2.register_forward_hook(lambda module, inputs, output: seen.update(bn=output.clone()))
    model.layer1[0].bn1.register_forward_hook(
        lambda module, inputs, output: seen.update(early=output.clone())
    )
    model(IMAGES)
    hooked = dict(seen)
    features = FeatureNet(model, {**LAYERS, "early": "layer1.0.bn1"})(IMAGES).features
    assert torch.equal(features["bn"], hooked["bn"])
    assert torch.equal(features["early"], hooked["early"])
    assert features["early"].min() < 0
    assert features["layer4_pre"].min() < 0
    assert torch.equal(F.relu(features["layer4_pre"]), features["layer4"])
    assert torch.equal(features["last"], features["layer4"])


class InPlace(nn.Module):
    """One of each in-place operation that tracing shows as a function."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, rows):
        hidden = self.first(rows)
        hidden += 1
        hidden *= 2
        hidden -= 2
        return self.second(F.relu(hidden, inplace=True))


@pytest.mark.parametrize("training", [False, True])
def test_functions_run_out_of_place(training):
    model = InPlace().train(training)
    rows = torch.randn(5, 4)
    output = FeatureNet(model, {"first": "first", "add": "add", "mul": "mul", "sub": "sub"})(rows)
    first = model.first(rows)
    assert output.features["sub"].min() < 0
    assert torch.equal(output.features["first"], first)
    assert torch.equal(output.features["add"], first + 1)
    assert torch.equal(output.features["mul"], (first + 1) * 2)
    assert torch.equal(output.features["sub"], (first + 1) * 2 - 2)
    assert torch.equal(output.logits, model(rows))


def test_parameters_are_shared_and_modes_work():
    model = mobilenet_v2(weights=None)
    net = FeatureNet(model, {"features": "features"})
    assert {id(parameter) for parameter in net.parameters()} == {
        id(parameter) for parameter in model.parameters()
    }
    net.eval()
    assert torch.equal(net(IMAGES).logits, net(IMAGES).logits)
    net.train()
    assert not torch.equal(net(IMAGES).logits, net(IMAGES).logits)  # dropout


def test_logits_may_be_named():
    model = resnet18(weights=None).eval()
    output = FeatureNet(model, {}, logits="avgpool")(IMAGES)
    assert output.logits.shape == (2, 512, 1, 1)
    assert output.features == {}


def test_unknown_node():
    with pytest.raises(ValueError, match=r"layers\['map'\] names no node of the model: 'layer9'"):
        FeatureNet(resnet18(weights=None), {"map": "layer9"})
    with pytest.raises(ValueError, match="logits names no node of the model: 'head'"):
        FeatureNet(resnet18(weights=None), {}, logits="head")


def test_missing_torchvision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="FeatureNet needs torchvision"):
        FeatureNet(nn.Linear(2, 2), {})
