"""Internal representations against golden numbers, plain loops and TextBrewer's formulas; schedules step by step."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.internal_representations import (
    InternalDistillation,
    Phase,
    attention_kl,
    cls_cosine_loss,
    phases,
)
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return draw(*shape), draw(*shape, seed=1)


# Golden numbers, loops, TextBrewer


def test_attention_equals_the_golden_numbers():
    with np.load(GOLDEN / "formula_internal_repr.npz", allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"c0_{side}"]) for side in "st")
        expected, expected_gradient = golden["kl_c0_loss"].item(), golden["kl_c0_grad_s"]
    value, gradient = value_and_gradient(lambda s: attention_kl(s, teacher, scores=True), student)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-6, atol=1e-8)
    assert attention_kl(student.softmax(3), teacher.softmax(3)).item() == pytest.approx(expected, rel=1e-9)


def test_cosine_equals_the_golden_numbers():
    with np.load(GOLDEN / "formula_internal_repr.npz", allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"c1_{side}"]) for side in "st")
        expected, expected_gradient = golden["cos_c1_loss"].item(), golden["cos_c1_grad_s"]
    value, gradient = value_and_gradient(lambda s: cls_cosine_loss(s, teacher), student)
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-6, atol=1e-8)


def test_cosine_equals_textbrewer():
    with np.load(GOLDEN / "intrep_textbrewer_cos.npz", allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"c0_{side}"]) for side in "st")
        expected, expected_gradient = golden["c0_loss"].item(), golden["c0_grad_s"]
    value, gradient = value_and_gradient(lambda s: cls_cosine_loss(s, teacher), student)
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)
    distance = (F.normalize(student[:, 0]) - F.normalize(teacher[:, 0])).square().sum(1).mean().item()
    assert cls_cosine_loss(student, teacher, variant="pkd").item() == pytest.approx(distance, rel=1e-9)
    assert distance == pytest.approx(2 * expected, rel=1e-9)


def loop(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Padding left out of rows and columns by indexing, sample by sample."""
    total = 0.0
    for s, t, m in zip(student, teacher, mask.bool(), strict=True):
        kept = torch.nonzero(m).squeeze(1).tolist()
        for head in range(len(s)):
            for i in kept:
                p, q = ([math.exp(x[head, i, j]) for j in kept] for x in (t, s))
                p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(kept)
    return total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_is_neither_a_row_nor_attended_to(dtype):
    student, teacher = pair(3, 2, 5, 5)
    expected = loop(student, teacher, MASK)
    assert expected > 0.1
    value, gradient = value_and_gradient(
        lambda s: attention_kl(s, teacher, MASK.to(dtype), scores=True), student
    )
    assert value == pytest.approx(expected, rel=1e-10)
    inside = (MASK[:, None, :, None] * MASK[:, None, None, :]).bool().expand_as(student)
    assert gradient[~inside].abs().max() == 0
    assert gradient[0][inside[0]].abs().min() > 0
    # What is at the padding changes nothing, be it scores or probabilities that were never masked.
    other = student.masked_fill(~inside, 7.0)
    assert attention_kl(other, teacher, MASK, scores=True).item() == pytest.approx(expected, rel=1e-10)
    unmasked = attention_kl(student.softmax(3), teacher.softmax(3), MASK).item()
    assert unmasked == pytest.approx(expected, rel=1e-9)
    masked = [x.masked_fill(~MASK[:, None, None, :].bool(), -1e9).softmax(3) for x in (student, teacher)]
    assert attention_kl(*masked, MASK).item() == pytest.approx(expected, rel=1e-9)


def test_masks_of_ones_and_of_zeros():
    student, teacher = pair(3, 2, 5, 5)
    full = attention_kl(student, teacher, scores=True).item()
    assert attention_kl(student, teacher, torch.ones(3, 5), scores=True).item() == pytest.approx(
        full, rel=1e-12
    )
    value, gradient = value_and_gradient(
        lambda s: attention_kl(s, teacher, torch.zeros(3, 5), scores=True), student
    )
    assert value == 0
    assert gradient.abs().max() == 0


