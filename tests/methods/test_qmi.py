"""Information potentials against integrals, a plain loop and closed forms, and at the corners of their arguments."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrefs import pair_sums
from kdrefs.kernels import cosine_kernel, gaussian_kernel, log_kernel
from kdrefs.methods.qmi import (
    biased_hsic,
    information_potentials,
    mean_squared_distance,
    quadratic_mutual_information,
)
from tests.memory import peak_growth

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "qmi_numeric_integration_some.npz"
LABELS = torch.tensor([2, 0, 0, 1, 2, 0, 3])  # unsorted, unequal, one class of a single sample
OPTIONS = {
    "gaussian": {"bandwidth": 3.0},
    "scale-free": {},
    "density": {"bandwidth": 3.0, "density": True},
    "cosine": {"kernel": "cosine"},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """Small enough that a handful of rows makes several of them."""
    monkeypatch.setattr(pair_sums, "_TILE", 3)


def features(rows: int = 7, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_kernel(x: Tensor, name: str) -> Tensor:
    if name == "cosine":
        return cosine_kernel(x)
    if name == "scale-free":
        return log_kernel(x, kernel="gaussian").exp()
    constant = (3 * math.pi) ** (-x.shape[1] / 2) if name == "density" else 1.0
    return constant * gaussian_kernel(x, bandwidth=3.0)


def same_label(labels: Tensor) -> Tensor:
    return (labels.unsqueeze(1) == labels).double()


def value_and_gradient(function, x: Tensor) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    value.backward()
    return value.item(), x.grad


# Integrals, a plain loop, the biased HSIC


@pytest.mark.parametrize("case", ["c0_3cls", "c1_balanced2"])
def test_equals_the_integrals(case):
    with np.load(GOLDEN, allow_pickle=False) as golden:
        x, labels = (torch.from_numpy(golden[f"{case}__{name}"]) for name in ("x", "labels"))
        variance = golden[f"{case}__kde_variance"].item()
        expected = [golden[f"{case}__{name}"].item() for name in ("V_IN", "V_ALL", "V_BTW", "QMI", "HSIC_b")]
    x = x.unsqueeze(1)
    arguments = (x, labels.long(), 4 * variance)
    information = quadratic_mutual_information(*arguments, density=True).item()
    found = [*(v.item() for v in information_potentials(*arguments, density=True)), information]
    kernel = gaussian_kernel(x, bandwidth=4 * variance) / math.sqrt(4 * math.pi * variance)
    found.append(biased_hsic(kernel, same_label(labels)).item())
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def loop(kernel: list[list[float]], labels: list[int]) -> tuple[float, float, float]:
    """The note's sums as they should be printed, one pair after the other."""
    samples, within, everything, between = len(labels), 0.0, 0.0, 0.0
    for label in set(labels):
        members = [k for k in range(samples) if labels[k] == label]
        prior = len(members) / samples
        for k in range(samples):
            for l in range(samples):
                everything += prior**2 * kernel[k][l]
                between += prior * kernel[k][l] * (k in members)
                within += kernel[k][l] * (k in members and l in members)
    return within / samples**2, everything / samples**2, between / samples**2


