"""Kernels against plain definitions, their invariances, and the ends of the floating-point range."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdrefs import kernels
from kdrefs.kernels import (
    KERNELS,
    cauchy_kernel,
    cosine_kernel,
    cosines,
    gaussian_kernel,
    laplace_kernel,
    log_kernel,
    pairwise_squared_distances,
    student_t_kernel,
    unit_rows,
)


def features(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DEFINITIONS = {
    "gaussian": (gaussian_kernel, lambda d, w: math.exp(-d * d / w)),
    "laplace": (laplace_kernel, lambda d, w: math.exp(-d / w)),
    "student_t": (student_t_kernel, lambda d, w: 1 / (1 + d / w)),
    "cauchy": (cauchy_kernel, lambda d, w: 1 / (1 + d * d / (w * w))),
}


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_distance_kernels_equal_their_definitions(name, bandwidth):
    x, y = features(5, 3), features(4, 3, seed=1)
    function, definition = DEFINITIONS[name]
    expected = [[definition(math.dist(a, b), bandwidth) for b in y.tolist()] for a in x.tolist()]
    torch.testing.assert_close(function(x, y, bandwidth=bandwidth), torch.tensor(expected, dtype=x.dtype))
    torch.testing.assert_close(
        log_kernel(x, y, kernel=name, bandwidth=bandwidth), torch.tensor(expected, dtype=x.dtype).log()
    )


def test_cosine_kernel_equals_its_definition():
    x, y = features(5, 3), features(4, 3, seed=1)
    expected = [
        [
            (sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) + 1) / 2
            for b in y.tolist()
        ]
        for a in x.tolist()
    ]
    torch.testing.assert_close(cosine_kernel(x, y), torch.tensor(expected, dtype=x.dtype))
    torch.testing.assert_close(log_kernel(x, y), torch.tensor(expected, dtype=x.dtype).log())


@pytest.mark.parametrize("kernel", KERNELS)
@given(rows=st.integers(1, 8), width=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_a_kernel_of_one_set_is_symmetric_and_largest_on_the_diagonal(kernel, rows, width, seed):
    x = features(rows, width, seed)
    matrix = log_kernel(x, kernel=kernel).exp()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(rows, dtype=x.dtype))
    assert ((matrix >= 0) & (matrix <= 1)).all()
    torch.testing.assert_close(matrix, log_kernel(x, x.clone(), kernel=kernel).exp(), rtol=1e-6, atol=1e-6)


def test_distances_of_features_far_from_the_origin_do_not_cancel():
    x = features(6, 4).float()
    near = pairwise_squared_distances(x)
    torch.testing.assert_close(pairwise_squared_distances(x + 1024.0), near, rtol=1e-3, atol=1e-3)
    assert (near.diagonal() == 0).all()
    assert (pairwise_squared_distances(x + 1e6) >= 0).all()


def test_marked_pairs_have_distance_zero():
    x, rows = features(5, 3).float(), torch.tensor([3, 0])
    same = torch.arange(5).unsqueeze(1) == rows
    marked = pairwise_squared_distances(x, x[rows], same=same)
    assert (marked[same] == 0).all()
    torch.testing.assert_close(marked, pairwise_squared_distances(x)[:, rows])


def test_unit_rows_depend_on_the_direction_alone():
    x = features(4, 5).float()
    expected = torch.nn.functional.normalize(x)
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e30):
        torch.testing.assert_close(unit_rows(x * scale), expected)
    for nothing in (0.0, 1e-40):
        zero = torch.full((2, 3), nothing, requires_grad=True)
        unit_rows(zero).sum().backward()
        assert (unit_rows(zero) == 0).all()
        assert (zero.grad == 0).all()
    assert unit_rows(torch.tensor([[1.0, float("nan")]])).isnan().any()
    assert torch.autograd.gradcheck(unit_rows, (features(3, 4).requires_grad_(),))


def test_cosines_are_the_products_of_unit_rows():
    x = features(6, 3)
    torch.testing.assert_close(cosines(x), unit_rows(x) @ unit_rows(x).mT)
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        torch.testing.assert_close(cosines(x.float() * scale), cosines(x).float())
    assert torch.autograd.gradcheck(cosines, (x.requires_grad_(),))
    some = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-40, 0.0]], requires_grad=True)
    cosines(some).sum().backward()
    assert cosines(some).tolist() == [[0, 0, 0], [0, pytest.approx(1), 0], [0, 0, 0]]
    assert (some.grad[::2] == 0).all()


def test_the_distance_has_gradient_zero_where_rows_coincide():
    square = torch.tensor([0.0, 4.0], requires_grad=True)
    kernels._sqrt(square).sum().backward()
    assert square.grad.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("kernel", KERNELS)
def test_coinciding_rows_have_finite_gradients(kernel):
    x = torch.ones(4, 3, requires_grad=True)
    log_kernel(x, kernel=kernel).square().sum().backward()
    assert x.grad.isfinite().all()


def test_opposite_rows_have_a_finite_logarithm():
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
    log_k = log_kernel(x)
    assert log_k[0, 1].item() == pytest.approx(math.log(torch.finfo(torch.float32).eps))
    log_k.sum().backward()
    assert x.grad.isfinite().all()


def test_a_zero_row_has_cosine_zero():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert cosine_kernel(x).tolist() == [[0.5, 0.5], [0.5, 1.0]]


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 0.1, 7.0, 1e6]))
def test_the_default_gaussian_bandwidth_follows_the_scale(seed, scale):
    x = features(6, 3, seed)
    torch.testing.assert_close(log_kernel(scale * x, kernel="gaussian"), log_kernel(x, kernel="gaussian"))
    mean = torch.cdist(x, x).square().mean().item()
    torch.testing.assert_close(
        log_kernel(x, kernel="gaussian"), log_kernel(x, kernel="gaussian", bandwidth=mean)
    )


def test_log_space_does_not_underflow():
    x = torch.tensor([[0.0], [100.0]])
    assert gaussian_kernel(x, bandwidth=1.0)[0, 1] == 0
    assert log_kernel(x, kernel="gaussian", bandwidth=1.0)[0, 1] == -10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: log_kernel(x, kernel="rbf"), "kernel: expected one of"),
        (lambda x: log_kernel(x, x[:, :2]), "y: expected 3 columns as in x, got 2"),
        (
            lambda x: log_kernel(x, kernel="gaussian", bandwidth=-1.0),
            "bandwidth: expected a finite number above 0",
        ),
        (lambda x: log_kernel(x, bandwidth=1.0), "bandwidth: the cosine kernel has none"),
        (lambda x: cosine_kernel(x.int()), "x: expected a floating tensor"),
        (lambda x: unit_rows(x[0]), "x: expected a floating tensor"),
        (lambda x: pairwise_squared_distances(x, x[:0]), "y: expected a floating tensor"),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(features(4, 3))
