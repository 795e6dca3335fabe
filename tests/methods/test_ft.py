"""Factor transfer against KDZoo's numbers and plain loops; paraphraser and translator; RepDistiller's other loss."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.ft import Paraphraser, Translator, factor_channels, factor_loss, paraphraser_loss
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ft_kdzoo.npz"
FORMS = {
    "paper": {},
    "p = 2": {"p": 2},
    "official": {"variant": "official"},
    "repdistiller": {"variant": "repdistiller"},
}


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The loss


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_official_variant_equals_kdzoo(case):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected, expected_gradient = golden[f"{case}_loss"].item(), golden[f"{case}_grad_s"]
    value, gradient = value_and_gradient(lambda s: factor_loss(s, teacher, variant="official"), student)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)


def unit(sample: Tensor) -> list[float]:
    values = sample.flatten().tolist()
    return [value / math.hypot(*values) for value in values]


@pytest.mark.parametrize("p", [1, 2])
def test_loss_equals_a_plain_loop(p):
    student, teacher = maps(3, 2, 4, 5), maps(3, 2, 4, 5, seed=1)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum(abs(a - b) ** p for a, b in zip(unit(s), unit(t), strict=True)) ** (1 / p)
    assert factor_loss(student, teacher, p=p).item() == pytest.approx(total / 3, rel=1e-12)


def test_repdistiller_variant_equals_its_formula():
    student, teacher = maps(3, 2, 4, 4), maps(3, 5, 8, 8, seed=1)
    pooled = F.adaptive_avg_pool2d(teacher, 4)
    ours, theirs = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, pooled))
    value = factor_loss(student, teacher, variant="repdistiller").item()
    assert value == pytest.approx((ours - theirs).abs().mean().item(), rel=1e-12)


@given(
    samples=st.integers(1, 4),
    channels=st.integers(1, 4),
    side=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_official_variant_is_ours_over_the_values_of_a_sample(samples, channels, side, seed):
    shape = samples, channels, side, side
    student, teacher = maps(*shape, seed=seed), maps(*shape, seed=seed + 1)
    ours = factor_loss(student, teacher).item()
    official = factor_loss(student, teacher, variant="official").item()
    assert official == pytest.approx(ours / (channels * side**2), rel=1e-12, abs=1e-15)


@given(
    samples=st.integers(1, 4),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    form=st.sampled_from(list(FORMS)),
)
def test_invariances(samples, channels, seed, form):
    student, teacher = maps(samples, channels, 2, 3, seed=seed), maps(samples, channels, 2, 3, seed=seed + 1)

    def loss(s: Tensor, t: Tensor) -> float:
        return factor_loss(s, t, **FORMS[form]).item()

    value = loss(student, teacher)
    assert loss(teacher, teacher) == pytest.approx(0, abs=1e-12)
    scales = 10 ** maps(2, samples, 1, 1, 1, seed=seed + 2)
    same = {
        "a scale for each sample": (scales[0] * student, scales[1] * teacher),
        "order of samples": (student.flip(0), teacher.flip(0)),
        "order of channels": (student.flip(1), teacher.flip(1)),
        "order of positions": (student.flip(2), teacher.flip(2)),
        "both signs turned": (-student, -teacher),
        "copies of the batch": (student.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1)),
        "sides": (teacher, student),
    }
    for name, (s, t) in same.items():
        assert loss(s, t) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_repdistiller_s_loss_is_blind_to_signs_and_to_the_channels_order():
    teacher = maps(4, 6, 3, 3)
    signs = maps(1, 6, 3, 3, seed=1).sign()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for stranger in (-teacher, signs * teacher, teacher[:, order]):
        assert factor_loss(stranger, teacher, variant="repdistiller").item() < 1e-12
        assert factor_loss(stranger, teacher).item() > 1
    rotation = torch.linalg.qr(maps(6, 6, seed=2)).Q
    rotated = torch.einsum("oc,nchw->nohw", rotation, teacher)
    assert factor_loss(rotated, teacher, variant="repdistiller").item() < 1e-12


def test_bounds():
    teacher = maps(4, 3, 2, 2)
    values = teacher[0].numel()
    assert factor_loss(-teacher, teacher, p=2).item() == pytest.approx(2)
    other = maps(4, 3, 2, 2, seed=1)
    assert factor_loss(other, teacher, p=2) <= factor_loss(other, teacher) <= 2 * math.sqrt(values)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_derivative(form):
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: factor_loss(s, teacher, **FORMS[form]), student)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("samples", [1, 2])
def test_gradient_is_finite(samples, size, form):
    student, teacher = size * maps(samples, 3, 2, 2).float(), size * maps(samples, 3, 2, 2, seed=1).float()
    student[0] = teacher[0]  # no distance, and no direction where the size is 0
    value, gradient = value_and_gradient(lambda s: factor_loss(s, teacher, **FORMS[form]), student)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_across_the_factor(form):
    """A unit vector cannot grow: the gradient has no part along the student's own factor."""
    student, teacher = maps(3, 2, 2, 2), maps(3, 2, 2, 2, seed=1)
    gradient = value_and_gradient(lambda s: factor_loss(s, teacher, **FORMS[form]), student)[1]
    along = (gradient * student).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    factor_loss(student, teacher).backward()
    paraphraser_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_half_precision_counts_in_single():
    student, teacher = maps(2, 3, 4, 4).bfloat16(), maps(2, 3, 4, 4, seed=1).bfloat16()
    for form in FORMS.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = factor_loss(student, teacher, **form)
        exact = factor_loss(student.double(), teacher.double(), **form)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_compile_without_breaks(unchecked, compiler):
    translator = Translator(3, 4)
    guided, factor = maps(2, 3, 6, 6).float(), maps(2, 4, 6, 6, seed=1).float()

    def loss(guided: Tensor) -> Tensor:
        return factor_loss(translator(guided), factor)

    plain = value_and_gradient(loss, guided)
    compiled = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), guided)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(compiled[1], plain[1])


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_students(unchecked, form):
    students, teachers = maps(3, 2, 4, 2, 2), maps(3, 2, 4, 2, 2, seed=1)
    assert_vmap_equals_a_loop(lambda s, t: factor_loss(s, t, **FORMS[form]), students, teachers)
    assert_vmap_equals_a_loop(paraphraser_loss, students, teachers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_cuda_without_waiting_for_the_device(form):
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    expected, expected_gradient = value_and_gradient(
        lambda s: factor_loss(s, teacher, **FORMS[form]), student
    )
    on_device, teacher = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = factor_loss(on_device, teacher, **FORMS[form])
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (maps(4, 2), maps(4, 2), {}, r"student: expected a floating tensor \(batch, channels"),
        (maps(4, 2, 3, 3), maps(4, 3, 3, 3), {}, r"teacher: expected the shape of student \(4, 2, 3, 3\)"),
        (maps(4, 2, 3, 3), maps(4, 2, 4, 3), {}, r"teacher: expected the shape of student"),
        (maps(4, 2, 3, 3), maps(3, 2, 3, 3), {}, r"teacher: expected as many rows as student"),
        (maps(4, 2, 3, 3), maps(4, 2, 3, 3), {"p": 3}, "p: expected 1 or 2, got 3"),
        (maps(4, 2, 3, 3), maps(4, 2, 3, 3), {"p": 2, "variant": "official"}, "p: the variant 'official' has 1"),
        (maps(4, 2, 3, 3), maps(4, 2, 3, 3), {"variant": "kdzoo"}, "variant: expected one of .* got 'kdzoo'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(unchecked, student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        factor_loss(student, teacher, **options)


# The paraphraser's loss


def test_paraphraser_loss_and_its_variants():
    reconstruction, x = maps(3, 2, 4, 4), maps(3, 2, 4, 4, seed=1)
    gap = reconstruction - x
    assert paraphraser_loss(reconstruction, x).item() == pytest.approx(gap.square().sum().item() / 3)
    assert paraphraser_loss(reconstruction, x, variant="mean").item() == pytest.approx(
        gap.square().mean().item()
    )
    assert paraphraser_loss(reconstruction, x, variant="official").item() == pytest.approx(
        gap.abs().mean().item()
    )
    for variant in (None, "mean", "official"):
        assert torch.autograd.gradcheck(
            lambda r, v=variant: paraphraser_loss(r, x, variant=v), reconstruction.requires_grad_()
        )


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 2, 4, 5), {}, r"maps: expected the shape of reconstruction \(3, 2, 4, 4\)"),
        ((3, 2, 4), {}, "maps: expected a floating tensor"),
        ((3, 2, 4, 4), {"variant": "l1"}, "variant: expected one of .* got 'l1'"),
    ],
)
def test_paraphraser_loss_s_errors(unchecked, shape, options, message):
    with pytest.raises(ValueError, match=message):
        paraphraser_loss(maps(3, 2, 4, 4), maps(*shape), **options)