def test_textbrewer_is_the_cross_entropy_over_the_batch_s_tokens():
    student, teacher = pair(3, 2, 5, 5)
    mask = MASK.double()
    rows = -(teacher.softmax(3) * student.log_softmax(3) * mask[:, None, None, :]).sum(3)
    expected = (rows * mask[:, None, :]).sum() / mask[:, None, :].expand(3, 2, 5).sum()
    options = {"scores": True, "variant": "textbrewer"}
    assert attention_kl(student, teacher, MASK, **options).item() == pytest.approx(expected.item(), rel=1e-12)
    p = teacher.softmax(3).where(teacher > -1e-3, 0)
    expected = -(p * student.log_softmax(3)).sum(3).mean()
    assert attention_kl(student, teacher, **options).item() == pytest.approx(expected.item(), rel=1e-12)
    # Without padding and without negative scores only the teacher's entropy is between the two.
    entropy = -(teacher.abs().softmax(3) * teacher.abs().log_softmax(3)).sum(3).mean().item()
    (ours, gradient), (theirs, other) = (
        value_and_gradient(lambda s, o=o: attention_kl(s, teacher.abs(), scores=True, **o), student)
        for o in ({}, {"variant": "textbrewer"})
    )
    assert theirs == pytest.approx(ours + entropy, rel=1e-10)
    torch.testing.assert_close(gradient, other)


def test_cosine_looks_at_the_first_token():
    student, teacher = pair(4, 6, 8)
    value, gradient = value_and_gradient(lambda s: cls_cosine_loss(s, teacher), student)
    expected = 1 - F.cosine_similarity(student[:, 0], teacher[:, 0]).mean().item()
    assert value == pytest.approx(expected, rel=1e-10)
    assert gradient[:, 1:].abs().max() == 0
    assert cls_cosine_loss(student[:, 0], teacher[:, 0]).item() == value


# Invariances and corners


@given(batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_invariances(batch, heads, length, seed):
    student, teacher = (
        draw(batch, heads, length, length, seed=seed),
        draw(batch, heads, length, length, seed=seed + 1),
    )
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    for m in (None, mask):
        value = attention_kl(student, teacher, m, scores=True).item()
        assert value >= -1e-12
        assert attention_kl(teacher, teacher, m, scores=True).item() == 0
        moved = [x[:, :, order][:, :, :, order] for x in (student, teacher)]
        same = {
            "a constant a row": (student + draw(batch, heads, length, 1, seed=seed + 2), teacher, m),
            "order of the tokens": (*moved, None if m is None else m[:, order]),
            "order of the heads": (student.flip(1), teacher.flip(1), m),
            "copies of the batch": (
                student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), None if m is None else m.repeat(2, 1),
            ),
        }  # fmt: skip
        for change, (s, t, tokens) in same.items():
            other = attention_kl(s, t, tokens, scores=True).item()
            assert other == pytest.approx(value, rel=1e-9, abs=1e-12), change
        padded = [F.pad(x, (0, 2, 0, 2), value=3.0) for x in (student, teacher)]
        tokens = F.pad(torch.ones(batch, length, dtype=torch.bool) if m is None else m, (0, 2))
        assert attention_kl(*padded, tokens, scores=True).item() == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_attention_that_is_ruled_out_stays_finite():
    student, teacher = draw(2, 1, 3, 3).softmax(3), draw(2, 1, 3, 3, seed=1).softmax(3)
    holes = teacher.clone()
    holes[..., 1] = 0
    for s, t in ((student, holes / holes.sum(3, keepdim=True)), (holes, student), (holes, holes)):
        value, gradient = value_and_gradient(lambda x, t=t: attention_kl(x, t), s)
        assert math.isfinite(value)
        assert gradient.isfinite().all()
    masked = draw(2, 1, 3, 3)
    masked[..., 2] = -torch.inf
    value, gradient = value_and_gradient(lambda s: attention_kl(s, masked, scores=True), masked.flip(2))
    assert math.isfinite(value)
    assert value > 0
    assert gradient.isfinite().all()
    value, gradient = value_and_gradient(
        lambda s: attention_kl(1e4 * s, -1e4 * s.detach(), scores=True), draw(2, 1, 3, 3)
    )
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_cosine_at_zero_and_extreme_vectors():
    teacher = draw(4, 6).float()
    student = draw(4, 6, seed=1).float()
    student[1], student[2] = 0, teacher[2]
    for factor in (1e-12, 1, 1e12):
        value, gradient = value_and_gradient(lambda s: cls_cosine_loss(s, teacher), factor * student)
        assert math.isfinite(value)
        assert gradient.isfinite().all()
        assert gradient[1].abs().max() == 0
    assert cls_cosine_loss(teacher[:1], teacher[:1]).item() == pytest.approx(0, abs=1e-6)
    assert cls_cosine_loss(-teacher[:2], teacher[:2]).item() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"mask": MASK, "variant": "textbrewer"}])
