r"""What the notes got wrong about noise and Jacobians, each with its proof.

Source: the literature note that this book arranges, its section "Proofs" and the summaries before it. The general
derivations stand in :mod:`reproductions.jacobian_matching.propositions`; here the same is seen on networks.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from kdrefs.divergences import softened_kl
from reproductions.harness.errata import Erratum, Evidence
from reproductions.jacobian_matching import propositions
from reproductions.jacobian_matching.expansions import (
    POINT,
    as_printed,
    at_the_kink,
    averaged_over_kinks,
    constant,
    cross_entropy,
    extrapolated,
    gauss_hermite,
    jacobians,
    kept_and_whole,
    random_net,
    second_coefficient,
    smooth_pair,
    softmax_of,
    squared_error,
)

SCALES = (0, 1, 2, 10, 100)


def _check_square() -> Evidence:
    target, student = smooth_pair()
    printed = (target(POINT) - student(POINT)).sum().item()
    squared = squared_error(target, student)(POINT).item()
    return Evidence(
        holds=abs(printed) < 1e-12 < 0.01 < squared,
        summary=(
            "Probabilities of two different networks: the sum of the differences is 0, as for any two, since both add "
            f"up to 1; the sum of their squares is {squared:.3f}."
        ),
        values={"differences": printed, "squares": squared},
    )


def _check_remainder() -> Evidence:
    net = random_net(1)
    direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    value, slopes = jacobians(net, POINT)
    remainders, constants = {}, {}
    for size in (0.1, 0.01, 0.001):
        moved = net(POINT + size * direction)
        remainders[size] = (moved - value - size * (slopes @ direction[0])).norm().item()
        constants[size] = (moved - value).norm().item()
    orders = {
        name: math.log10(found[0.01] / found[0.001])
        for name, found in (("first order", remainders), ("constant", constants))
    }
    return Evidence(
        holds=abs(orders["first order"] - 2) < 0.05 and abs(orders["constant"] - 1) < 0.05,
        summary=(
            f"A step ten times smaller makes the first-order remainder "
            f"{remainders[0.01] / remainders[0.001]:.1f} times "
            f"smaller; without the gradient the error shrinks {constants[0.01] / constants[0.001]:.1f} times, "
            f"which is all "
            r"that $\mathcal O(\epsilon)$ promises."
        ),
        values=orders,
    )


def sign_flips() -> dict[str, tuple[float, float, float]]:
    """By loss: exact coefficient, the same by quadrature, and the printed one, for networks where signs differ."""
    target, student = smooth_pair()
    label = target(POINT)
    found = {}
    for name, of in (("squared error", target), ("squared error, labels", constant(label[0]))):
        loss = squared_error(of, student)
        exact, measured = second_coefficient(loss, POINT).item(), extrapolated(loss, POINT).item()
        found[name] = (exact, measured, as_printed(of, student, POINT)[name].item())
    return found


def _check_squared_error() -> Evidence:
    found = sign_flips()
    target, student = (random_net(seed, affine=True) for seed in (20, 21))
    affine = squared_error(target, student)
    kept = as_printed(target, student, POINT)["squared error"].item()
    rest = abs((gauss_hermite(affine, POINT, 0.5) - affine(POINT)).item() / 0.25 - kept)
    orders = [propositions.PROPOSITIONS[name].residual() for name in found] + [
        propositions.squared_error_fourth()
    ]
    exact, measured, printed = found["squared error"]
    return Evidence(
        holds=all(abs(a - b) < 1e-5 * abs(a) and a < 0 < c for a, b, c in found.values())
        and rest < 1e-10
        and not any(orders),
        summary=(
            f"Two tanh networks: the coefficient is {exact:.4f}, by quadrature {measured:.4f}, as printed "
            f"{printed:+.4f}; for "
            f"constant labels {found['squared error, labels'][0]:.4f} against "
            f"{found['squared error, labels'][2]:+.4f}. With "
            f"the term $r\\,\\Delta r$ the residual is exactly 0. For affine networks the print is exact: off "
            f"by {rest:.0e} at σ = 0.5."
        ),
        values={"exact": exact, "quadrature": measured, "printed": printed},
    )


def _check_moments() -> Evidence:
    points, weights = np.polynomial.hermite_e.hermegauss(20)
    moments = {p: float((weights * points**p).sum() / math.sqrt(2 * math.pi)) for p in (2, 4, 6)}
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(10, generator=generator, dtype=torch.float64)
    noise = torch.randn(20000, 10, generator=generator, dtype=torch.float64)
    along = ((noise @ gradient).square().mean() / gradient.square().sum()).item()
    apart = noise.square().sum(1).mean().item()
    return Evidence(
        holds=all(abs(moments[p] - math.prod(range(1, p, 2))) < 1e-9 for p in moments)
        and abs(along - 1) < 0.05
        and abs(apart - 10) < 0.2
        and propositions.even_moments(highest=6) == 0
        and propositions.along_a_vector() == 0,
        summary=(
            f"$\\mathbb E z^p$ is {moments[2]:.0f}, {moments[4]:.0f}, {moments[6]:.0f} for p = 2, 4, 6. In ten "
            f"dimensions "
            rf"$(\xi^\top\nabla f)^2$ averages {along:.2f} $\sigma^2\lVert\nabla f\rVert^2$, "
            rf"$\lVert\xi\rVert^2\lVert\nabla f\rVert^2$ "
            f"{apart:.1f} times that."
        ),
        values={f"moment {p}": value for p, value in moments.items()},
    )


def _check_unbounded() -> Evidence:
    kept, whole = kept_and_whole(SCALES)
    target, student = smooth_pair()
    terms = propositions.PROPOSITIONS["cross-entropy"]
    exact = second_coefficient(cross_entropy(target, student), POINT).item()
    printed = as_printed(target, student, POINT)["cross-entropy"].item()
    return Evidence(
        holds=all(abs(value - scale * kept[1]) < 1e-9 for value, scale in zip(kept, SCALES, strict=True))
        and kept[1] < 0
        and min(whole) == whole[1]
        and abs(whole[0] - whole[2]) < 1e-9
        and terms.residual() == 0
        and propositions.matched_cross_entropy() == 0,
        summary=(
            "Scaling the student's Jacobian by "
            + ", ".join(map(str, SCALES))
            + " gives the kept term the values "
            + ", ".join(f"{value + 0:.3g}" for value in kept)
            + "; with the dropped square they are "
            + ", ".join(f"{value:.3g}" for value in whole)
            + f". For two tanh networks the print is {printed:.3f}, the truth {exact:.3f}."
        ),
        values={"printed": printed, "exact": exact},
    )


def _check_half() -> Evidence:
    _, student = smooth_pair()
    value = student(POINT)[0]
    best = constant(value)
    at_optimum = second_coefficient(cross_entropy(best, student), POINT).item()
    printed = as_printed(best, student, POINT)["cross-entropy, labels"].item()
    logits = random_net(31, affine=True)
    probabilities, slopes = logits(POINT)[0].softmax(0), jacobians(logits, POINT)[1][0]
    mean = probabilities @ slopes
    variance = (probabilities * (slopes - mean).square().sum(1)).sum().item()
    by_label = [
        second_coefficient(cross_entropy(constant(one), softmax_of(logits)), POINT).item()
        for one in torch.eye(4, dtype=torch.float64)
    ]
    return Evidence(
        holds=abs(printed - 2 * at_optimum) < 1e-9 * printed
        and all(abs(found - variance / 2) < 1e-9 for found in by_label)
        and propositions.labels_at_the_optimum() == 0
        and propositions.affine_labels() == 0,
        summary=(
            f"Labels distributed as the student says: the coefficient is {at_optimum:.5f}, as printed "
            f"{printed:.5f}. Affine "
            f"logits: it is {by_label[0]:.5f} for every one-hot label, half the variance {variance:.5f} of the "
            f"logits' gradients."
        ),
        values={"exact": at_optimum, "printed": printed, "half the variance": variance / 2},
    )


def _check_typography() -> Evidence:
    # One class of affine probability S = s + g·ξ, label y: the three expressions read as they stand.
    y, s, xi, g = 1.0, 0.6, torch.tensor([0.03, -0.02]), torch.tensor([0.5, 1.5])
    step = float(xi @ g)
    exact = (y - s - step) ** 2
    parts = {"right": (y - s) * step, "printed": y - s * step}
    squares = {name: abs((y - s) ** 2 + step**2 - 2 * part - exact) for name, part in parts.items()}
    logs = {
        "squared gradient": math.log(s) + step / s - step**2 / (2 * s**2),
        "Hessian": math.log(s) + step / s,  # which an affine function has not
    }
    gaps = {name: abs(value - math.log(s + step)) for name, value in logs.items()}
    return Evidence(
        holds=squares["right"] < 1e-7 < 1 < squares["printed"]
        and gaps["squared gradient"] < gaps["Hessian"] / 20,
        summary=(
            f"y = 1, S = 0.6: $(y - S\\,\\xi\\nabla S)$ as printed leaves {squares['printed']:.2f}, $(y - "
            f"S)\\,\\xi^\\top\\nabla S$ "
            f"{squares['right']:.0e}. $\\nabla^2 S$ read as the Hessian leaves {gaps['Hessian']:.1e} of $\\log "
            f"S$, read as the "
            f"squared gradient {gaps['squared gradient']:.1e}."
        ),
        values={"printed": squares["printed"], "right": squares["right"]},
    )


def _check_scope() -> Evidence:
    lines = [random_net(seed, affine=True) for seed in (20, 21)]
    (_, by_t), (_, by_s) = (jacobians(net, POINT) for net in lines)
    norms = [part.square().sum().item() for part in (by_t - by_s, by_t, by_s)]
    same = second_coefficient(squared_error(*lines), POINT).item()
    clean = second_coefficient(squared_error(constant(lines[0](POINT)[0]), lines[1]), POINT).item()
    apart = second_coefficient(  # the noise of teacher and student in coordinates of their own
        lambda x: (lines[0](x[:, :2]) - lines[1](x[:, 2:])).square().sum(1), POINT.repeat(1, 2)
    ).item()
    return Evidence(
        holds=max(abs(same - norms[0]), abs(clean - norms[2]), abs(apart - norms[1] - norms[2])) < 1e-9
        and propositions.kl_at_matched_outputs() == 0,
        summary=(
            f"Affine networks, squared error: with the same noise on both the coefficient is {same:.3f} "
            rf"$= \lVert\nabla T - \nabla S\rVert^2$; with a clean teacher {clean:.3f} $= \lVert\nabla "
            rf"S\rVert^2$; with noise of its "
            rf"own for each {apart:.3f} $= \lVert\nabla T\rVert^2 + \lVert\nabla S\rVert^2$. Only the first "
            rf"matches anything."
        ),
        values={"same noise": same, "clean teacher": clean, "own noise": apart},
    )


def _check_order_of_papers() -> Evidence:
    generator = torch.Generator().manual_seed(4)
    teacher = 3 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    student = teacher + 2
    with_temperature = softened_kl(student, teacher, 4.0).item()
    without_softmax = (student - teacher).square().sum(1).mean().item() / 2
    return Evidence(
        holds=abs(with_temperature) < 1e-9 and without_softmax > 1,
        summary=(
            "The two descriptions are of two losses: for logits that are the teacher's plus 2, soft labels "
            "with a temperature "
            f"give {abs(with_temperature):.0e} and a regression of the logits gives {without_softmax:.0f}."
        ),
        values={"soft labels": with_temperature, "logits": without_softmax},
    )


def _check_kinks() -> Evidence:
    sigmas = (0.1, 0.05, 0.025)
    first = {sigma: at_the_kink(sigma) for sigma in sigmas}
    limit = 2 / math.sqrt(2 * math.pi)
    average = averaged_over_kinks(0.2)
    return Evidence(
        holds=all(abs(first[s] - limit - s / 2) < 1e-9 for s in sigmas)
        and abs(average - 1) < 0.01
        and propositions.kink_at_a_point() == 0
        and propositions.kink_on_average() == 0,
        summary=(
            "$r = 1 + \\mathrm{relu}(x)$. At $x = 0$ the loss changes by "
            + ", ".join(f"{first[s]:.3f} σ (σ = {s:g})" for s in sigmas)
            + f", limit {limit:.3f} σ: first order. Averaged over $x$ from $U(-1, 1)$ by {average:.3f} σ², of which "
            r"$\mathbb E\lVert\nabla r\rVert^2$ is 0.5 and the kink the rest."
        ),
        values={f"at the kink, {s:g}": value for s, value in first.items()} | {"average": average},
    )


_PROOFS = "note of 2024-03-22, Proofs"

ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="J1",
        kind="note",
        where=f"{_PROOFS}, Proposition 1, the loss in its first sentence",
        printed=r"$\ell(\mathcal T(x), \mathcal S(x)) = \sum_i (\mathcal T^i(x) - \mathcal S^i(x))$",
        right=r"$\sum_i (\mathcal T^i(x) - \mathcal S^i(x))^2$, as the proposition itself goes on to use.",
        check=_check_square,
    ),
    Erratum(
        id="J2",
        kind="note",
        where=f"{_PROOFS}, the first-order Taylor formula",
        printed=r"$f(x + \Delta x) = f(x) + \nabla_x f(x)^\top \Delta x + \mathcal O(\epsilon)$",
        right=(
            r"The remainder is $\mathcal O(\epsilon^2)$ for twice differentiable $f$; $\mathcal O(\epsilon)$ "
            r"holds without the gradient, too."
        ),
        check=_check_remainder,
    ),
    Erratum(
        id="J3",
        kind="note",
        where=f"{_PROOFS}, Propositions 1 and 2, squared error",
        printed=(
            r"The coefficient of $\sigma^2$ is $\sum_i \lVert\nabla \mathcal T^i - \nabla \mathcal "
            r"S^i\rVert^2$ (with labels "
            r"$\sum_i\lVert\nabla \mathcal S^i\rVert^2$), the remainder $\mathcal O(\sigma^4)$."
        ),
        right=(
            r"$\sum_i \big(\lVert\nabla r_i\rVert^2 + r_i\,\Delta r_i\big)$ with $r = \mathcal T - \mathcal "
            r"S$: a first-order expansion "
            r"inside the square leaves $2 r \cdot \frac12 \xi^\top H \xi$, which is of order $\sigma^2$, too, "
            r"and can turn the sign. Without it "
            r"the remainder is $\mathcal O(\sigma^2)$. For affine networks the print is exact."
        ),
        check=_check_squared_error,
    ),
    Erratum(
        id="J4",
        kind="note",
        where=f"{_PROOFS}, moments of the noise in proof 1",
        printed=r"$\mathbb E[\xi^p] = \sigma^p$ for even $p$; $\xi^2 (\nabla \mathcal S)^2$ for vectors.",
        right=(
            r"$(p - 1)!!\,\sigma^p$: $3\sigma^4$, $15\sigma^6$. Only $p = 2$ is used, so no result changes. "
            r"For vectors the square is "
            r"$(\xi^\top \nabla \mathcal S)^2$ and what is needed $\mathbb E[\xi\xi^\top] = \sigma^2 I$."
        ),
        check=_check_moments,
    ),
    Erratum(
        id="J5",
        kind="note",
        where=f"{_PROOFS}, Proposition 1, cross-entropy",
        printed=(
            r"The coefficient is $-\sum_i \nabla \mathcal T^i \cdot \nabla \mathcal S^i / \mathcal S^i$; the "
            r"rest is dropped as a "
            "superlinear error."
        ),
        right=(
            r"$\frac12 \sum_i \mathcal T^i \lVert\nabla \mathcal S^i\rVert^2 / (\mathcal S^i)^2$ is of the "
            r"same order, and so are "
            r"$-\frac12 \sum_i \mathcal T^i \Delta \mathcal S^i / \mathcal S^i$ and $-\frac12 \sum_i \Delta "
            r"\mathcal T^i \log \mathcal S^i$. "
            r"The kept term alone is linear in the student's Jacobian, so it has no minimum; with the square it is "
            r"$\frac12 \sum_i \mathcal T^i \lVert\nabla\log \mathcal S^i - \nabla\log \mathcal T^i\rVert^2$ "
            r"less a constant where the outputs agree."
        ),
        check=_check_unbounded,
    ),
    Erratum(
        id="J6",
        kind="note",
        where=f"{_PROOFS}, Proposition 2, cross-entropy",
        printed=r"$\sum_i y^i \lVert\nabla \mathcal S^i\rVert^2 / (\mathcal S^i)^2$",
        right=(
            r"$\frac12 \sum_i y^i \big(\lVert\nabla \mathcal S^i\rVert^2 / (\mathcal S^i)^2 - \Delta \mathcal "
            r"S^i / \mathcal S^i\big)$: the ½ of the "
            r"note's own line before it was lost, and a term. For affine logits it is half the variance of "
            r"their gradients "
            "under the student's probabilities, whatever the label."
        ),
        check=_check_half,
    ),
    Erratum(
        id="J7",
        kind="note",
        where=f"{_PROOFS}, the expanded sums in both proofs",
        printed=(
            r"Products side by side for a sum; $(y^i - \mathcal S^i \nabla \mathcal S^i)$; $\nabla^2 \mathcal "
            r"S$ for a squared gradient."
        ),
        right=(
            r"A plus sign between the terms; $(y^i - \mathcal S^i)\, \xi^\top \nabla \mathcal S^i$; "
            r"$(\xi^\top\nabla \mathcal S)^2$, since "
            r"$\nabla^2$ is the Hessian or the Laplacian."
        ),
        check=_check_typography,
    ),
    Erratum(
        id="J8",
        kind="note",
        where="note of 2024-03-22, Local Affine Approximations, and the claim in bold type of its proofs",
        printed=(
            "Matching the Jacobians of two networks is equivalent to matching soft labels with noise added to "
            "the input."
        ),
        right=(
            r"Equal to second order in σ for squared error, isotropic Gaussian noise that is the *same* for "
            r"both, and networks that are "
            r"affine around the input. For the KL divergence the term is $\frac12\sum_i \mathcal "
            r"T^i\lVert\nabla\log \mathcal T^i - "
            r"\nabla\log \mathcal S^i\rVert^2$, where the outputs agree."
        ),
        check=_check_scope,
    ),
    Erratum(
        id="J9",
        kind="note",
        where="note of 2024-03-22, the two papers of 2014",
        printed=(
            "The first (Do Deep Nets Really Need to be Deep?) has soft labels and the temperature, the second "
            "the logits."
        ),
        right=(
            "The other way round: Ba and Caruana regress the logits and factorise a layer; the temperature is "
            "Hinton et al.'s, whose "
            "paper appeared at a workshop of the conference. FitNets does match a feature map, see F1 there."
        ),
        check=_check_order_of_papers,
    ),
    Erratum(
        id="J10",
        kind="note",
        where="note of 2024-03-22, Local Affine Approximations: networks by their affine approximation",
        printed=r"Networks are replaced by their affine approximations, with an error of $\mathcal O(\sigma^4)$.",
        right=(
            r"For piecewise affine networks: true where the noise reaches no kink. At a kink the loss changes "
            r"by $\mathcal O(\sigma)$; "
            r"averaged over inputs of density p a kink "
            r"adds $\sigma^2$ times residual, density and jump in slope, of the order of the Jacobians' own term."
        ),
        check=_check_kinks,
    ),
)
