"""Attention transfer against the authors' numbers, plain loops, closed forms and what its definition promises."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.at import at_loss, attention_map, gradient_at_loss, input_gradients
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MAPS = [(2.0, "sum"), (1.0, "sum"), (3.0, "sum"), (0.5, "sum"), (4.0, "max"), (2.0, "max"), (1.0, "max")]
VARIANTS = (None, "official")


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The authors' numbers


@pytest.mark.parametrize("case", range(3))
def test_official_variant_equals_the_authors_loss(case):
    with np.load(GOLDEN / "at_official.npz", allow_pickle=False) as arrays:
        student, teacher, loss, expected = (
            torch.from_numpy(arrays[f"c{case}_{field}"]) for field in ("s", "t", "loss", "grad_s")
        )
    value, gradient = value_and_gradient(lambda s: at_loss(s, teacher, variant="official"), student)
    assert value == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# Plain loops and closed forms


def loop_map(features: Tensor, power: float, reduction: str) -> list[list[float]]:
    rows = []
    for sample in features.tolist():
        cells = [
            [abs(channel[y][x]) ** power for channel in sample]
            for y in range(len(sample[0]))
            for x in range(len(sample[0][0]))
        ]
        values = [sum(cell) if reduction == "sum" else max(cell) for cell in cells]
        norm = math.hypot(*values)
        rows.append([value / norm for value in values])
    return rows


@pytest.mark.parametrize(("power", "reduction"), MAPS)
def test_map_and_loss_equal_a_plain_loop(power, reduction):
    student, teacher = maps(3, 4, 2, 3), maps(3, 6, 2, 3, seed=1)
    options = {"power": power, "reduction": reduction}
    q_s, q_t = loop_map(student, power, reduction), loop_map(teacher, power, reduction)
    torch.testing.assert_close(attention_map(student, **options), torch.tensor(q_s, dtype=torch.float64))
    gaps = [math.dist(a, b) for a, b in zip(q_s, q_t, strict=True)]
    assert at_loss(student, teacher, **options).item() == pytest.approx(sum(gaps) / 3, rel=1e-12)
    official = at_loss(student, teacher, variant="official", **options).item()
    assert official == pytest.approx(sum(gap**2 for gap in gaps) / (3 * 6), rel=1e-12)


def test_known_maps():
    features = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # two channels, two positions
    torch.testing.assert_close(attention_map(features, power=1), torch.tensor([[0.6, 0.8]]))
    expected = torch.tensor([[9.0, 16.0]]) / math.hypot(9, 16)
    torch.testing.assert_close(attention_map(features), expected)
    torch.testing.assert_close(attention_map(features, reduction="max"), expected)
    cubes = torch.tensor([[27.0, 64.0]]) / math.hypot(27, 64)
    torch.testing.assert_close(attention_map(-features, power=3), cubes)


def test_maps_that_do_not_overlap_are_at_the_largest_distance():
    left, right = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, -5.0]]]])
    assert at_loss(left, right).item() == pytest.approx(math.sqrt(2), rel=1e-6)
    assert at_loss(left, right, variant="official").item() == pytest.approx(1.0, rel=1e-6)


def test_no_factor_turns_one_variant_into_the_other():
    student, teacher = maps(5, 4, 3, 3), maps(5, 4, 3, 3, seed=1)
    ratios = [
        at_loss(s, teacher, variant="official").item() / at_loss(s, teacher).item()
        for s in (student, teacher + 0.1 * student)
    ]
    assert ratios[0] > 5 * ratios[1]
    # For a single sample the relation is a square.
    one = at_loss(student[:1], teacher[:1]).item()
    assert at_loss(student[:1], teacher[:1], variant="official").item() == pytest.approx(one**2 / 9)


def test_a_larger_map_is_pooled_to_the_smaller_in_each_dimension():
    student, teacher = maps(2, 3, 6, 2), maps(2, 5, 3, 4, seed=1)
    pooled_student = student.view(2, 3, 3, 2, 2).mean(3)
    pooled_teacher = teacher.view(2, 5, 3, 2, 2).mean(4)
    expected = at_loss(pooled_student, pooled_teacher).item()
    assert at_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert at_loss(pooled_student, teacher).item() == pytest.approx(expected, rel=1e-12)


# Invariances


@given(
    batch=st.integers(1, 4), channels=st.integers(1, 5), other=st.integers(1, 5),
    h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_invariances(batch, channels, other, h, w, seed):
    student, teacher = maps(batch, channels, h, w, seed=seed), maps(batch, other, h, w, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    shuffled, samples = (torch.randperm(n, generator=generator) for n in (channels, batch))
    for power, reduction in ((2.0, "sum"), (1.0, "max"), (3.0, "sum")):
        options = {"power": power, "reduction": reduction}
        value = at_loss(student, teacher, **options).item()
        assert 0 <= value <= math.sqrt(2) + 1e-12
        same = {
            "scale of a sample": (3.7 * student, 0.2 * teacher),
            "sign": (-student, teacher),
            "order of the channels": (student[:, shuffled], teacher),
            "order of the samples": (student[samples], teacher[samples]),
            "channels twice": (student.repeat(1, 2, 1, 1), teacher),
            "a flip of both": (student.flip(3), teacher.flip(3)),
        }
        for name, (s, t) in same.items():
            assert at_loss(s, t, **options).item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_the_scale_of_one_channel_matters():
    student, teacher = maps(2, 4, 3, 3), maps(2, 4, 3, 3, seed=1)
    louder = student * torch.tensor([10.0, 1, 1, 1]).view(4, 1, 1)
    assert abs(at_loss(louder, teacher) - at_loss(student, teacher)) > 0.01


# Gradients and corner cases


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("power", "reduction"), MAPS)
def test_gradient_is_the_derivative(power, reduction, variant):
    student, teacher = maps(2, 3, 4, 2).requires_grad_(), maps(2, 4, 2, 3, seed=1)

    def loss(s: Tensor) -> Tensor:
        return at_loss(s, teacher, power=power, reduction=reduction, variant=variant)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_the_teacher_and_inputs_stay(variant):
    student, teacher = maps(2, 3, 4, 4).requires_grad_(), maps(2, 5, 2, 2, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    at_loss(student, teacher, variant=variant).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


AWKWARD = {
    "zero": lambda x: 0 * x,
    "a zero sample": lambda x: x * (torch.arange(len(x)) > 0).view(-1, 1, 1, 1),
    "zero channels": lambda x: x * (torch.arange(x.shape[1]) > 1).view(-1, 1, 1),
    "half the positions zero": torch.relu,
    "1e-12": lambda x: 1e-12 * x,
    "1e12": lambda x: 1e12 * x,
    "mixed norms": lambda x: x * torch.logspace(-12, 12, len(x)).view(-1, 1, 1, 1),
    "one sample": lambda x: x[:1],
    "one channel": lambda x: x[:, :1],
    "one position": lambda x: x[:, :, :1, :1],
}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", AWKWARD)
def test_value_and_gradient_stay_finite_in_float32(name, side):
    student, teacher = maps(4, 3, 2, 2, dtype=torch.float32), maps(4, 5, 2, 2, seed=1, dtype=torch.float32)
    if side != "teacher" or name == "one sample":
        student = AWKWARD[name](student)
    if side != "student" or name == "one sample":
        teacher = AWKWARD[name](teacher)
    for (power, reduction), variant in itertools.product([*MAPS, (8.0, "sum")], VARIANTS):
        options = {"power": power, "reduction": reduction, "variant": variant}
        value, gradient = value_and_gradient(lambda s, o=options: at_loss(s, teacher, **o), student)
        assert math.isfinite(value), options
        assert gradient.isfinite().all(), options


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0, 8.0])
def test_the_scale_of_the_features_changes_nothing(power, scale):
    student, teacher = maps(3, 4, 3, 3, dtype=torch.float32), maps(3, 6, 3, 3, seed=1, dtype=torch.float32)
    value, gradient = value_and_gradient(lambda s: at_loss(s, teacher, power=power), student)
    other, scaled = value_and_gradient(lambda s: at_loss(s, teacher, power=power), scale * student)
    assert other == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(scaled * scale, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("power", "reduction"), MAPS)
def test_identical_maps_have_neither_loss_nor_gradient(power, reduction, variant):
    student = maps(2, 3, 3, 3)
    value, gradient = value_and_gradient(
        lambda s: at_loss(s, student, power=power, reduction=reduction, variant=variant), student
    )
    assert value == 0
    assert gradient.abs().max() == 0


# Gradient-based


class Small(nn.Module):
    """A network that can be differentiated three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        self.last = nn.Linear(12, 4, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(images)).flatten(1))


