"""Jacobian matching and the noise that it stands for: quadrature, closed forms, Monte Carlo, corners."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.methods.jacobian_matching import (
    fisher_directions,
    jacobian_loss,
    output_jacobian,
    random_directions,
    top_class_directions,
)
from kdrefs.nets import build
from kdrefs.noise import noise_expansion
from kdrefs.training import Members

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "jacobian_noise_quadrature_some.npz"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(inputs: int = 5, classes: int = 4, seed: int = 0):
    a, c = draw(7, inputs, seed=seed), draw(classes, 7, seed=seed + 100)
    return lambda x: torch.tanh(x.flatten(1) @ a.T) @ c.T


def jacobian_of(net, x: Tensor) -> Tensor:
    """Row by row with torch's own function, one sample at a time."""
    return torch.stack([torch.func.jacrev(lambda one: net(one[None])[0])(sample) for sample in x])


# ---------------------------------------------------------------- the expected loss under noise


def golden_losses():
    with np.load(GOLDEN, allow_pickle=False) as file:
        values = {
            name.removeprefix("seed0_tanh__"): torch.from_numpy(np.array(file[name])) for name in file.files
        }

    def net(side: str):
        a, b, c, d = (values[f"{side}_{name}"] for name in "AbCd")
        return lambda x: torch.tanh(x @ a.T + b) @ c.T + d

    teacher, student, label = net("teacher"), net("student"), values["y_soft"]
    return values, {
        "sq_logits": lambda x: (teacher(x) - student(x)).square().sum(1),
        "sq_softmax": lambda x: (teacher(x).softmax(1) - student(x).softmax(1)).square().sum(1),
        "ce_distill": lambda x: -(teacher(x).softmax(1) * student(x).log_softmax(1)).sum(1),
        "kl_distill": lambda x: (
            teacher(x).softmax(1) * (teacher(x).log_softmax(1) - student(x).log_softmax(1))
        ).sum(1),
        "ce_label": lambda x: -(label * student(x).log_softmax(1)).sum(1),
        "ce_onehot1": lambda x: -student(x).log_softmax(1)[:, 1],
        "sq_label_softmax": lambda x: (label - student(x).softmax(1)).square().sum(1),
        "sq_label_logits": lambda x: (label - student(x)).square().sum(1),
    }


@pytest.mark.parametrize("name", golden_losses()[1])
def test_expansion_equals_quadrature(name):
    values, losses = golden_losses()
    x = values["x0"][None]
    found = noise_expansion(losses[name], x, 4)
    assert found.value.item() == pytest.approx(values[f"{name}__sigma0"].item(), rel=1e-12)
    assert found.second.item() == pytest.approx(values[f"{name}__c2_exact"].item(), rel=1e-9)
    errors = [abs(found.at(s).item() - values[f"{name}__E_sigma{s}"].item()) for s in (0.05, 0.1, 0.2)]
    # What is left is of sixth order: 64 times more for twice the noise.
    assert errors[0] < 1e-6
    assert 40 < errors[1] / errors[0] < 90
    assert 20 < errors[2] / errors[1] < 150
    second_order = noise_expansion(losses[name], x)
    assert second_order.fourth is None
    assert abs(second_order.at(0.05).item() - values[f"{name}__E_sigma0.05"].item()) > 10 * errors[0]


def test_the_note_s_coefficients_are_others():
    values, losses = golden_losses()
    for name in losses:
        if f"{name}__c2_note" in values:
            exact, note = values[f"{name}__c2_exact"].item(), values[f"{name}__c2_note"].item()
            assert abs(note - exact) > 0.02 * abs(exact), name
    assert values["sq_softmax__c2_exact"] < 0 < values["sq_softmax__c2_note"]


