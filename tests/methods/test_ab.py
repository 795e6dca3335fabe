"""Activation boundaries against the authors' numbers, a plain loop and closed forms; connectors; layer weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.methods.ab import Connector, ab_layer_weights, ab_loss, activation_similarity
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ab_official_margin1.npz"
VARIANTS = (None, "official", "repdistiller", "mean")


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_official_variant_equals_the_authors_code(case):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected, expected_gradient = golden[f"{case}_loss"].item(), golden[f"{case}_grad_s"]
    value, gradient = value_and_gradient(lambda s: ab_loss(s, teacher, variant="official"), student)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("margin", [0.5, 1, 2.0])
def test_surrogate_equals_a_plain_loop(margin):
    student, teacher = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    total = 0.0
    for index in np.ndindex(2, 3, 4, 5):
        label = 1 if teacher[index] > 0 else -1
        total += max(0.0, margin - label * student[index].item()) ** 2
    assert ab_loss(student, teacher, margin=margin).item() == pytest.approx(total / 2, rel=1e-12)


def test_surrogate_equals_the_paper_s_two_masks():
    student, teacher = maps(3, 4, 2, 2), maps(3, 4, 2, 2, seed=1)
    on = (teacher > 0).double()
    parts = on * (1 - student).relu() + (1 - on) * (1 + student).relu()
    assert ab_loss(student, teacher).item() == pytest.approx(parts.square().sum().item() / 3, rel=1e-12)


def test_ideal_form_counts_neurons_on_the_wrong_side():
    student, teacher = maps(4, 3, 2, 2), maps(4, 3, 2, 2, seed=1)
    wrong = sum(
        (student[index].item() > 0) != (teacher[index].item() > 0) for index in np.ndindex(4, 3, 2, 2)
    )
    assert ab_loss(student, teacher, form="ideal").item() == wrong / 4
    assert activation_similarity(student, teacher).item() == pytest.approx(1 - wrong / 48, rel=1e-12)
    assert not ab_loss(student.requires_grad_(), teacher, form="ideal").requires_grad


def test_exactly_zero_is_inactive_on_both_sides():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert ab_loss(one, zero).item() == 4
    assert ab_loss(-one, zero).item() == 0
    assert ab_loss(zero, zero, form="ideal").item() == 0
    assert ab_loss(zero, one, form="ideal").item() == 1


@given(
    samples=st.integers(1, 4),
    channels=st.integers(1, 4),
    side=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    form=st.sampled_from(["surrogate", "ideal"]),
)
def test_variants_differ_by_their_factors(samples, channels, side, seed, form):
    shape = samples, channels, side, side
    student, teacher = maps(*shape, seed=seed), maps(*shape, seed=seed + 1)
    ours = ab_loss(student, teacher, form=form).item()
    factors = {"official": samples, "repdistiller": 0.003, "mean": 1 / (channels * side**2)}
    for variant, factor in factors.items():
        value = ab_loss(student, teacher, form=form, variant=variant).item()
        assert value == pytest.approx(factor * ours, rel=1e-12), variant


@given(samples=st.integers(1, 4), neurons=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_invariances(samples, neurons, seed):
    student, teacher = maps(samples, neurons, seed=seed), maps(samples, neurons, seed=seed + 1)
    value = ab_loss(student, teacher).item()
    same = {
        "the teacher's magnitudes": (student, teacher * maps(samples, neurons, seed=seed + 2).abs()),
        "a teacher of tiny responses": (student, 1e-6 * teacher),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of neurons": (student.flip(1), teacher.flip(1)),
        "copies of the batch": (student.repeat(3, 1), teacher.repeat(3, 1)),
        "both signs turned": (-student, -teacher),
        "a neuron more on its side by the margin": tuple(
            nn.functional.pad(x, (0, 1), value=1) for x in (student, teacher)
        ),
    }
    for name, (s, t) in same.items():
        assert ab_loss(s, t).item() == pytest.approx(value, rel=1e-9), name
    # The hinge is above what it stands for at every margin from 1 on.
    assert value >= ab_loss(student, teacher, form="ideal").item()


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_a_student_on_the_right_side_by_the_margin_costs_nothing(margin):
    teacher = maps(3, 5)
    student = torch.where(teacher > 0, margin, -margin).requires_grad_()
    value, gradient = value_and_gradient(lambda s: ab_loss(s, teacher, margin=margin), student.detach())
    assert value == 0
    assert gradient.abs().max() == 0


def test_loss_behind_a_relu_has_a_floor():
    teacher = maps(3, 8, seed=1)
    inactive = (teacher <= 0).sum().item() / 3
    perfect = torch.where(teacher > 0, 5.0, -5.0).relu()
    assert ab_loss(perfect, teacher, margin=1.5).item() == pytest.approx(1.5**2 * inactive)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_derivative(variant):
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: ab_loss(s, teacher, variant=variant), student)
    if variant is None:
        label = torch.where(teacher > 0, 1.0, -1.0).double()
        gradient = value_and_gradient(lambda s: ab_loss(s, teacher), student.detach())[1]
        torch.testing.assert_close(gradient, -label * (1 - label * student.detach()).relu())


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
@pytest.mark.parametrize("samples", [1, 2])
def test_gradient_is_finite(samples, size):
    student, teacher = size * maps(samples, 3, 2, 2).float(), size * maps(samples, 3, 2, 2, seed=1).float()
    student[:, 1] = student[:, 0]
    teacher[0] = 0
    value, gradient = value_and_gradient(lambda s: ab_loss(s, teacher), student)
    assert np.isfinite(value)
    assert gradient.isfinite().all()


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = maps(2, 3).requires_grad_(), maps(2, 3, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    ab_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_half_precision_counts_in_single():
    # 301 squared is no number of half precision.
    student, teacher = torch.full((1, 4), -300.0).half(), torch.ones(1, 4).half()
    assert ab_loss(student, teacher).item() == 4 * 301**2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ab_loss(maps(2, 3).bfloat16(), maps(2, 3, seed=1).bfloat16())
    exact = ab_loss(maps(2, 3).bfloat16().float(), maps(2, 3, seed=1))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0, atol=0)


def test_compile_without_breaks(unchecked, compiler):
    connector = Connector(3, 4)
    guided, teacher = maps(2, 3, 6, 6).float(), maps(2, 4, 6, 6, seed=1).float()

    def loss(guided: Tensor) -> Tensor:
        return ab_loss(connector(guided), teacher)

    plain = value_and_gradient(loss, guided)
    compiled = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), guided)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(compiled[1], plain[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_over_students(unchecked, variant):
    students, teachers = maps(3, 2, 4, 2, 2), maps(3, 2, 4, 2, 2, seed=1)
    assert_vmap_equals_a_loop(lambda s, t: ab_loss(s, t, variant=variant), students, teachers)


def test_vmap_of_the_ideal_form(unchecked):
    students, teachers = maps(3, 2, 4), maps(3, 2, 4, seed=1)
    each = [activation_similarity(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(torch.vmap(activation_similarity)(students, teachers), torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    expected, expected_gradient = value_and_gradient(lambda s: ab_loss(s, teacher), student)
    on_device, teacher = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = ab_loss(on_device, teacher)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (maps(4), maps(4), {}, r"student: expected a floating tensor \(batch, \.\.\.\)"),
        (maps(4, 2).long(), maps(4, 2), {}, "student: .* got torch.int64"),
        (maps(4, 2), maps(0, 2), {}, r"teacher: .* without an empty dimension, .* shape \(0, 2\)"),
        (maps(4, 2), maps(4, 3), {}, r"teacher: expected the shape of student \(4, 2\), got \(4, 3\)"),
        (maps(4, 2), maps(4, 2), {"margin": 0}, "margin: expected a finite number above 0, got 0"),
        (maps(4, 2), maps(4, 2), {"form": "hinge"}, "form: expected one of .* got 'hinge'"),
        (maps(4, 2), maps(4, 2), {"variant": "kdzoo"}, "variant: expected one of .* got 'kdzoo'"),
    ],
)
def test_errors_name_the_argument(unchecked, student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        ab_loss(student, teacher, **options)


def test_a_list_is_no_tensor(unchecked):
    with pytest.raises(TypeError, match="teacher: expected a tensor, got list"):
        ab_loss(maps(1, 1), [[1.0]])


# Layers


def test_layer_weights_are_the_authors():
    assert ab_layer_weights(3) == pytest.approx((0.003 / 4, 0.003 / 2, 0.003))
    assert ab_layer_weights(4, scale=0.001) == pytest.approx((0.000125, 0.00025, 0.0005, 0.001))


@pytest.mark.parametrize("layers", [0, 2.0, True])
def test_layer_weights_errors(unchecked, layers):
    with pytest.raises(ValueError, match="layers: expected an integer from 1 on"):
        ab_layer_weights(layers)


# The connector


def test_connector_is_a_convolution_without_bias_and_normalisation():
    connector = Connector(3, 5)
    names = {name for name, _ in connector.named_parameters()}
    assert names == {"conv.weight", "bn.weight", "bn.bias"}
    x = torch.randn(4, 3, 2, 2)
    mixed = torch.einsum("oc,nchw->nohw", connector.conv.weight[:, :, 0, 0], x)
    centred = mixed - mixed.mean((0, 2, 3), keepdim=True)
    spread = (centred.square().mean((0, 2, 3), keepdim=True) + connector.bn.eps).sqrt()
    torch.testing.assert_close(connector(x), centred / spread)


def test_training_moves_neurons_to_the_teacher_s_side():
    torch.manual_seed(0)
    images = torch.randn(32, 1, 6, 6)
    teacher, student, connector = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 4, 3), Connector(4, 6)
    optimizer = torch.optim.Adam([*student.parameters(), *connector.parameters()], lr=0.02)
    before = activation_similarity(connector(student(images)), teacher(images))
    for _ in range(100):
        loss = ab_loss(connector(student(images)), teacher(images), variant="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = activation_similarity(connector(student(images)), teacher(images))
    assert after > 0.8 > before
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 3), "student_channels"), ((3, 1.5), "teacher_channels")]
)
def test_connector_s_errors_name_the_argument(unchecked, arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer from 1 on"):
        Connector(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 4, 3, 3), "maps: expected 3 channels, got 4"), ((3, 4, 4), "maps: expected a floating tensor")],
)
def test_other_maps_than_it_was_made_for_are_refused(unchecked, shape, message):
    with pytest.raises(ValueError, match=message):
        Connector(3, 5)(torch.randn(*shape))
