"""KD against RepDistiller's numbers, a plain loop, its limits in temperature and the corners of its arguments."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.kd import kd_loss
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "kd_repdistiller.npz"
LABELS = torch.tensor([2, 0, 5, 1])


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)


# RepDistiller's numbers, a plain loop


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize("temperature", [1, 4, 20])
def test_equals_repdistiller(case, temperature):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected = golden[f"T{temperature}_{case}_loss"].item()
        expected_gradient = golden[f"T{temperature}_{case}_grad_s"]
    value, gradient = value_and_gradient(lambda s: kd_loss(s, teacher, temperature=temperature), student)
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)


def loop(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """KL divergence of the softened predictions without a factor, mean over samples."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in row] for row in (s, t))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student)


def loop_cross_entropy(student: Tensor, labels: Tensor) -> float:
    rows = zip(student.tolist(), labels.tolist(), strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / len(student)


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_equals_a_plain_loop(temperature, alpha):
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    divergence, hard = loop(student, teacher, temperature), loop_cross_entropy(student, LABELS)
    for scale in (True, False):
        soft = divergence * (temperature**2 if scale else 1)
        options = {"temperature": temperature, "scale": scale}
        assert kd_loss(student, teacher, **options).item() == pytest.approx(soft, rel=1e-12)
        mixed = kd_loss(student, teacher, LABELS, alpha=alpha, **options).item()
        assert mixed == pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-12)


def test_variants_differ_by_their_factors():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    ours = kd_loss(student, teacher).item()
    assert kd_loss(student, teacher, variant="mean").item() == pytest.approx(ours / 6, rel=1e-12)
    pytorch = torch.nn.KLDivLoss(reduction="mean")
    with pytest.warns(UserWarning, match="batchmean"):
        default = 16 * pytorch((student / 4).log_softmax(1), (teacher / 4).softmax(1)).item()
    assert default == pytest.approx(ours / 6, rel=1e-12)
    with_labels = kd_loss(student, teacher, LABELS)
    assert kd_loss(student, teacher, LABELS, variant="torchdistill").item() == with_labels.item()
    for labels, alpha in ((None, 0.9), (LABELS, 1), (LABELS, 1.0)):
        value = kd_loss(student, teacher, labels, alpha=alpha, variant="torchdistill").item()
        assert value == pytest.approx(ours / 16, rel=1e-12)
    everything = kd_loss(student, teacher, LABELS, alpha=0, variant="torchdistill").item()
    assert everything == pytest.approx(F.cross_entropy(student, LABELS).item(), rel=1e-12)


def test_two_classes_have_the_closed_form():
    # One logit gap is all that counts: KL of two Bernoulli distributions.
    student, teacher = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
    q, p = 1 / (1 + math.exp(1 / 2)), 1 / (1 + math.exp(-3 / 2))
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert kd_loss(student, teacher, temperature=2).item() == pytest.approx(expected, rel=1e-12)


# Limits in temperature


def test_high_temperature_tends_to_the_centred_squared_distance():
    student, teacher = logits(8, 6) + 1.5, logits(8, 6, seed=1)
    gap = centred(student) - centred(teacher)
    limit = gap.square().sum(1).mean().item() / (2 * 6)
    raw = (student - teacher).square().sum(1).mean().item() / (2 * 6)
    errors = [abs(kd_loss(student, teacher, temperature=t).item() - limit) for t in (10, 100, 1000)]
    assert errors[1] < errors[0] / 8  # the error falls as 1 / T
    assert errors[2] < errors[1] / 8
    assert errors[2] < 1e-3 * limit
    assert raw > 1.5 * limit  # plain regression of the logits is another loss


def test_logits_of_mean_zero_have_the_regression_as_their_limit():
    student, teacher = centred(logits(8, 6)), centred(logits(8, 6, seed=1))
    value, gradient = value_and_gradient(lambda s: kd_loss(s, teacher, temperature=1e4), student)
    assert value == pytest.approx((student - teacher).square().sum(1).mean().item() / 12, rel=1e-3)
    torch.testing.assert_close(gradient, (student - teacher) / (6 * 8), rtol=1e-2, atol=1e-6)


