"""Structured distillation against other codes' numbers, plain loops and closed forms; the discriminator's parts."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.structured_kd import (
    HolisticDiscriminator,
    discriminator_objective,
    gradient_penalty,
    holistic_loss,
    pairwise_loss,
    pixelwise_loss,
)
from kdrefs.training import Members
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
GRAPHS = {
    "default": {},
    "all pairs, patches": {"beta": 4},
    "rectangular patches": {"beta": (2, 1)},
    "nearest": {"alpha": 9},
    "nearest patches": {"alpha": 5, "beta": 4},
    "itself and 20": {"alpha": 21, "beta": (1, 2)},
    "official": {"variant": "official"},
    "official, nearest": {"variant": "official", "alpha": 5, "beta": 4},
    "cirkd": {"variant": "cirkd"},
}


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Other codes' numbers


def golden(name: str, case: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        fields = {key: torch.from_numpy(value) for key, value in arrays.items() if f"c{case}_" in key}
    return fields[f"c{case}_s"], fields[f"c{case}_t"], fields


@pytest.mark.parametrize("case", range(2))
def test_official_pixels_equal_the_authors_code(case):
    student, teacher, fields = golden("skd_official_pixelwise", case)
    value, gradient = value_and_gradient(lambda s: pixelwise_loss(s, teacher, variant="official"), student)
    assert value == pytest.approx(fields[f"c{case}_loss"].item(), rel=1e-9)
    torch.testing.assert_close(gradient, fields[f"c{case}_grad_s"], rtol=1e-9, atol=1e-12)
    # Ours has the gradient of one sample's mean.
    _, ours = value_and_gradient(lambda s: pixelwise_loss(s, teacher), student)
    torch.testing.assert_close(len(student) * ours, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", range(2))
def test_cirkd_pairs_equal_its_code(case):
    student, teacher, fields = golden("skd_cirkd_pairwise", case)
    value, gradient = value_and_gradient(lambda s: pairwise_loss(s, teacher, variant="cirkd"), student)
    assert value == pytest.approx(fields[f"c{case}_loss"].item(), rel=1e-9)
    torch.testing.assert_close(gradient, fields[f"c{case}_grad_s"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("beta1_full", {}), ("beta1_r1", {"alpha": 9}), ("beta4_full", {"beta": 4})],
)
def test_pairs_equal_the_formula_in_numpy(name, options):
    student, teacher, fields = golden("formula_skd_pairwise_alpha_beta", 0)
    value, gradient = value_and_gradient(lambda s: pairwise_loss(s, teacher, **options), student)
    assert value == pytest.approx(fields[f"{name}_c0_loss"].item(), rel=1e-9)
    torch.testing.assert_close(gradient, fields[f"{name}_c0_grad_s"], rtol=1e-6, atol=1e-8)


# Plain loops


def loop_pixels(student: Tensor, teacher: Tensor, variant: str | None) -> float:
    batch, classes, height, width = student.shape
    total = 0.0
    for n, y, x in itertools.product(range(batch), range(height), range(width)):
        s, t = (logits[n, :, y, x].softmax(0).tolist() for logits in (student, teacher))
        for k in range(classes):
            if variant == "printed":
                total += s[k] * math.log(s[k] / t[k])
            elif variant == "official":
                total -= t[k] * math.log(s[k])
            else:
                total += t[k] * math.log(t[k] / s[k])
    return total / (height * width * (1 if variant == "official" else batch))


@pytest.mark.parametrize("variant", [None, "printed", "official"])
def test_pixels_equal_a_plain_loop(variant):
    student, teacher = maps(3, 4, 2, 3), maps(3, 4, 2, 3, seed=1)
    value = pixelwise_loss(student, teacher, variant=variant).item()
    assert value == pytest.approx(loop_pixels(student, teacher, variant), rel=1e-12)


def nodes_of(sample: Tensor, patch: tuple[int, int], largest: bool) -> dict[tuple[int, int], list[float]]:
    """Features of the patches by row and column, pixel by pixel."""
    _, height, width = sample.shape
    found = {}
    for top, left in itertools.product(range(0, height, patch[0]), range(0, width, patch[1])):
        block = sample[:, top : top + patch[0], left : left + patch[1]]
        found[top // patch[0], left // patch[1]] = [
            max(channel.flatten().tolist()) if largest else float(np.mean(channel.flatten().tolist()))
            for channel in block
        ]
    return found


def loop_pairs(student: Tensor, teacher: Tensor, options: dict) -> float:
    variant, alpha, beta = options.get("variant"), options.get("alpha"), options.get("beta")
    height, width = student.shape[2:]
    usual = {None: (1, 1), "cirkd": (2, 2), "official": (height // 2, width // 2)}[variant]
    patch = usual if beta is None else beta if isinstance(beta, tuple) else (math.isqrt(beta),) * 2
    extra = 1e-8 if variant == "official" else 0.0
    # The alpha nearest on an endless map are those within some distance.
    everywhere = sorted(math.hypot(a, b) for a in range(-9, 10) for b in range(-9, 10))
    reach = math.inf if alpha is None else everywhere[alpha - 1] + 1e-9
    total = count = 0.0
    for one, other in zip(student, teacher, strict=True):
        s, t = (nodes_of(sample, patch, variant is not None) for sample in (one, other))
        for i, j in itertools.product(s, s):
            if math.dist(i, j) > reach:
                continue
            products = [
                sum(a * b for a, b in zip(x[i], x[j], strict=True))
                / ((math.hypot(*x[i]) + extra) * (math.hypot(*x[j]) + extra))
                for x in (s, t)
            ]
            total += (products[0] - products[1]) ** 2
            count += 1
    return total / count


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (1, 2, 5, 7), (3, 20, 4, 4)])
@pytest.mark.parametrize("name", GRAPHS)
def test_pairs_equal_a_plain_loop(name, shape):
    student, teacher = maps(*shape), maps(shape[0], 5, *shape[2:], seed=1)
    loss = pairwise_loss(student, teacher, **GRAPHS[name]).item()
    assert loss == pytest.approx(loop_pairs(student, teacher, GRAPHS[name]), rel=1e-9)


def test_official_norms_are_constants():
    student, teacher = maps(2, 3, 6, 6), maps(2, 5, 6, 6, seed=1)
    _, gradient = value_and_gradient(lambda s: pairwise_loss(s, teacher, variant="official"), student)
    pooled = F.max_pool2d(student, 3).flatten(2).requires_grad_()
    norms = pooled.detach().norm(dim=1, keepdim=True) + 1e-8
    with torch.no_grad():
        target = F.max_pool2d(teacher, 3).flatten(2)
        target = target / (target.norm(dim=1, keepdim=True) + 1e-8)
    unit = pooled / norms
    gap = unit.mT @ unit - target.mT @ target
    (expected,) = torch.autograd.grad(gap.square().sum() / 4**2 / 2, pooled)
    through = F.max_pool2d(student, 3, return_indices=True)[1].flatten(2)
    torch.testing.assert_close(gradient.flatten(2).gather(2, through), expected)
    # The affinity of a node with itself is 1 whatever it is; with constant norms it pulls along the features.
    assert (gradient.flatten(2).gather(2, through) * pooled).sum(1).abs().max() > 1e-3
    _, ours = value_and_gradient(lambda s: pairwise_loss(s, teacher), student)
    assert (ours * student).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("channels", [2, 5, 9, 30])
def test_both_routes_agree(channels):
    # 16 nodes: more channels than that in all are cheaper pair by pair. Channels thrice, the same affinities.
    student, teacher = maps(2, channels, 4, 4), maps(2, 3, 4, 4, seed=1)
    value, gradient = value_and_gradient(lambda s: pairwise_loss(s, teacher), student)
    again, other = value_and_gradient(lambda s: pairwise_loss(s.repeat(1, 9, 1, 1), teacher), student)
    assert again == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(other, gradient, rtol=1e-8, atol=1e-12)


def test_every_node_near_enough_is_every_node():
    student, teacher = maps(2, 3, 3, 3), maps(2, 4, 3, 3, seed=1)
    assert pairwise_loss(student, teacher, alpha=25).item() == pytest.approx(
        pairwise_loss(student, teacher).item(), rel=1e-12
    )
    assert pairwise_loss(student, teacher, alpha=1).item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    h=st.integers(2, 5),
    w=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_invariances(name, batch, channels, h, w, seed):
    student, teacher = maps(batch, channels, h, w, seed=seed), maps(batch, 3, h, w, seed=seed + 1)
    options = GRAPHS[name]
    value = pairwise_loss(student, teacher, **options).item()
    turn = torch.linalg.qr(maps(channels, channels, seed=seed + 2))[0]
    sample = torch.randperm(batch)
    same = {"order of the samples": (student[sample], teacher[sample]), "scale": (7 * student, teacher / 3)}
    if "variant" not in options:  # maxima are not of a turned basis
        same["turn of the feature space"] = (torch.einsum("dc,nchw->ndhw", turn, student), teacher)
    for change, (s, t) in same.items():
        assert pairwise_loss(s, t, **options).item() == pytest.approx(value, rel=1e-5, abs=1e-10), change
    assert -1e-12 <= value <= 4 + 1e-12
    assert pairwise_loss(teacher, teacher, **options).item() == pytest.approx(0, abs=1e-12)


def test_a_larger_map_is_pooled():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 8, 4, seed=1)
    pooled = teacher.view(2, 5, 4, 2, 4).mean(3)
    assert pairwise_loss(student, teacher).item() == pytest.approx(
        pairwise_loss(student, pooled).item(), rel=1e-12
    )


# Gradients and corner cases


@pytest.mark.parametrize("name", [name for name in GRAPHS if "official" not in name])
def test_gradient_of_pairs_is_the_derivative(name):
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: pairwise_loss(s, teacher, **GRAPHS[name]), (student.requires_grad_(),)
    )


@pytest.mark.parametrize("variant", [None, "printed", "official"])
def test_gradient_of_pixels_is_the_derivative(variant):
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: pixelwise_loss(s, teacher, variant=variant), (student.requires_grad_(),)
    )


def test_no_gradient_reaches_the_teacher():
    for loss in (pixelwise_loss, pairwise_loss):
        student, teacher = maps(2, 3, 4, 4).requires_grad_(), maps(2, 3, 4, 4, seed=1).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0


AWKWARD = {
    "zero": lambda x: 0 * x,
    "a zero sample": lambda x: x * (torch.arange(len(x)) > 0).view(-1, 1, 1, 1),
    "zero pixels": lambda x: x * (torch.arange(x.shape[3]) > 1),
    "equal pixels": lambda x: x[..., :1].expand_as(x).clone(),
    "opposite pixels": lambda x: torch.cat([x[..., :2], -x[..., :2]], -1),
    "1e-12": lambda x: 1e-12 * x,
    "1e12": lambda x: 1e12 * x,
    "one sample": lambda x: x[:1],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_values_and_gradients_stay_finite_in_float32(name):
    for side, options in itertools.product(("student", "teacher", "both"), GRAPHS.values()):
        student, teacher = (
            maps(2, 3, 4, 4, dtype=torch.float32),
            maps(2, 3, 4, 4, seed=1, dtype=torch.float32),
        )
        if side != "teacher" or name == "one sample":
            student = AWKWARD[name](student)
        if side != "student" or name == "one sample":
            teacher = AWKWARD[name](teacher)
        value, gradient = value_and_gradient(
            lambda s, t=teacher, o=options: pairwise_loss(s, t, **o), student
        )
        assert math.isfinite(value), options
        assert gradient.isfinite().all(), options
        value, gradient = value_and_gradient(lambda s, t=teacher: pixelwise_loss(s, t), student)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


# The discriminator


def test_size_is_the_authors():
    network = HolisticDiscriminator(19, image_channels=None)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 3_191_721
    with torch.no_grad():
        assert network.eval()(maps(1, 19, 65, 65, dtype=torch.float32)).shape == (1,)


def small(seed: int = 0, **options) -> HolisticDiscriminator:
    torch.manual_seed(seed)
    return HolisticDiscriminator(3, **{"width": 4, "blocks": 2, **options}).double()


def test_the_image_matters_to_a_conditional_one_only():
    conditional, plain = small(), small(image_channels=None)
    segmentation, image, other = maps(4, 3, 16, 16), maps(4, 3, 32, 32, seed=1), maps(4, 3, 32, 32, seed=2)
    assert (conditional(segmentation, image) - conditional(segmentation, other)).abs().min() > 1e-6
    assert plain(segmentation).shape == (4,)
    half = F.interpolate(image, size=(16, 16), mode="bilinear", align_corners=False)
    conditional.eval()
    torch.testing.assert_close(conditional(segmentation, image), conditional(segmentation, half))


def test_convolutions_have_spectral_norm_one():
    conv = small().convs[1]
    expected = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
    for _ in range(200):
        conv(maps(1, 4, 8, 8))
    conv.eval()
    u = conv.u.clone()
    plain = F.conv2d(maps(1, 4, 8, 8), conv.weight / expected, conv.bias, 2, 1)
    torch.testing.assert_close(conv(maps(1, 4, 8, 8)), plain, rtol=1e-5, atol=1e-8)
    assert torch.equal(conv.u, u)  # evaluation leaves it alone


def test_spectral_norm_equals_torch_s():
    conv = small().convs[0].eval()
    reference = nn.Conv2d(6, 4, 4, stride=2, padding=1).double()
    reference.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    reference = nn.utils.parametrizations.spectral_norm(reference, n_power_iterations=500).train()
    for _ in range(500):
        conv.train()(maps(1, 6, 8, 8))
    torch.testing.assert_close(conv(maps(1, 6, 8, 8)), reference(maps(1, 6, 8, 8)), rtol=1e-6, atol=1e-8)


def test_attention_is_a_weighted_mean_of_the_values():
    layer = small().attention[0].double()
    x = maps(1, 4, 2, 3)
    torch.testing.assert_close(layer(x), x)  # its share is 0 at first
    layer.share.data.fill_(0.7)
    flat = x.flatten(2)[0]
    query, key, value = (part(x).flatten(2)[0] for part in (layer.query, layer.key, layer.value))
    for place in range(6):
        weights = torch.stack([query[:, place] @ key[:, other] for other in range(6)]).softmax(0)
        expected = flat[:, place] + 0.7 * sum(w * value[:, other] for other, w in enumerate(weights))
        torch.testing.assert_close(layer(x).flatten(2)[0, :, place], expected)


def test_loss_is_a_difference_of_means():
    student, teacher = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 1.0, 0.5])
    assert holistic_loss(student, teacher).item() == pytest.approx(2.5)


class Slope(nn.Module):
    """Answers whose gradient is known: ``|steepness * x|`` along one direction."""

    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(steepness, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.steepness * x[:, 0, 0, 0]


@pytest.mark.parametrize("steepness", [0.0, 0.5, 1.0, -3.0])
def test_penalty_of_a_line_has_the_closed_form(steepness):
    line = Slope(steepness)
    value = gradient_penalty(
        line, maps(4, 3, 2, 2), maps(4, 3, 2, 2, seed=1), torch.rand(4, dtype=torch.float64)
    )
    assert value.item() == pytest.approx((abs(steepness) - 1) ** 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, line.steepness)
    expected = 2 * (abs(steepness) - 1) * math.copysign(1, steepness) if steepness else 0.0
    assert gradient.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_penalty_is_taken_between_student_and_teacher(share):
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return (x**2).sum((1, 2, 3)) / 2

    value = gradient_penalty(watched, student, teacher, torch.full((2,), share, dtype=torch.float64))
    between = share * teacher + (1 - share) * student
    torch.testing.assert_close(seen[0], between)
    assert value.item() == pytest.approx(
        (between.flatten(1).norm(dim=1) - 1).square().mean().item(), rel=1e-12
    )


def test_objective_trains_the_discriminator_alone_and_has_the_right_derivative():
    network = small().eval()  # training mode moves on with every call
    student, teacher = maps(2, 3, 16, 16).requires_grad_(), maps(2, 3, 16, 16, seed=1)
    images, shares = maps(2, 3, 16, 16, seed=2), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def objective() -> Tensor:
        return discriminator_objective(network, student, teacher, images, shares)

    objective().backward()
    assert student.grad is None
    for name, parameter in network.named_parameters():
        if name == "last.bias":  # moves both means alike
            assert parameter.grad.abs().max() < 1e-12
            continue
        place = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
        if parameter.grad[place] == 0:  # before attention's share is more than 0
            continue
        with torch.no_grad():
            parameter[place] += 1e-6
        after = objective().item()
        with torch.no_grad():
            parameter[place] -= 2e-6
        before = objective().item()
        with torch.no_grad():
            parameter[place] += 1e-6
        if name.startswith("convs") and name.endswith("weight"):
            continue  # u is a constant of the derivative, but follows the weight only in training mode
        assert (after - before) / 2e-6 == pytest.approx(parameter.grad[place].item(), rel=1e-4), name


def test_training_tells_student_from_teacher_and_the_student_s_term_brings_them_nearer():
    network = small(width=8).train()
    teacher, images = maps(16, 3, 16, 16, seed=1), maps(16, 3, 16, 16, seed=2)
    student = (0.3 * maps(16, 3, 16, 16, seed=3)).requires_grad_()
    optimizer = torch.optim.Adam(network.parameters(), 3e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        shares = torch.rand(16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        discriminator_objective(network, student, teacher, images, shares).backward()
        optimizer.step()
    network.eval()
    gap = holistic_loss(network(student, images), network(teacher, images))
    assert gap < -0.5
    (slope,) = torch.autograd.grad(-gap, student)  # the student's own term of the total loss
    moved = (student - 2.0 * slope * len(student)).detach()
    assert holistic_loss(network(moved, images), network(teacher, images)) > gap


def test_members_of_discriminators_are_those_alone():
    alone = [small(seed) for seed in range(3)]
    together = Members(alone)
    stacked = torch.stack([maps(4, 3, 16, 16, seed=seed) for seed in range(3)])
    for _ in range(2):  # the second time with what power iteration left
        answers = together(stacked, stacked)
        for one, network, batch in zip(answers, alone, stacked, strict=True):
            torch.testing.assert_close(one, network(batch, batch))


def test_no_answer_waits_for_a_second_pass():
    """A second derivative of an earlier pass is right after later passes: no buffer is changed in place."""
    network = small()
    first, second = maps(2, 3, 16, 16), maps(2, 3, 16, 16, seed=1)
    answers = [network(x, x) for x in (first, second)]
    sum(answer.sum() for answer in answers).backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all() for parameter in network.parameters()
    )


# Errors

X, Y = maps(2, 3, 4, 4), maps(2, 5, 4, 4)
BAD_CALLS = {
    "teacher: expected the shape of student \\(2, 3, 4, 4\\), got \\(2, 5, 4, 4\\)": lambda: pixelwise_loss(
        X, Y
    ),
    "student: expected a floating tensor .* shape \\(3, 4, 4\\)": lambda: pixelwise_loss(X[0], X[0]),
    "variant: expected one of .* got 'kl'": lambda: pixelwise_loss(X, X, variant="kl"),
    "variant: expected one of .* got 'max'": lambda: pairwise_loss(X, Y, variant="max"),
    "teacher: expected as many rows as student \\(2\\), got 1": lambda: pairwise_loss(X, Y[:1]),
    "alpha: expected an integer from 1 on, got 0": lambda: pairwise_loss(X, Y, alpha=0),
    "alpha: 10 nodes cannot be told .* near it 9 and 13": lambda: pairwise_loss(X, Y, alpha=10),
    "beta: expected a square number .* got 3": lambda: pairwise_loss(X, Y, beta=3),
    "beta: .* within 4x4, got 25": lambda: pairwise_loss(X, Y, beta=25),
    "beta: .* got \\(0, 2\\)": lambda: pairwise_loss(X, Y, beta=(0, 2)),
    "classes: expected an integer of at least 1, got 0": lambda: HolisticDiscriminator(0),
    "attention: expected 0 to 4 blocks, got 5": lambda: HolisticDiscriminator(3, attention=5),
    "maps: expected \\(batch, 3, h, w\\) of at least 16 pixels": lambda: small()(X, X),
    "images: expected 3 channels, got None": lambda: small()(maps(2, 3, 16, 16)),
    "images: expected none": lambda: small(image_channels=None)(maps(2, 3, 16, 16), X),
    "images: expected \\(2, 3, h, w\\)": lambda: small()(maps(2, 3, 16, 16), maps(2, 1, 16, 16)),
    "student: expected floating answers": lambda: holistic_loss(torch.ones(2, 2), torch.ones(2)),
    "shares: expected \\(2,\\), got \\(3,\\)": lambda: gradient_penalty(Slope(1.0), X, X, torch.rand(3)),
    "penalty: expected a finite number above 0": lambda: discriminator_objective(
        small(), X, X, X, torch.rand(2), penalty=0.0
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()
