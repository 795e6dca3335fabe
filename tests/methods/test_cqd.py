"""CQD against a plain loop, its relation to distillation, and the corners of its arguments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdrefs.data import Augment, Batches
from kdrefs.methods.cqd import cqd_loss
from kdrefs.methods.kd import kd_loss
from tests.methods.losses import value_and_gradient

LABELS = torch.tensor([2, 0, 5, 1])


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: float, first: float, second: float
) -> float:
    """Labels' cross-entropy and the teacher's at temperatures ``first`` (teacher) and ``second``."""
    total = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        total += math.log(sum(map(math.exp, s))) - s[label]
        p = [math.exp(x / first) for x in t]
        q = [math.exp(x / second) for x in s]
        total -= weight * sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("first", "second"), [(10.0, 10.0), (1.0, 1.0), (4.0, 2.0)])
@pytest.mark.parametrize("weight", [200, 50.0, 0.5])
def test_equals_a_plain_loop(weight, first, second):
    student, teacher = logits(4, 6), 3 * logits(4, 6, seed=1)
    options = {"weight": weight, "temperature": second}
    if first != second:
        options["teacher_temperature"] = first
    value = cqd_loss(student, teacher, LABELS, **options).item()
    assert value == pytest.approx(loop(student, teacher, LABELS, weight, first, second), rel=1e-12)
    alone = cqd_loss(student, teacher, **options).item()
    assert alone == pytest.approx(value - F.cross_entropy(student, LABELS).item(), rel=1e-9)


def test_defaults_are_the_authors():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    given = cqd_loss(student, teacher, LABELS, weight=200, temperature=10, teacher_temperature=10)
    assert cqd_loss(student, teacher, LABELS).item() == given.item()


@given(weight=st.floats(0.1, 300), temperature=st.floats(0.5, 20), seed=st.integers(0, 2**16))
def test_gradient_is_that_of_distillation_with_another_weight(weight, temperature, seed):
    student, teacher = logits(4, 6, seed=seed), logits(4, 6, seed=seed + 1)
    _, ours = value_and_gradient(
        lambda s: cqd_loss(s, teacher, LABELS, weight=weight, temperature=temperature), student
    )
    share = weight / temperature**2
    _, theirs = value_and_gradient(
        lambda s: kd_loss(s, teacher, LABELS, temperature=temperature, alpha=share / (1 + share)), student
    )
    torch.testing.assert_close(ours, (1 + share) * theirs, rtol=1e-9, atol=1e-12)


def test_logits_variant_is_the_commented_line_of_the_authors():
    student, teacher = logits(4, 6), 3 * logits(4, 6, seed=1)
    size = sum(sum(x * x for x in row) for row in teacher.tolist()) / 4
    gap = sum(
        (a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    value, gradient = value_and_gradient(lambda s: cqd_loss(s, teacher, weight=3, variant="logits"), student)
    assert value == pytest.approx(3 * gap / (2 * size) / 4, rel=1e-12)
    torch.testing.assert_close(gradient, 3 * (student - teacher) / size / 4)


@pytest.mark.parametrize("variant", [None, "logits"])
def test_gradient_is_the_derivative(variant):
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1)
    for options in ({}, {"temperature": 2.0, "teacher_temperature": 5.0}):
        assert torch.autograd.gradcheck(
            lambda s, o=options: cqd_loss(s, teacher, LABELS, variant=variant, weight=2, **o), student
        )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("variant", [None, "logits"])
def test_corners_are_finite(rows, variant):
    for scale in (0.0, 1.0, 1e4):
        student = scale * torch.ones(rows, 3)
        student[:, 0] *= -1
        value, gradient = value_and_gradient(
            lambda s: cqd_loss(s, torch.zeros(rows, 3), torch.zeros(rows).long(), variant=variant), student
        )
        assert math.isfinite(value)
        assert gradient.isfinite().all()


@given(samples=st.integers(1, 5), classes=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_invariances(samples, classes, seed):
    student, teacher = logits(samples, classes, seed=seed), logits(samples, classes, seed=seed + 1)
    value = cqd_loss(student, teacher).item()
    same = {
        "a constant a sample": (student + logits(samples, 1, seed=seed + 2), teacher - 3),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of classes": (student.flip(1), teacher.flip(1)),
        "copies of the batch": (student.repeat(3, 1), teacher.repeat(3, 1)),
    }
    for name, (s, t) in same.items():
        assert cqd_loss(s, t).item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    # The teacher's own answers are the minimum, its entropy.
    assert cqd_loss(teacher, teacher).item() <= value + 1e-9


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    cqd_loss(student, teacher, LABELS).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_half_precision_counts_in_single():
    student, teacher = logits(4, 6).bfloat16(), logits(4, 6, seed=1).bfloat16()
    exact = cqd_loss(student.float(), teacher.float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cqd_loss(student, teacher, LABELS), exact, rtol=0, atol=0)


def test_compile_without_breaks(unchecked, compiler):
    student, teacher = logits(4, 6).float(), logits(4, 6, seed=1).float()
    plain = value_and_gradient(lambda s: cqd_loss(s, teacher, LABELS), student)
    compiled = torch.compile(cqd_loss, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(lambda s: compiled(s, teacher, LABELS), student)
    assert value == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(gradient, plain[1])


def test_vmap_over_students(unchecked):
    students, teachers = logits(3, 4, 6), logits(3, 4, 6, seed=1)
    labels = torch.stack([LABELS, LABELS.flip(0), LABELS])
    for variant in (None, "logits"):
        each = [cqd_loss(*one, variant=variant) for one in zip(students, teachers, labels, strict=True)]
        mapped = torch.vmap(lambda s, t, y, v=variant: cqd_loss(s, t, y, variant=v))(
            students, teachers, labels
        )
        torch.testing.assert_close(mapped, torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    expected = cqd_loss(student, teacher, LABELS).item()
    on_device, teacher, labels = student.cuda().requires_grad_(), teacher.cuda(), LABELS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = cqd_loss(on_device, teacher, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_both_qualities_move_alike():
    clean = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inverted = 255 - clean
    batches = Batches(
        inverted, batch_size=6, augment=Augment(flip=True, crop=0), views=2, renderings=[clean], seed=3
    )
    for epoch in range(3):
        (batch,) = batches.epoch(epoch)
        degraded, sharp = batch.views
        torch.testing.assert_close(degraded + sharp, torch.ones_like(sharp))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": logits(4)}, r"student: expected a floating tensor \(batch, features\)"),
        ({"teacher": logits(4, 5)}, r"teacher: expected the shape of student \(4, 6\), got \(4, 5\)"),
        ({"weight": 0}, "weight: expected a finite number above 0, got 0"),
        ({"temperature": math.nan}, "temperature: expected a finite number above 0, got nan"),
        ({"teacher_temperature": -1.0}, "teacher_temperature: expected a finite number above 0, got -1.0"),
        ({"labels": LABELS[:3]}, r"labels: expected as many rows as student \(4\), got 3"),
        ({"labels": LABELS > 1}, r"labels: expected class indices \(batch,\), got torch.bool"),
        ({"labels": logits(4)}, r"labels: expected class indices \(batch,\), got torch.float64"),
        ({"variant": "official"}, r"variant: expected one of \['None', 'logits'\], got 'official'"),
    ],
)
def test_errors_name_the_argument(unchecked, changes, message):
    arguments = {"student": logits(4, 6), "teacher": logits(4, 6, seed=1), "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        cqd_loss(**arguments)


def test_wrong_types_are_named(unchecked):
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        cqd_loss(logits(4, 6), logits(4, 6), [1, 2, 3, 4])
