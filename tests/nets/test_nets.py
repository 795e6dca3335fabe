"""Networks: published sizes, named features, functional use, initial checks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from kdrefs.nets import Output, WideResNet, build, names

# name, options, parameters, where the number is from
SIZES = [
    ("tiny_cnn", {}, 15_050),  # PKT paper's student, counted from the authors' code
    ("small_cnn", {"channels": (4, 8)}, 1_046),
    ("small_cnn", {"channels": (8, 16)}, 2_482),
    ("plain_cnn", {}, 40_058),  # 448 + 17 * 2,320 + 170
    ("preact_resnet18", {}, 11_171_274),  # PKT paper's teacher, counted from the authors' code
    ("resnet20", {"shortcut": "pad"}, 269_722),  # He et al., table 6: 0.27 M
    ("resnet32", {"shortcut": "pad"}, 464_154),  # 0.46 M
    ("resnet44", {"shortcut": "pad"}, 658_586),  # 0.66 M
    ("resnet56", {"shortcut": "pad"}, 853_018),  # 0.85 M
    ("resnet110", {"shortcut": "pad"}, 1_727_962),  # 1.7 M
    ("resnet8x4", {"classes": 100}, 1_233_540),  # RepDistiller's layout from here on
    ("resnet32x4", {"classes": 100}, 7_433_860),
    ("resnet20", {"classes": 100}, 278_324),
    ("resnet56", {"classes": 100}, 861_620),
    ("resnet110", {"classes": 100}, 1_736_564),
    ("wide_resnet", {"depth": 16, "widen": 2, "classes": 100}, 703_284),
    ("wide_resnet", {"depth": 40, "widen": 1, "classes": 100}, 569_780),
    ("wide_resnet", {"depth": 40, "widen": 2, "classes": 100}, 2_255_156),
    ("wide_resnet", {"depth": 28, "widen": 10}, 36_479_194),  # Zagoruyko & Komodakis, table 4: 36.5 M
]


@pytest.mark.parametrize(("name", "options", "parameters"), SIZES)
def test_number_of_parameters(name, options, parameters):
    with torch.device("meta"):
        net = build(name, **options)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


PREACT_MAPS = {
    "layer1_sum": (64, 32), "layer1": (64, 32), "layer1_pre": (64, 32),
    "layer2_sum": (128, 16), "layer2": (128, 16), "layer2_pre": (128, 16),
    "layer3_sum": (256, 8), "layer3": (256, 8), "layer3_pre": (256, 8),
    "layer4_sum": (512, 4),
}  # fmt: skip
# name, options, image shape, feature -> (channels, side) of a map or width of a vector
LAYOUTS = [
    (
        "tiny_cnn", {}, (3, 32, 32),
        {"block1": (8, 30), "block1_pre": (8, 30), "block2": (16, 13), "block2_pre": (16, 13),
         "block3": (32, 4), "block3_pre": (32, 4), "fc1": 64, "fc1_pre": 64},
    ),
    (
        "small_cnn", {"in_channels": 1, "channels": (8, 16, 32), "feature": 20, "size": 24}, (1, 24, 24),
        {"block1": (8, 24), "block1_pre": (8, 24), "block2": (16, 12), "block2_pre": (16, 12),
         "block3": (32, 6), "block3_pre": (32, 6), "embedding": 20, "embedding_pre": 20},
    ),
    (
        "resnet8", {}, (3, 32, 32),
        {"stem": (16, 32), "stem_pre": (16, 32), "layer1": (16, 32), "layer1_pre": (16, 32),
         "layer2": (32, 16), "layer2_pre": (32, 16), "layer3": (64, 8), "layer3_pre": (64, 8), "pool": 64},
    ),
    ("preact_resnet18", {}, (3, 32, 32), {"stem": (64, 32), "stem_pre": (64, 32), **PREACT_MAPS, "pool": 512}),
    (
        "wide_resnet", {"depth": 10, "widen": 2}, (3, 32, 32),
        {f"layer{k}{kind}": (16 * 2**k, 64 >> k) for k in (1, 2, 3) for kind in ("", "_pre", "_sum")}
        | {"pool": 128},
    ),
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "options", "image", "features"), LAYOUTS)
def test_features(name, options, image, features, training):
    net = build(name, classes=7, **options).train(training)
    output = net(torch.randn(2, *image))
    assert isinstance(output, Output)
    assert output.logits.shape == (2, 7)
    shapes = {key: tuple(value.shape[1:]) for key, value in output.features.items()}
    assert shapes == {key: (s,) if isinstance(s, int) else (s[0], s[1], s[1]) for key, s in features.items()}
    pairs = [key for key in features if f"{key}_pre" in features]
    assert pairs
    for key in pairs:
        pre = output.features[f"{key}_pre"]
        assert pre.min() < 0
        assert torch.equal(F.relu(pre), output.features[key])


def test_every_name_is_covered():
    assert {name for name, *_ in SIZES + LAYOUTS} | {"cifar_resnet"} == set(names())


def test_the_classifier_sees_the_named_vector():
    cases = {"tiny_cnn": ("fc1", "fc2"), "small_cnn": ("embedding", "classifier"), "resnet8": ("pool", "fc"),
             "plain_cnn": ("pool", "fc")}  # fmt: skip
    for name, (feature, classifier) in cases.items():
        net = build(name).eval()
        images = torch.randn(2, net.in_channels, getattr(net, "size", 32), getattr(net, "size", 32))
        output = net(images)
        assert torch.equal(getattr(net, classifier)(output.features[feature]), output.logits)


def test_pooled_feature_of_the_preactivation_teacher_is_signed_and_wide_resnets_is_not():
    images = torch.randn(4, 3, 32, 32)
    assert build("preact_resnet18").eval()(images).features["pool"].min() < 0
    assert build("wide_resnet", depth=10, widen=1).eval()(images).features["pool"].min() >= 0


def test_preactivation_teacher_follows_the_authors_block():
    """The authors' identity shortcut carries relu(bn1(x)); that of He et al. carries x."""
    torch.manual_seed(0)
    ours = build("preact_resnet18").eval()
    block, maps = ours.layer1[0], torch.randn(2, 64, 8, 8)
    residual = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(maps))))))
    assert torch.allclose(block(maps)[0], residual + F.relu(block.bn1(maps)), atol=1e-6)
    torch.manual_seed(0)
    he = build("preact_resnet18", shortcut="identity").eval().layer1[0]
    assert torch.allclose(he(maps)[0], residual + maps, atol=1e-6)


