"""How far the precision goes where members agree, and what stops it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdrefs.methods.end2 import end2_loss
from reproductions.harness.errata import Evidence, draw

CLASSES, MEMBERS = 4, 5
SPREADS = {"equal members": 0.0, "spread 0.01": 0.01, "spread 0.1": 0.1, "spread 1": 1.0}


def members_of(spread: float, classes: int = CLASSES) -> Tensor:
    """Logits ``(1, 5, classes)``: one prediction, with noise of that deviation in each member's logits."""
    common = 2 * draw(1, 1, classes, seed=1)
    return common + spread * draw(1, MEMBERS, classes, seed=2)


def deficit(members: Tensor, smoothing: float = 0.0) -> Tensor:
    r""":math:`\delta = -\log \sum_c \exp(\frac1M \sum_m \log \pi_{mc})`, 0 only where all members agree."""
    pi = (1 - smoothing) * members.softmax(2) + smoothing / members.shape[2]
    return -pi.log().mean(1).logsumexp(1)


def fall(shift: float, smoothing: float, classes: int = CLASSES) -> float:
    """By how much the loss of equal members falls between the precisions ``e^shift`` and ``e^(shift + 1)``."""
    members = members_of(0.0, classes)
    target = ((1 - smoothing) * members[:, 0].softmax(1) + smoothing / classes).log()
    near, far = (end2_loss(target + s, members, smoothing=smoothing) for s in (shift, shift + 1))
    return float(near - far)


def check_no_lower_bound() -> Evidence:
    """The loss of equal members falls for ever, by (K - 1) / 2 an e-fold of the precision."""
    falls = {
        (classes, smoothing): fall(16, smoothing, classes)
        for classes in (2, 4, 10)
        for smoothing in (0.0, 1e-3)
    }
    worst = max(abs(value - (classes - 1) / 2) for (classes, _), value in falls.items())
    return Evidence(
        holds=worst < 1e-5,
        summary=(
            f"At a precision of e¹⁶ the loss of 4 classes falls by {falls[4, 0.0]:.4f} an e-fold of the precision "
            f"without smoothing and by {falls[4, 1e-3]:.4f} with it; (K - 1) / 2 = 1.5. For 2, 4 and 10 classes the "
            f"largest deviation is {worst:.0e}."
        ),
        values={f"K = {k}, γ = {g}": value for (k, g), value in falls.items()},
    )


def best_precision(members: Tensor, smoothing: float = 0.0) -> float:
    """The precision at which the likelihood of the members is largest, by Newton's method on the logits."""
    pi = (1 - smoothing) * members.softmax(2) + smoothing / members.shape[2]
    z = pi.log().mean(1)
    z = (z.log_softmax(1) + ((members.shape[2] - 1) / (2 * deficit(members, smoothing))).log()).detach()
    for _ in range(12):
        z = z.requires_grad_()
        (slope,) = torch.autograd.grad(end2_loss(z, members, smoothing=smoothing), z)
        curve = torch.autograd.functional.hessian(
            lambda x: end2_loss(x, members, smoothing=smoothing), z.detach()
        )
        size = z.shape[1]
        step = torch.linalg.solve(curve.reshape(size, size), slope.reshape(size))
        z = (z - step.clamp(-1, 1)).detach()
    return float(z.logsumexp(1).exp())


def check_best_precision() -> Evidence:
    """The formula against the maximum itself, for members closer and closer to each other."""
    ratios = {}
    for spread in (0.3, 0.1, 0.03, 0.01):
        members = members_of(spread)
        ratios[spread] = best_precision(members) * 2 * float(deficit(members)) / (CLASSES - 1)
    errors = [abs(ratio - 1) for ratio in ratios.values()]
    return Evidence(
        holds=errors[-1] < 1e-3 and errors == sorted(errors, reverse=True),
        summary="Best precision over (K - 1) / 2δ: "
        + ", ".join(f"{ratio:.5f} at a spread of {spread}" for spread, ratio in ratios.items())
        + ".",
        values={f"spread {spread}": ratio for spread, ratio in ratios.items()},
    )


def growth(
    steps: int = 600, rate: float = 0.01, spreads: Mapping[str, float] = SPREADS
) -> dict[str, dict[float, list[float]]]:
    """Precisions over the steps of Adam on a free vector of logits.

    Returns:
        By name of the spread, then by smoothing: one precision a step.
    """
    members = torch.cat([members_of(spread) for spread in spreads.values()])
    found: dict[str, dict[float, list[float]]] = {name: {} for name in spreads}
    for smoothing in (0.0, 1e-3):
        z = torch.zeros(len(members), CLASSES, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([z], lr=rate)
        curves = []
        for _ in range(steps):
            optimizer.zero_grad()
            (len(members) * end2_loss(z, members, smoothing=smoothing)).backward()
            optimizer.step()
            curves.append(z.detach().logsumexp(1).exp().tolist())
        for row, name in enumerate(spreads):
            found[name][smoothing] = [step[row] for step in curves]
    return found