def test_polynomials_have_their_coefficients():
    # f = a|x|⁴ + b·x: Δf = 4 a (D + 2)|x|², Δ²f = 8 a D (D + 2), and nothing of higher order.
    a, b, x = 0.7, draw(6), draw(3, 2, 3)
    found = noise_expansion(lambda x: a * x.flatten(1).square().sum(1) ** 2 + x.flatten(1) @ b, x, 4)
    torch.testing.assert_close(found.second, 2 * a * 8 * x.flatten(1).square().sum(1))
    torch.testing.assert_close(found.fourth, torch.full((3,), a * 6 * 8, dtype=torch.float64))
    # Sixth moments of the norm: E|x + σz|⁴ is a polynomial, known for every σ.
    norm, sigma = x.flatten(1).square().sum(1), 1.3
    exact = a * (norm**2 + 2 * (6 + 2) * sigma**2 * norm + 6 * 8 * sigma**4) + x.flatten(1) @ b
    torch.testing.assert_close(found.at(sigma), exact)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_result_does_not_depend_on_the_chunk(chunk):
    net = smooth()
    x = draw(3, 5)
    expected = noise_expansion(lambda x: net(x).square().sum(1), x, 4)
    found = noise_expansion(lambda x: net(x).square().sum(1), x, 4, chunk=chunk)
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_exact_coefficient_is_half_the_trace_of_the_hessian_of_a_convolutional_net():
    net = build("plain_cnn", in_channels=1, width=4, depth=3, init="he").double()
    x = draw(2, 1, 4, 4)

    def loss(x: Tensor) -> Tensor:
        return -net(x).logits.log_softmax(1)[:, 3]

    found = noise_expansion(loss, x).second
    for sample, value in zip(x, found, strict=True):
        hessian = torch.autograd.functional.hessian(lambda one: loss(one[None])[0], sample)
        assert value.item() == pytest.approx(hessian.reshape(16, 16).trace().item() / 2, rel=1e-9, abs=1e-12)
    assert found.abs().min() > 1e-4


def test_hutchinson_has_the_right_mean_and_error():
    net = smooth()
    x = draw(1, 5)

    def loss(x: Tensor) -> Tensor:
        return -net(x).log_softmax(1)[:, 0]

    exact = noise_expansion(loss, x, 4)
    found = noise_expansion(loss, x.expand(400, -1), 4, probes=64, generator=generator())
    for estimate, error, truth in (
        (found.second, found.second_error, exact.second),
        (found.fourth, found.fourth_error, exact.fourth),
    ):
        deviations = (estimate - truth) / error
        assert abs((estimate - truth).mean() / (estimate.std() / 20)) < 3
        assert 0.9 < deviations.std() < 1.2
    again = noise_expansion(loss, x.expand(400, -1), 2, probes=64, generator=generator())
    assert again.fourth is None
    assert again.fourth_error is None
    torch.testing.assert_close(again.second, found.second)


def test_monte_carlo_agrees_within_its_error():
    net, teacher = smooth(), smooth(seed=1)
    x, sigma, count = draw(1, 5), 0.1, 200_000

    def loss(x: Tensor) -> Tensor:
        return (net(x) - teacher(x)).square().sum(1)

    z = draw(count, 5, seed=5)
    drawn = (loss(x + sigma * z) + loss(x - sigma * z)) / 2
    error = drawn.std() / count**0.5
    found = noise_expansion(loss, x, 4)
    assert abs(drawn.mean() - found.at(sigma)) < 4 * error
    assert abs(drawn.mean() - found.value) > 20 * error


def test_expansion_keeps_no_graph():
    net = nn.Linear(3, 1).double()
    found = noise_expansion(lambda x: net(x).squeeze(1).square(), draw(2, 3).requires_grad_())
    assert not any(value.requires_grad for value in found if value is not None)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": draw(3)}, r"x: expected a floating tensor \(batch, \*input\)"),
        ({"x": draw(3, 2).long()}, "x: expected a floating tensor"),
        ({"order": 3}, "order: expected 2 or 4, got 3"),
        ({"probes": 1, "generator": generator()}, "probes: expected a whole number from 2 on, got 1"),
        ({"probes": 4}, "generator: expected one, since probes are drawn from it, got None"),
        ({"chunk": 0}, "chunk: expected a whole number from 1 on, got 0"),
        ({"loss": lambda x: x.sum()}, r"loss: expected one value a sample \(3,\), got \(\)"),
    ],
)
def test_expansion_s_errors_name_the_argument(unchecked, changes, message):
    arguments = {"loss": lambda x: x.square().sum(1), "x": draw(3, 2)} | changes
    with pytest.raises(ValueError, match=message):
        noise_expansion(arguments.pop("loss"), arguments.pop("x"), **arguments)


# ---------------------------------------------------------------- Jacobians


def test_rows_are_those_of_torch_s_jacobian():
    net, x = smooth(6), draw(3, 2, 3).requires_grad_()
    expected = jacobian_of(net, x.detach())
    outputs = net(x)
    whole = output_jacobian(outputs, x)
    torch.testing.assert_close(whole.detach(), expected)
    directions = draw(3, 2, 4, seed=9)
    rows = output_jacobian(outputs, x, directions)
    torch.testing.assert_close(rows.detach(), torch.einsum("nrk,nkij->nrij", directions, expected))