def test_tiny_cnn_is_the_plain_stack_of_layers():
    net = build("tiny_cnn").eval()
    hidden = images = torch.randn(3, 3, 32, 32)
    for block in net.blocks:
        hidden = F.max_pool2d(F.relu(block.bn(block.conv(hidden))), 2)
    assert hidden.shape == (3, 32, 2, 2)
    assert torch.allclose(net(images).logits, net.fc2(F.relu(net.fc1(hidden.flatten(1)))), atol=1e-6)


def test_pad_shortcut_takes_every_other_pixel_and_adds_zeros():
    shortcut = build("resnet8", shortcut="pad").layer2[0].downsample
    maps = torch.randn(2, 16, 6, 6)
    wide = shortcut(maps)
    assert wide.shape == (2, 32, 3, 3)
    assert torch.equal(wide[:, 8:24], maps[:, :, ::2, ::2])
    assert not wide[:, :8].any()
    assert not wide[:, 24:].any()


def test_parameter_names_are_those_of_published_checkpoints():
    resnet = build("resnet8x4").state_dict()
    assert {
        "conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.running_mean",
        "fc.bias",
    } <= set(resnet)
    teacher = build("preact_resnet18").state_dict()
    assert {"bn1.weight", "layer2.0.shortcut.0.weight", "layer1.1.conv2.weight", "linear.bias"} <= set(
        teacher
    )


def test_convolutions_of_resnets_start_with_the_variance_of_fan_out():
    for net in (build("resnet8x4"), build("wide_resnet", depth=10, widen=4)):
        weight = net.layer3[0].conv2.weight
        assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)


def test_running_statistics_move_once_a_step():
    for name, options in [("preact_resnet18", {}), ("wide_resnet", {"depth": 10, "widen": 1})]:
        net = build(name, **options)
        net(torch.randn(2, 3, 16, 16))
        counts = {
            key: int(value) for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")
        }
        assert set(counts.values()) == {1}


def test_dropout_acts_in_training_only():
    net = WideResNet(10, 1, dropout=0.5)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(net(images).logits, net(images).logits)
    net.eval()
    assert torch.equal(net(images).logits, net(images).logits)


NETS = [("tiny_cnn", {}, (3, 32, 32)), ("small_cnn", {}, (1, 8, 8)), ("resnet8", {}, (3, 16, 16)),
        ("plain_cnn", {"width": 4, "depth": 6}, (3, 8, 8)),
        ("preact_resnet18", {}, (3, 8, 8)), ("wide_resnet", {"depth": 10, "widen": 1}, (3, 16, 16))]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "image"), NETS)
def test_functional_call_with_other_weights(name, options, image):
    one, other = build(name, **options).eval(), build(name, **options).eval()
    images = torch.randn(2, *image)
    called = functional_call(one, dict(other.state_dict()), (images,))
    expected = other(images)
    assert torch.equal(called.logits, expected.logits)
    assert all(torch.equal(called.features[key], value) for key, value in expected.features.items())
    assert not torch.equal(called.logits, one(images).logits)


