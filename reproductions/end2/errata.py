r"""What the notes and the public code of ensemble distribution distillation got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, KaosEngineer/PriorNetworks@d6f6ffb, as read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrefs.divergences import kl_divergence
from kdrefs.methods.end2 import dirichlet_uncertainty, end2_loss, end_loss, ensemble_uncertainty
from reproductions.end2.divergence import fall
from reproductions.harness.errata import Erratum, Evidence, draw


def _minimised(loss: object, start: Tensor, steps: int = 400, rate: float = 0.05) -> Tensor:
    assert callable(loss)
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(z).backward()
        optimizer.step()
    return z.detach()


def _check_sign() -> Evidence:
    members = 2 * draw(1, 5, 4, seed=1)
    log_mean = (members.log_softmax(2).logsumexp(1) - math.log(5)).detach()
    start = draw(1, 4, seed=2)

    def distance(z: Tensor) -> float:
        return float(kl_divergence(log_mean, z.log_softmax(1)))

    printed = _minimised(lambda z: -end_loss(z, members), start, steps=100)
    right = _minimised(lambda z: end_loss(z, members), start)
    values = {"at the start": distance(start), "printed": distance(printed), "right": distance(right)}
    return Evidence(
        holds=values["right"] < 1e-4 < values["at the start"] < values["printed"],
        summary=(
            f"Divergence from the ensemble's mean: {values['at the start']:.3f} at the start, {values['printed']:.1f} "
            f"after 100 steps that minimise what is printed, {values['right']:.0e} after minimising its negative."
        ),
        values=values,
    )


def _check_not_kl() -> Evidence:
    # No divergence that is least at the student's equality with the mean gives EnD²'s gradient: it moves the precision.
    members = 2 * draw(1, 50, 4, seed=3)
    mean = members.softmax(2).mean(1)
    copy = mean.log().requires_grad_()
    (of_end,) = torch.autograd.grad(end_loss(copy, members), copy)
    (of_end2,) = torch.autograd.grad(end2_loss(copy, members, smoothing=0), copy)
    pi = members.softmax(2)
    density = -torch.distributions.Dirichlet(copy.detach().exp().unsqueeze(1)).log_prob(pi).mean()
    likelihood = abs(float(density - end2_loss(copy.detach(), members, smoothing=0)))
    values = {
        "gradient of EnD": float(of_end.abs().max()),
        "gradient of EnD²": float(of_end2.abs().max()),
        "EnD² less the log-density": likelihood,
        "loss": float(density),
    }
    return Evidence(
        holds=values["gradient of EnD"] < 1e-12
        and values["gradient of EnD²"] > 0.1
        and likelihood < 1e-9
        and values["loss"] < 0,
        summary=(
            "A student whose mean is exactly the ensemble's: the divergence is at its minimum (largest gradient "
            f"{values['gradient of EnD']:.0e}), EnD² is not ({values['gradient of EnD²']:.2f}). It equals the mean "
            f"negative log-density of the members to {likelihood:.0e} and is {values['loss']:.2f}, below the 0 of any "
            "divergence."
        ),
        values=values,
    )


def _check_learns_the_average() -> Evidence:
    # Two ensembles with one mean: EnD cannot tell them apart.
    far = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).double().log()
    near = (
        torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).double().log()
        + 0.1 * torch.tensor([[[1.0, 0], [0, 1.0]]]).double()
    )
    start = torch.tensor([[0.3, -0.2]]).double()
    mean = [_minimised(lambda z, m=m: end_loss(z, m), start) for m in (far, near)]
    whole = [_minimised(lambda z, m=m: end2_loss(z, m), start, steps=1500) for m in (far, near)]
    knowledge = [float(dirichlet_uncertainty(z).knowledge) for z in whole]
    theirs = [float(ensemble_uncertainty(m).knowledge) for m in (far, near)]
    same = float((mean[0] - mean[1]).abs().max())
    means = [float(z.softmax(1)[0, 0]) for z in whole]
    return Evidence(
        holds=same < 1e-6
        and knowledge[0] > 50 * knowledge[1]
        and all(0.5 < one / other < 2 for one, other in zip(knowledge, theirs, strict=True))
        and all(abs(p - 0.5) < 1e-3 for p in means),
        summary=(
            f"Members at 0.9 and 0.1, or both near 0.5: EnD ends with the same student (to {same:.0e}); EnD² with the "
            f"same mean and knowledge uncertainties of {knowledge[0]:.3f} and {knowledge[1]:.4f} where the "
            f"ensembles have {theirs[0]:.3f} and {theirs[1]:.4f}."
        ),
        values={
            "far": knowledge[0],
            "near": knowledge[1],
            "ensemble, far": theirs[0],
            "ensemble, near": theirs[1],
        },
    )


def _check_sum_of_pairs() -> Evidence:
    ratios = {}
    for count in (2, 5, 20):
        members = 2 * draw(3, count, 4, seed=count)
        log_pi = members.log_softmax(2)
        printed = torch.zeros(3, dtype=torch.float64)
        for i in range(count):
            for j in range(count):
                printed += (log_pi[:, i].exp() * (log_pi[:, i] - log_pi[:, j])).sum(1)
        found = printed / ensemble_uncertainty(members).epkl
        ratios[count] = float(found.mean())
    return Evidence(
        holds=all(abs(ratio - count**2) < 1e-9 * count**2 for count, ratio in ratios.items()),
        summary="Printed over the mean: "
        + ", ".join(f"{ratio:.6g} for {count} members" for count, ratio in ratios.items())
        + ".",
        values={f"{count} members": ratio for count, ratio in ratios.items()},
    )


def _sampled_epkl(alpha: Tensor, draws: int = 200_000) -> float:
    """Mean divergence of independent pairs from a Dirichlet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = (torch.distributions.Dirichlet(alpha).sample((draws,)) for _ in range(2))
    return float((one * (one.log() - other.log())).sum(1).mean())