# The modules


def widths(layers: nn.Sequential) -> list[tuple[type, int, int]]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return [(type(one), one.in_channels, one.out_channels) for one in layers if isinstance(one, kinds)]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_modules_are_the_authors(batch_norm):
    paraphraser = Paraphraser(8, 4, batch_norm=batch_norm)
    conv, back = nn.Conv2d, nn.ConvTranspose2d
    assert widths(paraphraser.encoder) == [(conv, 8, 8), (conv, 8, 4), (conv, 4, 4)]
    assert widths(paraphraser.decoder) == [(back, 4, 4), (back, 4, 8), (back, 8, 8)]
    translator = Translator(6, 4, batch_norm=batch_norm)
    assert widths(translator.layers) == [(conv, 6, 6), (conv, 6, 4), (conv, 4, 4)]
    for layers in (paraphraser.encoder, paraphraser.decoder, translator.layers):
        kinds = [type(one) for one in layers]
        step = [kinds[0], nn.BatchNorm2d, nn.LeakyReLU] if batch_norm else [kinds[0], nn.LeakyReLU]
        assert kinds == 3 * step
        assert {one.negative_slope for one in layers if isinstance(one, nn.LeakyReLU)} == {0.1}
        assert all(one.bias is not None for one in layers if isinstance(one, (conv, back)))
    x = torch.randn(2, 8, 5, 7)
    assert paraphraser.encode(x).shape == (2, 4, 5, 7)
    torch.testing.assert_close(paraphraser.eval()(x), paraphraser.decoder(paraphraser.encode(x)))
    assert paraphraser(x).shape == x.shape


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 32), (0.75, 48), (1, 64), (0.51, 33), (2, 128)])
def test_factor_channels(rate, expected):
    assert factor_channels(64, rate) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factor_channels(64, 0.001), "rate: expected a number that leaves at least one of 64 channels"),
        (lambda: factor_channels(64, True), "rate: expected"),
        (lambda: factor_channels(0, 0.5), "channels: expected an integer from 1 on, got 0"),
        (lambda: Paraphraser(8, 0), "factor: expected an integer from 1 on, got 0"),
        (lambda: Translator(2.0, 4), "channels: expected an integer from 1 on, got 2.0"),
        (lambda: Paraphraser(8, 4)(maps(2, 4, 3, 3)), "maps: expected 8 channels, got 4"),
        (lambda: Translator(8, 4)(maps(8, 3, 3)), "maps: expected a floating tensor"),
    ],
)  # fmt: skip
def test_modules_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_both_stages_on_a_toy():
    torch.manual_seed(0)
    x = torch.randn(32, 8, 4, 4).relu()
    paraphraser = Paraphraser(8, 4)
    optimizer = torch.optim.Adam(paraphraser.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = paraphraser_loss(paraphraser(x), x, variant="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    paraphraser.requires_grad_(False)
    frozen = [parameter.clone() for parameter in paraphraser.parameters()]
    student, translator = nn.Conv2d(8, 3, 1), Translator(3, 4)
    optimizer = torch.optim.Adam([*student.parameters(), *translator.parameters()], lr=0.01)
    losses = []
    for _ in range(60):
        loss = factor_loss(translator(student(x)), paraphraser.encode(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, paraphraser.parameters(), strict=True))