@pytest.mark.parametrize(("name", "options", "image"), NETS)
def test_vmap_over_networks_in_training_mode(name, options, image):
    nets = [build(name, **options).double() for _ in range(2)]
    images = torch.randn(2, 4, *image, dtype=torch.float64)
    parameters, buffers = stack_module_state(copy.deepcopy(nets))

    def forward(parameters, buffers, images):
        return functional_call(nets[0], (parameters, buffers), (images,)), buffers

    output, buffers = vmap(forward)(parameters, buffers, images)
    for k, net in enumerate(nets):
        expected = net(images[k])
        torch.testing.assert_close(output.logits[k], expected.logits)
        for key, value in expected.features.items():
            torch.testing.assert_close(output.features[key][k], value)
        for key, value in net.named_buffers():
            torch.testing.assert_close(buffers[key][k], value)


@pytest.mark.parametrize(("name", "options", "image"), NETS)
def test_channels_last_gives_the_same_numbers(name, options, image):
    net = build(name, **options).double().eval()
    images = torch.randn(2, *image, dtype=torch.float64)
    expected = net(images).logits
    net.to(memory_format=torch.channels_last)
    output = net(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output.logits, expected)
    maps = [value for value in output.features.values() if value.ndim == 4 and value[0, 0].numel() > 1]
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)


def test_same_seed_same_network():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in build("resnet8").parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny_cnn", {"classes": 0}, "classes must be a positive integer, got 0"),
        ("tiny_cnn", {"classes": 2.0}, r"classes must be a positive integer, got 2\.0"),
        ("tiny_cnn", {"channels": ()}, "channels must name at least one block"),
        ("tiny_cnn", {"channels": (8, -1)}, "channels must be a positive integer, got -1"),
        ("tiny_cnn", {"size": 20}, "size must leave at least one pixel after 3 blocks, got 20"),
        ("small_cnn", {"size": 3}, "size must be at least 4 for 2 blocks, got 3"),
        ("plain_cnn", {"depth": 8}, "depth must be a multiple of 3, got 8"),
        ("plain_cnn", {"init": "orthogonal"}, "init must be 'default' or 'he', got 'orthogonal'"),
        ("cifar_resnet", {"depth": 18}, "depth must be 6n"),
        ("cifar_resnet", {"depth": 2}, "depth must be 6n"),
        ("resnet8", {"widths": (16, 16, 32)}, "widths must name the stem and three stages"),
        ("resnet8", {"shortcut": "none"}, "shortcut must be 'projection' or 'pad', got 'none'"),
        ("resnet8", {"shortcut": "pad", "widths": (32, 16, 32, 64)}, "widths must not decrease"),
        ("preact_resnet18", {"shortcut": "pad"}, "shortcut must be 'activated' or 'identity', got 'pad'"),
        ("wide_resnet", {"depth": 20, "widen": 1}, "depth must be 6n"),
        ("wide_resnet", {"depth": 10, "widen": 0}, "widen must be a positive integer, got 0"),
        ("wide_resnet", {"depth": 10, "widen": 1, "dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
        ("tiny_cn", {}, "got 'tiny_cn'; did you mean tiny_cnn"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_unknown_option():
    with pytest.raises(TypeError, match="width"):
        build("tiny_cnn", width=3)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("tiny_cnn", (2, 3, 28, 28), r"\(B, 3, 32, 32\), got \(2, 3, 28, 28\)"),
        ("tiny_cnn", (3, 32, 32), r"\(B, 3, 32, 32\), got \(3, 32, 32\)"),
        ("small_cnn", (2, 3, 8, 8), r"\(B, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        ("resnet8", (2, 1, 32, 32), r"\(B, 3, H, W\), got \(2, 1, 32, 32\)"),
    ],
)
def test_bad_images(name, shape, expected):
    with pytest.raises(ValueError, match=f"images must have shape {expected}"):
        build(name)(torch.zeros(shape))


def test_networks_hold_no_state_of_a_forward_pass():
    """Features are returned, not kept: nothing but parameters and buffers may survive a forward pass."""
    net = build("resnet8")
    before = set(vars(net))
    net(torch.randn(2, 3, 16, 16))
    assert set(vars(net)) == before
    assert not any(
        isinstance(value, torch.Tensor) for module in net.modules() for value in vars(module).values()
    )
    assert isinstance(copy.deepcopy(net), nn.Module)


def test_he_initialisation_keeps_the_signal_of_a_deep_plain_net_and_the_default_one_does_not():
    images = torch.randn(8, 3, 16, 16)
    sizes = {
        init: build("plain_cnn", init=init)(images).features["stage3_pre"].std().item()
        for init in ("default", "he")
    }
    assert sizes["default"] < 0.05 < 0.1 < sizes["he"]
