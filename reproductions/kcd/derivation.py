r"""What stands between the objective of distillation and the rule "train on the points above a threshold".

A knowledge point has a hidden bit y: is it of value? For one image x and one class c write
:math:`a = p(x, c, y=0)`, :math:`b = p(x, c, y=1)` and :math:`\pi = b / (a + b) = p(y=1 | x, c)`. Everything in the
paper's equations 2 to 11 is a sum over such pairs with the teacher's weights :math:`t > 0`, so a step is proved for one
pair, or for a sum over any number of them.

A step takes the formulas it speaks about from a table, so that a wrong one can be put in its place: its residual is
exactly 0 for the right ones only. Which of the paper's steps are none of these, but choices, is in
:mod:`reproductions.kcd.errata`; :mod:`reproductions.kcd.example` has exact numbers.
"""

from __future__ import annotations

import sympy as sp

from reproductions.harness.derivation import Derivation, Formulas, Step

a, b = sp.symbols("a b", positive=True)  # p(x, c, 0) and p(x, c, 1)
q = sp.Symbol("q", positive=True)  # Q(1); Q(0) is 1 - q
Y = sp.Symbol("Y")  # whether the point is kept: 0 or 1
t = sp.Symbol("t", positive=True)  # the teacher's weight of a pair
theta = sp.Symbol("theta", real=True)
A, B = sp.Function("a", positive=True)(theta), sp.Function("b", positive=True)(theta)
i, n = sp.symbols("i n", integer=True, positive=True)
T, LA, LB = sp.IndexedBase("t"), sp.IndexedBase("A"), sp.IndexedBase("B")  # of pair i: t, log a, log b
F, F1, F2, K = sp.symbols("F F_1 F_2 K", positive=True)
alpha = sp.Symbol("alpha", positive=True)
V, v = sp.symbols("V v", nonnegative=True)  # mean so far, new entropy
K0, K1, x, epsilon = sp.symbols("K_0 K_1 x epsilon", positive=True)  # sizes, rank, largest strength

FORMULAS: dict[str, sp.Expr] = {
    "objective": sp.log(a + b),
    "bound": (1 - q) * sp.log(a / (1 - q)) + q * sp.log(b / q),
    "posterior": b / (a + b),
    "gap": q * sp.log(q * (a + b) / b) + (1 - q) * sp.log((1 - q) * (a + b) / a),
    # The logarithm of Q(1) / Q(0) of the best single Q for all pairs.
    "common": sp.Sum(T[i] * (LB[i] - LA[i]), (i, 1, n)) / sp.Sum(T[i], (i, 1, n)),
    "complete": (1 - q) * sp.log(a) + q * sp.log(b),
    "entropy": -q * sp.log(q) - (1 - q) * sp.log(1 - q),
    "entropy change": -sp.log(q / (1 - q)),  # for a change of q
    "one-hot": (1 - Y) * sp.log(a) + Y * sp.log(b),
    "one-hot gap": -(1 - Y) * sp.log(a / (a + b)) - Y * sp.log(b / (a + b)),
    "kept alone": Y * (sp.log(2 * b) + sp.log(sp.Rational(1, 2))),  # p(x, c | y=1) = 2 b
    "left out": (1 - Y) * sp.log(a),
    "strength": epsilon / K0 * (x - K1) + epsilon,
    "first rank": K1 - K0,
    "running mean": (F - 1) / F * V + v / F,
    "score ratio": (F1 / F2) ** alpha,
}


def _at(formula: sp.Expr, share: sp.Expr) -> sp.Expr:
    return formula.subs(q, share)


def _zero(expression: sp.Expr) -> sp.Expr:
    return sp.simplify(sp.expand_log(sp.expand(expression), force=True))


def jensen(f: Formulas = FORMULAS) -> sp.Expr:
    """What Jensen's inequality loses on one pair is the divergence of Q from the posterior."""
    return _zero(sp.expand_log(f["objective"] - f["bound"] - f["gap"], force=True))


def tight(f: Formulas = FORMULAS) -> sp.Expr:
    """At the posterior of the pair nothing is lost."""
    return _zero(_at(f["gap"], f["posterior"]))


