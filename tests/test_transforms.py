"""Where every loss must work: compiled, mapped over many runs, in mixed precision, on another device.

A new loss is a line in ``LOSSES``; the last test fails without it.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

import kdrefs
from kdrefs import divergences
from kdrefs.methods import (
    ab,
    afd,
    at,
    cqd,
    darkrank,
    end2,
    fitnets,
    ft,
    internal_representations,
    jacobian_matching,
    kd,
    ksanc,
    logit_regression,
    noisy_kd,
    nst,
    pkt,
    quest,
    structured_kd,
)

# Inputs by name: eight samples of ten classes, vectors of two widths, maps of two channel numbers and sizes.
SHAPES = {
    "logits": (8, 10), "rows": (8, 5), "wide": (8, 9), "maps": (8, 6, 4, 4), "wide maps": (8, 9, 6, 6),
    "jacobians": (8, 2, 3, 4, 4), "words": (6, 9), "answers": (8,), "judged": (8, 11), "members": (8, 5, 10),
}  # fmt: skip
INTEGERS = {"labels": torch.arange(8) % 3, "landmarks": torch.tensor([5, 1, 6])}

# The loss, its tensors (the student's first), its options.
LOSSES = [
    (divergences.kl_divergence, ("logits", "logits"), {}),
    (divergences.jeffreys_divergence, ("logits", "logits"), {}),
    (divergences.quadratic_divergence, ("logits", "logits"), {}),
    (divergences.softened_kl, ("logits", "logits"), {"temperature": 4.0}),
    (divergences.softened_cross_entropy, ("logits", "logits"), {"temperature": 4.0}),
    (kd.kd_loss, ("logits", "logits"), {}),
    (kd.kd_loss, ("logits", "logits", "labels"), {}),
    (fitnets.hint_loss, ("maps", "maps"), {}),
    (logit_regression.logit_regression_loss, ("logits", "logits"), {}),
    (cqd.cqd_loss, ("logits", "logits", "labels"), {}),
    (noisy_kd.soft_randomization_loss, ("logits", "logits", "labels"), {}),
    (end2.end_loss, ("logits", "members"), {}),
    (end2.end2_loss, ("logits", "members"), {"temperature": 2.5}),
    (ab.ab_loss, ("maps", "maps"), {}),
    (ft.paraphraser_loss, ("maps", "maps"), {}),
    (ft.factor_loss, ("maps", "maps"), {}),
    (internal_representations.cls_cosine_loss, ("rows", "rows"), {}),
    (afd.discriminator_loss, ("answers", "answers"), {}),
    (afd.adversarial_loss, ("answers",), {}),
    (afd.mutual_logit_loss, ("logits", "logits", "labels"), {}),
    (afd.mutual_logit_loss, ("logits", "logits", "labels"), {"temperature": 1.0, "weight": 0.3}),
    (at.at_loss, ("maps", "wide maps"), {}),
    (at.at_loss, ("maps", "wide maps"), {"power": 1.0}),
    (at.at_loss, ("maps", "wide maps"), {"power": 4.0, "reduction": "max"}),
    (at.at_loss, ("maps", "wide maps"), {"variant": "official"}),
    (at.gradient_at_loss, ("maps", "maps"), {}),
    (darkrank.soft_darkrank_loss, ("rows", "wide"), {}),
    (darkrank.soft_darkrank_loss, ("rows", "wide"), {"variant": "official"}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {"variant": "official"}),
    (darkrank.hard_darkrank_loss, ("rows", "wide"), {"variant": "rkd"}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {"normalize": True}),
    (jacobian_matching.jacobian_loss, ("jacobians", "jacobians"), {"squared": False}),
    (ksanc.ksanc_loss, ("logits", "logits"), {}),
    (ksanc.ksanc_loss, ("logits", "logits", "judged", "labels", "rows", "rows"), {"adversarial": 0.5}),
    (ksanc.logit_adversarial_loss, ("judged", "labels"), {}),
    (ksanc.logit_discriminator_loss, ("judged", "judged", "labels"), {"mu": 0.1}),
    (nst.nst_loss, ("maps", "wide maps"), {"kernel": "linear"}),
    (nst.nst_loss, ("maps", "wide maps"), {}),
    (nst.nst_loss, ("maps", "wide maps"), {"degree": 3, "offset": 0.5}),
    (nst.nst_loss, ("maps", "wide maps"), {"kernel": "gaussian"}),
    (pkt.pkt_loss, ("rows", "wide"), {}),
    (pkt.pkt_loss, ("rows", "wide"), {"kernel": "gaussian", "diagonal": False}),
    (pkt.pkt_loss, ("rows", "wide"), {"kernel": "student_t", "divergence": "jeffreys"}),
    (pkt.pkt_loss, ("rows", "wide"), {"variant": "official"}),
    (pkt.supervised_pkt_loss, ("rows", "labels"), {}),
    (pkt.nystrom_pkt_loss, ("rows", "wide", "landmarks"), {}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {"variant": "printed"}),
    (structured_kd.pixelwise_loss, ("maps", "maps"), {"variant": "official"}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"alpha": 9}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"alpha": 5, "beta": 4}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"variant": "official"}),
    (structured_kd.pairwise_loss, ("maps", "wide maps"), {"variant": "cirkd"}),
    (structured_kd.holistic_loss, ("answers", "answers"), {}),
    (quest.quest_loss, ("maps", "wide maps", "words"), {"beta": 0.2}),
]
NAMES = [
    " ".join([loss.__name__, *kinds[2:], *(f"{name}={value}" for name, value in options.items())])
    for loss, kinds, options in LOSSES
]
every_loss = pytest.mark.parametrize(("loss", "kinds", "options"), LOSSES, ids=NAMES)


def inputs(kinds: tuple[str, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        INTEGERS[kind]
        if kind in INTEGERS
        else torch.randn(SHAPES[kind], generator=generator, dtype=torch.float64).to(dtype)
        for kind in kinds
    ]


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
    assert public | {"softened_kl", "softened_cross_entropy"} == {loss.__name__ for loss, *_ in LOSSES}
