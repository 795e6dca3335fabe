"""EnD² against the authors' numbers, plain loops, sampled Dirichlets, closed forms and the corners of its arguments."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import Tensor

from kdrefs.divergences import softened_kl
from kdrefs.methods.end2 import (
    dirichlet_uncertainty,
    end2_loss,
    end_loss,
    ensemble_uncertainty,
    temperature_schedule,
)
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LOSSES = {"EnDLoss": end_loss, "DirichletEnDDLoss": end2_loss}


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"end2_priornetworks_{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides(seed: int = 0) -> tuple[Tensor, Tensor]:
    return 2 * logits(4, 5, seed=seed), 2 * logits(4, 7, 5, seed=seed + 1)


# The authors' numbers


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize("temperature", ["1.0", "2.5", "10.0"])
@pytest.mark.parametrize("name", LOSSES)
def test_official_losses_equal_the_authors(name, temperature, case):
    fields = golden("losses")
    members = fields[f"{case}_t"]
    options = {"temperature": float(temperature)}
    value, gradient = value_and_gradient(
        lambda s: LOSSES[name](s, members, variant="official", **options), fields[f"{case}_s"]
    )
    key = f"{name}_T{temperature}_{case}"
    assert value == pytest.approx(fields[f"{key}_loss"].item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, fields[f"{key}_grad_s"], rtol=1e-9, atol=1e-12)
    ours, our_gradient = value_and_gradient(
        lambda s: LOSSES[name](s, members, **options), fields[f"{case}_s"]
    )
    if name == "EnDLoss":  # per class, and a cross-entropy
        torch.testing.assert_close(our_gradient, members.shape[2] * gradient)
    else:
        assert ours == pytest.approx(value, rel=1e-5)
        torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_uncertainties_equal_the_authors(case):
    fields = golden("uncertainties")
    members = fields[f"{case}_ens_probs"].log()
    count = members.shape[1]
    pairs = {
        "ens": (ensemble_uncertainty(members), count**2),
        "dpn": (dirichlet_uncertainty(fields[f"{case}_dpn_logits"]), 1),
    }
    for side, (found, summed) in pairs.items():
        theirs = {
            "entropy_of_expected": found.total,
            "expected_entropy": found.data,
            "mutual_information": found.knowledge,
            "EPKL": summed * found.epkl,  # theirs adds up all pairs of members
        }
        for measure, ours in theirs.items():  # 1e-10 stands inside their logarithms
            torch.testing.assert_close(ours, fields[f"{case}_{side}_{measure}"], rtol=1e-6, atol=1e-8)


def test_schedule_equals_the_authors():
    temps = golden("tempschedule")["temps"]
    assert [temperature_schedule(epoch) for epoch in range(60)] == pytest.approx(temps.tolist(), rel=1e-12)


# Plain loops and closed forms


def loop(student: Tensor, ensemble: Tensor, temperature: float, smoothing: float) -> float:
    """Mean log-density of the members, by its definition."""
    total = 0.0
    for z, members in zip(student.numpy(), ensemble.numpy(), strict=True):
        alpha = np.exp(z / temperature)
        for v in members:
            pi = special.softmax(v / temperature)
            pi = (1 - smoothing) * pi + smoothing / len(pi)
            log_density = special.gammaln(alpha.sum()) - special.gammaln(alpha).sum()
            total -= log_density + ((alpha - 1) * np.log(pi)).sum()
    return temperature**2 * total / (len(student) * ensemble.shape[1])


@pytest.mark.parametrize("smoothing", [0, 1e-3, 0.3])
@pytest.mark.parametrize("temperature", [0.5, 1, 10.0])
def test_losses_equal_plain_loops(temperature, smoothing):
    student, ensemble = sides()
    value = end2_loss(student, ensemble, temperature=temperature, smoothing=smoothing).item()
    assert value == pytest.approx(loop(student, ensemble, temperature, smoothing), rel=1e-10)
    mean = special.softmax(ensemble.numpy() / temperature, axis=2).mean(1)
    q = special.softmax(student.numpy() / temperature, axis=1)
    expected = temperature**2 * (mean * np.log(mean / q)).sum(1).mean()
    assert end_loss(student, ensemble, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)


def test_one_member_is_distillation():
    student, ensemble = sides()
    one = ensemble[:, :1]
    torch.testing.assert_close(
        end_loss(student, one, temperature=3.0), softened_kl(student, one[:, 0], temperature=3.0)
    )


def test_likelihood_equals_torchs_dirichlet():
    student, ensemble = sides()
    pi = 0.999 * ensemble.softmax(2) + 0.001 / 5
    expected = -torch.distributions.Dirichlet(student.exp().unsqueeze(1)).log_prob(pi).mean()
    torch.testing.assert_close(end2_loss(student, ensemble), expected)


def test_a_sampled_dirichlet_is_found_again():
    # Enough draws of a Dirichlet as members: the likelihood is largest at its own concentrations.
    alpha = torch.tensor([[4.0, 2.0, 1.0]]).double()
    draws = np.random.default_rng(0).dirichlet(alpha[0].numpy(), 20_000)
    members = torch.from_numpy(np.log(draws)).unsqueeze(0)
    _, gradient = value_and_gradient(lambda z: end2_loss(z, members, smoothing=0), alpha.log())
    assert gradient.abs().max() < 0.03
    for factor in (0.5, 2.0):
        assert end2_loss((factor * alpha).log(), members, smoothing=0) > end2_loss(
            alpha.log(), members, smoothing=0
        )


def test_members_that_agree_have_no_best_precision():
    # At their common prediction the loss falls by (K - 1) / 2 for each e-fold of the precision, smoothed or not.
    common = logits(1, 4)
    members = common.unsqueeze(1).repeat(1, 3, 1)
    for smoothing in (0, 1e-3):
        target = ((1 - smoothing) * common.softmax(1) + smoothing / 4).log()
        values = [end2_loss(target + shift, members, smoothing=smoothing).item() for shift in (10, 11, 20)]
        assert values[1] - values[0] == pytest.approx(-1.5, abs=1e-3)
        assert values[2] - values[0] == pytest.approx(-15, abs=2e-3)


def test_best_precision_of_members_that_nearly_agree():
    # (K - 1) / 2δ with δ = -log Σ exp(mean log π), the deficit of the geometric mean.
    common = logits(1, 4)
    members = common.unsqueeze(1) + 0.02 * logits(1, 6, 4, seed=3)
    geometric = members.log_softmax(2).mean(1)
    deficit = -geometric.logsumexp(1).item()
    z = (geometric.log_softmax(1) + math.log(1.5 / deficit)).detach()
    _, gradient = value_and_gradient(lambda s: end2_loss(s, members, smoothing=0), z)
    assert (
        abs(gradient.sum().item()) < 1e-3
    )  # along the precision, where the slope is 1.5 without the first term


def test_dirichlet_uncertainties_equal_sampling():
    z = torch.tensor([[0.5, 1.5, -1.0], [3.0, 2.0, 2.5]]).double()
    found = dirichlet_uncertainty(z)
    for row, alpha in enumerate(z.exp().numpy()):
        one, other = np.random.default_rng(row).dirichlet(alpha, (2, 200_000))
        mean = alpha / alpha.sum()
        total, data = special.entr(mean).sum(), special.entr(one).sum(1).mean()
        pairs = special.rel_entr(one, other).sum(1).mean()
        assert found.total[row].item() == pytest.approx(total, rel=1e-12)
        assert found.data[row].item() == pytest.approx(data, rel=5e-3)
        assert found.knowledge[row].item() == pytest.approx(total - data, rel=2e-2)
        assert found.epkl[row].item() == pytest.approx(pairs, rel=3e-2)


def test_ensemble_uncertainties_equal_plain_loops():
    members = sides()[1].numpy()
    found = ensemble_uncertainty(torch.from_numpy(members))
    for row, v in enumerate(members):
        pi = special.softmax(v, axis=1)
        pairs = [special.rel_entr(a, b).sum() for a in pi for b in pi]
        total, data = special.entr(pi.mean(0)).sum(), special.entr(pi).sum(1).mean()
        expected = total, data, total - data, np.mean(pairs)
        assert [part[row].item() for part in found] == pytest.approx(expected, rel=1e-10)


def test_many_draws_of_a_dirichlet_have_its_uncertainties():
    z = torch.tensor([1.0, 0.0, 2.0]).double()
    draws = np.random.default_rng(1).dirichlet(z.exp().numpy(), 50_000)
    for one, other in zip(
        dirichlet_uncertainty(z), ensemble_uncertainty(torch.from_numpy(np.log(draws))), strict=True
    ):
        assert one.item() == pytest.approx(other.item(), rel=2e-2)


# Digits at high and low precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [-30, -5, 0, 5, 20, 45])
def test_every_precision_has_its_digits(shift, dtype):
    mpmath = pytest.importorskip("mpmath")
    z = (logits(1, 4) + shift).to(dtype)
    members = (logits(1, 3, 4, seed=1)).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    with mpmath.workdps(60):
        alpha = [mpmath.e ** mpmath.mpf(x) for x in z[0].tolist()]
        a0 = sum(alpha)
        rows = [[mpmath.e ** mpmath.mpf(x) for x in row] for row in members[0].tolist()]
        mean_log = [sum(mpmath.log(row[c] / sum(row)) for row in rows) / 3 for c in range(4)]
        nll = sum(mpmath.loggamma(a) - (a - 1) * g for a, g in zip(alpha, mean_log, strict=True))
        nll -= mpmath.loggamma(a0)
        knowledge = sum(
            a / a0 * (mpmath.digamma(a + 1) - mpmath.digamma(a0 + 1) - mpmath.log(a / a0)) for a in alpha
        )
        slopes = [
            a * (mpmath.digamma(a) - mpmath.digamma(a0) - g) for a, g in zip(alpha, mean_log, strict=True)
        ]
    value, gradient = value_and_gradient(lambda s: end2_loss(s, members, smoothing=0), z)
    assert value == pytest.approx(float(nll), rel=tolerance)
    expected = [float(slope) for slope in slopes]
    assert gradient[0].tolist() == pytest.approx(
        expected, rel=tolerance, abs=tolerance * max(map(abs, expected))
    )
    assert dirichlet_uncertainty(z).knowledge.item() == pytest.approx(float(knowledge), rel=tolerance)


def test_gradients_are_the_derivatives():
    student, ensemble = sides()
    for loss in LOSSES.values():
        for options in ({}, {"temperature": 3.0}, {"variant": "official"}):
            assert torch.autograd.gradcheck(
                lambda s, f=loss, o=options: f(s, ensemble, **o), student.clone().requires_grad_()
            )
    wide = torch.linspace(-3, 5, 12).double().view(3, 4)  # both sides of where the series begins
    assert torch.autograd.gradcheck(lambda z: tuple(dirichlet_uncertainty(z)), wide.requires_grad_())
    assert torch.autograd.gradcheck(lambda z: tuple(ensemble_uncertainty(z)), ensemble.requires_grad_())


def test_members_get_no_gradient_and_inputs_stay():
    student, ensemble = sides()
    before = student.clone(), ensemble.clone()
    for loss in LOSSES.values():
        student.requires_grad_(), ensemble.requires_grad_()
        loss(student, ensemble).backward()
        assert ensemble.grad is None
    for now, then in zip((student, ensemble), before, strict=True):
        assert torch.equal(now, then)


# Invariances and corners


@given(
    batch=st.integers(1, 4),
    members=st.integers(1, 5),
    classes=st.integers(1, 5),
    scale=st.floats(0.1, 20),
    seed=st.integers(0, 2**16),
)
def test_invariances(batch, members, classes, scale, seed):
    student, ensemble = (
        logits(batch, classes, seed=seed),
        scale * logits(batch, members, classes, seed=seed + 1),
    )
    for loss in LOSSES.values():
        value = loss(student, ensemble).item()
        same = {
            "order of members": (student, ensemble.flip(1)),
            "order of samples": (student.flip(0), ensemble.flip(0)),
            "order of classes": (student.flip(1), ensemble.flip(2)),
            "a constant a member": (student, ensemble + logits(batch, members, 1, seed=seed + 2)),
            "members twice": (student, ensemble.repeat(1, 2, 1)),
        }
        for name, (s, e) in same.items():
            assert loss(s, e).item() == pytest.approx(value, rel=1e-9, abs=1e-9), name
    found = ensemble_uncertainty(ensemble)
    torch.testing.assert_close(found.total, found.data + found.knowledge, rtol=1e-9, atol=1e-12)
    assert (found.knowledge >= -1e-12).all()
    assert (found.epkl >= found.knowledge - 1e-12).all()
    assert (found.total <= math.log(classes) + 1e-12).all()
    of_student = dirichlet_uncertainty(student)
    torch.testing.assert_close(
        of_student.total, of_student.data + of_student.knowledge, rtol=1e-9, atol=1e-12
    )
    assert (of_student.knowledge >= -1e-12).all()
    assert (of_student.epkl >= of_student.knowledge - 1e-12).all()


def test_only_the_distribution_sees_the_precision():
    student, ensemble = sides()
    torch.testing.assert_close(end_loss(student + 3, ensemble), end_loss(student, ensemble))
    assert abs(end2_loss(student + 3, ensemble) - end2_loss(student, ensemble)) > 1
    near, far = dirichlet_uncertainty(student), dirichlet_uncertainty(student + 3)
    torch.testing.assert_close(near.total, far.total)
    assert (far.knowledge < 0.1 * near.knowledge).all()


def test_one_class_and_one_member():
    one = torch.zeros(2, 1).double()
    assert [part.tolist() for part in dirichlet_uncertainty(one)] == [[0, 0]] * 4
    assert end2_loss(one, torch.zeros(2, 3, 1).double()).item() == 0
    alone = ensemble_uncertainty(logits(2, 1, 4))
    assert alone.knowledge.abs().max() < 1e-12
    assert alone.epkl.abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e3, 1e12])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_logits_keep_value_and_gradient_finite(scale, batch):
    student, ensemble = logits(batch, 4).float(), logits(batch, 3, 4, seed=1).float()
    student[-1] = student[0]
    for loss in LOSSES.values():
        for s, e in (
            (scale * student, ensemble),
            (student, scale * ensemble),
            (scale * student, scale * ensemble),
        ):
            value, gradient = value_and_gradient(lambda x, f=loss, e=e: f(x, e), s)
            assert math.isfinite(value)
            assert gradient.isfinite().all()
    for part in dirichlet_uncertainty(scale * student):
        assert part.isfinite().all() or scale > 80  # the EPKL of a precision below e^-88 is beyond float32
    for part in ensemble_uncertainty(scale * ensemble):
        assert part.isfinite().all()


def test_half_precision_counts_in_single():
    student, ensemble = (x.bfloat16() for x in sides())
    for loss in LOSSES.values():
        exact = loss(student.float(), ensemble.float())
        torch.testing.assert_close(loss(student, ensemble), exact, rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(loss(student.float(), ensemble.float()), exact, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_compile_without_breaks(unchecked, compiler, loss):
    student, ensemble = (x.float() for x in sides())
    plain = value_and_gradient(lambda s: loss(s, ensemble, temperature=2.0), student)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(lambda s: compiled(s, ensemble, temperature=2.0), student)
    assert value == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(gradient, plain[1])


@pytest.mark.parametrize("loss", LOSSES.values())
def test_vmap_over_students(unchecked, loss):
    assert_vmap_equals_a_loop(loss, logits(3, 4, 5), logits(3, 4, 2, 5, seed=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_without_waiting_for_the_device():
    student, ensemble = sides()
    for loss in LOSSES.values():
        expected, expected_gradient = value_and_gradient(lambda s, f=loss: f(s, ensemble), student)
        on_device, members = student.cuda().requires_grad_(), ensemble.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(on_device, members)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.item() == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


# The schedule, errors


@given(epoch=st.floats(0, 200), hold=st.floats(0, 50), decay=st.floats(0.1, 50))
def test_schedule_lies_between_its_ends_and_never_rises(epoch, hold, decay):
    options = {"initial": 8.0, "final": 2.0, "hold": hold, "decay": decay}
    now, later = temperature_schedule(epoch, **options), temperature_schedule(epoch + 1, **options)
    assert 2 <= later <= now <= 8
    assert temperature_schedule(hold, **options) == 8
    assert temperature_schedule(hold + decay + 1e-6, **options) == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": logits(4)}, r"student: expected a floating tensor \(batch, features\)"),
        ({"ensemble": logits(4, 5)}, r"ensemble: expected a floating tensor \(batch, members, classes\)"),
        (
            {"ensemble": logits(4, 0, 5)},
            r"ensemble: .* all at least 1, got torch.float64 of shape \(4, 0, 5\)",
        ),
        ({"ensemble": logits(4, 2, 5).long()}, "ensemble: expected a floating tensor"),
        ({"ensemble": logits(3, 2, 5)}, r"ensemble: expected as many rows as student \(4\), got 3"),
        ({"ensemble": logits(4, 2, 6)}, r"ensemble: expected as many classes as student \(5\), got 6"),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"smoothing": 1}, "smoothing: expected a number from 0 to below 1, got 1"),
        ({"smoothing": -0.1}, "smoothing: expected a number from 0 to below 1, got -0.1"),
        ({"variant": "authors"}, r"variant: expected one of \['official'\], got 'authors'"),
    ],
)
def test_errors_name_the_argument(unchecked, arguments, message):
    student, ensemble = sides()
    given = {"student": student, "ensemble": ensemble} | arguments
    with pytest.raises(ValueError, match=message):
        end2_loss(**given)
    if "smoothing" not in arguments:
        with pytest.raises(ValueError, match=message):
            end_loss(**given)


def test_errors_of_the_other_functions(unchecked):
    with pytest.raises(ValueError, match=r"logits: expected a floating tensor \(..., classes\)"):
        dirichlet_uncertainty(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits: expected a floating tensor \(..., members, classes\)"):
        ensemble_uncertainty(logits(4))
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        dirichlet_uncertainty([1.0])
    for name, value in (("initial", 0), ("final", -1.0), ("decay", 0), ("epoch", -1), ("hold", math.inf)):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
            temperature_schedule(**{"epoch": 1, name: value})