def minimum(f: Formulas = FORMULAS) -> sp.Expr:
    """There the gap has its minimum, with second derivative 1 / q(1 - q): no other Q is as good."""
    slope = _zero(_at(sp.diff(f["gap"], q), f["posterior"]))
    return slope + sp.simplify(sp.diff(f["gap"], q, 2) - 1 / (q * (1 - q)))


def common(f: Formulas = FORMULAS) -> sp.Expr:
    """Of one Q for all pairs the best has the weighted mean of the posteriors' log-odds: the derivative vanishes."""
    odds = sp.Symbol("r", real=True)  # log(q / (1 - q))
    of_pair = sp.expand_log(sp.expand(f["bound"]), force=True)
    slope = sp.diff(of_pair, q).subs({sp.log(a): LA[i], sp.log(b): LB[i]})
    slope = sp.simplify(slope.subs(q, 1 / (1 + sp.exp(-odds))))
    slope = sp.expand(sp.expand_log(slope, force=True))
    factor = sp.simplify(sp.diff(slope, odds))
    rest = sp.simplify(slope - factor * odds)
    total = odds * sp.Sum(T[i] * factor, (i, 1, n)) + sp.Sum(T[i] * rest, (i, 1, n))
    return sp.simplify(_split(total.subs(odds, f["common"])))


def _split(expression: sp.Expr) -> sp.Expr:
    """Sums of sums as sums of sums of one term each, so that equal ones cancel."""

    def apart(summand: sp.Expr, limits: sp.Tuple) -> sp.Expr:
        return sp.Add(*(sp.Sum(term, limits) for term in sp.Add.make_args(sp.expand(summand)))).replace(
            lambda e: isinstance(e, sp.Sum) and e.function.could_extract_minus_sign(),
            lambda e: -sp.Sum(-e.function, *e.limits),
        )

    return sp.expand(expression.replace(sp.Sum, apart))


def entropy(f: Formulas = FORMULAS) -> sp.Expr:
    """The bound is the expected complete-data logarithm and the entropy of Q."""
    return _zero(f["bound"] - f["complete"] - f["entropy"])


def gradient(f: Formulas = FORMULAS) -> sp.Expr:
    """With Q frozen at the old parameters, the M-step has the gradient of the objective there (Fisher's identity)."""
    along = {a: A, b: B}
    frozen = sp.diff(f["complete"].subs(along), theta).subs(q, f["posterior"].subs(along))
    return sp.simplify(frozen - sp.diff(f["objective"].subs(along), theta))


def tied(f: Formulas = FORMULAS) -> sp.Expr:
    """With Q tied to the parameters its entropy is no constant: it changes as this says, by 0 only at one half."""
    share = f["posterior"].subs({a: A, b: B})
    change = sp.diff(_at(f["entropy"], share), theta)
    return sp.simplify(
        sp.expand_log(change - _at(f["entropy change"], share) * sp.diff(share, theta), force=True)
    )


def one_hot(f: Formulas = FORMULAS) -> sp.Expr:
    """A threshold makes Q one-hot: its entropy is 0, and the bound has a term for each value of the bit."""
    residual = sp.Integer(0)
    for kept in (0, 1):
        limit = sp.limit(sp.expand_log(f["bound"], force=True), q, kept, "+" if kept == 0 else "-")
        residual += (kept + 1) * _zero(limit - f["one-hot"].subs(Y, kept))
    return sp.simplify(residual)


def one_hot_gap(f: Formulas = FORMULAS) -> sp.Expr:
    """It is tight only where the posterior is certain."""
    residual = sp.Integer(0)
    for kept in (0, 1):
        lost = f["objective"] - f["one-hot"] - f["one-hot gap"]
        residual += (kept + 1) * _zero(lost.subs(Y, kept))
    return sp.simplify(residual)


def kept(f: Formulas = FORMULAS) -> sp.Expr:
    """The objective on the kept points is that bound without the terms of the others."""
    residual = f["one-hot"] - f["kept alone"] - f["left out"]
    return _zero(residual)