def _check_numerator() -> Evidence:
    alpha = torch.tensor([5.0, 3.0, 4.0]).double()
    sampled = _sampled_epkl(alpha)
    ours = float(dirichlet_uncertainty(alpha.log()).epkl)
    printed = len(alpha) / float(alpha.sum())
    return Evidence(
        holds=abs(sampled / ours - 1) < 0.02 and abs(printed / sampled - 1) > 0.3,
        summary=(
            f"α = (5, 3, 4): (K - 1)/α₀ is {ours:.4f}, K/α₀ {printed:.4f}; 200,000 sampled pairs give "
            f"{sampled:.4f}. A Dirichlet over one class, which has nothing to disagree about, would have 1/α₀."
        ),
        values={"(K - 1)/α₀": ours, "K/α₀": printed, "sampled": sampled},
    )


def _check_divisor() -> Evidence:
    alpha = torch.tensor([5.0, 3.0, 4.0]).double()
    printed = (len(alpha) - 1.0) / alpha
    right = float(dirichlet_uncertainty(alpha.log()).epkl)
    least = float(printed.min()) / right
    return Evidence(
        holds=printed.shape == (3,) and least > 2 and abs(right - 2 / 12) < 1e-12,
        summary=(
            f"α = (5, 3, 4): {', '.join(f'{x:.3f}' for x in printed.tolist())}, one number a class, where the "
            f"answer is the single {right:.3f}; the smallest is {least:.1f} times that."
        ),
        values={"right": right, "smallest printed": float(printed.min())},
    )


def _check_smoothing_is_no_bound() -> Evidence:
    plain, smoothed = fall(16, 0.0), fall(16, 1e-3)
    # What it does: a member that is certain, in single precision.
    certain = torch.tensor([[[200.0, 0.0], [200.0, 0.0]]])
    probability = float(certain.softmax(2)[0, 0, 1])
    finite = float(end2_loss(torch.zeros(1, 2), certain))
    return Evidence(
        holds=abs(plain - 0.5 * 3) < 1e-5
        and abs(smoothed - 0.5 * 3) < 1e-5
        and probability == 0
        and math.isfinite(finite),
        summary=(
            f"Equal members, 4 classes: an e-fold of the precision lowers the loss by {plain:.4f} without smoothing "
            f"and by {smoothed:.4f} with 0.001, at any precision. What smoothing does prevent: a member certain by "
            f"200 nats has a probability of {probability:g} in single precision, whose logarithm is infinite."
        ),
        values={"fall, γ = 0": plain, "fall, γ = 0.001": smoothed},
    )


