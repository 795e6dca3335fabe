"""The proofs of the relations that no erratum of a column proves already."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import sympy
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.nn import functional as F

from kdrefs.divergences import kl_divergence, softened_cross_entropy
from kdrefs.methods.ab import ab_loss
from kdrefs.methods.at import attention_map
from kdrefs.methods.darkrank import soft_darkrank_loss
from kdrefs.methods.end2 import end2_loss
from kdrefs.methods.fitnets import HintRegressor, hint_loss
from kdrefs.methods.kd import kd_loss
from kdrefs.methods.logit_regression import logit_regression_loss
from kdrefs.methods.nst import nst_loss
from kdrefs.methods.structured_kd import pairwise_loss
from reproductions.harness.errata import Evidence, draw


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def check_logit_regression() -> Evidence:
    """Distillation at high temperature and the regression of logits."""
    student, teacher = 3 * draw(64, 10, seed=1) + 1, 3 * draw(64, 10, seed=2)
    regression = float(logit_regression_loss(_centred(student), _centred(teacher))) / 10
    gaps = {
        T: abs(float(kd_loss(_centred(student), _centred(teacher), temperature=T)) / regression - 1)
        for T in (4.0, 100.0, 1e4)
    }
    raw = float(logit_regression_loss(student, teacher)) / 10
    # The limit itself, for two classes, in symbols.
    t, s, x = sympy.symbols("t s x", real=True)
    p, q = (1 / (1 + sympy.exp(-2 * value * x)) for value in (t, s))  # of the logits (t, -t) at T = 1/x
    divergence = p * sympy.log(p / q) + (1 - p) * sympy.log((1 - p) / (1 - q))
    second = sympy.simplify(sympy.diff(divergence, x, 2).subs(x, 0) / 2)
    exact = sympy.simplify(second - ((s - t) ** 2 + (t - s) ** 2) / 4) == 0
    return Evidence(
        holds=bool(exact) and gaps[1e4] < 1e-3 < 1e-2 < gaps[4.0] and abs(raw / regression - 1) > 0.05,
        summary=(
            f"Centred logits of ten classes: $T^2$ KL and $1/K$ of the regression differ by {100 * gaps[4.0]:.1f} % at "
            f"T = 4, {100 * gaps[100.0]:.2f} % at 100 and {100 * gaps[1e4]:.4f} % at 10,000. Without centring the "
            f"regression is {raw / regression:.2f} times as large. For two classes the limit is "
            "$\\frac{1}{2K} \\lVert s - t \\rVert^2$ in symbols."
        ),
        values={"T = 4": gaps[4.0], "T = 10,000": gaps[1e4], "not centred": raw / regression},
    )


def _grams(maps: Tensor) -> Tensor:
    unit = F.normalize(maps.flatten(2), dim=2)
    return unit.mT @ unit / unit.shape[1]


def check_at_in_nst() -> Evidence:
    """The attention map as the diagonal of the Gram matrix that polynomial NST matches."""
    maps = draw(4, 6, 3, 5, seed=3)
    unit = F.normalize(maps.flatten(2), dim=2).view_as(maps)
    diagonal = _grams(maps).diagonal(dim1=1, dim2=2)
    gap = float((F.normalize(diagonal, dim=1) - attention_map(unit)).abs().max())
    loud = maps.clone()
    loud[:, 0] *= 10
    raw = float((F.normalize(diagonal, dim=1) - attention_map(loud)).abs().max())
    return Evidence(
        holds=gap < 1e-12 and raw > 0.01,
        summary=(
            f"Channels of unit norm: the diagonal, normalised, is the attention map (p = 2) to {gap:.0e}. With one "
            f"channel ten times as loud the attention map moves by {raw:.2f}; NST's matrix does not."
        ),
        values={"gap": gap, "a loud channel": raw},
    )


def check_nst_is_gram_matching() -> Evidence:
    """Polynomial NST as the distance of Gram matrices over positions."""
    student, teacher = draw(4, 6, 4, 4, seed=4), draw(4, 9, 4, 4, seed=5)
    nst = float(nst_loss(student, teacher))
    positions = float((_grams(student) - _grams(teacher)).square().sum((1, 2)).mean())
    own, other = (F.normalize(x[:, :6].flatten(2), dim=2) for x in (student, teacher))
    channels = float((own @ own.mT - other @ other.mT).square().mean())  # the style matrix, C x C
    same = float(nst_loss(student, teacher[:, :6]))
    return Evidence(
        holds=abs(nst - positions) < 1e-12 and abs(channels - same) > 0.01,
        summary=(
            f"Six against nine channels: MMD² {nst:.6f}, squared distance of the matrices over positions "
            f"{positions:.6f}. Six against six: {same:.3f}, while the matrices over channels (style) give "
            f"{channels:.3f}."
        ),
        values={"MMD²": nst, "over positions": positions, "over channels": channels},
    )


def check_darkrank() -> Evidence:
    """What NST and DarkRank look at: channels of one sample, samples of one batch."""
    teacher, student = draw(6, 8, 2, 2, seed=6), draw(6, 8, 2, 2, seed=7)

    def darkrank(s: Tensor, t: Tensor) -> float:
        return float(soft_darkrank_loss(s.flatten(1), t.flatten(1)))

    def changes(s: Tensor, t: Tensor) -> tuple[float, float]:
        return (
            abs(float(nst_loss(s, t) - nst_loss(student, teacher))),
            abs(darkrank(s, t) - darkrank(student, teacher)),
        )

    turn = torch.linalg.qr(draw(32, 32, seed=8))[0]  # all values of a sample mixed, distances kept
    rotated = changes((student.flatten(1) @ turn).view_as(student), teacher)
    order = torch.tensor([3, 1, 0, 6, 2, 7, 5, 4])
    shuffled = changes(student[:, order], teacher)
    first = float(nst_loss(student[:1], teacher[:1]))
    company = torch.cat([student[:1], draw(5, 8, 2, 2, seed=9)]), torch.cat([teacher[:1], teacher[1:]])
    alone = abs(6 * float(nst_loss(*company)) - 5 * float(nst_loss(company[0][1:], company[1][1:])) - first)
    return Evidence(
        holds=rotated[0] > 0.01 > 1e-9 > rotated[1] and shuffled[0] < 1e-12 < 0.001 and alone < 1e-9,
        summary=(
            f"All values of each sample rotated, which keeps the distances: NST moves by {rotated[0]:.3f}, DarkRank by "
            f"{rotated[1]:.0e}. The student's channels in another order: NST moves by {shuffled[0]:.0e}, DarkRank too "
            f"({shuffled[1]:.0e}). The share of a sample in NST is the same in any company (to {alone:.0e}); one "
            "sample alone has no DarkRank."
        ),
        values={"NST, rotated": rotated[0], "DarkRank, rotated": rotated[1]},
    )


def _gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student), student)
    return found


def _swapped(loss: Callable[..., Tensor], teacher: Tensor, student: Tensor) -> Tensor:
    return loss(student, teacher)


def check_weak_responses() -> Evidence:
    """What a change of sign of the weakest and of the strongest neuron does to activation boundaries and to NST."""
    teacher, student = draw(2, 6, 4, 4, seed=10), draw(2, 6, 4, 4, seed=11)
    order = teacher[0].abs().flatten().argsort()
    faint = abs(float(ab_loss(student, 1e-6 * teacher) - ab_loss(student, teacher)))

    def flipped(place: int) -> tuple[float, float]:
        other = teacher.clone()
        other[0].view(-1)[place] *= -1
        gaps = []
        for loss in (ab_loss, nst_loss):
            before, after = (_gradient(partial(_swapped, loss, t), student) for t in (teacher, other))
            gaps.append(float((after - before).norm()))
        return gaps[0], gaps[1]

    weak, strong = flipped(int(order[0])), flipped(int(order[-1]))
    quiet = teacher.clone()
    quiet[:, 0] *= 1e-3
    channel = abs(float(nst_loss(student, quiet) - nst_loss(student, teacher)))
    return Evidence(
        holds=faint < 1e-12 and weak[0] > 0.1 and 20 * weak[1] < strong[1] and channel < 1e-9,
        summary=(
            f"The teacher's responses a million times weaker: AB changes by {faint:.0e}. The sign of the weakest "
            f"neuron flipped: AB's gradient changes by {weak[0]:.2f} (the strongest's: {strong[0]:.2f}), NST's by "
            f"{weak[1]:.1e} ({strong[1]:.1e}). A whole channel a thousand times weaker: NST changes by {channel:.0e}."
        ),
        values={"AB, weakest": weak[0], "NST, weakest": weak[1], "NST, strongest": strong[1]},
    )


def check_auxiliary_network() -> Evidence:
    """FitNets' regressor as an auxiliary network, three years before factor transfer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        regressor = HintRegressor((4, 6, 6), (8, 4, 4)).double()
    student, hint = draw(16, 4, 6, 6, seed=12), draw(16, 8, 4, 4, seed=13).relu()
    count = sum(parameter.numel() for parameter in regressor.parameters())
    losses = []
    optimizer = torch.optim.Adam(regressor.parameters(), lr=0.01)
    for _ in range(50):
        loss = hint_loss(regressor(student), hint)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Evidence(
        holds=count > 0 and losses[-1] < 0.9 * losses[0],
        summary=(
            f"FitNets (ICLR 2015) between 4 and 8 channels: a convolution of {count} parameters that belongs to "
            f"neither network and learns: 50 steps on it alone take the loss from {losses[0]:.1f} to {losses[-1]:.1f}."
        ),
        values={"parameters": count, "before": losses[0], "after": losses[-1]},
    )


