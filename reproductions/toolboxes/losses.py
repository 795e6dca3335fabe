r"""Losses of public toolboxes beside what their papers define, in a few lines each of our own.

A function without a mark in its name is the paper's definition, one that ends in the name of a toolbox computes what
that toolbox computes. Each check proves how the two are related and what follows from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.kernels import gaussian_kernel, unit_rows
from kdrefs.methods.at import attention_map
from kdrefs.methods.kd import kd_loss
from reproductions.harness.errata import Evidence, draw


def equicorrelated(samples: int, cosine: float) -> Tensor:
    """``(samples, samples)`` unit rows whose pairwise cosines are all ``cosine``."""
    gram = torch.full((samples, samples), cosine, dtype=torch.float64).fill_diagonal_(1)
    return torch.linalg.cholesky(gram)


def similarity_preserving(student: Tensor, teacher: Tensor, norm: float = 2) -> float:
    r"""SP (arXiv:1907.09682): :math:`\lVert \bar G_t - \bar G_s \rVert_F^2 / N^2`, rows of :math:`G` divided by
    their Euclidean norm.
    """
    grams = [F.normalize(x @ x.mT, p=norm, dim=1) for x in (student.flatten(1), teacher.flatten(1))]
    return float((grams[0] - grams[1]).square().mean())


def check_row_norm() -> Evidence:
    """SP with rows divided by the sum of magnitudes."""
    n, rho = 16, 0.25
    student, teacher = equicorrelated(n, rho), equicorrelated(n, 0.0)
    length, total = math.sqrt(1 + (n - 1) * rho**2), 1 + (n - 1) * rho
    by_hand = (2 - 2 / length) / n, ((n - 1) ** 2 + n - 1) * rho**2 / total**2 / n
    paper, theirs = similarity_preserving(student, teacher), similarity_preserving(student, teacher, norm=1)
    ratios = {}
    for rows in (16, 64, 256):
        maps = draw(rows, 32, seed=1).relu(), draw(rows, 128, seed=2).relu()
        ratios[rows] = similarity_preserving(*maps) / similarity_preserving(*maps, norm=1)
    return Evidence(
        holds=abs(paper - by_hand[0]) < 1e-12
        and abs(theirs - by_hand[1]) < 1e-12
        and abs(paper / theirs - 1) > 0.1
        and ratios[256] > 3 * ratios[64] > 6 * ratios[16],
        summary=(
            f"Sixteen samples with all cosines 0.25 against an orthonormal teacher: {paper:.5f} as defined, "
            f"{theirs:.5f} with the sum of magnitudes, both equal to their closed forms. For rectified features the "
            "definition is "
            + ", ".join(f"{ratio:.0f} times theirs at N = {rows}" for rows, ratio in ratios.items())
            + ": their weight means another one for each batch size."
        ),
        values={"as defined": paper, "sum of magnitudes": theirs}
        | {f"ratio, N = {rows}": ratio for rows, ratio in ratios.items()},
    )


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1) -> float:
    r"""AB (arXiv:1811.03233): a squared hinge on every neuron, the teacher's sign its label, summed; mean over
    the samples.
    """
    label = torch.where(teacher > 0, 1.0, -1.0).to(student)
    return float((margin - label * student).relu().square().sum() / student.shape[0])


def _masked_hinge(student: Tensor, teacher: Tensor, margin: float = 1) -> Tensor:
    """The same as toolboxes write it, neuron by neuron."""
    off = (student + margin).square() * ((student > -margin) & (teacher <= 0))
    on = (student - margin).square() * ((student <= margin) & (teacher > 0))
    return off + on


def check_boundary_scales() -> Evidence:
    """AB under one name in three sizes."""
    values: dict[str, float] = {}
    off = 0.0
    for channels, side in ((64, 8), (16, 32)):
        student, teacher = draw(8, channels, side, side, seed=3), draw(8, channels, side, side, seed=4)
        paper, terms = activation_boundary(student, teacher), _masked_hinge(student, teacher)
        name = f"{channels} x {side} x {side}"
        values[f"torchdistill, {name}"] = float(terms.sum() / 8)
        values[f"RepDistiller, {name}"] = float(terms.sum() / 8 / 1000 * 3)
        values[f"Zoo, {name}"] = float(terms.mean())
        factors = 1, 0.003, 1 / (channels * side**2)
        got = [values[f"{box}, {name}"] for box in ("torchdistill", "RepDistiller", "Zoo")]
        off = max(off, *(abs(g / (paper * factor) - 1) for g, factor in zip(got, factors, strict=True)))
    first, second = (
        [values[f"{box}, {name}"] for box in ("torchdistill", "RepDistiller", "Zoo")]
        for name in ("64 x 8 x 8", "16 x 32 x 32")
    )
    return Evidence(
        holds=off < 1e-9 and second[0] / first[0] > 3.5 and 0.9 < second[2] / first[2] < 1.1,
        summary=(
            f"One layer of 64 x 8 x 8 neurons: {first[0]:.0f} (torchdistill), {first[1]:.2f} (RepDistiller, MMRazor) "
            f"and {first[2]:.3f} (Zoo), that is 1, 0.003 and 1/4096 of the sum. With 16 x 32 x 32 neurons: "
            f"{second[0]:.0f}, {second[1]:.2f} and {second[2]:.3f}."
        ),
        values=values,
    )


def factor_transfer(student: Tensor, teacher: Tensor) -> float:
    r"""FT (arXiv:1802.04977) with p = 1: :math:`\lVert F_t / \lVert F_t \rVert - F_s / \lVert F_s \rVert
    \rVert_1`, mean over the samples.
    """
    gap = unit_rows(student.flatten(1)) - unit_rows(teacher.flatten(1))
    return float(gap.abs().sum(1).mean())


def factor_transfer_repdistiller(student: Tensor, teacher: Tensor) -> float:
    """Squares averaged over the channels first, then normalised: nothing but attention maps."""
    maps = [F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher)]
    return float((maps[0] - maps[1]).abs().sum(1).mean())


def check_factor() -> Evidence:
    """FT that sees attention maps only."""
    teacher, other = draw(16, 8, 4, 4, seed=5), draw(16, 8, 4, 4, seed=6)
    same_map = (attention_map(other) - attention_map(teacher)).abs().sum(1).mean()
    off = abs(factor_transfer_repdistiller(other, teacher) - float(same_map))
    strangers = {"sign flipped": -teacher, "channels reversed": teacher.flip(1)}
    theirs = {name: factor_transfer_repdistiller(student, teacher) for name, student in strangers.items()}
    paper = {name: factor_transfer(student, teacher) for name, student in strangers.items()}
    opposite = float(2 * unit_rows(teacher.flatten(1)).abs().sum(1).mean())
    return Evidence(
        holds=off < 1e-12
        and max(theirs.values()) < 1e-12
        and abs(paper["sign flipped"] - opposite) < 1e-12
        and paper["channels reversed"] > 1,
        summary=(
            f"A factor with all signs flipped: {paper['sign flipped']:.1f} by the paper, "
            f"{theirs['sign flipped']:.0g} by their code; with its channels in reverse order "
            f"{paper['channels reversed']:.1f} and {theirs['channels reversed']:.0g}. From the L1 distance of "
            f"attention maps theirs differs by {off:.0g}."
        ),
        values={f"paper, {name}": value for name, value in paper.items()}
        | {f"theirs, {name}": value for name, value in theirs.items()},
    )


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> float:
    r"""CC (arXiv:1904.01802): :math:`\frac{1}{N^2} \sum_{ij} (k(s_i, s_j) - k(t_i, t_j))^2` with the Gaussian
    kernel of unit rows.
    """
    kernels = [gaussian_kernel(unit_rows(x), bandwidth=1 / gamma) for x in (student, teacher)]
    return float((kernels[0] - kernels[1]).square().mean())


def correlation_congruence_repdistiller(student: Tensor, teacher: Tensor) -> float:
    """Magnitudes of student minus teacher, those of one sample times those of the next."""
    gap = (student - teacher).abs()
    return float((gap[:-1] * gap[1:]).sum(1).mean())


def check_successive_differences() -> Evidence:
    """CC from products of successive differences between student and teacher."""
    teacher = draw(32, 16, seed=7)
    halfway, turned = teacher.clone(), teacher @ torch.linalg.qr(draw(16, 16, seed=8)).Q
    halfway[::2] = draw(16, 16, seed=9)
    order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])
    paper, theirs = correlation_congruence, correlation_congruence_repdistiller
    shuffled = theirs(halfway[order], teacher[order])
    return Evidence(
        holds=theirs(halfway, teacher) == 0
        and paper(halfway, teacher) > 0.001
        and paper(turned, teacher) < 1e-24
        and theirs(turned, teacher) > 1
        and shuffled > 1
        and abs(paper(halfway[order], teacher[order]) - paper(halfway, teacher)) < 1e-12,
        summary=(
            "A student that is right on every second sample and random on the others: "
            f"{theirs(halfway, teacher):.0f} by their code, {shuffled:.1f} with the batch in another order; by the "
            f"paper {paper(halfway, teacher):.4f} in any order. A rotated copy of the teacher, all correlations kept: "
            f"{theirs(turned, teacher):.1f} by their code, {paper(turned, teacher):.0e} by the paper."
        ),
        values={
            "every second sample": theirs(halfway, teacher),
            "the same, reordered": shuffled,
            "rotated copy": theirs(turned, teacher),
        },
    )


def gaussian_series(x: Tensor, gamma: float, order: int) -> Tensor:
    r"""The paper's series of the Gaussian kernel, :math:`e^{-2\gamma} \sum_{p \le P} \frac{(2\gamma)^p}{p!} (x_i \cdot
    x_j)^p`, which holds for unit rows.
    """
    gram = x @ x.mT
    terms = [(2 * gamma * gram) ** p / math.factorial(p) for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


def correlation_congruence_torchdistill(student: Tensor, teacher: Tensor, gamma: float, order: int) -> float:
    """Frobenius norm, not squared, over the square of the batch size; rows as they come."""
    gap = gaussian_series(student, gamma, order) - gaussian_series(teacher, gamma, order)
    return float(gap.norm() / student.shape[0] ** 2)


def check_series() -> Evidence:
    """CC without the square, of rows that are not unit vectors."""
    gamma, order = 0.4, 20  # enough terms that the series is the kernel to rounding
    student, teacher = unit_rows(draw(24, 8, seed=10)), unit_rows(draw(24, 8, seed=11))
    paper = correlation_congruence(student, teacher, gamma)
    theirs = correlation_congruence_torchdistill(student, teacher, gamma, order)
    twice = correlation_congruence_torchdistill(student.repeat(2, 1), teacher.repeat(2, 1), gamma, order)
    long = 3 * student
    largest = float(gaussian_series(long, gamma, order).max())
    bound = float(gaussian_kernel(long, bandwidth=1 / gamma).max())
    return Evidence(
        holds=abs((theirs * 24) ** 2 / paper - 1) < 1e-9
        and abs(twice / theirs - 0.5) < 1e-12
        and largest > 100
        and bound == 1,
        summary=(
            f"Unit rows: {theirs:.5f} where the definition gives {paper:.5f}, and ({theirs:.5f} N)² is the definition; "
            f"the same batch twice gives {twice:.5f}. Rows of length 3, as a linear layer may return them: the series "
            f"reaches {largest:.0f}, the Gaussian kernel never exceeds {bound:.0f}."
        ),
        values={
            "theirs": theirs,
            "definition": paper,
            "theirs, batch twice": twice,
            "largest kernel": largest,
        },
    )


class _Variances(nn.Module):
    """The parameters of the variances, in a list that registers them or in a plain one."""

    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        parameters = [nn.Parameter(torch.ones(4))]
        self.log_scales = nn.ParameterList(parameters) if registered else parameters


def best_variance(residual: Tensor) -> Tensor:
    """The variance of each channel that minimises VID's negative log-likelihood of ``(batch, channels)`` residuals."""
    return residual.square().mean(0)


def _negative_log_likelihood(residual: Tensor, variance: Tensor) -> Tensor:
    return (residual.square() / variance + variance.log()).mean() / 2


def check_variances() -> Evidence:
    """VID whose variances no optimiser knows."""
    known, registered = (len(list(_Variances(registered=flag).parameters())) for flag in (False, True))
    spread = torch.tensor([0.1, 0.5, 2, 8], dtype=torch.float64)
    residual = (draw(512, 4, seed=12) * spread).requires_grad_()
    start = torch.full((4,), 5.0, dtype=torch.float64)
    best = best_variance(residual.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(_negative_log_likelihood(residual.detach(), best), best)
    fixed, learned = (_negative_log_likelihood(residual, v) for v in (start, best.detach()))
    pull, learned_pull = (torch.autograd.grad(loss, residual)[0] for loss in (fixed, learned))
    (squares,) = torch.autograd.grad(0.1 * residual.square().mean(), residual)
    first, last = (float(pull[:, c].norm() / learned_pull[:, c].norm()) for c in (0, 3))
    at_five, at_best = float(fixed.detach()), float(learned.detach())
    return Evidence(
        holds=known == 0
        and registered == 1
        and bool(slope.abs().max() < 1e-9)
        and float((pull - squares).abs().max()) < 1e-15
        and at_five > at_best + 0.1
        and first < 0.01
        and last > 5,
        summary=(
            f"A module names {known} of the parameters that it keeps in a list, so the variances stay at 5 and "
            "the gradient is exactly that of 0.1 times the mean square. Four channels with residuals of 0.1, 0.5, 2 "
            f"and 8: negative log-likelihood {at_five:.2f} with variance 5, {at_best:.2f} at its "
            f"minimum; the best channel's pull is {first:.3f} of what it should be, the worst one's {last:.0f} times."
        ),
        values={"variance 5": at_five, "minimum": at_best},
    )


def noisy_teacher_kd_lib(student: Tensor, teacher: Tensor, temperature: float = 20) -> Tensor:
    """Mean square of the student's *log*-probabilities less the teacher's probabilities, with weight one half."""
    gap = (student / temperature).log_softmax(1) - (teacher / temperature).softmax(1)
    return 0.5 * temperature**2 * gap.square().mean()


def check_log_probabilities() -> Evidence:
    """A soft term that is not least where the student equals its teacher."""
    teacher = 20 * draw(8, 10, seed=13)
    copy, flat = noisy_teacher_kd_lib(teacher, teacher), torch.zeros_like(teacher)
    by_hand = 200 * (math.log(10) + 0.1) ** 2  # both uniform over ten classes
    uniform = float(noisy_teacher_kd_lib(flat, flat))
    found, slope = teacher.clone(), torch.full_like(teacher, math.inf)
    for _ in range(300):  # gradient descent from the teacher; a rate at which it settles
        student = found.requires_grad_()
        (slope,) = torch.autograd.grad(noisy_teacher_kd_lib(student, teacher), student)
        found = (student - 20 * slope).detach()
    least, kl = float(noisy_teacher_kd_lib(found, teacher)), float(kd_loss(found, teacher, temperature=20))
    tops = [float((x / 20).softmax(1).amax(1).mean()) for x in (teacher, found)]
    right = float(kd_loss(teacher, teacher, temperature=20))
    return Evidence(
        holds=abs(uniform / by_hand - 1) < 1e-9
        and abs(right) < 1e-9
        and bool(slope.abs().max() < 1e-6)
        and least < 0.9 * float(copy)
        and kl > 1
        and tops[1] < 0.5 * tops[0],
        summary=(
            f"T = 20, ten classes: a perfect copy of the teacher costs {float(copy):.0f} (two uniform predictions "
            f"{uniform:.0f}), divergence {abs(right):.0g}. The minimum is {least:.0f}, at a student whose softened "
            f"predictions have a top probability of {tops[1]:.2f} where the teacher's have {tops[0]:.2f}."
        ),
        values={"copy of the teacher": float(copy), "minimum": least, "both uniform": uniform},
    )


def relation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""DIST's inter-class term (arXiv:2205.10536): one less the mean correlation of the softened predictions."""
    s, t = ((x / temperature).softmax(1) for x in (student, teacher))
    return 1 - F.cosine_similarity(s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)).mean()


def check_relation_scale() -> Evidence:
    r"""DIST with a factor :math:`\tau^2` that nothing asks for."""
    student, teacher = 3 * draw(64, 10, seed=14), 3 * draw(64, 10, seed=15)
    correlations = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(student, teacher, strict=True)]
    )
    limit = 1 - float(correlations.mean())
    slopes: dict[float, float] = {}
    values: dict[float, float] = {}
    for temperature in (1.0, 4.0, 16.0, 1000.0):
        s = student.clone().requires_grad_()
        value = relation(s, teacher, temperature)
        slopes[temperature] = float(torch.autograd.grad(value, s)[0].norm())
        values[temperature] = float(value.detach())
    kept = slopes[16] / slopes[4]
    return Evidence(
        holds=abs(values[1000] / limit - 1) < 0.01
        and 0.5 < kept < 2
        and abs(slopes[1000] / slopes[16] - 1) < 0.5,
        summary=(
            f"Correlations have no scale: at τ = 1000 the term is {values[1000]:.4f}, one less the correlation of the "
            f"logits {limit:.4f}. From τ = 4 to 16 its gradient changes by {kept:.2f}, with the factor by "
            f"{16 * kept:.1f}."
        ),
        values={"gradient, 16 against 4": kept, "with the factor": 16 * kept, "limit": limit},
    )