@pytest.mark.parametrize("labels", [LABELS, LABELS.sort().values, LABELS * 0, torch.arange(7), LABELS - 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_a_plain_loop(name, labels):
    x = features()
    x[4] = x[2]  # duplicates in two classes
    expected = loop(dense_kernel(x, name).tolist(), labels.tolist())
    found = information_potentials(x, labels, **OPTIONS[name])
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-12)
    assert found._fields == ("within", "all", "between")
    information = quadratic_mutual_information(x, labels, **OPTIONS[name]).item()
    within, everything, between = expected
    assert information == pytest.approx(within + everything - 2 * between, rel=1e-9, abs=1e-15)
    hsic = biased_hsic(dense_kernel(x, name), same_label(labels)).item()
    assert information == pytest.approx(hsic, rel=1e-9, abs=1e-15)


def test_hsic_is_the_trace():
    x, other = features(seed=1), features(seed=2)
    k, l = cosine_kernel(x), gaussian_kernel(other, bandwidth=2.0)
    h = torch.eye(7, dtype=torch.float64) - 1 / 7
    assert biased_hsic(k, l).item() == pytest.approx((k @ h @ l @ h).trace().item() / 49, rel=1e-12)
    assert biased_hsic(k, l).item() == pytest.approx(biased_hsic(l, k).item(), rel=1e-12)


# Closed forms


def test_two_points_of_two_classes():
    # K = [[1, k], [k, 1]]: V_IN = 1/2, V_ALL = V_BTW = (1 + k) / 4, and what is left is (1 - k) / 4.
    x = torch.tensor([[0.0], [1.5]]).double()
    k = math.exp(-2.25 / 2)
    found = information_potentials(x, torch.tensor([0, 1]), 2.0)
    assert [v.item() for v in found] == pytest.approx([1 / 2, (1 + k) / 4, (1 + k) / 4], rel=1e-12)
    information = quadratic_mutual_information(x, torch.tensor([0, 1]), 2.0).item()
    assert information == pytest.approx((1 - k) / 4, rel=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "cosine"])
def test_classes_far_apart_have_the_labels_own_information(name):
    # Points that coincide inside classes; K is the matrix of equal labels, or for opposite directions of two classes.
    labels = torch.tensor([0, 1, 0, 1, 1])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()[labels]
    options = {"kernel": "cosine"} if name == "cosine" else {"bandwidth": 1e-3}
    expected = biased_hsic(same_label(labels), same_label(labels)).item()
    assert expected == pytest.approx(4 * (0.4 * 0.6) ** 2, rel=1e-12)
    assert quadratic_mutual_information(x, labels, **options).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "scale-free", "cosine"])
def test_no_information(name):
    x, options = features(), OPTIONS[name]
    one_class = quadratic_mutual_information(x, LABELS * 0, **options).item()
    equal_features = quadratic_mutual_information(x[:1].expand(7, 4), LABELS, **options).item()
    single_sample = quadratic_mutual_information(x[:1], LABELS[:1], **options).item()
    assert [one_class, equal_features, single_sample] == pytest.approx([0, 0, 0], abs=1e-15)
    # Every class holds the same points: features and labels are independent.
    both = quadratic_mutual_information(x.repeat(2, 1), torch.arange(2).repeat_interleave(7), **options)
    assert both.item() == pytest.approx(0, abs=1e-15)


def test_zero_rows_have_the_cosine_kernel_of_one_half():
    x = features()
    x[[0, 3]] = 0
    expected = loop(cosine_kernel(x).tolist(), LABELS.tolist())
    assert [v.item() for v in information_potentials(x, LABELS, kernel="cosine")] == pytest.approx(expected)
    value, gradient = value_and_gradient(
        lambda s: quadratic_mutual_information(s, LABELS, kernel="cosine"), x
    )
    assert value > 0
    assert gradient.isfinite().all()


def test_mean_squared_distance_is_that_of_all_pairs():
    x = features() + 3
    assert mean_squared_distance(x).item() == pytest.approx(torch.cdist(x, x).square().mean().item())


def test_small_information_survives_float32_with_the_cosine_kernel():
    # Two classes whose means hardly differ: three orders of magnitude cancel between the potentials.
    x = features(2000, 8)
    labels = torch.arange(2000) % 2
    exact = quadratic_mutual_information(x, labels, kernel="cosine").item()
    single = quadratic_mutual_information(x.float(), labels, kernel="cosine").item()
    within = information_potentials(x, labels, kernel="cosine").within.item()
    assert exact < 1e-3 * within
    assert single == pytest.approx(exact, rel=1e-4)


# Gradients


@pytest.mark.parametrize("name", ["gaussian", "density", "cosine"])
def test_gradients_are_the_derivatives(name):
    x = features(width=3).requires_grad_()
    weights = (0.3, -0.7, 1.1)

    def potentials(x: Tensor) -> Tensor:
        found = information_potentials(x, LABELS, **OPTIONS[name])
        return sum(weight * value for weight, value in zip(weights, found, strict=True))

    assert torch.autograd.gradcheck(potentials, x)
    assert torch.autograd.gradcheck(lambda s: quadratic_mutual_information(s, LABELS, **OPTIONS[name]), x)