def _entropy(p: float) -> float:
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def _gap(mean: float, p: float) -> float:
    """Divergence of a member's prediction from the mean prediction."""
    return sum(x * math.log(x / m) for x, m in ((p, mean), (1 - p, 1 - mean)) if x > 0)


def _expected(density: Callable[[float], float], term: Callable[[float], float]) -> float:
    value, _ = integrate.quad(lambda p: density(p) * term(p), 0, 1, limit=200)
    return float(value)


def check_uncertainties() -> Evidence:
    """Total uncertainty of a Dirichlet as expected entropy plus mutual information, by integration."""
    worst, table = 0.0, []
    for a, b in ((0.5, 0.5), (2.0, 5.0), (30.0, 10.0)):
        mean = a / (a + b)
        data, information = (
            _expected(stats.beta(a, b).pdf, term) for term in (_entropy, partial(_gap, mean))
        )
        alpha = torch.tensor([a, b], dtype=torch.float64)
        shares, total = alpha / alpha.sum(), _entropy(mean)
        closed = float(-(shares * (torch.digamma(alpha + 1) - torch.digamma(alpha.sum() + 1))).sum())
        worst = max(worst, abs(data - closed), abs(total - data - information))
        table.append((total, data, information))
    first, *_, last = table
    return Evidence(
        holds=worst < 1e-6 and first[2] > last[2],
        summary=(
            f"Two classes, three Dirichlet distributions: the entropy of the mean is the integrated entropy plus the "
            f"integrated divergence from the mean to {worst:.0e}, and the former has its closed form. Of "
            f"{first[0]:.3f} nats {first[2]:.3f} are knowledge at $\\alpha = (0.5, 0.5)$, of {last[0]:.3f} nats "
            f"{last[2]:.3f} at $(30, 10)$."
        ),
        values={"largest gap": worst},
    )


