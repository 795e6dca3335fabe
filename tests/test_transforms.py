"""Where every loss must work: compiled, mapped over many runs, in mixed precision, on another device.

A new loss is a line in ``LOSSES`` of :mod:`tests.methods.losses`; the last test fails without it.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

import kdrefs
from kdrefs.methods import kd
from tests.methods.losses import INTEGERS, LOSSES, SHAPES, SIZES, VALUES

NAMES = [
    " ".join([loss.__name__, *kinds[2:], *(f"{name}={value}" for name, value in options.items())])
    for loss, kinds, options in LOSSES
]
every_loss = pytest.mark.parametrize(("loss", "kinds", "options"), LOSSES, ids=NAMES)


def inputs(kinds: tuple[str, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(kind: str) -> Tensor:
        shape = [SIZES[size] for size in SHAPES[kind]]
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return VALUES.get(kind, lambda x: x)(values).to(dtype)

    return [INTEGERS[kind] if kind in INTEGERS else drawn(kind) for kind in kinds]


def value_and_gradient(loss, student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, *others)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@every_loss
def test_compiles_to_one_graph(unchecked, compiler, loss, kinds, options):
    call = partial(loss, **options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        value_and_gradient(compiled, *inputs(kinds)), value_and_gradient(call, *inputs(kinds)), strict=True
    ):
        assert_equal(got, expected)


@every_loss
def test_mapped_over_members_equals_a_loop(unchecked, loss, kinds, options):
    call = partial(loss, **options)
    members = [inputs(kinds, seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*members, strict=True)]
    each = [value_and_gradient(call, *member) for member in members]
    values, gradients = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    # Backwards through the map, as a training of many runs goes, and the map of the gradient.
    got, gradient = value_and_gradient(torch.vmap(call), *stacked)
    assert_equal(got, values)
    assert_equal(gradient, gradients)
    assert_equal(torch.vmap(torch.func.grad(call))(*stacked), gradients)


@every_loss
def test_under_autocast_the_value_is_single_precision(loss, kinds, options):
    """Backwards outside of it, as :func:`kdrefs.training.update` does."""
    call = partial(loss, **options)
    expected, expected_gradient = value_and_gradient(call, *inputs(kinds, dtype=torch.float32))
    for dtype, tolerance in {torch.float32: 1e-5, torch.bfloat16: 3e-2}.items():
        student, *others = inputs(kinds, dtype=dtype)
        student.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = call(student, *others)
        value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        size = expected_gradient.abs().max().item()
        torch.testing.assert_close(
            student.grad, expected_gradient, rtol=0, atol=2 * tolerance * size, check_dtype=False
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_loss
def test_on_cuda_the_value_is_that_of_the_cpu(loss, kinds, options):
    call = partial(loss, **options)
    expected = value_and_gradient(call, *inputs(kinds))
    got = value_and_gradient(call, *(tensor.cuda() for tensor in inputs(kinds)))
    for one, other in zip(expected, got, strict=True):
        assert other.device.type == "cuda"
        torch.testing.assert_close(other.cpu(), one, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiles_to_machine_code(unchecked, compiler):
    call = partial(kd.kd_loss, temperature=4.0)
    kinds = ("logits", "logits", "labels")
    got = value_and_gradient(torch.compile(call, fullgraph=True), *inputs(kinds))
    for one, other in zip(value_and_gradient(call, *inputs(kinds)), got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_the_table_has_every_public_loss():
    public = {name for name in kdrefs.__all__ if name.endswith(("_loss", "_divergence"))}
    assert public | {"softened_kl", "softened_cross_entropy", "attention_kl"} == {
        loss.__name__ for loss, *_ in LOSSES
    }