def test_members_have_their_own_jacobians():
    nets = [build("plain_cnn", in_channels=1, width=4, depth=3, init="he").double() for _ in range(2)]
    x = draw(2, 3, 1, 4, 4).requires_grad_()
    found = output_jacobian(Members(nets)(x).logits, x)
    assert found.shape == (2, 3, 10, 1, 4, 4)
    for member, net in enumerate(nets):
        expected = jacobian_of(lambda one, net=net: net(one).logits, x[member].detach())
        torch.testing.assert_close(found[member].detach(), expected)
    assert found.abs().max() > 1e-3


def test_the_teacher_keeps_no_graph_and_the_student_does():
    net, x = nn.Linear(3, 2).double(), draw(4, 3).requires_grad_()
    outputs = torch.tanh(net(x))
    ours = output_jacobian(outputs, x)
    theirs = output_jacobian(outputs, x, create_graph=False)
    assert ours.requires_grad
    assert not theirs.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    jacobian_loss(ours, 2 * ours).backward()
    assert net.weight.grad.abs().sum() > 0
    assert x.grad is not None


def test_no_gradient_reaches_the_teacher_of_the_loss():
    student, teacher = draw(3, 2, 4).requires_grad_(), draw(3, 2, 4, seed=1).requires_grad_()
    jacobian_loss(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 3)


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"squared": False}, {"normalize": True, "squared": False}]
)
def test_loss_equals_a_plain_loop(options):
    student, teacher = draw(3, 2, 4, 5), draw(3, 2, 4, 5, seed=1)
    total = 0.0
    for s, t in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        if options.get("normalize"):
            s, t = ([v / math.hypot(*row) for v in row] for row in (s, t))
        distance = math.dist(s, t)
        total += distance if options.get("squared") is False else distance**2
    assert jacobian_loss(student, teacher, **options).item() == pytest.approx(total / 3, rel=1e-12)


def test_normalised_loss_is_two_less_two_cosines():
    student, teacher = draw(5, 1, 7), draw(5, 1, 7, seed=1)
    cosine = torch.cosine_similarity(student, teacher, dim=2).mean().item()
    assert jacobian_loss(student, teacher, normalize=True).item() == pytest.approx(2 - 2 * cosine, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"squared": False}])
def test_gradient_is_the_derivative(options):
    teacher = draw(3, 2, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: jacobian_loss(s, teacher, **options), draw(3, 2, 4).requires_grad_()
    )


def test_training_gradient_is_the_derivative_of_the_whole_step():
    # Through the student's Jacobian: central differences of the loss in one weight.
    teacher, x = smooth(seed=3), draw(4, 5)
    weight = draw(4, 5, seed=7)

    def loss(weight: Tensor) -> Tensor:
        images = x.clone().requires_grad_()
        ours = output_jacobian(torch.tanh(images @ weight.T), images)
        return jacobian_loss(ours, jacobian_of(teacher, x))

    assert torch.autograd.gradcheck(loss, weight.requires_grad_())


@given(samples=st.integers(1, 4), rows=st.integers(1, 3), size=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_invariances(samples, rows, size, seed):
    student, teacher = draw(samples, rows, size, seed=seed), draw(samples, rows, size, seed=seed + 1)
    value = jacobian_loss(student, teacher).item()
    rotation = torch.linalg.qr(draw(size, size, seed=seed + 2)).Q
    mixing = torch.linalg.qr(draw(rows, rows, seed=seed + 3)).Q
    same = {
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of rows": (student.flip(1), teacher.flip(1)),
        "copies of the batch": (student.repeat(3, 1, 1), teacher.repeat(3, 1, 1)),
        "rotation of the input": (student @ rotation, teacher @ rotation),
        "rotation of the outputs": (mixing @ student, mixing @ teacher),
    }
    for name, (s, t) in same.items():
        assert jacobian_loss(s, t).item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert jacobian_loss(student, student).item() == 0
    assert jacobian_loss(3 * student, 3 * teacher).item() == pytest.approx(9 * value, rel=1e-9)
    unit = jacobian_loss(student, teacher, normalize=True).item()
    assert 0 <= unit <= 4 + 1e-9
    assert jacobian_loss(1e9 * student, 1e-9 * teacher, normalize=True).item() == pytest.approx(
        unit, rel=1e-9
    )


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"squared": False}, {"normalize": True, "squared": False}]
)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_values_and_gradients_are_finite(options, scale):
    for teacher in (torch.zeros(2, 3, 4), torch.randn(2, 3, 4), scale * torch.randn(2, 3, 4)):
        student = (scale * torch.randn(2, 3, 4)).requires_grad_()
        value = jacobian_loss(student, teacher, **options)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_a_dead_student_has_a_zero_jacobian_and_a_finite_gradient():
    net, x = nn.Linear(3, 4), torch.randn(5, 3).requires_grad_()
    nn.init.constant_(net.bias, -100.0)
    ours = output_jacobian(torch.relu(net(x)), x)
    assert not ours.any()
    for options in ({}, {"normalize": True}, {"squared": False}):
        jacobian_loss(ours, torch.randn_like(ours), **options).backward(retain_graph=True)
    assert net.weight.grad.isfinite().all()