def check_likelihood() -> Evidence:
    """EnD² minimises a likelihood: what a divergence of mean predictions cannot see decides it."""
    ensemble = draw(1, 5, 3, seed=14)
    mean = ensemble.softmax(-1).mean(1)
    values = {}
    for precision in (1.0, 10.0, 100.0):
        logits = (precision * mean).log()
        values[precision] = (
            float(end2_loss(logits, ensemble, smoothing=0.0)),
            float(kl_divergence(mean.log(), logits.log_softmax(-1))),
        )
    agreed = draw(1, 1, 3, seed=15).expand(1, 5, 3)
    least = [
        float(end2_loss((k * agreed[:, 0].softmax(-1)).log(), agreed, smoothing=0.0)) for k in (1e2, 1e4, 1e6)
    ]
    divergences = [value for _, value in values.values()]
    losses = [value for value, _ in values.values()]
    return Evidence(
        holds=max(map(abs, divergences)) < 1e-12
        and max(losses) - min(losses) > 0.5
        and least[2] < least[1] < least[0] < 0,
        summary=(
            f"Students with the ensemble's mean and precisions 1, 10 and 100: the divergence of the means is at most "
            f"{max(map(abs, divergences)):.0e}, the loss {losses[0]:.2f}, {losses[1]:.2f} and {losses[2]:.2f}. Where "
            f"all members agree, precisions of 100, 10⁴ and 10⁶ give {least[0]:.1f}, {least[1]:.1f} and "
            f"{least[2]:.1f}: no divergence is below 0."
        ),
        values={"precision 1": losses[0], "precision 100": losses[2], "agreed": least[2]},
    )


def check_pixelwise() -> Evidence:
    """The direction of the divergence between pixels: as printed, and as the code has it."""
    student, teacher = 2 * draw(40, 5, seed=16), 2 * draw(40, 5, seed=17)
    log_t = teacher.log_softmax(1)
    code = _gradient(lambda s: softened_cross_entropy(s, teacher, 1.0), student)
    usual = _gradient(lambda s: kl_divergence(log_t, s.log_softmax(1)), student)
    printed = _gradient(lambda s: kl_divergence(s.log_softmax(1), log_t), student)
    same = float((code - usual).abs().max())
    cosine = float(F.cosine_similarity(code.flatten(), printed.flatten(), dim=0))
    return Evidence(
        holds=same < 1e-12 and cosine < 0.95,
        summary=(
            f"Gradients: the code's cross-entropy and KL(teacher ‖ student) agree to {same:.0e}; with the printed "
            f"KL(student ‖ teacher) it has a cosine of {cosine:.2f}."
        ),
        values={"gap": same, "cosine": cosine},
    )


def check_pairwise_factor() -> Evidence:
    """The factor before the sum over pairs: a mean, or its inverse."""
    means, printed = {}, {}
    for side in (4, 8, 16):
        student, teacher = draw(2, 6, side, side, seed=18), draw(2, 6, side, side, seed=19)
        means[side] = float(pairwise_loss(student, teacher))
        pairs = side**2 * side**2  # W'H'α/β edges, α all nodes, β = 1
        printed[side] = means[side] * pairs * pairs
    growth = printed[16] / printed[4], means[16] / means[4]
    return Evidence(
        holds=growth[0] > 1e4 and 0.5 < growth[1] < 2,
        summary=(
            f"Random maps of 4 and of 16 pixels: the mean over the edges goes from {means[4]:.3f} to {means[16]:.3f}, "
            f"the sum times the printed factor from {printed[4]:.1e} to {printed[16]:.1e}."
        ),
        values={"printed, growth": growth[0], "mean, growth": growth[1]},
    )
