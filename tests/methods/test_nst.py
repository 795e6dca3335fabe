"""Neuron selectivity transfer against other codes' numbers, plain loops, closed forms and its identities."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.at import at_loss, attention_map
from kdrefs.methods.nst import nst_loss
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KERNELS = {
    "linear": {"kernel": "linear"},
    "polynomial": {},
    "polynomial, c = 0.7": {"offset": 0.7},
    "degree 1": {"degree": 1},
    "degree 1, c = 2": {"degree": 1, "offset": 2.0},
    "degree 3": {"degree": 3},
    "degree 3, c = 1": {"degree": 3, "offset": 1},
    "gaussian": {"kernel": "gaussian", "bandwidth": 0.8},
    "gaussian, own width": {"kernel": "gaussian"},
}
FIXED = [name for name in KERNELS if name != "gaussian, own width"]
VARIANTS = (None, "official")
# Degree 2 is computed over the channels with the first pair of shapes and over the positions with the second.
ROUTES = {"channels": ((2, 3, 4, 4), (2, 5, 4, 4)), "positions": ((2, 7, 2, 1), (2, 5, 2, 1))}


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(route: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = ROUTES[route]
    return maps(*student, dtype=dtype), maps(*teacher, seed=1, dtype=dtype)


# Other codes' numbers


def golden(name: str, case: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        fields = {key: torch.from_numpy(value) for key, value in arrays.items() if f"c{case}_" in key}
    return fields[f"c{case}_s"], fields[f"c{case}_t"], fields


@pytest.mark.parametrize("case", range(5))
def test_default_equals_repdistiller(case):
    student, teacher, fields = golden("nst_repdistiller", case)
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher), student)
    assert value == pytest.approx(fields[f"c{case}_loss"].item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, fields[f"c{case}_grad_s"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"kernel": "linear"}),
        ("poly", {}),
        ("gauss_sig2_05", {"kernel": "gaussian", "bandwidth": 0.5}),
    ],
)
def test_kernels_equal_the_formula_in_numpy(name, options, case):
    student, teacher, fields = golden("formula_nst_kernels", case)
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **options), student)
    assert value == pytest.approx(fields[f"{name}_c{case}_loss"].item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, fields[f"{name}_c{case}_grad_s"], rtol=1e-6, atol=1e-8)


# Plain loops and closed forms


def unit_vectors(sample: Tensor) -> list[list[float]]:
    rows = [channel.flatten().tolist() for channel in sample]
    return [[value / (math.hypot(*row) or 1) for value in row] for row in rows]


def loop_kernel(x: list[float], y: list[float], options: dict, width: float) -> float:
    product = sum(a * b for a, b in zip(x, y, strict=True))
    match options.get("kernel", "polynomial"):
        case "linear":
            return product
        case "gaussian":
            return math.exp(-(math.dist(x, y) ** 2) / (2 * width))
        case _:
            return (product + options.get("offset", 0)) ** options.get("degree", 2)


def loop_loss(student: Tensor, teacher: Tensor, options: dict, variant: str | None) -> float:
    samples = [(unit_vectors(s), unit_vectors(t)) for s, t in zip(student, teacher, strict=True)]
    distances = [math.dist(x, y) ** 2 for s, t in samples for x in s for y in t]
    width = options.get("bandwidth") or sum(distances) / len(distances)

    def mean(xs: list, ys: list) -> float:
        return sum(loop_kernel(x, y, options, width) for x in xs for y in ys) / (len(xs) * len(ys))

    total = 0.0
    for s, t in samples:
        total += mean(s, s) - 2 * mean(t, s) + (mean(t, t) if variant is None else 0)
    return total / len(samples)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KERNELS)
def test_loss_equals_a_plain_loop(name, variant, route):
    student, teacher = pair(route)
    student[0, 1] = 0  # a channel that never fires has the feature 0
    loss = nst_loss(student, teacher, variant=variant, **KERNELS[name]).item()
    assert loss == pytest.approx(loop_loss(student, teacher, KERNELS[name], variant), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("channels", range(1, 12))
def test_both_routes_agree(channels):
    # 3 x 3 positions: more channels than that are cheaper over the positions. Twice the channels, the same loss.
    student, teacher = maps(2, channels, 3, 3), maps(2, 4, 3, 3, seed=1)
    value = nst_loss(student, teacher).item()
    assert nst_loss(student.repeat(1, 9, 1, 1), teacher).item() == pytest.approx(value, rel=1e-10)
    assert nst_loss(student, teacher.repeat(1, 9, 1, 1)).item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    # Orthogonal unit vectors, one a side: k(x, x) + k(y, y) - 2 k(x, y).
    [
        ({"kernel": "linear"}, 2.0),
        ({}, 2.0),
        ({"offset": 1.0}, 4 + 4 - 2),
        ({"degree": 3, "offset": 1.0}, 8 + 8 - 2),
        ({"kernel": "gaussian", "bandwidth": 2.0}, 2 - 2 * math.exp(-1 / 2)),
        ({"kernel": "gaussian"}, 2 - 2 * math.exp(-1 / 2)),
    ],
)
def test_two_orthogonal_channels_have_the_closed_form(options, expected):
    student, teacher = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 0.2]]]])
    assert nst_loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("route", ROUTES)
def test_official_leaves_out_the_teacher_s_own_term(name, route):
    student, teacher = pair(route)
    options = KERNELS[name]
    ours, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **options), student)
    theirs, same = value_and_gradient(lambda s: nst_loss(s, teacher, variant="official", **options), student)
    torch.testing.assert_close(same, gradient, rtol=1e-10, atol=1e-14)
    if name != "gaussian, own width":  # whose width would change with the student
        # Against itself the teacher's own term is all that is missing.
        own = -nst_loss(teacher, teacher, variant="official", **options).item()
        assert theirs == pytest.approx(ours - own, rel=1e-10)


def test_official_value_may_be_negative():
    student, teacher = pair("channels")
    assert nst_loss(teacher + 0.1 * maps(2, 5, 4, 4, seed=2), teacher, variant="official") < 0
    assert nst_loss(student, teacher) > 0


@pytest.mark.parametrize("route", ROUTES)
def test_default_bandwidth_is_the_mean_squared_distance_over_the_pairs(route):
    student, teacher = pair(route)
    student[0, 1] = 0
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    width = torch.cdist(t, s).square().mean().item()
    value, gradient = value_and_gradient(lambda x: nst_loss(x, teacher, kernel="gaussian"), student)
    fixed, expected = value_and_gradient(
        lambda x: nst_loss(x, teacher, kernel="gaussian", bandwidth=width), student
    )
    assert value == pytest.approx(fixed, rel=1e-10)
    torch.testing.assert_close(gradient, expected)  # a constant: no gradient through the width


# Identities


@pytest.mark.parametrize("route", ROUTES)
def test_polynomial_loss_is_the_distance_of_gram_matrices_over_positions(route):
    student, teacher = pair(route)
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    grams = [torch.einsum("ncp,ncq->npq", x, x) / x.shape[1] for x in (s, t)]
    expected = (grams[0] - grams[1]).square().sum((1, 2)).mean().item()
    assert nst_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_attention_is_the_diagonal_of_that_gram_matrix():
    unit = F.normalize(maps(3, 5, 2, 4).flatten(2), dim=2)
    diagonal = torch.einsum("ncp,ncp->np", unit, unit) / 5
    torch.testing.assert_close(attention_map(unit.view(3, 5, 2, 4)), F.normalize(diagonal))


def test_an_offset_adds_the_linear_loss():
    # (x'y + c)^2 = (x'y)^2 + 2c x'y + c^2, and the constant cancels.
    student, teacher = pair("channels")
    expected = nst_loss(student, teacher) + 2 * 0.7 * nst_loss(student, teacher, kernel="linear")
    torch.testing.assert_close(nst_loss(student, teacher, offset=0.7), expected)


def test_a_wide_gaussian_is_the_linear_loss():
    student, teacher = pair("channels")
    linear = nst_loss(student, teacher, kernel="linear").item()
    gaussian = nst_loss(student, teacher, kernel="gaussian", bandwidth=1e6).item()
    assert 1e6 * gaussian == pytest.approx(linear, rel=1e-4)


def of_equal_norm(features: Tensor) -> Tensor:
    return F.normalize(features.flatten(2), dim=2).view_as(features)


def test_linear_loss_is_attention_transfer_normalised_before_averaging():
    student, teacher = maps(4, 3, 3, 3).abs(), maps(4, 5, 3, 3, seed=1).abs()
    linear = nst_loss(student, teacher, kernel="linear").item()
    spatial = at_loss(student, teacher, power=1, variant="official").item() * 9
    assert abs(linear - spatial) > 0.02  # not the same loss
    # With channels of one norm AT is the linear loss of the mean maps, normalised once more.
    s, t = of_equal_norm(student), of_equal_norm(teacher)
    after = nst_loss(s.mean(1, keepdim=True), t.mean(1, keepdim=True), kernel="linear").item()
    assert at_loss(s, t, power=1, variant="official").item() * 9 == pytest.approx(after, rel=1e-12)
    assert abs(nst_loss(s, t, kernel="linear").item() - after) > 0.02
    # With one channel there is nothing to average.
    one = at_loss(student[:, :1], teacher[:, :1], power=1, variant="official").item() * 9
    assert one == pytest.approx(nst_loss(student[:, :1], teacher[:, :1], kernel="linear").item(), rel=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 6), other=st.integers(1, 6),
    h=st.integers(1, 3), w=st.integers(1, 3), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_invariances(name, batch, channels, other, h, w, seed):
    student, teacher = maps(batch, channels, h, w, seed=seed), maps(batch, other, h, w, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    channel, sample, place = (torch.randperm(n, generator=generator) for n in (channels, batch, h * w))
    factors = torch.rand(batch, channels, 1, 1, generator=generator, dtype=torch.float64) + 0.1

    def moved(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, place].view_as(x)

    value = nst_loss(student, teacher, **KERNELS[name]).item()
    assert value >= -1e-12
    same = {
        "positive factor of a channel": (student * factors, teacher),
        "order of the channels": (student[:, channel], teacher),
        "order of the samples": (student[sample], teacher[sample]),
        "order of the positions": (moved(student), moved(teacher)),
        "channels twice": (student, teacher.repeat(1, 2, 1, 1)),
        "roles": (teacher, student),
    }
    for change, (s, t) in same.items():
        assert nst_loss(s, t, **KERNELS[name]).item() == pytest.approx(value, rel=1e-7, abs=1e-11), change


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_copy_of_the_teacher_has_neither_loss_nor_gradient(name, route):
    _, teacher = pair(route, torch.float32)
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), teacher)
    assert value == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-5


# Sizes


def test_a_larger_map_is_pooled_to_the_smaller_in_each_dimension():
    student, teacher = maps(2, 3, 6, 2), maps(2, 5, 3, 4, seed=1)
    pooled_student = student.view(2, 3, 3, 2, 2).mean(3)
    pooled_teacher = teacher.view(2, 5, 3, 2, 2).mean(4)
    expected = nst_loss(pooled_student, pooled_teacher).item()
    assert nst_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert nst_loss(pooled_student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert nst_loss(student, pooled_teacher).item() == pytest.approx(expected, rel=1e-12)


# Gradients and corner cases


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FIXED)
def test_gradient_is_the_derivative(name, route, variant):
    student, teacher = pair(route)

    def loss(s: Tensor) -> Tensor:
        return nst_loss(s, teacher, variant=variant, **KERNELS[name])

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("name", KERNELS)
def test_no_gradient_reaches_the_teacher_and_inputs_stay(name):
    student, teacher = maps(2, 3, 4, 4).requires_grad_(), maps(2, 5, 2, 2, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    nst_loss(student, teacher, **KERNELS[name]).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


AWKWARD = {
    "zero": lambda x: 0 * x,
    "a zero sample": lambda x: x * (torch.arange(len(x)) > 0).view(-1, 1, 1, 1),
    "zero channels": lambda x: x * (torch.arange(x.shape[1]) > 1).view(-1, 1, 1),
    "half the positions zero": torch.relu,
    "equal channels": lambda x: x[:, :1].expand_as(x).clone(),
    "opposite channels": lambda x: torch.cat([x, -x], 1),
    "1e-12": lambda x: 1e-12 * x,
    "1e12": lambda x: 1e12 * x,
    "mixed norms": lambda x: x * torch.logspace(-12, 12, x.shape[1]).view(-1, 1, 1),
    "one sample": lambda x: x[:1],
    "one channel": lambda x: x[:, :1],
    "one position": lambda x: x[:, :, :1, :1],
}


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", AWKWARD)
def test_value_and_gradient_stay_finite_in_float32(name, side):
    for route, options, variant in itertools.product(ROUTES, KERNELS.values(), VARIANTS):
        student, teacher = pair(route, torch.float32)
        if side != "teacher" or name == "one sample":
            student = AWKWARD[name](student)
        if side != "student" or name == "one sample":
            teacher = AWKWARD[name](teacher)
        value, gradient = value_and_gradient(
            lambda s, t=teacher, o=options, v=variant: nst_loss(s, t, variant=v, **o), student
        )
        assert math.isfinite(value), options
        assert gradient.isfinite().all(), options
        assert (gradient[(student == 0).flatten(2).all(2)] == 0).all(), options


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", KERNELS)
def test_the_scale_of_the_features_changes_nothing(name, scale):
    student, teacher = pair("channels", torch.float32)
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), student)
    other, scaled = value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), scale * student)
    assert other == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close(scaled * scale, gradient, rtol=1e-3, atol=1e-6)


def test_one_direction_is_no_noise_to_the_gaussian():
    # Student and teacher differ by rounding only: a width of that size would call them far apart.
    teacher = maps(4, 1, 5, 5, dtype=torch.float32)
    student = teacher * torch.rand(4, 1, 1, 1)
    assert nst_loss(student, teacher, kernel="gaussian").item() == pytest.approx(0, abs=1e-2)


# Memory


def largest_tensor(loss) -> int:
    """Numbers in the largest tensor that a loss and its gradient make."""
    found = [0]

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    found.append(value.untyped_storage().nbytes() // value.element_size())
            return out

    with Sizes():
        loss()
    return max(found)


@pytest.mark.parametrize("name", KERNELS)
def test_no_pair_of_channels_is_spread_over_the_positions(unchecked, name):
    batch, channels, positions = 2, 256, 64
    student, teacher = (maps(batch, channels, 8, 8, seed=i, dtype=torch.float32) for i in range(2))
    largest = largest_tensor(
        lambda: value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), student)
    )
    # The features or a matrix of pairs; spread over the positions that would be 64 times as large.
    assert largest <= batch * channels * (channels + 1)
    if name == "polynomial":
        assert largest == batch * channels * positions


def test_the_cheaper_route_is_taken(unchecked):
    batch, channels, positions = 2, 6, 256
    student, teacher = (maps(batch, channels, 16, 16, seed=i) for i in range(2))
    largest = largest_tensor(lambda: value_and_gradient(lambda s: nst_loss(s, teacher), student))
    assert largest == batch * channels * positions


# Where a loss must work


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["linear", "polynomial", "degree 3, c = 1", "gaussian, own width"])
def test_vmap_equals_a_loop(unchecked, name, route):
    shapes = ROUTES[route]
    students, teachers = maps(3, *shapes[0]), maps(3, *shapes[1], seed=1)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return nst_loss(s, t, **KERNELS[name])

    assert_vmap_equals_a_loop(loss, students, teachers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_is_compared_in_float32(name, route, dtype):
    student, teacher = pair(route, dtype)
    exact = nst_loss(student.float(), teacher.float(), **KERNELS[name])
    assert exact.dtype == torch.float32
    torch.testing.assert_close(nst_loss(student, teacher, **KERNELS[name]), exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(nst_loss(student, teacher, **KERNELS[name]), exact, rtol=0, atol=0)
        from_float32 = nst_loss(student.float(), teacher.float(), **KERNELS[name])
    torch.testing.assert_close(from_float32, exact, rtol=0, atol=0)


def test_dtypes_may_differ():
    student, teacher = pair("channels")
    student = student.to(torch.bfloat16)
    assert nst_loss(student, teacher).item() == nst_loss(student.double(), teacher).item()


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("polynomial", "positions"),
        *(
            pytest.param(name, "channels", marks=pytest.mark.slow)
            for name in ("linear", "polynomial", "degree 3, c = 1", "gaussian, own width")
        ),
    ],
)
def test_traces_to_one_graph(unchecked, compiler, name, route):
    compiled = torch.compile(nst_loss, fullgraph=True, backend="aot_eager")
    student, teacher = pair(route)
    for batch in (2, 3):  # the second size is traced with a symbolic one
        s, t = student.repeat(batch, 1, 1, 1), teacher.repeat(batch, 1, 1, 1)
        value, gradient = value_and_gradient(lambda x, t=t: nst_loss(x, t, **KERNELS[name]), s)
        traced, traced_gradient = value_and_gradient(lambda x, t=t: compiled(x, t, **KERNELS[name]), s)
        assert traced == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(traced_gradient, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["polynomial", "gaussian, own width"])
def test_compiles_to_machine_code(unchecked, compiler, name, route):
    compiled = torch.compile(nst_loss, fullgraph=True)
    student, teacher = pair(route)
    student[0, 1] = 0
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), student)
    fast, fast_gradient = value_and_gradient(lambda s: compiled(s, teacher, **KERNELS[name]), student)
    assert fast == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KERNELS)
def test_cuda_equals_cpu_without_waiting_for_the_device(unchecked, name, route):
    student, teacher = pair(route)
    value, gradient = value_and_gradient(lambda s: nst_loss(s, teacher, **KERNELS[name]), student)
    on_device, guide = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = nst_loss(on_device, guide, **KERNELS[name])
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), gradient)


# Errors

X, Y = maps(2, 3, 4, 4), maps(2, 5, 4, 4)
BAD_CALLS = {
    "student: expected a floating tensor .* shape \\(3, 4, 4\\)": lambda: nst_loss(X[0], Y),
    "student: .* got torch.int64": lambda: nst_loss(X.long(), Y),
    "teacher: .* \\(2, 0, 4, 4\\)": lambda: nst_loss(X, Y[:, :0]),
    "teacher: expected as many rows as student \\(2\\), got 1": lambda: nst_loss(X, Y[:1]),
    "kernel: expected one of .* got 'poly'": lambda: nst_loss(X, Y, kernel="poly"),
    "variant: expected one of .* got 'paper'": lambda: nst_loss(X, Y, variant="paper"),
    "degree: expected an integer from 1 on, got 0": lambda: nst_loss(X, Y, degree=0),
    "degree: .* got 2.0": lambda: nst_loss(X, Y, degree=2.0),
    "degree: .* got True": lambda: nst_loss(X, Y, degree=True),
    "offset: expected a finite number from 0 on, got -1": lambda: nst_loss(X, Y, offset=-1),
    "offset: .* got nan": lambda: nst_loss(X, Y, offset=math.nan),
    "offset: .* got inf": lambda: nst_loss(X, Y, offset=math.inf),
    "degree and offset: the linear kernel has neither": lambda: nst_loss(X, Y, kernel="linear", degree=3),
    "degree and offset: the gaussian kernel": lambda: nst_loss(X, Y, kernel="gaussian", offset=1),
    "bandwidth: the polynomial kernel has none, got 1.0": lambda: nst_loss(X, Y, bandwidth=1.0),
    "bandwidth: expected a finite number above 0, got 0": lambda: nst_loss(
        X, Y, kernel="gaussian", bandwidth=0.0
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_wrong_types_are_type_errors(unchecked):
    with pytest.raises(TypeError, match="student: expected a tensor, got ndarray"):
        nst_loss(X.numpy(), Y)
    with pytest.raises(TypeError, match="bandwidth: expected a number, got str"):
        nst_loss(X, Y, kernel="gaussian", bandwidth="wide")


def test_shape_annotations_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        nst_loss(X, Y[:1])
