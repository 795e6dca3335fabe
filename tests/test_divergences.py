"""Divergences against SciPy and plain loops, their limits, and probabilities of zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from torch import Tensor

from kdrefs.divergences import (
    jeffreys_divergence,
    kl_divergence,
    quadratic_divergence,
    softened_cross_entropy,
    softened_kl,
)

ALL = [kl_divergence, jeffreys_divergence, quadratic_divergence]


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_distribution(*shape: int, seed: int = 0) -> Tensor:
    return logits(*shape, seed=seed).log_softmax(dim=-1)


def expected(divergence, p: Tensor, q: Tensor) -> float:
    forward, backward = (rel_entr(a.numpy(), b.numpy()).sum(-1).mean() for a, b in ((p, q), (q, p)))
    return {
        kl_divergence: forward,
        jeffreys_divergence: forward + backward,
        quadratic_divergence: ((p - q) ** 2).sum(-1).mean().item(),
    }[divergence]


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7), (5, 1)])
@pytest.mark.parametrize("divergence", ALL)
def test_sum_over_the_distribution_and_mean_over_the_samples(divergence, shape):
    log_p, log_q = log_distribution(*shape), log_distribution(*shape, seed=1)
    value = divergence(log_p, log_q).item()
    assert value == pytest.approx(expected(divergence, log_p.exp(), log_q.exp()), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("divergence", ALL)
@given(samples=st.integers(1, 5), outcomes=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_divergences_are_nonnegative_and_zero_only_for_equals(divergence, samples, outcomes, seed):
    log_p, log_q = (
        log_distribution(samples, outcomes, seed=seed),
        log_distribution(samples, outcomes, seed=seed + 1),
    )
    value = divergence(log_p, log_q).item()
    assert divergence(log_p, log_p).item() == 0.0
    assert value > 1e-12 if outcomes > 1 else value == 0.0
    assert divergence(log_p.repeat(3, 1), log_q.repeat(3, 1)).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("divergence", ALL)
def test_gradient_is_the_derivative(divergence):
    p, q = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: divergence(a.log_softmax(dim=-1), b.log_softmax(dim=-1)), (p, q)
    )


@pytest.mark.parametrize("divergence", ALL)
def test_an_outcome_impossible_on_both_sides_counts_nothing(divergence):
    mask = torch.eye(4, dtype=torch.bool)
    p, q = logits(4, 4), logits(4, 4, seed=1).requires_grad_()
    masked = divergence(*(x.masked_fill(mask, -torch.inf).log_softmax(dim=1) for x in (p, q)))
    short = divergence(*(x[~mask].view(4, 3).log_softmax(dim=1) for x in (p, q)))
    assert masked.item() == pytest.approx(short.item(), rel=1e-12)
    masked.backward()
    assert q.grad.isfinite().all()
    assert q.grad[~mask].abs().min() > 0


def test_zeros_on_one_side():
    certain, even = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(certain, even).item() == pytest.approx(math.log(2))
    assert kl_divergence(even, certain).item() == math.inf
    assert jeffreys_divergence(certain, even).item() == math.inf
    assert quadratic_divergence(certain, even).item() == pytest.approx(0.5)


@pytest.mark.parametrize("divergence", ALL)
def test_nan_is_not_hidden(divergence):
    log_p = log_distribution(2, 3)
    assert divergence(log_p, log_p * math.nan).isnan()
    assert divergence(log_p * math.nan, log_p).isnan()


@pytest.mark.parametrize("temperature", [1, 4.0, 20.0])
def test_softened_kl_equals_a_plain_loop(temperature):
    student, teacher = logits(3, 5), logits(3, 5, seed=1)
    total = cross = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in row] for row in (s, t))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
        cross -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 3
    assert softened_kl(student, teacher, temperature).item() == pytest.approx(total * temperature**2)
    assert softened_kl(student, teacher, temperature, scale=False).item() == pytest.approx(total)
    assert softened_cross_entropy(student, teacher, temperature).item() == pytest.approx(cross)
    assert softened_cross_entropy(student, teacher, temperature, scale=True).item() == pytest.approx(
        cross * temperature**2
    )


def test_high_temperature_gradient_tends_to_matching_centred_logits():
    # Hinton et al. 2015, section 2.1: T² dL/ds_k -> (s_k - t_k) / K for logits of mean zero.
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1)
    softened_kl(student, teacher, 1e4).backward()
    centred = [x - x.mean(dim=1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(4 * student.grad, (centred[0] - centred[1]) / 6, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [softened_kl, softened_cross_entropy])
def test_softened_losses_detach_the_teacher_and_ignore_a_constant(loss):
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 6, seed=1).requires_grad_()
    value = loss(student, teacher, 2.0)
    value.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert loss(student + 1e3, teacher - 5.0, 2.0).item() == pytest.approx(value.item(), rel=1e-9)


def test_large_logits_and_half_precision():
    student, teacher = logits(4, 6).float(), logits(4, 6, seed=1).float()
    assert softened_kl(1e6 * student, 1e6 * teacher, 1.0).isfinite()
    exact = softened_kl(student.bfloat16().float(), teacher.bfloat16().float(), 4.0)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(
        softened_kl(student.bfloat16(), teacher.bfloat16(), 4.0), exact, rtol=0, atol=0
    )


def test_a_class_ruled_out_by_both_counts_nothing():
    student, teacher = logits(2, 4), logits(2, 4, seed=1)
    masked = [x.clone() for x in (student, teacher)]
    for x in masked:
        x[:, 3] = -torch.inf
    for loss in (softened_kl, softened_cross_entropy):
        assert loss(*masked, 2.0).item() == pytest.approx(loss(student[:, :3], teacher[:, :3], 2.0).item())


def test_vmap(unchecked):
    p, q = log_distribution(5, 3, 4), log_distribution(5, 3, 4, seed=1)
    for divergence in ALL:
        rows = torch.stack([divergence(a, b) for a, b in zip(p, q, strict=True)])
        torch.testing.assert_close(torch.vmap(divergence)(p, q), rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: kl_divergence(p, p[:, :2]), r"log_q: expected the shape of log_p \(3, 4\), got \(3, 2\)"),
        (lambda p: jeffreys_divergence(p, p.long()), "log_q: expected a floating tensor"),
        (lambda p: quadratic_divergence(p[:0], p[:0]), "log_p: expected a floating tensor"),
        (lambda p: softened_kl(p, p[:2], 4.0), "teacher: expected the shape of student"),
        (lambda p: softened_kl(p, p, 0.0), "temperature: expected a finite number above 0, got 0"),
        (
            lambda p: softened_cross_entropy(p, p, math.inf),
            "temperature: expected a finite number above 0, got inf",
        ),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(log_distribution(3, 4))
