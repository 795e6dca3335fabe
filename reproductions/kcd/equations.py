"""What the equations of KCD say and do not say, on small numbers: checks of :mod:`reproductions.kcd.errata`."""

from __future__ import annotations

import math

import sympy as sp
import torch

from kdrefs.divergences import softened_cross_entropy, softened_kl
from kdrefs.methods.kcd import condensed_size, prediction_entropy, ranks, strengths
from reproductions.harness.errata import Evidence, draw
from reproductions.kcd import derivation, example


def _number(expression: sp.Expr) -> float:
    return float(expression.evalf(20))


def check_classes() -> Evidence:
    """Equation 1 and the divergence."""
    student, teacher = draw(5, 4, seed=1), draw(5, 4, seed=2)
    kl = softened_kl(student, teacher, 1.0).item()
    cross = softened_cross_entropy(student, teacher, 1.0).item()
    own = prediction_entropy(teacher).mean().item()
    return Evidence(
        holds=abs(cross - own - kl) < 1e-12 and own > 0.1,
        summary=(
            f"Five points of four classes: cross-entropy {cross:.3f} nats, divergence {kl:.3f}; the difference "
            f"is the teacher's entropy {own:.3f}, which no student changes."
        ),
        values={"cross-entropy": cross, "KL": kl, "teacher's entropy": own},
    )


def check_bit() -> Evidence:
    """One bit a point, or all vectors of bits."""
    points, joint = 3, (sp.Rational(1, 3), sp.Rational(1, 6))
    literal = sum(
        joint[bits & 1] for bits in range(2**points)
    )  # the first point's own bit decides p(x, c, y)
    right = sum(joint)
    return Evidence(
        holds=literal == 2 ** (points - 1) * right and literal > 1,
        summary=(
            "Three points, p(x, c, 0) = 1/3 and p(x, c, 1) = 1/6 for the first: the sum over its bit is "
            f"{right}. Over all {2**points} vectors of bits, as printed, it is {literal}: more than 1, so no "
            "probability."
        ),
        values={"over the bit": _number(right), "over the vectors": _number(sp.Rational(literal))},
    )


def check_common_distribution() -> Evidence:
    """Where Jensen's inequality is an equality."""
    exact = example.bounds()
    names = ("objective", "posterior of each pair", "one Q a point", "one Q")
    found = {name: _number(exact[name]) for name in names}
    lost = sp.simplify(sp.expand_log(exact["objective"] - exact["posterior of each pair"], force=True))
    values = list(found.values())
    return Evidence(
        holds=lost == 0 and values[1] > values[2] > values[3],
        summary=(
            f"Three points, two classes: the objective is {values[0]:.4f}; the bound with the posterior of each "
            f"point and class is the same (difference exactly {lost}), with the best Q of each point "
            f"{values[2]:.4f}, with the best single Q {values[3]:.4f}."
        ),
        values=found,
    )


def check_constant() -> Evidence:
    """The entropy of Q, frozen and not."""
    weights, slope = draw(6, seed=3).softmax(0), draw(6, 2, seed=4)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logs = (draw(6, 2, seed=5) + theta * slope).flatten().log_softmax(0).view(6, 2)
    posterior = logs.softmax(1)  # of the bit
    entropy = -(weights * (posterior * posterior.log()).sum(1)).sum()
    objective = (weights * logs.logsumexp(1)).sum()
    frozen = (weights * (posterior.detach() * logs).sum(1)).sum()
    of_entropy, of_objective, of_frozen = (
        torch.autograd.grad(value, theta, retain_graph=True)[0].item()
        for value in (entropy, objective, frozen)
    )
    return Evidence(
        holds=abs(of_entropy) > 0.01
        and abs(of_objective - of_frozen) < 1e-12
        and frozen.item() < objective.item() - 0.1
        and derivation.tied() == 0
        and derivation.gradient() == 0,
        summary=(
            f"A random model of six pairs: the derivative of the entropy of Q is {of_entropy:.3f} where Q "
            "follows the parameters. With Q frozen the derivatives of the rest and of the objective agree "
            f"({of_frozen:.5f} and {of_objective:.5f}), but the rest alone is {frozen.item():.3f}, "
            f"{objective.item():.3f} being the objective."
        ),
        values={"entropy": of_entropy, "objective": of_objective, "frozen": of_frozen},
    )