# ---------------------------------------------------------------- directions


def test_top_class_is_one_row_of_the_largest_logit():
    logits = draw(2, 3, 5)
    directions = top_class_directions(logits.requires_grad_())
    assert directions.shape == (2, 3, 1, 5)
    assert not directions.requires_grad
    assert torch.equal(directions.squeeze(2).argmax(-1), logits.argmax(-1))
    assert torch.equal(directions.sum(-1), torch.ones(2, 3, 1, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 3])
def test_random_projection_is_unbiased(count):
    student, teacher = draw(1, 6, 4), draw(1, 6, 4, seed=1)
    whole = jacobian_loss(student, teacher).item()
    samples = 4000
    directions = random_directions(torch.zeros(samples, 6, dtype=torch.float64), count, generator())
    assert directions.shape == (samples, count, 6)
    gap = directions @ (student - teacher)
    each = gap.square().sum((1, 2))
    assert abs(each.mean().item() - whole) < 4 * each.std().item() / samples**0.5
    # Any other scale would be noticed.
    assert each.std().item() / samples**0.5 < 0.03 * whole
    torch.testing.assert_close(directions.abs(), torch.full_like(directions, count**-0.5))


def test_more_probes_have_less_variance():
    gap = draw(6, 4)
    spread = {
        count: (random_directions(torch.zeros(2000, 6, dtype=torch.float64), count, generator(3)) @ gap)
        .square()
        .sum((1, 2))
        .var()
        .item()
        for count in (1, 4)
    }
    assert spread[4] == pytest.approx(spread[1] / 4, rel=0.2)