def _check_mean_over_classes() -> Evidence:
    members, student = 2 * draw(6, 5, 10, seed=7), draw(6, 10, seed=8).requires_grad_()
    (ours,) = torch.autograd.grad(end_loss(student, members, temperature=2.0), student)
    (theirs,) = torch.autograd.grad(end_loss(student, members, temperature=2.0, variant="official"), student)
    ratios = ours / theirs
    spread = float((ratios - 10).abs().max())
    return Evidence(
        holds=spread < 1e-9,
        summary=(
            f"Ten classes: the gradient of the divergence is {float(ratios.mean()):.6g} times the code's, in every "
            f"entry (to {spread:.0e}); EnD² beside it in the same file is summed over the classes."
        ),
        values={"ratio": float(ratios.mean())},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="E1",
        kind="note",
        where="Ensemble Distribution Distillation, the loss of ensemble distillation (picture 6)",
        printed=r"The loss to be minimised is $-\mathbb E[KL(\bar\pi \,\|\, p)]$.",
        right=r"The sign is wrong: $+\mathbb E[KL(\bar\pi \,\|\, p)]$ is minimised.",
        check=_check_sign,
    ),
    Erratum(
        id="E2",
        kind="note",
        where="Ensemble Distribution Distillation, first paragraph",
        printed="'In computing the loss the paper uses KL divergence, too.'",
        right=(
            "That is the baseline, EnD. EnD² is a negative log-likelihood, a density that may be below 0: up to a "
            "constant the divergence of the Dirichlet from the *empirical mixture of deltas* at the members' "
            "predictions, and no divergence of the mean predictions."
        ),
        check=_check_not_kl,
    ),
    Erratum(
        id="E3",
        kind="note",
        where="Ensemble Distribution Distillation, first paragraph",
        printed="'Using an ensemble, the student learns the average of the ensemble.'",
        right=(
            "That, too, is EnD. EnD² is there to learn what the average loses: how the members are spread around it."
        ),
        check=_check_learns_the_average,
    ),
    Erratum(
        id="E4",
        kind="code",
        where="KaosEngineer/PriorNetworks@d6f6ffb: ensembles/uncertainties.py, expected_pairwise_kl_divergence",
        printed="The divergences of all pairs of members are added up and called their expectation.",
        right=r"The sum has to be divided by $M^2$: with five members it is 25 times too large.",
        check=_check_sum_of_pairs,
    ),
    Erratum(
        id="E5",
        kind="code",
        where="KaosEngineer/PriorNetworks@d6f6ffb: priornet/dpn.py, PriorNet.epkl",
        printed=r"The expected pairwise divergence of a Dirichlet is $K / \alpha_0$.",
        right=r"It is $(K - 1) / \alpha_0$, as the NumPy function of the same file has it.",
        check=_check_numerator,
    ),
    Erratum(
        id="E6",
        kind="code",
        where="KaosEngineer/PriorNetworks@d6f6ffb: priornet/dpn.py, PriorNet.uncertainty_metrics",
        printed=r"The same, divided by the vector $\alpha$ instead of its sum.",
        right=r"$(K - 1) / \alpha_0$: one number a sample, not one a class.",
        check=_check_divisor,
    ),
    Erratum(
        id="E7",
        kind="code",
        where="KaosEngineer/PriorNetworks@d6f6ffb: ensembles/losses.py, 'smooth for num. stability'",
        printed="The members' probabilities are smoothed for numerical stability.",
        right=(
            "It keeps logarithms finite, and nothing more: where members agree the loss has no lower bound, "
            r"smoothed or not. It falls by $(K - 1)/2$ for every e-fold of the precision, so that only the end of "
            "training, clipping and members that differ stop it."
        ),
        check=_check_smoothing_is_no_bound,
    ),
    Erratum(
        id="E8",
        kind="code",
        where="KaosEngineer/PriorNetworks@d6f6ffb: ensembles/losses.py, EnDLoss",
        printed="The cross-entropy of EnD is averaged over the batch *and* the classes.",
        right=(
            r"A sum over the classes: their baseline's gradient is $1/K$ of the divergence's, so that the two "
            "losses of the file need learning rates of their own."
        ),
        check=_check_mean_over_classes,
    ),
)
