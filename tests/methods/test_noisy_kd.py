"""Noisy collaboration: plain loops, the three mechanisms' promises, and the corners of their arguments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.kd import kd_loss
from kdrefs.methods.noisy_kd import (
    add_noise,
    averaged_logits,
    corrupt_labels,
    fickle_teacher,
    soft_randomization_loss,
)
from kdrefs.training import Members
from tests.methods.losses import value_and_gradient

LABELS = torch.tensor([2, 0, 5, 1])


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, 3),
    )


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(9))


# The loss


def loop(student: Tensor, teacher: Tensor, temperature: float, alpha: float, reverse: bool) -> float:
    total = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), LABELS.tolist(), strict=True):
        hard = math.log(sum(map(math.exp, s))) - s[label]
        q, p = ([math.exp(x / temperature) for x in row] for row in (s, t))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        one, other = (q, p) if reverse else (p, q)
        soft = sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))
        total += (1 - alpha) * hard + alpha * temperature**2 * soft
    return total / len(student)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 20.0])
def test_equals_a_plain_loop(temperature, alpha, divergence):
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    value = soft_randomization_loss(
        student, teacher, LABELS, temperature=temperature, alpha=alpha, divergence=divergence
    ).item()
    assert value == pytest.approx(
        loop(student, teacher, temperature, alpha, divergence == "reverse"), rel=1e-10
    )


def test_is_distillation_where_both_see_the_same():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    torch.testing.assert_close(
        soft_randomization_loss(student, teacher, LABELS), kd_loss(student, teacher, LABELS)
    )


def test_the_port_divides_the_divergence_by_the_classes():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    options = {"temperature": 20.0, "alpha": 0.5}
    soft = F.kl_div((student / 20).log_softmax(1), (teacher / 20).softmax(1), reduction="none").mean()
    expected = 0.5 * F.cross_entropy(student, LABELS) + 0.5 * 400 * soft
    torch.testing.assert_close(
        soft_randomization_loss(student, teacher, LABELS, variant="kd_lib", **options), expected
    )
    alone = soft_randomization_loss(student, teacher, LABELS, temperature=20.0, alpha=1)
    port = soft_randomization_loss(student, teacher, LABELS, temperature=20.0, alpha=1, variant="kd_lib")
    assert alone.item() == pytest.approx(6 * port.item(), rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_gradients_are_derivatives_and_the_teacher_gets_none(divergence):
    student, teacher = logits(4, 6), logits(4, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: soft_randomization_loss(s, teacher.detach(), LABELS, divergence=divergence),
        student.clone().requires_grad_(),
    )
    soft_randomization_loss(student.requires_grad_(), teacher, LABELS, divergence=divergence).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e4])
@pytest.mark.parametrize("batch", [1, 2])
def test_value_and_gradient_stay_finite(batch, scale, divergence):
    student = scale * logits(1, 6).float().repeat(batch, 1)
    value, gradient = value_and_gradient(
        lambda s: soft_randomization_loss(s, -student, LABELS[:batch], divergence=divergence), student
    )
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_half_precision_counts_in_single():
    student, teacher = logits(4, 6).bfloat16(), logits(4, 6, seed=1).bfloat16()
    for divergence in ("forward", "reverse"):
        exact = soft_randomization_loss(student.float(), teacher.float(), LABELS, divergence=divergence)
        half = soft_randomization_loss(student, teacher, LABELS, divergence=divergence)
        torch.testing.assert_close(half, exact, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_compile_and_vmap(unchecked, compiler, divergence):
    students, teachers = logits(3, 4, 6).float(), logits(3, 4, 6, seed=1).float()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return soft_randomization_loss(s, t, LABELS, divergence=divergence)

    each = torch.stack([loss(*one) for one in zip(students, teachers, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(students, teachers), each)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(students[0], teachers[0]), each[0])


# The fickle teacher


def test_only_dropout_is_active_and_everything_is_put_back():
    teacher = network().eval()
    teacher[2].train()  # as its owner left it
    flags, statistics = [part.training for part in teacher.modules()], teacher[1].running_mean.clone()
    with fickle_teacher(teacher, rate=0.2) as inside, torch.no_grad():
        assert inside is teacher
        assert [part.training for part in teacher] == [False, False, True, False, True, False]
        assert (teacher[2].p, teacher[4].p) == (0.2, 0.2)
        one, other = teacher(IMAGES), teacher(IMAGES)
    assert not torch.equal(one, other)
    assert [part.training for part in teacher.modules()] == flags
    assert (teacher[2].p, teacher[4].p) == (0.3, 0.5)
    assert torch.equal(teacher[1].running_mean, statistics)


def test_training_mode_and_errors_are_put_back():
    teacher = network().train()

    def ask():
        with fickle_teacher(teacher):
            assert not teacher[1].training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        ask()
    assert all(part.training for part in teacher.modules())


def test_dropout_has_its_rate_and_keeps_the_mean():
    teacher = nn.Sequential(nn.Dropout(0.4)).eval()
    ones = torch.ones(200, 500)
    with fickle_teacher(teacher):
        dropped = teacher(ones)
        assert (dropped == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
        assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    with fickle_teacher(teacher, rate=0):
        assert torch.equal(teacher(ones), ones)


def test_members_draw_masks_of_their_own():
    together = Members([nn.Sequential(nn.Dropout(0.5)).eval() for _ in range(2)])
    with fickle_teacher(together), torch.no_grad():
        one, other = together(torch.ones(2, 4, 50))
    assert not torch.equal(one, other)
    assert torch.equal(together(torch.ones(2, 4, 50)), torch.ones(2, 4, 50))


def test_a_network_without_dropout_is_refused():
    with pytest.raises(ValueError, match="teacher: expected a network with dropout, found none in Linear"):
        fickle_teacher(nn.Linear(2, 2)).__enter__()
    for rate in (1, -0.1, math.nan, True):
        with pytest.raises(ValueError, match="rate: expected a number from 0 to below 1"):
            fickle_teacher(network(), rate=rate).__enter__()


def test_averaged_logits_have_the_mean_prediction():
    answers = logits(7, 4, 6)
    for temperature in (1.0, 4.0):
        mean = (answers / temperature).softmax(2).mean(0)
        torch.testing.assert_close((averaged_logits(answers, temperature) / temperature).softmax(1), mean)
    one = averaged_logits(answers[:1])
    torch.testing.assert_close(one.softmax(1), answers[0].softmax(1))
    assert averaged_logits(1e4 * answers.float()).isfinite().all()


# Noise and labels


def test_noise_is_additive_and_has_its_deviation():
    images = torch.tensor([0.0, 0.5, 1.0]).repeat(40_000, 1)
    noisy = add_noise(images, 0.2, generator=generator())
    for column in range(3):
        assert (noisy - images)[:, column].std().item() == pytest.approx(0.2, rel=0.02)
        assert (noisy - images)[:, column].mean().item() == pytest.approx(0, abs=0.005)
    assert torch.equal(add_noise(images, 0), images)
    assert torch.equal(noisy, add_noise(images, 0.2, generator=generator()))
    port = add_noise(images, 0.2, generator=generator(), variant="kd_lib")
    torch.testing.assert_close(port - images, images * (noisy - images), atol=1e-6, rtol=1e-4)


@given(
    samples=st.integers(1, 60), rate=st.floats(0, 1), classes=st.integers(2, 12), seed=st.integers(0, 2**16)
)
def test_exactly_the_share_is_corrupted_and_never_with_its_own_class(samples, rate, classes, seed):
    labels = torch.randint(classes, (samples,), generator=generator(seed))
    before = labels.clone()
    changed = corrupt_labels(labels, rate, classes, generator=generator(seed))
    assert (changed != labels).sum().item() == round(rate * samples)
    assert changed.min() >= 0
    assert changed.max() < classes
    assert torch.equal(labels, before)
    assert changed.dtype == labels.dtype
    lower = corrupt_labels(labels, rate / 2, classes, generator=generator(seed))
    assert ((lower != labels) <= (changed != labels)).all()


def test_other_classes_are_equally_likely():
    labels = torch.full((30_000,), 2)
    counts = corrupt_labels(labels, 1.0, 5, generator=generator()).bincount(minlength=5)
    assert counts[2] == 0
    for k in (0, 1, 3, 4):
        assert counts[k].item() == pytest.approx(7500, rel=0.05)
    any_class = corrupt_labels(labels, 1.0, 5, generator=generator(), other=False).bincount(minlength=5)
    assert any_class[2].item() == pytest.approx(6000, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_small_integers_do_not_overflow(dtype):
    labels = torch.full((50,), 250, dtype=torch.int64).to(torch.uint8 if dtype == torch.uint8 else dtype)
    changed = corrupt_labels(labels, 1.0, 251, generator=generator())
    assert changed.dtype == dtype
    assert (changed.long() < 250).all()


def wrong(**changes):
    arguments = {"student": logits(4, 6), "teacher": logits(4, 6, seed=1), "labels": LABELS} | changes
    return soft_randomization_loss(
        arguments.pop("student"), arguments.pop("teacher"), arguments.pop("labels"), **arguments
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": logits(4)}, "student: expected a floating tensor"),
        ({"teacher": logits(4, 5)}, r"teacher: expected the shape of student \(4, 6\), got \(4, 5\)"),
        ({"labels": LABELS[:3]}, r"labels: expected as many rows as student \(4\), got 3"),
        ({"labels": LABELS.double()}, r"labels: expected class indices \(batch,\), got torch.float64"),
        ({"temperature": 0}, "temperature: expected a finite number above 0"),
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"divergence": "KL"}, r"divergence: expected one of \['forward', 'reverse'\], got 'KL'"),
        ({"variant": "official"}, r"variant: expected one of \['kd_lib'\], got 'official'"),
    ],
)
def test_errors_name_the_argument(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changes)


def test_errors_of_the_other_functions(unchecked):
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        wrong(labels=[0])
    with pytest.raises(ValueError, match="answers: expected a floating tensor"):
        averaged_logits(torch.zeros(3))
    with pytest.raises(ValueError, match="temperature: expected"):
        averaged_logits(logits(2, 3), 0)
    with pytest.raises(ValueError, match="images: expected a floating tensor, got torch"):
        add_noise(torch.zeros(3, dtype=torch.uint8), 0.1)
    with pytest.raises(ValueError, match="sigma: expected a finite number"):
        add_noise(torch.zeros(3), -1)
    with pytest.raises(ValueError, match="classes: expected a whole number from 2 on"):
        corrupt_labels(LABELS, 0.1, 1, generator=generator())
    with pytest.raises(ValueError, match="rate: expected a number from 0 to 1, got 2"):
        corrupt_labels(LABELS, 2, 6, generator=generator())
