"""KSANC against golden vectors and plain loops; which loss trains whom; what the estimator depends on."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.methods.ksanc import (
    AttentionEstimator,
    LogitDiscriminator,
    TaskDrivenEstimators,
    ksanc_loss,
    logit_adversarial_loss,
    logit_discriminator_loss,
    weight_penalty,
)
from kdrefs.training import Members, each
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "formula_ksanc_estimator.npz"
READINGS = [(values, pooling) for values in ("lifted", "maps") for pooling in ("sum", "mean")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimator(channels: int = 4, descriptor: int = 6, seed: int = 0, **options) -> AttentionEstimator:
    torch.manual_seed(seed)
    return AttentionEstimator(channels, descriptor, **options).double()


# The attention estimator


@pytest.mark.parametrize(("values", "pooling"), READINGS)
def test_all_four_readings_equal_the_formula(values, pooling):
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    module = estimator(values=values, pooling=pooling)
    with torch.no_grad():
        module.score.weight.copy_(golden["w"].view(1, 4))
        if module.projection is not None:
            module.projection.weight.copy_(golden["Wc"])
    name = f"out_{'avg' if pooling == 'mean' else 'sum'}_{'Lhat' if values == 'lifted' else 'L'}"
    torch.testing.assert_close(module(golden["L"], golden["g"]), golden[name], rtol=1e-9, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_estimator_equals_a_plain_loop(batch, channels, height, width, seed):
    module = estimator(channels, 2, seed, in_channels=channels + 1)
    maps, descriptor = draw(batch, channels + 1, height, width, seed=seed), draw(batch, 2, seed=seed + 1)
    lift, project, score = (one.weight for one in (module.lift, module.projection, module.score))
    found = module(maps, descriptor)
    for b in range(batch):
        columns = []
        for y in range(height):
            for x in range(width):
                columns.append(lift @ maps[b, :, y, x] + project @ descriptor[b])
        scores = [math.exp((score[0] @ column).item()) for column in columns]
        expected = sum(s / sum(scores) * column for s, column in zip(scores, columns, strict=True))
        torch.testing.assert_close(found[b], expected, rtol=1e-9, atol=1e-12)


def test_readings_differ_by_the_positions_and_by_the_projection():
    maps, descriptor = draw(3, 4, 5, 2), draw(3, 6, seed=1)
    full = estimator()
    torch.testing.assert_close(estimator(pooling="mean")(maps, descriptor) * 10, full(maps, descriptor))
    figure = estimator(values="maps")
    figure.score.load_state_dict(full.score.state_dict())
    gap = full(maps, descriptor) - figure(maps, descriptor)
    torch.testing.assert_close(gap, full.projection(descriptor))


def test_attention_sums_to_one_and_does_not_see_the_descriptor():
    module = estimator(in_channels=3)
    maps = draw(2, 3, 4, 5)
    found = module.attention(maps, draw(2, 6, seed=1))
    assert found.shape == (2, 4, 5)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    assert torch.equal(found, module.attention(maps, 100 * draw(2, 6, seed=2)))
    gradient = torch.autograd.grad(found[:, 0, 0].sum(), list(module.parameters()), allow_unused=True)
    named = dict(zip([name for name, _ in module.named_parameters()], gradient, strict=True))
    assert named["projection.weight"] is None
    assert named["score.weight"].abs().sum() > 0


def test_uniform_scores_give_the_average():
    module = estimator(values="maps")
    nn.init.zeros_(module.score.weight)
    maps = draw(2, 4, 3, 3)
    torch.testing.assert_close(module(maps, draw(2, 6)), maps.mean((2, 3)))


@pytest.mark.parametrize(
    "maps", [torch.zeros(2, 4, 3, 3), torch.full((1, 4, 1, 1), 1e12), torch.ones(2, 4, 3, 3)]
)
def test_gradients_are_finite(maps):
    module = AttentionEstimator(5, 3, in_channels=4)
    maps = maps.clone().requires_grad_()
    module(maps, torch.zeros(len(maps), 3)).square().sum().backward()
    assert torch.isfinite(maps.grad).all()
    assert all(torch.isfinite(one.grad).all() for one in module.parameters())


def test_estimator_in_double_is_differentiable():
    module = estimator(3, 2, in_channels=2)
    inputs = draw(2, 2, 2, 2).requires_grad_(), draw(2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(module, inputs)


def test_estimators_of_many_runs_at_once(unchecked):
    modules = [
        TaskDrivenEstimators([estimator(seed=s), estimator(3, 6, seed=s + 5)], 7).double() for s in (0, 1)
    ]
    inputs = draw(2, 5, 6), draw(2, 5, 4, 3, 3, seed=1), draw(2, 5, 3, 2, 2, seed=2)
    found = Members(modules)(*inputs)
    for m, module in enumerate(modules):
        alone = module(*(one[m] for one in inputs))
        torch.testing.assert_close(found.logits[m], alone.logits)
        torch.testing.assert_close(found.features["squeezed"][m], alone.features["squeezed"])
    expected = modules[0].estimators[1](inputs[2][0], inputs[0][0])
    torch.testing.assert_close(found.features["squeezed"][0, :, 4:], expected)
    assert found.logits.shape == (2, 5, 7)


def test_estimator_under_autocast_is_single_precision():
    module = AttentionEstimator(4, 6)
    maps, descriptor = torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(maps, descriptor)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module(maps, descriptor), rtol=3e-2, atol=3e-2)


def test_estimator_compiles_to_one_graph(unchecked, compiler):
    module = estimator(in_channels=3)
    maps, descriptor = draw(2, 3, 4, 4), draw(2, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, descriptor), module(maps, descriptor))


# The discriminator and the losses


def test_discriminator_judges_both_networks_in_one_batch():
    torch.manual_seed(0)
    module = LogitDiscriminator(5, hidden=8).double()
    logits = draw(6, 5)
    first, second = module(logits, 10 * logits)
    assert first.shape == second.shape == (6, 6)
    assert (first - second).abs().max() > 0.1  # normalised alone, both would be the same numbers
    together = module.layers(torch.cat([logits, 10 * logits]))
    torch.testing.assert_close(torch.cat([first, second]), together)
    kinds = [type(layer).__name__ for layer in module.layers]
    assert kinds == [
        "BatchNorm1d",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    assert torch.isfinite(torch.cat(module(draw(1, 5), draw(1, 5, seed=1)))).all()


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 2), st.integers(0, 2**16))
def test_losses_equal_plain_loops(batch, classes, mu, seed):
    theirs, ours = draw(batch, 1 + classes, seed=seed), draw(batch, 1 + classes, seed=seed + 1)
    labels = torch.arange(batch) % classes
    judged = fooled = 0.0
    for t, s, y in zip(theirs, ours, labels, strict=True):
        real, fake = t[0].sigmoid().item(), s[0].sigmoid().item()
        judged -= math.log(real) + math.log(1 - fake) + mu * math.log(fake)
        judged -= t[1:].softmax(0)[y].log().item() + s[1:].softmax(0)[y].log().item()
        fooled += math.log(1 - fake) - s[1:].softmax(0)[y].log().item()
    assert logit_discriminator_loss(theirs, ours, labels, mu=mu).item() == pytest.approx(
        judged / batch, rel=1e-9
    )
    assert logit_adversarial_loss(ours, labels).item() == pytest.approx(fooled / batch, rel=1e-9, abs=1e-12)

    student, teacher = draw(batch, classes, seed=seed + 2), draw(batch, classes, seed=seed + 3)
    squeezed, target = draw(batch, 4, seed=seed + 4), draw(batch, 4, seed=seed + 5)
    total = 0.2 * fooled
    for z, v, g, h in zip(student, teacher, squeezed, target, strict=True):
        total += 0.5 * sum((a - b) ** 2 for a, b in zip(z.tolist(), v.tolist(), strict=True))
        total += 0.3 * sum((a - b) ** 2 for a, b in zip(g.tolist(), h.tolist(), strict=True))
    weights = {"backbone": 0.5, "adversarial": 0.2, "intermediate": 0.3}
    got = ksanc_loss(student, teacher, ours, labels, squeezed, target, **weights)
    assert got.item() == pytest.approx(total / batch, rel=1e-9, abs=1e-12)


def test_gradients_are_the_derivatives():
    answers, other, labels = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_(), torch.arange(4)
    assert torch.autograd.gradcheck(
        lambda t, s: logit_discriminator_loss(t, s, labels, mu=0.3), (answers, other)
    )
    assert torch.autograd.gradcheck(lambda s: logit_adversarial_loss(s, labels), other)
    student, squeezed = draw(4, 5).requires_grad_(), draw(4, 7).requires_grad_()
    teacher, target = draw(4, 5, seed=1), draw(4, 7, seed=1)
    call = lambda z, a, g: ksanc_loss(z, teacher, a, labels, g, target)  # noqa: E731
    assert torch.autograd.gradcheck(call, (student, answers, squeezed))


def test_teacher_gets_no_gradient():
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    squeezed, target = draw(3, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    ksanc_loss(student, teacher, None, None, squeezed, target).backward()
    assert teacher.grad is None
    assert target.grad is None
    assert student.grad.abs().sum() > 0
    assert squeezed.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("batch", [1, 2])
def test_loss_gradients_are_finite(size, batch):
    labels = torch.zeros(batch, dtype=torch.int64)
    answers = (size * torch.ones(batch, 4)).requires_grad_()
    student = (size * torch.ones(batch, 3)).requires_grad_()
    loss = ksanc_loss(student, torch.zeros(batch, 3), answers, labels)
    (loss + logit_discriminator_loss(-answers, answers, labels, mu=1.0)).backward()
    assert torch.isfinite(answers.grad).all()
    assert torch.isfinite(student.grad).all()


def test_discriminator_and_student_want_opposite_answers_but_the_same_classes():
    ours, theirs, labels = draw(5, 4), draw(5, 4, seed=1), torch.arange(5) % 3
    _, judging = value_and_gradient(lambda a: logit_discriminator_loss(theirs, a, labels), ours)
    _, fooling = value_and_gradient(lambda a: logit_adversarial_loss(a, labels), ours)
    assert (judging[:, 0] * fooling[:, 0] < 0).all()
    torch.testing.assert_close(judging[:, 1:], fooling[:, 1:])


def test_weight_penalty_is_that_of_every_weight(unchecked):
    torch.manual_seed(0)
    modules = [LogitDiscriminator(3, hidden=4) for _ in range(2)]
    for module in modules:
        expected = sum(abs(w) + w * w for p in module.parameters() for w in p.flatten().tolist())
        assert weight_penalty(module.parameters()).item() == pytest.approx(expected, rel=1e-5)
    total = sum(weight_penalty(module.parameters()).item() for module in modules)
    assert weight_penalty(Members(modules).parameters()).item() == pytest.approx(total, rel=1e-5)


def test_losses_of_many_runs_at_once(unchecked):
    tensors = [draw(3, 4, 5, seed=k) for k in range(4)] + [draw(3, 4, 6, seed=k) for k in (5, 6)]
    student, teacher, squeezed, target, theirs, ours = tensors
    labels = torch.arange(12).view(3, 4) % 5
    found = each(ksanc_loss)(student, teacher, ours, labels, squeezed, target)
    judged = each(logit_discriminator_loss)(theirs, ours, labels, mu=0.1)
    for m in range(3):
        alone = ksanc_loss(student[m], teacher[m], ours[m], labels[m], squeezed[m], target[m])
        torch.testing.assert_close(found[m], alone)
        torch.testing.assert_close(judged[m], logit_discriminator_loss(theirs[m], ours[m], labels[m], mu=0.1))


def test_mistakes_are_named(unchecked):
    maps, logits, labels = torch.zeros(2, 4, 3, 3), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    module = AttentionEstimator(4, 6)
    for call, message in {
        (lambda: AttentionEstimator(0, 6)): "channels must be a positive integer",
        (lambda: AttentionEstimator(4, 6, values="both")): "values: expected one of",
        (lambda: AttentionEstimator(4, 6, pooling="max")): "pooling: expected one of",
        (lambda: module(torch.zeros(2, 3, 3, 3), torch.zeros(2, 6))): "maps: expected 4 channels, got 3",
        (lambda: module(maps, torch.zeros(2, 5))): "descriptor: expected 6 channels, got 5",
        (lambda: module(maps, torch.zeros(3, 6))): "descriptor: expected as many rows as maps",
        (lambda: module(maps[0], torch.zeros(2, 6))): "maps: expected a floating tensor",
        (lambda: TaskDrivenEstimators([], 5)): "estimators must be a positive integer",
        (lambda: LogitDiscriminator(5)(logits, torch.zeros(2, 4))): "student: expected the shape of teacher",
        (lambda: logit_adversarial_loss(torch.zeros(2, 1), labels)): r"student: expected \(batch, 1 \+ classes\)",
        (lambda: logit_adversarial_loss(logits, labels.float())): "labels: expected class indices",
        (lambda: logit_discriminator_loss(logits, logits, labels[:1])): "labels: expected as many rows",
        (lambda: weight_penalty([])): "parameters: expected at least one tensor",
        (lambda: ksanc_loss(logits, torch.zeros(2, 4))): "teacher: expected the shape of student",
        (lambda: ksanc_loss(logits, logits, logits)): "labels: expected class indices with answers",
        (lambda: ksanc_loss(logits, logits, squeezed=logits)): "target: expected a tensor",
        (lambda: ksanc_loss(logits, logits, None, None, logits[:1], logits[:1])): "squeezed: expected as many rows",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