def test_low_temperature_tends_to_the_teacher_s_first_choice():
    # T KL -> how far the student's logit at the teacher's first choice lies below the student's own largest.
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    temperature = 1e-4
    chosen = student.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
    expected = (student.amax(1) - chosen).mean().item()
    assert expected > 0.1
    value = kd_loss(student, teacher, temperature=temperature).item() / temperature
    assert value == pytest.approx(expected, rel=1e-3)


def test_the_factor_keeps_the_gradient_s_size():
    student, teacher = logits(8, 6), logits(8, 6, seed=1)
    sizes = {}
    for scale in (True, False):
        for temperature in (4, 40):
            options = {"temperature": temperature, "scale": scale}
            gradient = value_and_gradient(lambda s, o=options: kd_loss(s, teacher, **o), student)[1]
            sizes[scale, temperature] = gradient.norm().item()
    assert 0.8 < sizes[True, 40] / sizes[True, 4] < 1.25
    assert sizes[False, 40] / sizes[False, 4] < 0.02


# Gradients


def test_gradient_is_the_derivative_and_has_the_known_form():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    for options in ({}, {"scale": False}, {"variant": "mean"}, {"variant": "torchdistill"}):
        assert torch.autograd.gradcheck(
            lambda s, o=options: kd_loss(s, teacher, LABELS, temperature=2, **o), student.requires_grad_()
        )
    gradient = value_and_gradient(lambda s: kd_loss(s, teacher, temperature=3), student.detach())[1]
    expected = 3 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 4
    torch.testing.assert_close(gradient, expected.detach())


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone(), LABELS.clone()
    kd_loss(student, teacher, LABELS).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    for now, then in zip((student, teacher, LABELS), before, strict=True):
        assert torch.equal(now, then)


# Invariances and corners


@given(
    samples=st.integers(1, 5),
    classes=st.integers(1, 6),
    temperature=st.floats(0.5, 20),
    seed=st.integers(0, 2**16),
)
def test_invariances(samples, classes, temperature, seed):
    student, teacher = logits(samples, classes, seed=seed), logits(samples, classes, seed=seed + 1)
    value = kd_loss(student, teacher, temperature=temperature).item()
    assert value >= 0
    assert kd_loss(student, student, temperature=temperature).item() == 0
    if classes == 1:
        assert value == 0
    same = {
        "a constant a sample": (student + logits(samples, 1, seed=seed + 2), teacher - 3),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of classes": (student.flip(1), teacher.flip(1)),
        "copies of the batch": (student.repeat(3, 1), teacher.repeat(3, 1)),
    }
    for name, (s, t) in same.items():
        other = kd_loss(s, t, temperature=temperature).item()
        assert other == pytest.approx(value, rel=1e-9, abs=1e-12), name
    scaled = kd_loss(2 * student, 2 * teacher, temperature=2 * temperature).item()
    assert scaled == pytest.approx(4 * value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [1, 4])
def test_huge_logits_keep_value_and_gradient_finite(temperature):
    student = 1e4 * logits(1, 6).float()
    teacher = -student
    value, gradient = value_and_gradient(
        lambda s: kd_loss(s, teacher, torch.tensor([0]), temperature=temperature), student
    )
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_class_ruled_out_by_both_counts_nothing():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    short = value_and_gradient(lambda s: kd_loss(s, teacher, LABELS), student)
    masked = [F.pad(x, (0, 1), value=-torch.inf) for x in (student, teacher)]
    value, gradient = value_and_gradient(lambda s: kd_loss(s, masked[1], LABELS), masked[0])
    assert value == pytest.approx(short[0], rel=1e-12)
    torch.testing.assert_close(gradient, F.pad(short[1], (0, 1)))


