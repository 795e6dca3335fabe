"""Regression of logits against golden vectors, a plain loop and its relation to distillation; the factorised layer."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.divergences import softened_kl
from kdrefs.methods.logit_regression import (
    FactorizedLinear,
    LogitStatistics,
    logit_regression_loss,
    logit_statistics,
)
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


# The loss


@pytest.mark.parametrize(
    ("file", "case", "prefix", "variant"),
    [
        ("formula_logit_regression.npz", "c0", "half_sum_c0", None),
        ("logits_kdzoo.npz", "c0", "c0", "mean"),
        ("logits_kdzoo.npz", "c1", "c1", "mean"),
        ("logits_kdzoo.npz", "c2", "c2", "mean"),
    ],
)
def test_equals_golden_vectors(file, case, prefix, variant):
    with np.load(GOLDEN / file, allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected, expected_gradient = golden[f"{prefix}_loss"].item(), golden[f"{prefix}_grad_s"]
    value, gradient = value_and_gradient(
        lambda s: logit_regression_loss(s, teacher, variant=variant), student
    )
    assert value == pytest.approx(expected, rel=1e-9)
    rtol = 1e-6 if file.startswith("formula") else 1e-9  # those gradients are finite differences
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
def test_equals_a_plain_loop(standardise):
    student, teacher = logits(4, 3), 5 * logits(4, 3, seed=1) + 2
    statistics = logit_statistics(teacher) if standardise else None
    total = 0.0
    for k in range(3):
        column = teacher[:, k].tolist()
        mean, deviation = 0.0, 1.0
        if standardise:
            mean = sum(column) / 4
            deviation = math.sqrt(sum((t - mean) ** 2 for t in column) / 4)
        total += sum(
            (s - (t - mean) / deviation) ** 2 for s, t in zip(student[:, k].tolist(), column, strict=True)
        )
    value = logit_regression_loss(student, teacher, statistics=statistics).item()
    assert value == pytest.approx(total / 2 / 4, rel=1e-12)


@given(samples=st.integers(1, 5), classes=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_invariances_and_the_factor_of_the_variant(samples, classes, seed):
    student, teacher = logits(samples, classes, seed=seed), logits(samples, classes, seed=seed + 1)
    value = logit_regression_loss(student, teacher).item()
    assert logit_regression_loss(teacher, teacher).item() == 0
    mean = logit_regression_loss(student, teacher, variant="mean").item()
    assert mean == pytest.approx(2 * value / classes, rel=1e-12)
    same = {
        "a common shift": (student + 3, teacher + 3),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of classes": (student.flip(1), teacher.flip(1)),
        "copies of the batch": (student.repeat(3, 1), teacher.repeat(3, 1)),
        "sides": (teacher, student),
    }
    for name, (s, t) in same.items():
        assert logit_regression_loss(s, t).item() == pytest.approx(value, rel=1e-9), name
    divided = logit_regression_loss(student / 4, teacher / 4).item()  # what a temperature would do
    assert divided == pytest.approx(value / 16, rel=1e-9)


def test_distillation_tends_to_it_for_centred_logits_only():
    student, teacher = logits(8, 6) + 1.5, logits(8, 6, seed=1)
    limit = logit_regression_loss(centred(student), centred(teacher)).item()
    errors = [
        abs(6 * softened_kl(student, teacher, temperature).item() - limit) for temperature in (10, 100, 1000)
    ]
    assert errors[1] < errors[0] / 8  # falls as 1 / T
    assert errors[2] < 1e-3 * limit
    offset = 6 * 0.5 * (student.mean(1) - teacher.mean(1)).square().mean().item()
    assert logit_regression_loss(student, teacher).item() == pytest.approx(limit + offset, rel=1e-12)


def test_gradient_is_the_derivative():
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    statistics = logit_statistics(teacher)
    for options in ({}, {"variant": "mean"}, {"statistics": statistics}):
        assert torch.autograd.gradcheck(lambda s, o=options: logit_regression_loss(s, teacher, **o), student)
    _, gradient = value_and_gradient(lambda s: logit_regression_loss(s, teacher), student.detach())
    torch.testing.assert_close(gradient, (student.detach() - teacher) / 3)


@pytest.mark.parametrize("rows", [1, 2])
def test_corners(rows):
    for student in (torch.zeros(rows, 3), torch.ones(rows, 3), torch.full((rows, 3), 1e15)):
        value, gradient = value_and_gradient(
            lambda s: logit_regression_loss(s, torch.zeros(rows, 3)), student
        )
        assert math.isfinite(value)
        assert gradient.isfinite().all()


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    logit_regression_loss(student, teacher, statistics=logit_statistics(teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_half_precision_counts_in_single():
    student, teacher = torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()
    assert logit_regression_loss(student, teacher).item() == 0.5 * 4 * 300**2  # no number of half precision
    student, teacher = logits(4, 6).bfloat16(), logits(4, 6, seed=1).bfloat16()
    exact = logit_regression_loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logit_regression_loss(student, teacher), exact, rtol=0, atol=0)


def test_compile_without_breaks(unchecked, compiler):
    student, teacher = logits(4, 6).float(), logits(4, 6, seed=1).float()
    layer = FactorizedLinear(6, 6, 2)
    statistics = logit_statistics(teacher)

    def loss(inputs: Tensor) -> Tensor:
        return logit_regression_loss(layer(inputs), teacher, statistics=statistics)

    plain = value_and_gradient(loss, student)
    compiled = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), student)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(compiled[1], plain[1])


def test_vmap_over_students(unchecked):
    students, teachers = logits(3, 4, 6), logits(3, 4, 6, seed=1)
    for variant in (None, "mean"):
        assert_vmap_equals_a_loop(
            lambda s, t, v=variant: logit_regression_loss(s, t, variant=v), students, teachers
        )
    each = [logit_statistics(t) for t in teachers]
    stacked = LogitStatistics(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    mapped = torch.vmap(lambda s, t, m: logit_regression_loss(s, t, statistics=m))(
        students, teachers, stacked
    )
    looped = [
        logit_regression_loss(s, t, statistics=m) for s, t, m in zip(students, teachers, each, strict=True)
    ]
    torch.testing.assert_close(mapped, torch.stack(looped))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    expected, expected_gradient = value_and_gradient(lambda s: logit_regression_loss(s, teacher), student)
    on_device, teacher = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = logit_regression_loss(on_device, teacher, statistics=None)
        value.backward()
        logit_regression_loss(on_device, teacher, statistics=logit_statistics(teacher))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


def test_statistics_standardise_and_restore():
    teacher = 7 * logits(50, 4) + torch.arange(4)
    statistics = logit_statistics(teacher)
    scaled = statistics.standardised(teacher)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.square().mean(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(statistics.restored(scaled), teacher)
    assert logit_regression_loss(scaled, teacher, statistics=statistics).item() == pytest.approx(0, abs=1e-24)
    assert logit_statistics(teacher.half()).mean.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3])
def test_a_logit_that_never_changes_is_left_on_its_scale(rows):
    teacher = torch.full((rows, 2), 5.0)
    statistics = logit_statistics(teacher)
    assert statistics.std.tolist() == [1, 1]
    assert logit_regression_loss(torch.ones(rows, 2), teacher, statistics=statistics).item() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": logits(4)}, r"student: expected a floating tensor \(batch, features\)"),
        ({"teacher": logits(4, 6).long()}, "teacher: expected a floating tensor"),
        ({"teacher": logits(3, 6)}, r"teacher: expected as many rows as student \(4\), got 3"),
        ({"teacher": logits(4, 5)}, r"teacher: expected the shape of student \(4, 6\), got \(4, 5\)"),
        ({"variant": "official"}, r"variant: expected one of \['None', 'mean'\], got 'official'"),
        (
            {"statistics": LogitStatistics(torch.zeros(6), torch.ones(5))},
            r"statistics: expected a std of shape \(6,\), got \(5,\)",
        ),
    ],
)
def test_errors_name_the_argument(unchecked, changes, message):
    arguments = {"student": logits(4, 6), "teacher": logits(4, 6, seed=1)} | changes
    with pytest.raises(ValueError, match=message):
        logit_regression_loss(**arguments)


# The factorised layer


@given(inputs=st.integers(1, 6), outputs=st.integers(1, 6), rank=st.integers(1, 8), bias=st.booleans())
def test_the_product_is_the_layer(inputs, outputs, rank, bias):
    layer = FactorizedLinear(inputs, outputs, rank, bias=bias).double()
    x = logits(5, inputs)
    whole = layer.multiplied_out()
    torch.testing.assert_close(whole(x), layer(x))
    torch.testing.assert_close(whole.weight, layer.weight)
    assert layer.weight.shape == (outputs, inputs)
    assert torch.linalg.matrix_rank(layer.weight.detach()) <= min(rank, inputs, outputs)
    assert layer.weight_count == rank * (inputs + outputs)
    assert sum(p.numel() for p in layer.parameters()) == layer.weight_count + bias * outputs
    assert (layer.weight_count < inputs * outputs) == (rank < inputs * outputs / (inputs + outputs))


@pytest.mark.parametrize("rank", [8, 64, 512])
def test_outputs_start_with_the_variance_of_a_linear_layer(rank):
    x = torch.randn(200, 300)
    expected = torch.stack([nn.Linear(300, 400, bias=False)(x).var() for _ in range(20)]).mean()
    found = torch.stack([FactorizedLinear(300, 400, rank, bias=False)(x).var() for _ in range(20)]).mean()
    assert expected.item() == pytest.approx(1 / 3, rel=0.03)
    assert found.item() == pytest.approx(expected.item(), rel=0.1)


def test_both_factors_are_trained_and_the_product_is_differentiable():
    layer = FactorizedLinear(5, 7, 2)
    layer(torch.randn(3, 4, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert layer.reduce.bias is None
    layer.zero_grad()
    layer.weight.square().sum().backward()
    assert layer.reduce.weight.grad.abs().sum() > 0
    assert "rank=2" in repr(layer)
    assert not layer.multiplied_out().weight.grad_fn


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 3, 2), "in_features: expected a positive integer, got 0"),
        ((3, True, 2), "out_features: expected a positive integer, got True"),
        ((3, 3, 1.5), "rank: expected a positive integer, got 1.5"),
    ],
)
def test_sizes_are_checked(unchecked, sizes, message):
    with pytest.raises(ValueError, match=message):
        FactorizedLinear(*sizes)


def test_inputs_are_checked(unchecked):
    with pytest.raises(ValueError, match=r"inputs: expected \(\.\.\., 3\), got \(2, 4\)"):
        FactorizedLinear(3, 3, 1)(torch.zeros(2, 4))