def test_gradient_equals_that_of_the_dense_form():
    for name in ("gaussian", "cosine"):
        value = value_and_gradient(
            lambda s, n=name: quadratic_mutual_information(s, LABELS, **OPTIONS[n]), features()
        )
        dense = value_and_gradient(
            lambda s, n=name: biased_hsic(dense_kernel(s, n), same_label(LABELS)), features()
        )
        assert value[0] == pytest.approx(dense[0], rel=1e-10)
        torch.testing.assert_close(value[1], dense[1], rtol=1e-9, atol=1e-12)


def test_the_default_bandwidth_is_a_constant():
    x = features()
    scale = mean_squared_distance(x).item()
    fixed = value_and_gradient(lambda s: quadratic_mutual_information(s, LABELS, scale), x)
    free = value_and_gradient(lambda s: quadratic_mutual_information(s, LABELS), x)
    assert free[0] == pytest.approx(fixed[0], rel=1e-12)
    torch.testing.assert_close(free[1], fixed[1])


# Invariances and corners


@given(
    samples=st.integers(1, 9), classes=st.integers(1, 4), width=st.integers(1, 3), seed=st.integers(0, 2**16)
)
def test_invariances(samples, classes, width, seed):
    x = features(samples, width, seed)
    labels = torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    for options in ({"bandwidth": 2.0}, {"kernel": "cosine"}):
        within, everything, between = (v.item() for v in information_potentials(x, labels, **options))
        information = quadratic_mutual_information(x, labels, **options).item()
        assert information >= -1e-15
        assert information == pytest.approx(within + everything - 2 * between, abs=1e-15)
        assert min(within, everything, between) > 0
        same = {
            "order of the samples": (x[order], labels[order], {}),
            "names of the classes": (x, 7 - 2 * labels, {}),
            "classes without samples": (x, labels, {"classes": 6}),
            "copies of the samples": (x.repeat(3, 1), labels.repeat(3), {}),
            "direction": (x.flip(1), labels, {}),
        }
        if "bandwidth" in options:
            same["place"] = (x + 5, labels, {})
            same["units"] = (3 * x, labels, {"bandwidth": 18.0})
        else:
            same["length of the rows"] = (x * torch.arange(1, samples + 1).unsqueeze(1), labels, {})
        for name, (y, other, changes) in same.items():
            value = quadratic_mutual_information(y, other, **(options | changes)).item()
            assert value == pytest.approx(information, rel=1e-9, abs=1e-14), name


def test_balanced_classes_have_two_equal_potentials():
    labels = torch.tensor([0, 1, 2]).repeat(4)
    within, everything, between = information_potentials(features(12), labels, 2.0)
    assert everything.item() == pytest.approx(between.item(), rel=1e-12)
    information = quadratic_mutual_information(features(12), labels, 2.0).item()
    assert information == pytest.approx((within - everything).item(), rel=1e-9)