def test_input_gradient_is_each_samples_own():
    network, images, labels = Small(), maps(3, 2, 4, 4), torch.tensor([0, 3, 1])
    images.requires_grad_()
    found = input_gradients(network(images), images, labels, create_graph=False)
    for i in range(3):
        image = images[i : i + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(F.cross_entropy(network(image), labels[i : i + 1]), image)
        torch.testing.assert_close(found[i : i + 1], own)
    assert not found.requires_grad


def test_input_gradient_has_the_closed_form_of_a_linear_network():
    weight, images = maps(4, 12), maps(3, 3, 2, 2, seed=1).requires_grad_()
    logits, labels = images.flatten(1) @ weight.T, torch.tensor([2, 0, 1])
    expected = (logits.softmax(1) - F.one_hot(labels, 4)) @ weight
    found = input_gradients(logits, images, labels.int())
    torch.testing.assert_close(found.flatten(1), expected)


def test_input_gradients_of_members_are_those_of_each():
    weights, images = maps(2, 4, 12), maps(2, 3, 3, 2, 2, seed=1).requires_grad_()
    labels = torch.tensor([[2, 0, 1], [3, 3, 0]])
    found = input_gradients(torch.einsum("mkd,mbd->mbk", weights, images.flatten(2)), images, labels)
    for i in range(2):
        own = images[i].detach().requires_grad_()
        torch.testing.assert_close(
            found[i], input_gradients(own.flatten(1) @ weights[i].T, own, labels[i], create_graph=False)
        )


def test_gradient_loss_equals_a_plain_loop():
    student, teacher = maps(3, 2, 2, 3), maps(3, 2, 2, 3, seed=1)
    expected = sum(
        math.dist(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(student, teacher, strict=True)
    )
    assert gradient_at_loss(student, teacher).item() == pytest.approx(expected / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: gradient_at_loss(s, teacher), (student.requires_grad_(),))


def test_gradient_loss_trains_through_the_input_gradient():
    # First and second derivative with respect to a weight of the network, which needs a third of the network.
    network, images, labels = Small(), maps(2, 2, 4, 4), torch.tensor([1, 2])
    teacher = maps(2, 2, 4, 4, seed=1)
    bias = network.last.weight.detach().clone().requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        inputs = images.clone().requires_grad_()
        logits = torch.tanh(network.first(inputs)).flatten(1) @ weight.T
        return gradient_at_loss(input_gradients(logits, inputs, labels), teacher)

    assert torch.autograd.gradcheck(loss, (bias,))
    assert torch.autograd.gradgradcheck(loss, (bias,))


def test_equal_input_gradients_stop_the_training():
    network, images, labels = Small(), maps(2, 2, 4, 4).requires_grad_(), torch.tensor([1, 2])
    student = input_gradients(network(images), images, labels)
    teacher = student.detach().clone().requires_grad_()
    loss = gradient_at_loss(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert all(
        parameter.grad.abs().max() == 0 for parameter in network.parameters() if parameter.grad is not None
    )
    assert teacher.grad is None


# Where a loss must work


LOSSES = {
    "ours": at_loss,
    "official": lambda s, t: at_loss(s, t, variant="official"),
    "p4 max": lambda s, t: at_loss(s, t, power=4, reduction="max"),
    "gradient": gradient_at_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_equals_a_loop(unchecked, name):
    loss, shape = LOSSES[name], (3, 2, 4, 4, 4) if name != "gradient" else (3, 2, 5, 2, 2)
    students, teachers = maps(*shape), maps(3, 2, 5, 2, 2, seed=1)
    assert_vmap_equals_a_loop(loss, students, teachers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_compared_in_float32(name, dtype):
    student, teacher = maps(2, 3, 4, 4).to(dtype), maps(2, 3, 4, 4, seed=1).to(dtype)
    exact = LOSSES[name](student.float(), teacher.float())
    assert exact.dtype == torch.float32
    torch.testing.assert_close(LOSSES[name](student, teacher), exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](student, teacher), exact, rtol=0, atol=0)
        torch.testing.assert_close(LOSSES[name](student.float(), teacher.float()), exact, rtol=0, atol=0)


def test_dtypes_may_differ():
    student, teacher = maps(2, 3, 4, 4).to(torch.bfloat16), maps(2, 3, 4, 4, seed=1)
    assert at_loss(student, teacher).item() == at_loss(student.double(), teacher).item()


@pytest.mark.parametrize(
    "name", ["ours", *(pytest.param(name, marks=pytest.mark.slow) for name in LOSSES if name != "ours")]
)
def test_traces_to_one_graph(unchecked, compiler, name):
    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for batch in (6, 4):  # the second size is traced with a symbolic one
        student, teacher = maps(batch, 3, 4, 4), maps(batch, 3, 4, 4, seed=1)
        value, gradient = value_and_gradient(lambda s, t=teacher: loss(s, t), student)
        traced, traced_gradient = value_and_gradient(lambda s, t=teacher: compiled(s, t), student)
        assert traced == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(traced_gradient, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_to_machine_code(unchecked, compiler, name):
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    student, teacher = maps(4, 3, 4, 4), maps(4, 3, 4, 4, seed=1)
    student[0], student[1] = 0, teacher[1]
    value, gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher), student)
    fast, fast_gradient = value_and_gradient(lambda s: compiled(s, teacher), student)
    assert fast == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_cuda_equals_cpu_without_waiting_for_the_device(unchecked, name):
    student, teacher = maps(4, 3, 4, 4), maps(4, 3, 4, 4, seed=1)
    value, gradient = value_and_gradient(lambda s: LOSSES[name](s, teacher), student)
    on_device = student.cuda().requires_grad_()
    guide = teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = LOSSES[name](on_device, guide)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), gradient)


# Errors

X, Y = maps(2, 3, 4, 4), maps(2, 5, 4, 4)
LOGITS, LABELS = maps(2, 3), torch.tensor([0, 1])
IMAGES = maps(2, 3, 4, 4).requires_grad_()
BAD_CALLS = {
    "student: expected a floating tensor .* shape \\(3, 4, 4\\)": lambda: at_loss(X[0], Y),
    "student: .* got torch.int64": lambda: at_loss(X.long(), Y),
    "teacher: .* \\(2, 0, 4, 4\\)": lambda: at_loss(X, Y[:, :0]),
    "teacher: expected as many rows as student \\(2\\), got 1": lambda: at_loss(X, Y[:1]),
    "features: expected a floating tensor": lambda: attention_map(X[0]),
    "power: expected a finite number above 0, got 0": lambda: at_loss(X, Y, power=0),
    "power: .* got inf": lambda: attention_map(X, power=math.inf),
    "reduction: expected one of .* got 'mean'": lambda: at_loss(X, Y, reduction="mean"),
    "variant: expected one of .* got 'paper'": lambda: at_loss(X, Y, variant="paper"),
    "teacher: expected the shape of student \\(2, 3, 4, 4\\), got \\(2, 5, 4, 4\\)": lambda: gradient_at_loss(
        X, Y
    ),
    "student: expected a floating tensor": lambda: gradient_at_loss(X[0], X),
    "logits: expected a floating tensor": lambda: input_gradients(LABELS, IMAGES, LABELS),
    "labels: expected class indices of shape \\(2,\\), got torch.int64 of shape \\(1,\\)": lambda: (
        input_gradients(LOGITS, IMAGES, LABELS[:1])
    ),
    "labels: expected class indices .* got torch.float64": lambda: input_gradients(
        LOGITS, IMAGES, LABELS.double()
    ),
    "images: expected a shape that starts with \\(2,\\), got \\(1, 3, 4, 4\\)": lambda: input_gradients(
        LOGITS, IMAGES[:1], LABELS
    ),
    "images: expected requires_grad=True": lambda: input_gradients(LOGITS, X, LABELS),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_wrong_types_are_type_errors(unchecked):
    with pytest.raises(TypeError, match="student: expected a tensor, got ndarray"):
        at_loss(X.numpy(), Y)
    with pytest.raises(TypeError, match="power: expected a number, got str"):
        at_loss(X, Y, power="two")


def test_shape_annotations_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        at_loss(X, Y[:1])
