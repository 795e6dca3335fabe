r"""What the notes and the authors' code got wrong about PKT and mutual information, each with its proof.

Sources: *note*, the literature note that this book arranges, section on PKT and mutual information; *code*,
passalis/probabilistic_kt@a58fd1b as read. A formula of the note is also put in the place of the right one in
:mod:`reproductions.qmi.derivation`, whose residual then is not 0.
"""

from __future__ import annotations

import math

import sympy as sp
import torch
from torch import Tensor

from kdrefs.kernels import cosine_kernel, gaussian_kernel
from kdrefs.methods.pkt import pkt_loss
from kdrefs.methods.qmi import biased_hsic, information_potentials, quadratic_mutual_information
from reproductions.harness.errata import Erratum, Evidence
from reproductions.qmi import derivation
from reproductions.qmi.derivation import FORMULAS, J, N, c, p
from reproductions.qmi.integrals import integrated_potentials

SIZES = (2, 4, 6)  # of the classes in most examples
VARIANCE = 0.3


def draw(width: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of three classes of 2, 4 and 6 around 0, 1 and 2, float64, and their labels."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    noise = torch.randn(
        len(labels), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return noise + labels.unsqueeze(1), labels


def dense_potentials(kernel: Tensor, labels: Tensor) -> dict[str, float]:
    """The potentials and the QMI of any kernel matrix ``(N, N)``, as the formulas stand."""
    samples = len(labels)
    same = (labels.unsqueeze(1) == labels).to(kernel.dtype)
    share = same.mean(dim=1)  # of each sample's class
    values = {
        "within": float((kernel * same).sum() / samples**2),
        "all": float(share.mean() * kernel.mean()),
        "between": float((share.unsqueeze(1) * kernel).mean()),
    }
    return values | {"qmi": values["within"] + values["all"] - 2 * values["between"]}


def _check_limit() -> Evidence:
    samples, limit = sum(SIZES), SIZES[0]
    mass = sum(SIZES[:limit]) / samples
    residual = derivation.marginal(FORMULAS | {"classes": J[p]})
    return Evidence(
        holds=abs(mass - 1) > 0.1 and SIZES[1] > len(SIZES) and residual != 0,
        summary=(
            f"Classes of 2, 4 and 6: with the limit $J_1 = 2$ the third class is left out and $p(x)$ integrates to "
            f"{mass:.2f}; with $J_2 = 4$ there is no fourth class to add."
        ),
        values={"integral of p(x)": mass},
    )


def _check_bracket() -> Evidence:
    points, labels = draw()
    right = integrated_potentials(points.numpy(), labels.numpy(), VARIANCE)
    # The bracket is 1, and the sum over the samples of an unbound class is read as the sum over all of them.
    kernel = gaussian_kernel(points, bandwidth=4 * VARIANCE) / math.sqrt(4 * math.pi * VARIANCE)
    printed = float(kernel.mean())
    negative = right["within"] + right["all"] - 2 * printed
    ours = float(information_potentials(points, labels, 4 * VARIANCE, density=True).between)
    residual = derivation.potential_between(FORMULAS | {"between": derivation.over_classes(J[c] / N) / N**2})
    return Evidence(
        holds=abs(ours - right["between"]) < 1e-9 and negative < -0.01 and residual != 0,
        summary=(
            f"Twelve samples on a line: the integral is {right['between']:.4f}, with the prior inside the sum "
            f"{ours:.4f}, as printed {printed:.4f}. The printed one makes the mutual information {negative:.3f}; an "
            f"integral of a square cannot be negative, it is {right['qmi']:.4f}."
        ),
        values={"integral": right["between"], "printed": printed, "QMI with the printed one": negative},
    )


def _check_others() -> Evidence:
    points, labels = draw()
    right = integrated_potentials(points.numpy(), labels.numpy(), VARIANCE)
    kernel = gaussian_kernel(points, bandwidth=4 * VARIANCE) / math.sqrt(4 * math.pi * VARIANCE)
    same = (labels.unsqueeze(1) == labels).double()
    others = float((same.mean(dim=1).unsqueeze(1) * kernel * (1 - same)).mean())
    ours = dense_potentials(kernel, labels)["between"]
    return Evidence(
        holds=abs(ours - right["between"]) < 1e-9 and others < 0.9 * right["between"],
        summary=(
            f"The same samples: the integral is {right['between']:.4f}, the sum over all samples {ours:.4f}, over "
            f"those of other classes {others:.4f}."
        ),
        values={"integral": right["between"], "all": ours, "others": others},
    )


def _check_equivalence() -> Evidence:
    points, labels = draw(width=3)
    kernel = gaussian_kernel(points, bandwidth=4.0)
    one, shifted = dense_potentials(kernel, labels), dense_potentials(kernel + 0.05, labels)
    order = torch.cat([torch.tensor([1, 0]), torch.tensor([3, 4, 5, 2]), torch.arange(6, 12).roll(1)])
    assert torch.equal(labels[order], labels)
    permuted = gaussian_kernel(points[order], bandwidth=4.0)
    other = dense_potentials(permuted, labels)
    same_information = abs(one["qmi"] - shifted["qmi"])
    moved = abs(one["within"] - shifted["within"])
    same_potentials = max(abs(one[name] - other[name]) for name in one)
    apart = float((kernel - permuted).abs().max())
    return Evidence(
        holds=same_information < 1e-15 and moved > 0.01 and same_potentials < 1e-15 and apart > 0.3,
        summary=(
            f"A constant 0.05 added to the kernel changes the mutual information by {same_information:.0e} and "
            f"$V_{{IN}}$ by {moved:.3f}. Points exchanged inside their classes change the potentials by "
            f"{same_potentials:.0e} and the kernel by up to {apart:.2f}."
        ),
        values={"QMI": same_information, "V_IN": moved, "potentials": same_potentials, "kernel": apart},
    )


def _check_kernel() -> Evidence:
    x, s = sp.Symbol("x", real=True), sp.Symbol("s", positive=True)
    # Two of the note's kernels around one point.
    product = sp.integrate(sp.exp(-(x**2) / s) * sp.exp(-(x**2) / s), (x, -sp.oo, sp.oo))
    constant = sp.simplify(product - sp.sqrt(sp.pi * s / 2))
    ratio = (math.pi * 2.0 / 2) ** (64 / 2) / (math.pi * 2.0 / 2) ** (16 / 2)
    # A square of the cosine kernel's section is a polynomial of degree two: the corners of the cross-polytope average
    # it over the sphere exactly.
    width = 8
    one, two = (_unit(width, seed) for seed in (1, 2))
    corners = torch.cat([torch.eye(width, dtype=torch.float64), -torch.eye(width, dtype=torch.float64)])
    sections = ((1 + corners @ one) / 2) * ((1 + corners @ two) / 2)
    integral, cosine = float(sections.mean()), float(one @ two)
    closed, kernel = (1 + cosine / width) / 4, (1 + cosine) / 2
    return Evidence(
        holds=constant == 0
        and ratio > 1e6
        and abs(integral - closed) < 1e-14
        and abs(integral - kernel) > 0.01,
        summary=(
            "With the note's $e^{-d^2/s}$ the integral carries $(\\pi s/2)^{D/2}$: at $s = 2$ a student of 16 "
            f"dimensions and a teacher of 64 differ by a factor {ratio:.0e} whatever they know. On the sphere in "
            f"{width} dimensions the mean of two cosine kernels is {integral:.5f}, that is $(1 + \\cos/D)/4$, for a "
            f"pair where the kernel is {kernel:.5f}."
        ),
        values={"factor": ratio, "integral": integral, "kernel": kernel},
    )


def _check_objective() -> Evidence:
    teacher, labels = draw(width=8)
    order = torch.cat([torch.tensor([1, 0]), torch.tensor([3, 4, 5, 2]), torch.arange(6, 12).roll(1)])
    exchanged = teacher[order]
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noisy = teacher + 0.6 * noise
    aim = float(quadratic_mutual_information(teacher, labels, kernel="cosine"))
    gaps, losses = {}, {}
    for name, student in (("exchanged", exchanged), ("noisy", noisy)):
        gaps[name] = abs(float(quadratic_mutual_information(student, labels, kernel="cosine")) / aim - 1)
        losses[name] = float(pkt_loss(student, teacher))
    hsic = float(biased_hsic(cosine_kernel(teacher), (labels.unsqueeze(1) == labels).double()))
    return Evidence(
        holds=gaps["exchanged"] < 1e-12 < 0.01 < gaps["noisy"]
        and losses["exchanged"] > 2 * losses["noisy"]
        and abs(hsic - aim) < 1e-14,
        summary=(
            "A student with the teacher's points exchanged inside their classes has all of its mutual information "
            f"(off by {gaps['exchanged']:.0e}) and a PKT loss of {losses['exchanged']:.4f} nat; one with a little "
            f"noise has a loss of {losses['noisy']:.4f} nat and is off by {100 * gaps['noisy']:.1f} %."
        ),
        values={
            f"{what}, {name}": value
            for what, by in (("gap", gaps), ("loss", losses))
            for name, value in by.items()
        },
    )


def _unit(width: int, seed: int) -> Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="Q1",
        kind="note",
        where="note, PKT and mutual information: the density of x",
        printed=r"$p(x) = \sum_{p=1}^{J_p} p(x, c_p)$",
        right=r"The sum runs over the classes: $p(x) = \sum_{p=1}^{N_c} p(x, c_p)$.",
        check=_check_limit,
    ),
    Erratum(
        id="Q2",
        kind="note",
        where="note, PKT and mutual information: the third potential",
        printed=(
            r"$V_{BTW} = \frac1{N^2} \big( \sum_{p=1}^{N_c} \frac{J_p}{N} \big) "
            r"\sum_{j=1}^{J_p} \sum_{k=1}^{N} K(x_{pj}, x_k)$"
        ),
        right=(
            r"The bracket is 1 and leaves $p$ unbound. The prior belongs inside the sum over the classes: "
            r"$V_{BTW} = \frac1{N^2} \sum_{p=1}^{N_c} \frac{J_p}{N} \sum_{j=1}^{J_p} \sum_{k=1}^{N} K(x_{pj}, x_k)$."
        ),
        check=_check_bracket,
    ),
    Erratum(
        id="Q3",
        kind="note",
        where="note, PKT and mutual information: the potentials in words",
        printed=r"$V_{BTW}$ is the interaction of each class with all *other* samples.",
        right="With all samples, those of the class itself included.",
        check=_check_others,
    ),
    Erratum(
        id="Q4",
        kind="note",
        where="note, PKT and mutual information: last paragraph",
        printed=(
            "If QMI is to be transferred, the potentials of both models must be equal, which requires equal kernel "
            "values for every pair of samples."
        ),
        right=(
            "Both implications go the other way only: equal kernels give equal potentials, and these equal mutual "
            "information. For the converse the labels must be unknown: with equal diagonals, kernels are equal if and "
            "only if the mutual information is for *every* labelling with two classes."
        ),
        check=_check_equivalence,
    ),
    Erratum(
        id="Q5",
        kind="note",
        where="note, PKT and mutual information: the potentials as sums over pairs, for the kernels of the method",
        printed=(
            r"Sums of $K(\cdot, \cdot; 2\sigma^2)$ for the integrals, with $K = e^{-d^2/\sigma}$ or the cosine kernel."
        ),
        right=(
            r"It takes $\int g_v(x-a)\,g_v(x-b)\,dx = g_{2v}(a-b)$, with normalised Gaussians. Unnormalised ones leave "
            r"a factor that depends on bandwidth and dimension, which differ between teacher and student. The integral "
            r"of two cosine kernels over the whole space diverges, and its mean over the unit sphere is "
            r"$\frac14(1 + \cos/D)$, another kernel: for the loss that is trained, mutual information is a motivation, "
            r"not a derivation."
        ),
        check=_check_kernel,
    ),
    Erratum(
        id="Q6",
        kind="code",
        where="probabilistic_kt@a58fd1b: nn/pkt.py, read as the transfer of mutual information",
        printed="What is minimised is the difference of the information potentials.",
        right=(
            "What is minimised is a divergence between rows of kernels that are normalised row by row. Both are 0 for "
            "equal kernels (erratum P1 of PKT); away from there a smaller loss need not mean a smaller difference."
        ),
        check=_check_objective,
    ),
)