def test_a_class_ruled_out_by_one():
    student, teacher = logits(2, 3), logits(2, 3, seed=1)
    ruled_out = student.clone()
    ruled_out[:, 2] = -torch.inf
    assert kd_loss(ruled_out, teacher).item() == math.inf
    value, gradient = value_and_gradient(lambda s: kd_loss(s, ruled_out), teacher)
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    # A probability too small for its type is no zero that the student could be blamed for.
    vanishing = torch.tensor([[0.0, -1e4]])
    ruled_out = torch.tensor([[0.0, -torch.inf]])
    assert kd_loss(ruled_out, vanishing, temperature=1).item() == 0


def test_half_precision_counts_in_single():
    student, teacher = logits(4, 6).bfloat16(), logits(4, 6, seed=1).bfloat16()
    exact = kd_loss(student.float(), teacher.float(), LABELS)
    half = kd_loss(student, teacher, LABELS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kd_loss(student.float(), teacher.float(), LABELS), exact, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    expected = kd_loss(student, teacher, LABELS).item()
    assert kd_loss(student, teacher, LABELS.to(dtype)).item() == expected


def test_compile_without_breaks(unchecked, compiler):
    student, teacher = logits(4, 6).float(), logits(4, 6, seed=1).float()
    plain = value_and_gradient(lambda s: kd_loss(s, teacher, LABELS), student)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(lambda s: compiled(s, teacher, LABELS), student)
    assert value == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(gradient, plain[1])


def test_vmap_over_students(unchecked):
    students, teachers = logits(3, 4, 6), logits(3, 4, 6, seed=1)
    labels = torch.stack([LABELS, LABELS.flip(0), LABELS])
    each = torch.stack([kd_loss(*one) for one in zip(students, teachers, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(kd_loss)(students, teachers, labels), each)
    shared = torch.vmap(lambda s: kd_loss(s, teachers[0], LABELS))(students)
    torch.testing.assert_close(shared, torch.stack([kd_loss(s, teachers[0], LABELS) for s in students]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    expected, expected_gradient = value_and_gradient(lambda s: kd_loss(s, teacher, LABELS), student)
    on_device = student.cuda().requires_grad_()
    teacher, labels = teacher.cuda(), LABELS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = kd_loss(on_device, teacher, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


def wrong(**changes):
    arguments = {"student": logits(4, 6), "teacher": logits(4, 6, seed=1), "labels": LABELS} | changes
    return kd_loss(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": logits(4)}, r"student: expected a floating tensor \(batch, features\)"),
        ({"student": logits(0, 6)}, "student: expected a floating tensor"),
        ({"teacher": logits(4, 6).long()}, "teacher: expected a floating tensor"),
        ({"teacher": logits(4, 5)}, r"teacher: expected the shape of student \(4, 6\), got \(4, 5\)"),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": math.nan}, "temperature: expected a finite number above 0, got nan"),
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": -0.1}, "alpha: expected a number from 0 to 1, got -0.1"),
        ({"alpha": math.nan}, "alpha: expected a number from 0 to 1, got nan"),
        ({"alpha": True}, "alpha: expected a number from 0 to 1, got True"),
        ({"labels": LABELS[:3]}, r"labels: expected as many rows as student \(4\), got 3"),
        ({"labels": logits(4)}, r"labels: expected class indices \(batch,\), got torch.float64"),
        ({"labels": LABELS > 1}, r"labels: expected class indices \(batch,\), got torch.bool"),
        ({"labels": LABELS[:, None]}, r"labels: expected class indices \(batch,\), .* shape \(4, 1\)"),
        ({"variant": "official"}, r"variant: expected one of \['mean', 'torchdistill'\], got 'official'"),
        ({"variant": "mean", "scale": False}, "scale: 'mean' decides about the factor itself"),
    ],
)
def test_errors_name_the_argument(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": [[1.0]]}, "student: expected a tensor, got list"),
        ({"labels": [2, 0, 5, 1]}, "labels: expected a tensor, got list"),
        ({"temperature": "4"}, "temperature: expected a number, got str"),
    ],
)
def test_wrong_types_are_named(unchecked, changes, message):
    with pytest.raises(TypeError, match=message):
        wrong(**changes)