def test_gradient_is_the_derivative(options):
    student, teacher = pair(3, 2, 5, 5)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: attention_kl(s, teacher, scores=True, **options), student.requires_grad_()
    )
    attention_kl(student, teacher, scores=True, **options).backward()
    assert teacher.grad is None
    states, guides = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cls_cosine_loss(s, guides), states)
    cls_cosine_loss(states, guides).backward()
    assert guides.grad is None


def test_half_precision_counts_in_single():
    student, teacher = (x.bfloat16() for x in pair(3, 2, 5, 5))
    exact = attention_kl(student.float(), teacher.float(), MASK, scores=True)
    half = attention_kl(student, teacher, MASK, scores=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0)
    states = [x.flatten(1) for x in (student, teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cls_cosine_loss(*(x.float() for x in states))
        torch.testing.assert_close(attention_kl(student.float(), teacher.float(), MASK, scores=True), exact)
    torch.testing.assert_close(inside, cls_cosine_loss(*states))


def test_compile_without_breaks(unchecked, compiler):
    student, teacher = (x.float() for x in pair(3, 2, 5, 5))
    for loss in (
        lambda s, t: attention_kl(s, t, MASK, scores=True),
        lambda s, t: attention_kl(s.softmax(3), t.softmax(3)),
        lambda s, t: cls_cosine_loss(s[:, 0], t[:, 0]),
    ):
        plain = value_and_gradient(lambda s, loss=loss: loss(s, teacher), student)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        value, gradient = value_and_gradient(lambda s, c=compiled: c(s, teacher), student)
        assert value == pytest.approx(plain[0], rel=1e-6)
        torch.testing.assert_close(gradient, plain[1])


def test_vmap_over_students(unchecked):
    students, teachers = draw(4, 3, 2, 5, 5), draw(4, 3, 2, 5, 5, seed=1)
    assert_vmap_equals_a_loop(lambda s, t: attention_kl(s, t, MASK, scores=True), students, teachers)
    assert_vmap_equals_a_loop(lambda s, t: attention_kl(s, t, scores=True), students, teachers)
    assert_vmap_equals_a_loop(cls_cosine_loss, students[:, :, 0, 0], teachers[:, :, 0, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = pair(3, 2, 5, 5)
    expected = attention_kl(student, teacher, MASK, scores=True).item()
    schedule = InternalDistillation("all", 1)
    state = draw(3, 5, 4)
    arguments = [x.cuda() for x in (student, teacher, MASK, state)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = attention_kl(*arguments[:3], scores=True)
        both = [[(x, arguments[3])] for x in arguments[:2]]
        schedule.internal_loss(*both, arguments[2], scores=True)
        schedule.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)


# Schedules


def test_phases_of_every_schedule():
    last = Phase((), True)
    assert phases("all", 3) == (Phase((0, 1, 2), True),)
    assert phases("progressive", 3) == (Phase((0,), False), Phase((1,), False), Phase((2,), False), last)
    stacked = (Phase((0,), False), Phase((0, 1), False), Phase((0, 1, 2), False))
    assert phases("stacked", 3) == (*stacked, last)
    assert phases("stacked_kept", 3) == (*stacked, Phase((0, 1, 2), True))


def test_steps_end_phases_and_are_logged():
    schedule = InternalDistillation("progressive", 2, max_steps=(2, 3))
    seen = []
    for _ in range(8):
        seen.append(schedule.phase)
        schedule.advance()
    first, second, last = schedule.phases
    assert seen == [first, first, second, second, second, last, last, last]
    assert schedule.log == [(0, 2, "steps"), (1, 3, "steps")]
    assert not InternalDistillation("all", 2).advance()


def test_a_limit_ends_a_phase_early():
    schedule = InternalDistillation("stacked", 2, max_steps=3, limit=0.5)
    losses = [0.9, torch.tensor(0.4), 0.9, 0.8, 0.7, 0.1]
    assert [schedule.advance(loss) for loss in losses] == [False, True, False, False, True, False]
    assert schedule.log == [(0, 2, "limit"), (1, 3, "steps")]
    with pytest.raises(ValueError, match="loss: expected the step's internal loss"):
        InternalDistillation("stacked", 2, limit=0.5).advance()


def test_internal_loss_is_that_of_the_phase():
    layers = [[(draw(3, 2, 5, 5, seed=s), draw(3, 5, 4, seed=s + 1))] for s in (0, 10, 20, 30)]
    student, teacher = layers[0] + layers[1], layers[2] + layers[3]
    schedule = InternalDistillation("stacked_kept", 2, max_steps=1, attention_weight=2.0, cosine_weight=3.0)

    def expected(k: int) -> float:
        (a, h), (b, g) = student[k], teacher[k]
        return (2 * attention_kl(a, b, MASK, scores=True) + 3 * cls_cosine_loss(h, g)).item()

    for which in ((0,), (0, 1), (0, 1)):
        value = schedule.internal_loss(student, teacher, MASK, scores=True)
        assert value.item() == pytest.approx(sum(map(expected, which)), rel=1e-12)
        schedule.advance()
    plain = InternalDistillation("stacked", 2, max_steps=1)
    plain.advance()
    plain.advance()
    assert plain.internal_loss(student, teacher, MASK, scores=True) == 0.0
    with pytest.raises(ValueError, match="teacher: expected 2 matched layers, got 1"):
        plain.internal_loss(student, teacher[:1])


def test_the_schedule_is_restored():
    schedule = InternalDistillation("stacked", 3, max_steps=2)
    for _ in range(3):
        schedule.advance()
    other = InternalDistillation("stacked", 3, max_steps=2)
    other.load_state_dict(schedule.state_dict())
    for _ in range(5):
        assert (other.phase, other.log) == (schedule.phase, schedule.log)
        schedule.advance()
        other.advance()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_kl(draw(2, 3), draw(2, 3)), r"student: expected a floating tensor \(batch, heads"),
        (lambda: attention_kl(draw(1, 1, 2, 3), draw(1, 1, 2, 3)), "student: expected as many rows as columns"),
        (lambda: attention_kl(draw(1, 1, 3, 3), draw(1, 2, 3, 3)), "teacher: expected the shape of student"),
        (lambda: attention_kl(*pair(2, 1, 3, 3), torch.ones(2, 4)), r"mask: expected \(batch, length\) \(2, 3\)"),
        (lambda: attention_kl(*pair(2, 1, 3, 3), variant="bert"), "variant: expected one of"),
        (lambda: attention_kl(*pair(2, 1, 3, 3), variant="textbrewer"), "scores: 'textbrewer' takes scores"),
        (lambda: cls_cosine_loss(draw(3, 4), draw(3, 5)), "teacher: expected the shape of student"),
        (lambda: cls_cosine_loss(draw(3), draw(3)), r"student: expected a floating tensor \(batch, width\)"),
        (lambda: cls_cosine_loss(*pair(3, 4), variant="mse"), "variant: expected one of"),
        (lambda: phases("pid", 2), "schedule: expected one of"),
        (lambda: phases("all", 0), "layers: expected an integer from 1 on, got 0"),
        (lambda: InternalDistillation("stacked", 2, max_steps=(1,)), "max_steps: expected 2 integers from 1 on"),
        (lambda: InternalDistillation("stacked", 2, max_steps=0), "max_steps: expected 2 integers from 1 on"),
        (lambda: InternalDistillation("stacked", 2, limit=0), "limit: expected a finite number above 0"),
        (lambda: InternalDistillation("all", 2, cosine_weight=-1), "cosine_weight: expected a finite number"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
