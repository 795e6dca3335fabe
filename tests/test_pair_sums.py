"""Tiled sums over pairs against the dense formulas, at the ends of their range, and in what they may allocate."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrefs import pair_sums
from kdrefs.divergences import kl_divergence
from kdrefs.kernels import gaussian_kernel
from kdrefs.methods.pkt import conditional_probabilities
from kdrefs.pair_sums import class_pair_sums, cosine_neighbour_kl
from tests.memory import peak_growth

WEIGHTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """Small enough that a handful of rows makes several of them, the last one narrower."""
    monkeypatch.setattr(pair_sums, "_TILE", 5)


def features(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes_of(rows: int) -> Tensor:
    """Unsorted labels; class 2 of the four stays empty."""
    return torch.tensor([3, 0, 1, 1])[torch.arange(rows) % 4]


def dense_kl(student: Tensor, teacher: Tensor, diagonal: bool = True) -> Tensor:
    log_p = conditional_probabilities(teacher.detach(), diagonal=diagonal)
    return kl_divergence(log_p, conditional_probabilities(student, diagonal=diagonal))


def dense_class_sums(x: Tensor, labels: Tensor, classes: int, *, bandwidth: float) -> Tensor:
    member = torch.nn.functional.one_hot(labels, classes).to(x.dtype)
    return member.mT @ gaussian_kernel(x, bandwidth=bandwidth) @ member


def value_and_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = function(x)
    (value if value.ndim == 0 else (value * WEIGHTS.to(value.dtype)).sum()).backward()
    return value.detach(), x.grad


def assert_equal(function, expected, x: Tensor, rtol: float = 1e-10) -> None:
    (value, gradient), (true_value, true_gradient) = (
        value_and_gradient(function, x),
        value_and_gradient(expected, x),
    )
    torch.testing.assert_close(value, true_value, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        gradient, true_gradient, rtol=rtol, atol=rtol * max(1, true_gradient.abs().max())
    )


def rows_of(kind: str) -> Tensor:
    """Twelve rows whose similarities are special."""
    x = features(12, 3)
    match kind:
        case "zero":
            x[[0, 7]] = 0
        case "all zero":
            x[:] = 0
        case "duplicate":
            x[[1, 9, 11]] = x[4].clone()
        case "all equal":
            x[:] = x[0].clone()
        case "opposite":
            x[6:] = -x[:6].clone()
        case "opposite to all others":
            x[:] = x[0].clone() * torch.arange(1, 13).unsqueeze(1)
            x[7] *= -1
        case "huge":
            x *= 1e150
        case "far from the origin":
            x += 1e3
    return x


KINDS = (
    "zero",
    "all zero",
    "duplicate",
    "all equal",
    "opposite",
    "opposite to all others",
    "huge",
    "far from the origin",
)


# Equal to the dense form


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("rows", [2, 4, 5, 6, 10, 23])
def test_neighbour_kl_equals_the_dense_form(rows, diagonal):
    teacher = features(rows, 7, seed=1)
    assert_equal(
        lambda s: cosine_neighbour_kl(s, teacher, diagonal=diagonal),
        lambda s: dense_kl(s, teacher, diagonal),
        features(rows, 3),
    )


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_neighbour_kl_equals_the_dense_form_for_special_rows(kind, diagonal):
    special, other = rows_of(kind), features(12, 4, seed=1)
    for student, teacher in ((special, other), (other, special)):
        assert_equal(
            lambda s, t=teacher: cosine_neighbour_kl(s, t, diagonal=diagonal),
            lambda s, t=teacher: dense_kl(s, t, diagonal),
            student,
        )


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 10, 23])
def test_class_sums_equal_the_dense_form(rows):
    labels = classes_of(rows)
    assert_equal(
        lambda x: class_pair_sums(x, labels, 4, bandwidth=3.0),
        lambda x: dense_class_sums(x, labels, 4, bandwidth=3.0),
        features(rows, 3),
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
def test_class_sums_equal_the_dense_form_for_special_rows(kind):
    labels = classes_of(12)
    assert_equal(
        lambda x: class_pair_sums(x, labels, 4, bandwidth=3.0),
        lambda x: dense_class_sums(x, labels, 4, bandwidth=3.0),
        rows_of(kind),
    )


def test_a_single_sample():
    x = features(1, 3).requires_grad_()
    loss = cosine_neighbour_kl(x, features(1, 4))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert (x.grad == 0).all()
    assert class_pair_sums(x, torch.tensor([1]), 2, bandwidth=1.0).tolist() == [[0, 0], [0, 1]]


def test_class_sums_by_hand():
    # Distances 1, 2 and 3 on a line; every row pairs with itself.
    x, labels = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([1, 0, 1])
    near, far, farther = (torch.tensor(-d * d / 2).exp().item() for d in (1.0, 2.0, 3.0))
    expected = torch.tensor([[1, far + farther], [far + farther, 2 + 2 * near]])
    torch.testing.assert_close(class_pair_sums(x, labels, 2, bandwidth=2.0), expected)


def test_class_sums_of_all_pairs_do_not_depend_on_the_order():
    x, labels = features(23, 3), classes_of(23)
    order = labels.argsort()
    sums = class_pair_sums(x, labels, 4, bandwidth=2.0)
    torch.testing.assert_close(class_pair_sums(x[order], labels[order], 4, bandwidth=2.0), sums)
    torch.testing.assert_close(sums, sums.mT, rtol=0, atol=0)
    assert (sums[2] == 0).all()
    torch.testing.assert_close(sums.sum(), gaussian_kernel(x, bandwidth=2.0).sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    x, labels = features(7, 3), classes_of(7)
    torch.testing.assert_close(
        class_pair_sums(x, labels.to(dtype), 4, bandwidth=2.0), class_pair_sums(x, labels, 4, bandwidth=2.0)
    )


@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients_are_the_finite_differences(diagonal):
    x, teacher = features(7, 3).requires_grad_(), features(7, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: cosine_neighbour_kl(s, teacher, diagonal=diagonal), (x,))
    assert torch.autograd.gradcheck(lambda s: class_pair_sums(s, classes_of(7), 4, bandwidth=2.0), (x,))


# Precision


def test_float32_keeps_as_many_digits_as_the_dense_form(monkeypatch):
    monkeypatch.setattr(pair_sums, "_TILE", 128)
    centre = features(1, 16, seed=2)
    # Cosines about 0.9: the terms of value and gradient all but cancel.
    student, teacher = (centre + 0.3 * features(500, 16, seed=seed).float() for seed in (0, 1))
    labels = classes_of(500)
    pairs = (
        (lambda s: cosine_neighbour_kl(s, teacher.to(s)), lambda s: dense_kl(s, teacher.to(s))),
        (
            lambda s: class_pair_sums(s, labels, 4, bandwidth=3.0),
            lambda s: dense_class_sums(s, labels, 4, bandwidth=3.0),
        ),
    )
    for tiled, dense in pairs:
        exact = value_and_gradient(dense, student.double())
        ours, theirs = (
            [(got.double() - true).norm() / true.norm() for got, true in zip(result, exact, strict=True)]
            for result in (value_and_gradient(f, student.float()) for f in (tiled, dense))
        )
        assert ours[0] < 1e-4
        assert ours[1] < max(2 * theirs[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_float32(dtype):
    student, teacher = features(12, 3).to(dtype), features(12, 4, seed=1).to(dtype)
    kl = cosine_neighbour_kl(student.float(), teacher.float())
    sums = class_pair_sums(student.float(), classes_of(12), 4, bandwidth=2.0)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            for s, t in ((student, teacher), (student.float(), teacher.float())):
                torch.testing.assert_close(cosine_neighbour_kl(s, t), kl, rtol=0, atol=0)
                torch.testing.assert_close(
                    class_pair_sums(s, classes_of(12), 4, bandwidth=2.0), sums, rtol=0, atol=0
                )
    x = student.clone().requires_grad_()
    cosine_neighbour_kl(x, teacher).backward()
    assert x.grad.dtype == dtype


def test_mixed_precision_is_compared_in_the_wider():
    student, teacher = features(12, 3).float(), features(12, 4, seed=1)
    loss = cosine_neighbour_kl(student, teacher)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, dense_kl(student.double(), teacher), rtol=1e-6, atol=0)


# Where they must work

FUNCTIONS = {
    "neighbour kl": lambda x, y: cosine_neighbour_kl(x, y),
    "class sums": lambda x, y: (class_pair_sums(x, classes_of(x.shape[0]), 4, bandwidth=2.0) * WEIGHTS).sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_may_lie_anywhere_in_memory(name):
    function, y = FUNCTIONS[name], features(12, 4, seed=1)
    columns = features(3, 12).mT
    strided = features(24, 6)[::2, ::2]
    expanded = features(1, 3).expand(12, 3)
    for x in (columns, strided, expanded):
        assert not x.is_contiguous()
        before = x.clone()
        value = function(x, y.mT.contiguous().mT)
        torch.testing.assert_close(value, function(x.contiguous(), y), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(x, before, rtol=0, atol=0)
        gradient = torch.func.grad(function)(x, y)
        torch.testing.assert_close(gradient, value_and_gradient(lambda s: function(s, y), x)[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_stay_and_only_the_student_learns(name):
    x, y = features(12, 3).requires_grad_(), features(12, 4, seed=1).requires_grad_()
    before = x.detach().clone(), y.detach().clone()
    FUNCTIONS[name](x, y).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x.grad.abs().sum() > 0
    assert y.grad is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_may_be_used_twice(name):
    x, y = features(12, 3).requires_grad_(), features(12, 4, seed=1)
    value = FUNCTIONS[name](x, y)
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3 * value, x)
    torch.testing.assert_close(scaled, -3 * once)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_there_is_no_second_derivative(name):
    x = features(12, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](x, features(12, 4, seed=1)), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_without_gradients(name):
    x, y = features(12, 3).requires_grad_(), features(12, 4, seed=1)
    with torch.no_grad():
        value = FUNCTIONS[name](x, y)
    assert not value.requires_grad
    torch.testing.assert_close(value, FUNCTIONS[name](x, y), rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name):
    function = FUNCTIONS[name]
    x, y = features(3 * 7, 4).view(3, 7, 4), features(3 * 7, 5, seed=1).view(3, 7, 5)
    values, gradients = zip(
        *(value_and_gradient(lambda s, t=t: function(s, t), s) for s, t in zip(x, y, strict=True)),
        strict=True,
    )
    torch.testing.assert_close(torch.vmap(function)(x, y), torch.stack(values))
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(x, y), torch.stack(gradients))
    outer = torch.func.grad(lambda s: torch.vmap(function)(s, y).sum())(x)
    torch.testing.assert_close(outer, torch.stack(gradients))
    one_teacher = torch.vmap(function, in_dims=(1, None))(x.transpose(0, 1), y[0])
    torch.testing.assert_close(one_teacher, torch.stack([function(s, y[0]) for s in x]))


@pytest.mark.parametrize("rows", [11, 16])
def test_class_sums_trace_to_one_graph(unchecked, compiler, rows):
    labels = classes_of(rows)
    compiled = torch.compile(class_pair_sums, fullgraph=True, backend="aot_eager")
    assert_equal(
        lambda x: compiled(x, labels, 4, bandwidth=2.0),
        lambda x: class_pair_sums(x, labels, 4, bandwidth=2.0),
        features(rows, 3),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_without_waiting_for_it():
    x, y, labels, weights = features(23, 3), features(23, 4, seed=1), classes_of(23), WEIGHTS

    def total(x: Tensor, y: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return cosine_neighbour_kl(x, y) + (class_pair_sums(x, labels, 4, bandwidth=2.0) * weights).sum()

    on_device = [tensor.cuda() for tensor in (y, labels, weights)]
    there = x.cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = total(there, *on_device)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, gradient = value_and_gradient(lambda s: total(s, y, labels, weights), x)
    torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there.grad.cpu(), gradient, rtol=1e-10, atol=1e-10)


# Memory


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_larger_than_the_features(name):
    x, y = features(60, 4).requires_grad_(), features(60, 5, seed=1)
    with _Largest() as largest:
        FUNCTIONS[name](x, y).backward()
    assert 60 * 4 <= largest.elements <= 60 * 5
    with _Largest() as largest:
        dense_kl(x, y).backward()
    assert largest.elements == 60 * 60


STEP = """
x, y, labels = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 64), torch.arange(rows) % 10
cosine_neighbour_kl(x, y).backward()
class_pair_sums(x, labels, 10, bandwidth=64.0).square().sum().backward()
assert x.grad.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the kibibytes of Linux")
def test_twenty_thousand_samples_in_little_memory():
    # A single 20,000 x 20,000 matrix of float32 has 1.5 GiB.
    imports = "from kdrefs.pair_sums import class_pair_sums, cosine_neighbour_kl"
    assert peak_growth(imports, STEP, 20_000, timeout=300) < 256 * 1024


