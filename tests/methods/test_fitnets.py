"""Hints against RepDistiller's numbers and a plain loop; the regressors; the schedule of the second stage."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.methods.fitnets import HintRegressor, hint_loss, teacher_weight
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hint_repdistiller.npz"


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The loss


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_mean_variant_equals_repdistiller(case):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected, expected_gradient = golden[f"{case}_loss"].item(), golden[f"{case}_grad_s"]
    value, gradient = value_and_gradient(lambda s: hint_loss(s, teacher, variant="mean"), student)
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)


def test_equals_a_plain_loop():
    student, teacher = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    total = 0.0
    for index in np.ndindex(2, 3, 4, 5):
        total += 0.5 * (teacher[index].item() - student[index].item()) ** 2
    assert hint_loss(student, teacher).item() == pytest.approx(total / 2, rel=1e-12)


def test_official_variant_equals_the_authors_reduction():
    # Theano's axes are (channels, rows, columns, batch): the sum over axis 1 is one over rows.
    student, teacher = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    s, t = (x.permute(1, 2, 3, 0).numpy() for x in (student, teacher))
    expected = (0.5 * (t - s) ** 2).sum(axis=1).mean()
    assert hint_loss(student, teacher, variant="official").item() == pytest.approx(expected, rel=1e-12)


@given(
    samples=st.integers(1, 4),
    channels=st.integers(1, 4),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_variants_differ_by_their_factors(samples, channels, height, width, seed):
    shape = samples, channels, height, width
    student, teacher = maps(*shape, seed=seed), maps(*shape, seed=seed + 1)
    ours = hint_loss(student, teacher).item()
    mean = hint_loss(student, teacher, variant="mean").item()
    assert mean == pytest.approx(2 * ours / (channels * height * width), rel=1e-12)
    official = hint_loss(student, teacher, variant="official").item()
    assert official == pytest.approx(ours / (channels * width), rel=1e-12)


@given(samples=st.integers(1, 4), values=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_invariances(samples, values, seed):
    student, teacher = maps(samples, values, seed=seed), maps(samples, values, seed=seed + 1)
    value = hint_loss(student, teacher).item()
    assert hint_loss(teacher, teacher).item() == 0
    rotation = torch.linalg.qr(maps(values, values, seed=seed + 2)).Q
    same = {
        "a common shift": (student + 3, teacher + 3),
        "a common rotation": (student @ rotation, teacher @ rotation),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "copies of the batch": (student.repeat(3, 1), teacher.repeat(3, 1)),
        "sides": (teacher, student),
        "more values equal on both sides": tuple(
            nn.functional.pad(x, (0, 2), value=1) for x in (student, teacher)
        ),
    }
    for name, (s, t) in same.items():
        assert hint_loss(s, t).item() == pytest.approx(value, rel=1e-9), name
    assert hint_loss(3 * student, 3 * teacher).item() == pytest.approx(9 * value, rel=1e-9)


@pytest.mark.parametrize("variant", [None, "mean", "official"])
def test_gradient_is_the_derivative(variant):
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, teacher, variant=variant), student)
    if variant is None:
        gradient = value_and_gradient(lambda s: hint_loss(s, teacher), student.detach())[1]
        torch.testing.assert_close(gradient, (student.detach() - teacher) / 2)


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    hint_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_half_precision_counts_in_single():
    # 300² is no number of half precision.
    student, teacher = torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()
    assert hint_loss(student, teacher).item() == 0.5 * 4 * 300**2
    student, teacher = maps(2, 3, 2, 2).bfloat16(), maps(2, 3, 2, 2, seed=1).bfloat16()
    exact = hint_loss(student.float(), teacher.float())
    torch.testing.assert_close(hint_loss(student, teacher), exact, rtol=0, atol=0)


def test_compile_without_breaks(unchecked, compiler):
    regressor = HintRegressor((3, 6, 6), (4, 4, 4))
    guided, hint = maps(2, 3, 6, 6).float(), maps(2, 4, 4, 4, seed=1).float()

    def loss(guided: Tensor) -> Tensor:
        return hint_loss(regressor(guided), hint)

    plain = value_and_gradient(loss, guided)
    compiled = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), guided)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(compiled[1], plain[1])


def test_vmap_over_students(unchecked):
    students, teachers = maps(3, 2, 4, 2, 2), maps(3, 2, 4, 2, 2, seed=1)
    for variant in (None, "mean", "official"):
        each = [hint_loss(s, t, variant=variant) for s, t in zip(students, teachers, strict=True)]
        mapped = torch.vmap(lambda s, t, v=variant: hint_loss(s, t, variant=v))(students, teachers)
        torch.testing.assert_close(mapped, torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    expected, expected_gradient = value_and_gradient(lambda s: hint_loss(s, teacher), student)
    on_device, teacher = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = hint_loss(on_device, teacher)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


@pytest.mark.parametrize(
    ("student", "teacher", "variant", "message"),
    [
        (maps(4), maps(4), None, r"student: expected a floating tensor \(batch, \.\.\.\)"),
        (maps(4, 2).long(), maps(4, 2), None, "student: .* got torch.int64"),
        (maps(4, 2), maps(0, 2), None, r"teacher: .* without an empty dimension, .* shape \(0, 2\)"),
        (maps(4, 2), maps(4, 3), None, r"teacher: expected the shape of student \(4, 2\), got \(4, 3\)"),
        (maps(4, 2), maps(4, 2), "official", r"student: expected a floating tensor \(batch, channels"),
        (maps(4, 2), maps(4, 2), "paper", "variant: expected one of .* got 'paper'"),
    ],
)
def test_errors_name_the_argument(unchecked, student, teacher, variant, message):
    with pytest.raises(ValueError, match=message):
        hint_loss(student, teacher, variant=variant)


def test_a_list_is_no_tensor(unchecked):
    with pytest.raises(TypeError, match="teacher: expected a tensor, got list"):
        hint_loss(maps(1, 1), [[1.0]])


# The regressor


@pytest.mark.parametrize("variant", [None, "repdistiller"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 4, 4), (5, 4, 4)),
        ((3, 7, 5), (2, 4, 5)),
        ((3, 8, 8), (5, 4, 4)),
        ((3, 8, 6), (5, 4, 3)),
        ((3, 8, 5), (5, 4, 3)),  # twice as high but not as wide
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_prediction_has_the_hint_s_shape(student, teacher, variant):
    regressor = HintRegressor(student, teacher, variant=variant)
    predicted = regressor(torch.randn(2, *student))
    assert predicted.shape == (2, *teacher)
    assert hint_loss(predicted, torch.zeros(2, *teacher)).isfinite()


def test_paper_s_regressor_is_one_convolution_and_the_hint_s_activation():
    regressor = HintRegressor((3, 7, 5), (2, 4, 5))
    assert regressor.conv.kernel_size == (7 - 4 + 1, 5 - 5 + 1)
    assert regressor.conv.padding == (0, 0)
    assert {name for name, _ in regressor.named_parameters()} == {"conv.weight", "conv.bias"}
    x = torch.randn(2, 3, 7, 5)
    expected = nn.functional.conv2d(x, regressor.conv.weight, regressor.conv.bias).relu()
    torch.testing.assert_close(regressor(x), expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", torch.relu), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid), (None, lambda x: x)],
)
def test_activation_is_the_hint_layer_s(name, function):
    regressor = HintRegressor((3, 4, 4), (5, 4, 4), activation=name)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(regressor(x), function(regressor.conv(x)))


def test_repdistiller_s_regressor_changes_the_size_by_strides():
    smaller = HintRegressor((3, 8, 8), (5, 4, 4), variant="repdistiller")
    assert (smaller.conv.kernel_size, smaller.conv.stride) == ((3, 3), (2, 2))
    larger = HintRegressor((3, 4, 4), (5, 8, 8), variant="repdistiller")
    assert isinstance(larger.conv, nn.ConvTranspose2d)
    assert larger(torch.randn(2, 3, 4, 4)).shape == (2, 5, 8, 8)
    for regressor in (smaller, larger, HintRegressor((3, 4, 4), (5, 4, 4), variant="repdistiller")):
        assert isinstance(regressor.bn, nn.BatchNorm2d)
        assert any(parameter is regressor.bn.weight for parameter in regressor.parameters())


@pytest.mark.parametrize("variant", [None, "repdistiller"])
def test_training_teaches_regressor_and_guided_layer(variant):
    torch.manual_seed(0)
    images = torch.randn(16, 1, 6, 6)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
    student = nn.Conv2d(1, 4, 3)
    regressor = HintRegressor((4, 4, 4), (6, 4, 4), variant=variant)
    optimizer = torch.optim.Adam([*student.parameters(), *regressor.parameters()], lr=0.02)
    before = student.weight.detach().clone()
    losses = []
    for _ in range(60):
        loss = hint_loss(regressor(student(images)), teacher(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert not torch.equal(student.weight, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 4, 4), (5, 6, 4)), "student: expected at least 6 x 4 positions, the hint's, got 4 x 4"),
        (((3, 4, 4), (5, 8, 8)), "student: expected at least 8 x 8 positions"),
        (((3, 4), (5, 4, 4)), r"student: expected \(channels, height, width\), .* got \(3, 4\)"),
        (((3, 4, 4), (0, 4, 4)), r"teacher: expected \(channels, height, width\), .* got \(0, 4, 4\)"),
        (((3, 4.0, 4), (5, 4, 4)), r"student: expected .* got \(3, 4\.0, 4\)"),
        (((3, 4, 4), (5, 4, 4), "gelu"), "activation: expected one of .* got 'gelu'"),
        (((3, 4, 4), (5, 4, 4), "relu", "mdistiller"), "variant: expected one of .* got 'mdistiller'"),
    ],
)
def test_regressor_s_errors_name_the_argument(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        HintRegressor(*arguments[:2], **dict(zip(("activation", "variant"), arguments[2:], strict=False)))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 3, 5, 4), (3, 4, 4)])
def test_other_maps_than_it_was_made_for_are_refused(unchecked, shape):
    with pytest.raises(ValueError, match="maps: expected"):
        HintRegressor((3, 4, 4), (5, 4, 4))(torch.randn(*shape))


# The second stage


def test_teacher_weight_falls_in_a_straight_line():
    assert [teacher_weight(share) for share in (0, 0.25, 0.5, 1)] == [4, 3.25, 2.5, 1]
    assert teacher_weight(0.5, start=2, end=8) == 5


def test_teacher_weight_is_the_authors_schedule():
    # Their extension takes one step an epoch from `begin` on, so the line starts one epoch before.
    weight, begin, saturate, final = 4.0, 5, 400, 1.0
    step = (weight - final) / (saturate - begin + 1)
    for epoch in range(begin - 1, saturate + 1):
        expected = weight - step * (epoch - begin + 1)
        progress = (epoch - begin + 1) / (saturate - begin + 1)
        assert teacher_weight(progress) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"progress": 1.01}, ValueError, "progress: expected a number from 0 to 1, got 1.01"),
        ({"progress": math.nan}, ValueError, "progress: expected a number from 0 to 1, got nan"),
        ({"progress": True}, ValueError, "progress: expected a number from 0 to 1, got True"),
        ({"progress": 0.5, "start": 0}, ValueError, "start: expected a finite number above 0, got 0"),
        ({"progress": 0.5, "end": -1.0}, ValueError, "end: expected a finite number above 0, got -1.0"),
        ({"progress": 0.5, "end": None}, TypeError, "end: expected a number, got NoneType"),
    ],
)
def test_teacher_weight_s_errors(unchecked, arguments, error, message):
    with pytest.raises(error, match=message):
        teacher_weight(**arguments)