def test_density_scales_by_its_constant_and_may_leave_the_range():
    x = features()
    plain = quadratic_mutual_information(x, LABELS, 0.5).item()
    density = quadratic_mutual_information(x, LABELS, 0.5, density=True).item()
    assert density == pytest.approx(plain * (0.5 * math.pi) ** -2, rel=1e-12)
    wide = information_potentials(features(7, 512).float(), LABELS, 1e-3, density=True)
    assert wide.within.isinf()


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_counts_in_single(name):
    x = features().bfloat16()
    exact = quadratic_mutual_information(x.float(), LABELS, **OPTIONS[name])
    half = quadratic_mutual_information(x, LABELS, **OPTIONS[name])
    assert half.dtype == torch.float32
    assert half.item() == exact.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = information_potentials(x.float(), LABELS, **OPTIONS[name])
    outside = information_potentials(x.float(), LABELS, **OPTIONS[name])
    assert [v.item() for v in inside] == [v.item() for v in outside]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    expected = quadratic_mutual_information(features(), LABELS, 2.0).item()
    for classes in (None, 4):
        assert (
            quadratic_mutual_information(features(), LABELS.to(dtype), 2.0, classes=classes).item()
            == expected
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_compile_without_breaks(name, unchecked, compiler):
    def loss(x: Tensor) -> Tensor:
        return quadratic_mutual_information(x, LABELS, classes=4, **OPTIONS[name])

    plain = value_and_gradient(loss, features().float())
    value, gradient = value_and_gradient(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), features().float()
    )
    assert value == pytest.approx(plain[0], rel=1e-4)
    torch.testing.assert_close(gradient, plain[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_over_feature_spaces(name, unchecked):
    spaces = torch.stack([features(seed=seed) for seed in range(3)])
    each = [quadratic_mutual_information(x, LABELS, **OPTIONS[name]) for x in spaces]
    mapped = torch.vmap(lambda x: quadratic_mutual_information(x, LABELS, classes=4, **OPTIONS[name]))(spaces)
    torch.testing.assert_close(mapped, torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_without_waiting_for_the_device(name):
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return quadratic_mutual_information(x, labels, classes=4, **OPTIONS[name])

    expected, gradient = value_and_gradient(lambda s: loss(s, LABELS), features())
    x, labels = features().cuda().requires_grad_(), LABELS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(x, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(x.grad.cpu(), gradient)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("name", OPTIONS)
def test_no_matrix_of_all_pairs(name):
    x = features(60, 4).requires_grad_()
    with _Largest() as largest:
        quadratic_mutual_information(x, torch.arange(60) % 5, **OPTIONS[name]).backward()
    assert largest.elements == 60 * 4


STEP = """
x, labels = torch.randn(rows, 64, requires_grad=True), torch.arange(rows) % 10
quadratic_mutual_information(x, labels).backward()
quadratic_mutual_information(x, labels, kernel="cosine").backward()
assert x.grad.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the kibibytes of Linux")
def test_fifty_thousand_samples_in_less_than_a_gibibyte():
    # A single 50,000 x 50,000 matrix of float32 has 9.3 GiB.
    imports = "from kdrefs.methods.qmi import quadratic_mutual_information"
    assert peak_growth(imports, STEP, 50_000, timeout=600) < 1024**2


def wrong(**changes):
    arguments = {"features": features(), "labels": LABELS} | changes
    return quadratic_mutual_information(arguments.pop("features"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": features()[0]}, r"features: expected a floating tensor \(batch, features\)"),
        ({"features": features()[:0]}, "features: expected a floating tensor"),
        ({"labels": LABELS[:3]}, r"labels: expected as many rows as features \(7\), got 3"),
        ({"labels": LABELS.double()}, r"labels: expected class indices \(batch,\), got torch.float64"),
        ({"labels": LABELS > 0}, r"labels: expected class indices \(batch,\), got torch.bool"),
        ({"labels": LABELS[:, None]}, r"labels: expected class indices .* shape \(7, 1\)"),
        ({"bandwidth": 0}, "bandwidth: expected a finite number above 0, got 0"),
        ({"bandwidth": math.inf}, "bandwidth: expected a finite number above 0, got inf"),
        ({"classes": 0}, "classes: expected a whole number above 0, got 0"),
        ({"classes": True}, "classes: expected a whole number above 0, got True"),
        ({"kernel": "laplace"}, r"kernel: expected one of \['cosine', 'gaussian'\], got 'laplace'"),
        (
            {"kernel": "cosine", "bandwidth": 2.0},
            "bandwidth: the cosine kernel has none, expected None, got 2.0",
        ),
        ({"kernel": "cosine", "density": True}, "density: the cosine kernel is no integral of densities"),
    ],
)
def test_errors_name_the_argument(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changes)


def test_hsic_errors_name_the_argument(unchecked):
    square = torch.eye(3)
    with pytest.raises(ValueError, match=r"kernel: expected shape \(3, 3\), got \(3, 2\)"):
        biased_hsic(square[:, :2], square)
    with pytest.raises(ValueError, match=r"other: expected shape \(3, 3\), got \(2, 2\)"):
        biased_hsic(square, square[:2, :2])
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        quadratic_mutual_information(features(), [0, 1])
