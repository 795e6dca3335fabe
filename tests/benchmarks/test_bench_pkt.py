"""Value and gradient of PKT at the paper's sizes, beside the authors' formula written down plainly.

The table's figures in brackets are ratios to the fastest of the group; the seconds depend on the machine.
"""

import pytest
import torch
from torch import Tensor

from kdrefs.methods.pkt import nystrom_pkt_loss, pkt_loss

pytestmark = pytest.mark.usefixtures("unchecked")


def plain_formula(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    def conditionals(x: Tensor) -> Tensor:
        x = x / ((x**2).sum(dim=1, keepdim=True).sqrt() + eps)
        kernel = (x @ x.T + 1) / 2
        return kernel / kernel.sum(dim=1, keepdim=True)

    p, q = conditionals(teacher), conditionals(student)
    return (p * torch.log((p + eps) / (q + eps))).mean()


LOSSES = {
    "authors' formula": plain_formula,
    "official variant": lambda s, t: pkt_loss(s, t, variant="official"),
    "default": pkt_loss,
    "gaussian": lambda s, t: pkt_loss(s, t, kernel="gaussian"),
    "an eighth as landmarks": lambda s, t: nystrom_pkt_loss(s, t, torch.arange(0, len(s), 8)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [128, 1024])
def test_pkt_loss_and_gradient(benchmark, rows, name):
    benchmark.group = f"PKT, {rows} samples, 64-d student, 512-d teacher"
    student, teacher = torch.randn(rows, 64).relu().requires_grad_(), torch.randn(rows, 512)

    def step() -> Tensor:
        student.grad = None
        LOSSES[name](student, teacher).backward()
        return student.grad

    assert benchmark(step).isfinite().all()