def strengths(f: Formulas = FORMULAS) -> sp.Expr:
    """The strength of blending is 0 at the rank where K1L begins and its largest at the last kept one."""
    at_first = f["strength"].subs(x, f["first rank"])
    return sp.simplify(at_first**2 + (f["strength"].subs(x, K1) - epsilon) ** 2)


def running_mean(f: Formulas = FORMULAS) -> sp.Expr:
    """The recursion computes the mean: F times it is the sum before and the new value."""
    return sp.simplify(F * f["running mean"] - ((F - 1) * V + v))


def constants_cancel(f: Formulas = FORMULAS) -> sp.Expr:
    """F divided by any constant ranks alike."""
    ratio = (F1 / K) ** alpha / (F2 / K) ** alpha
    return sp.simplify(sp.expand_log(sp.log(ratio) - sp.log(f["score ratio"]), force=True))


STEPS: tuple[Step, ...] = (
    Step(
        "Jensen",
        r"\log(a+b) = \sum_y Q(y)\log\tfrac{p(x,c,y)}{Q(y)} + \mathrm{KL}\big(Q\,\|\,p(y|x,c)\big)",
        ("objective", "bound", "gap"),
        jensen,
    ),
    Step(
        "tight", r"Q(1) = \pi = \tfrac{b}{a+b} \;\Rightarrow\; \mathrm{KL} = 0", ("posterior", "gap"), tight
    ),
    Step(
        "nowhere else",
        r"\tfrac{\partial}{\partial q}\mathrm{KL}\big|_{q=\pi} = 0,\quad "
        r"\tfrac{\partial^2}{\partial q^2}\mathrm{KL} = \tfrac1{q(1-q)} > 0",
        ("posterior", "gap"),
        minimum,
    ),
    Step(
        "one Q for all",
        r"\text{best: } \log\tfrac{Q(1)}{Q(0)} = \tfrac{\sum_i t_i \log (b_i/a_i)}{\sum_i t_i}",
        ("bound", "common"),
        common,
    ),
    Step(
        "entropy of Q",
        r"\sum_y Q \log\tfrac{p}{Q} = \sum_y Q \log p + H(Q)",
        ("bound", "complete", "entropy"),
        entropy,
    ),
    Step(
        "M-step, Q frozen",
        r"\sum_y \pi_{\text{old}}(y)\, \partial_\theta \log p(x,c,y) = \partial_\theta \log p(x,c)",
        ("complete", "posterior", "objective"),
        gradient,
    ),
    Step(
        "Q tied to θ",
        r"\partial_\theta H(\pi) = -\log\tfrac{\pi}{1-\pi}\; \partial_\theta \pi",
        ("entropy", "posterior", "entropy change"),
        tied,
    ),
    Step(
        "threshold",
        r"Q(1) = Y \in \{0, 1\}: \quad (1 - Y)\log a + Y \log b",
        ("bound", "one-hot"),
        one_hot,
    ),
    Step(
        "its gap",
        r"-\,(1-Y)\log(1-\pi) - Y \log \pi",
        ("objective", "one-hot", "one-hot gap"),
        one_hot_gap,
    ),
    Step(
        "kept points",
        r"= Y \log p(x, c\,|\,1) + Y \log\tfrac12 + (1 - Y) \log a",
        ("one-hot", "kept alone", "left out"),
        kept,
    ),
    Step(
        "ends of ε",
        r"\varepsilon(|K_1| - |K_0|) = 0,\quad \varepsilon(|K_1|) = \varepsilon_m",
        ("strength", "first rank"),
        strengths,
    ),
    Step(
        "running mean",
        r"F\,V^F = (F-1)\,V^{F-1} + V(x)",
        ("running mean",),
        running_mean,
    ),
    Step(
        "constants in F",
        r"\tfrac{(F_1/K)^\alpha}{(F_2/K)^\alpha} = \big(\tfrac{F_1}{F_2}\big)^\alpha",
        ("score ratio",),
        constants_cancel,
    ),
)

DERIVATION = Derivation(FORMULAS, STEPS)
evidence, table = DERIVATION.evidence, DERIVATION.table