# Errors

X, LABELS = features(4, 3), torch.tensor([0, 1, 1, 0])
BAD_CALLS = {
    "student: expected a floating tensor": lambda: cosine_neighbour_kl(X[0], X),
    "teacher: expected a floating tensor": lambda: cosine_neighbour_kl(X, X.long()),
    "teacher: expected as many rows as student \\(4\\), got 3": lambda: cosine_neighbour_kl(X, X[:3]),
    "student: diagonal=False needs at least 2": lambda: cosine_neighbour_kl(X[:1], X[:1], diagonal=False),
    "features: expected a floating tensor": lambda: class_pair_sums(X[:0], LABELS[:0], 2, bandwidth=1.0),
    "labels: expected class indices .* got torch.float64": lambda: class_pair_sums(
        X, LABELS.double(), 2, bandwidth=1.0
    ),
    "labels: expected class indices .* got torch.bool": lambda: class_pair_sums(
        X, LABELS.bool(), 2, bandwidth=1.0
    ),
    "labels: expected class indices .* \\(4, 1\\)": lambda: class_pair_sums(
        X, LABELS[:, None], 2, bandwidth=1.0
    ),
    "labels: expected as many rows as features": lambda: class_pair_sums(X, LABELS[:3], 2, bandwidth=1.0),
    "classes: expected a whole number above 0, got 0": lambda: class_pair_sums(X, LABELS, 0, bandwidth=1.0),
    "classes: expected a whole number above 0, got 2.0": lambda: class_pair_sums(
        X, LABELS, 2.0, bandwidth=1.0
    ),
    "bandwidth: expected a finite number above 0, got 0": lambda: class_pair_sums(
        X, LABELS, 2, bandwidth=0.0
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()