def test_same_generator_same_directions():
    logits = torch.zeros(3, 4)
    one, two = (random_directions(logits, 2, generator(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, random_directions(logits, 2, generator(6)))


def test_fisher_directions_give_the_divergence_s_coefficient_at_matched_outputs():
    # Any two smooth networks whose outputs agree at x: here by a shift of the logits.
    teacher, other, x = smooth(), smooth(seed=4), draw(3, 5)
    shift = teacher(x) - other(x)

    def divergence(inputs: Tensor) -> Tensor:
        t, s = teacher(inputs).log_softmax(1), (other(inputs) + shift).log_softmax(1)
        return (t.exp() * (t - s)).sum(1)

    exact = noise_expansion(divergence, x).second.mean().item()
    images = x.clone().requires_grad_()
    guide = teacher(images)
    directions = fisher_directions(guide)
    ours = output_jacobian((other(images) + shift).log_softmax(1), images, directions)
    theirs = output_jacobian(guide.log_softmax(1), images, directions, create_graph=False)
    assert jacobian_loss(ours, theirs).item() / 2 == pytest.approx(exact, rel=1e-9)
    plain = jacobian_loss(*(output_jacobian(net(images), images) for net in (other, teacher))).item()
    assert abs(plain / 2 - exact) > 0.05 * exact
    # One random probe is right on average.
    many = guide.detach()[:1].expand(4000, -1)
    probes = fisher_directions(many, random_directions(many, 1, generator()))
    first = (ours - theirs)[:1].detach()
    whole = first.square().sum().item()
    log_gap = first.squeeze(0) / guide[0].softmax(0).sqrt()[:, None].detach()
    each = (probes @ log_gap).square().sum((1, 2))
    assert abs(each.mean().item() - whole) < 4 * each.std().item() / 4000**0.5


def test_squared_error_of_affine_networks_is_outputs_plus_jacobians_exactly():
    a, b, x = draw(4, 5), draw(4, 5, seed=1), draw(3, 5)

    def loss(x: Tensor) -> Tensor:
        return (x @ (a - b).T).square().sum(1)

    found = noise_expansion(loss, x, 4)
    expected = jacobian_loss(a.expand(3, -1, -1), b.expand(3, -1, -1))
    torch.testing.assert_close(found.second, expected.expand(3))
    torch.testing.assert_close(found.fourth, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_probability_too_small_for_its_type_keeps_its_direction():
    directions = fisher_directions(torch.tensor([[0.0, -150.0]]))
    assert directions[0, 1, 1] > 0
    assert directions.isfinite().all()


# ---------------------------------------------------------------- where the loss must work


def test_half_precision_counts_in_single():
    student, teacher = draw(3, 2, 4).bfloat16(), draw(3, 2, 4, seed=1).bfloat16()
    for options in ({}, {"normalize": True}):
        exact = jacobian_loss(student.float(), teacher.float(), **options)
        half = jacobian_loss(student, teacher, **options)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = jacobian_loss(student.float(), teacher.float())
    torch.testing.assert_close(value, jacobian_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"squared": False}])
def test_compile_without_breaks(unchecked, compiler, options):
    student, teacher = draw(3, 2, 4).requires_grad_(), draw(3, 2, 4, seed=1)
    compiled = torch.compile(lambda s, t: jacobian_loss(s, t, **options), fullgraph=True, backend="aot_eager")
    value, expected = compiled(student, teacher), jacobian_loss(student, teacher, **options)
    torch.testing.assert_close(value, expected)
    for one, other in zip(*(torch.autograd.grad(v, student) for v in (value, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_directions_compile_without_breaks(unchecked, compiler):
    logits = draw(3, 5)
    for function in (top_class_directions, fisher_directions):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits), function(logits))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"squared": False}])
def test_mapped_over_members_equals_a_loop(unchecked, options):
    students, teachers = draw(3, 4, 2, 5), draw(3, 4, 2, 5, seed=1)

    def call(s: Tensor, t: Tensor) -> Tensor:
        return jacobian_loss(s, t, **options)

    expected = torch.stack([call(s, t) for s, t in zip(students, teachers, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(students, teachers), expected)
    gradients = torch.stack([torch.func.grad(call)(s, t) for s, t in zip(students, teachers, strict=True)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(call))(students, teachers), gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    expected = jacobian_loss(student, teacher, normalize=True)
    logits = draw(3, 5).cuda()
    on_device = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = jacobian_loss(*on_device, normalize=True)
        value.backward()
        fisher_directions(logits, top_class_directions(logits))
        random_directions(logits, 2, torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


X = draw(4, 3).requires_grad_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jacobian_loss(draw(3, 4), draw(3, 4)),
            r"student: expected a floating tensor \(batch, rows, \*input\)",
        ),
        (lambda: jacobian_loss(draw(3, 2, 4), draw(3, 2, 4).long()), "teacher: expected a floating tensor"),
        (
            lambda: jacobian_loss(draw(3, 2, 4), draw(3, 1, 4)),
            r"teacher: expected the shape of student \(3, 2, 4\), got \(3, 1, 4\)",
        ),
        (lambda: output_jacobian(draw(4), X), r"outputs: expected a floating tensor \(..., batch, classes\)"),
        (
            lambda: output_jacobian(draw(5, 2), X),
            r"inputs: expected a shape that starts with \(5,\), got \(4, 3\)",
        ),
        (lambda: output_jacobian(draw(4, 2), X.detach()), "inputs: expected requires_grad=True"),
        (
            lambda: output_jacobian(X.sin(), X, draw(4, 1, 2)),
            r"directions: expected \(4, rows, 3\), got \(4, 1, 2\)",
        ),
        (
            lambda: random_directions(draw(4, 3), 0, generator()),
            "count: expected a whole number from 1 on, got 0",
        ),
        (lambda: random_directions(draw(4), 1, generator()), "logits: expected a floating tensor"),
        (lambda: top_class_directions(draw(4, 3).long()), "logits: expected a floating tensor"),
        (lambda: fisher_directions(draw(4, 0)), "teacher: expected a floating tensor"),
        (
            lambda: fisher_directions(draw(4, 3), draw(4, 1, 2)),
            r"directions: expected \(4, rows, 3\), got \(4, 1, 2\)",
        ),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