def check_indicator() -> Evidence:
    """What an indicator that does not see y adds up to."""
    exact = {name: _number(value) for name, value in example.bounds().items()}
    objective, threshold = exact["objective"], exact["threshold"]
    return Evidence(
        holds=exact["equation 9"] < threshold < objective < exact["equation 11"],
        summary=(
            f"The same example with the third point dropped: objective {objective:.3f}; equation 9 as printed, "
            f"where kept points pay for both values of the bit, {exact['equation 9']:.3f}; a one-hot Q, where "
            f"dropped points pay for y = 0, {threshold:.3f}, a bound; equation 11, {exact['equation 11']:.3f}, "
            "above the objective: no bound."
        ),
        values={name: exact[name] for name in ("objective", "equation 9", "threshold", "equation 11")},
    )


def one_parameter() -> tuple[float, float]:
    """Objective of a student that gives every point the same prediction, before and after a step on the kept point.

    Two points with the teacher's probabilities 9/10 and 1/10 for the first class; the student begins at the best
    parameter 1/2 and is then trained to the end on the first point alone.
    """

    def objective(p: float) -> float:
        return sum(target * math.log(p) + (1 - target) * math.log(1 - p) for target in (0.9, 0.1))

    return objective(0.5), objective(0.9)


def check_no_em() -> Evidence:
    """A step on the kept points, and what ranks cannot know."""
    before, after = one_parameter()
    # One E-step: a rank is no posterior, and does not ask for the joint distribution that the posterior comes from.
    score = torch.tensor([0.7, 0.2, 0.5], dtype=torch.float64)
    by_rank = (1 - ranks(score).double() / 3).tolist()
    same = (1 - ranks(score**3).double() / 3).tolist()
    return Evidence(
        holds=after < before - 0.5 and by_rank == same,
        summary=(
            "Two points with the teacher's probabilities 0.9 and 0.1, a student with one parameter: trained on "
            f"both, the objective is {before:.3f}; after dropping the second and training on the first, "
            f"{after:.3f}. EM never lowers it. And ranks cannot be posteriors: the entropies' cubes have the "
            f"same ({', '.join(f'{p:.2f}' for p in same)})."
        ),
        values={"before": before, "after": after},
    )


def check_threshold() -> Evidence:
    """How many points each reading of the threshold keeps."""
    samples, tau = 60, sp.Rational(7, 10)
    p = [1 - sp.Rational(rank, samples) for rank in range(samples)]
    printed, fraction = sum(bool(x >= tau) for x in p), sum(bool(x > 1 - tau) for x in p)
    code = condensed_size(6, samples, tau=0.7, variant="official")
    with_extra = 1 - sp.Rational(samples, samples)
    return Evidence(
        holds=(printed, fraction, code) == (19, 42, 42)
        and with_extra == 0
        and min(p) == sp.Rational(1, samples),
        summary=(
            f"60 points, τ = 0.7: the printed rule keeps {printed}; the code, whose option is the fraction "
            f"that is left, {code}, as many as p > 1 - τ. Ranks 0 to N would be {samples + 1} for {samples} "
            "points, the last with p = 0."
        ),
        values={"printed": printed, "code": code, "p > 1 - τ": fraction},
    )


def check_ends() -> Evidence:
    """The ends of the strength of blending."""
    sizes = {derivation.K1: 47_500, derivation.K0: 2_500, derivation.epsilon: sp.Rational(3, 10)}
    strength = derivation.FORMULAS["strength"]
    printed_end = strength.subs(derivation.x, derivation.K0).subs(sizes)  # |K1L| = |K0|
    elements = 47_500 - 2_500 + 1
    official = strengths(2_500, variant="official")
    ours = strengths(2_500)
    return Evidence(
        holds=derivation.strengths() == 0
        and printed_end < -5
        and elements != 2_500
        and official.max().item() < 0.3
        and abs(ours.max().item() - 0.3) < 1e-7
        and bool((official.diff() > 0).all()),
        summary=(
            f"|K1| = 47,500 and |K0| = 2,500: the printed S = {{|K1|, …, |K1L|}} has {elements:,} elements, and "
            f"ε at its end is {_number(printed_end):.1f}. ε is 0 at |K1| - |K0| and 0.3 at |K1|. In the code it "
            f"grows from 0 for the highest of K1L to {official.max().item():.5f}."
        ),
        values={"ε at the printed end": _number(printed_end), "largest in the code": official.max().item()},
    )
