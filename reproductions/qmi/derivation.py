r"""From the definition of the quadratic mutual information to the biased HSIC, step by step, by computer algebra.

Everything is general: any number of classes of any sizes, any number of dimensions. A kernel density is a sum of
Gaussians :math:`g_v(x - x_k)`, one a sample, so it is given by the weight of each; the integral of a product of two of
them is :math:`\sum_{kl} w_k w'_l K_{kl}`, given by the coefficient of :math:`K_{kl}`. Both depend only on the classes
of the samples: sample k is of class p, sample l of class q.

A step takes the formulas it speaks about from a table, so that a wrong one can be put in its place: its residual is
exactly 0 for the right ones only.
"""

from __future__ import annotations

import sympy as sp

from reproductions.harness.derivation import Derivation, Formulas, Step

N, C, D = sp.symbols("N C D", integer=True, positive=True)  # samples, classes, dimensions
p, q, c = sp.symbols("p q c", integer=True, positive=True)  # classes of sample k, of sample l, of a sum
i, j = sp.symbols("i j", integer=True, positive=True)  # a coordinate, a member of a class
J = sp.IndexedBase("J", positive=True)  # class sizes
v, r = sp.symbols("v r", positive=True)  # variance of a density in each direction, a squared distance
y = sp.Symbol("y", real=True)
x, a, b = (sp.IndexedBase(name, real=True) for name in "xab")
joint, product = sp.symbols("p_xc p_xP_c", real=True)  # p(x, c) and p(x) P(c) at one place
V_IN, V_ALL, V_BTW = sp.symbols("V_IN V_ALL V_BTW")

delta = sp.KroneckerDelta

FORMULAS: dict[str, sp.Expr] = {
    "definition": (joint - product) ** 2,
    "expansion": joint**2 + product**2 - 2 * joint * product,
    # Weights of g_v(x - x_k), and what is no density: the priors and how many classes there are.
    "joint": delta(p, c) / N,
    "marginal": 1 / N,
    "prior": J[c] / N,
    "classes": C,
    # Gaussians as functions of the squared distance r.
    "density": sp.exp(-r / (2 * v)) / (2 * sp.pi * v) ** (D / 2),
    "kernel": sp.exp(-r / (4 * v)) / (4 * sp.pi * v) ** (D / 2),
    "line": sp.sqrt(sp.pi * v),
    # Coefficients of K_kl.
    "within": delta(p, q) / N**2,
    "all": sp.Sum((J[c] / N) ** 2, (c, 1, C)) / N**2,
    "between": (J[p] / N) / N**2,
    "squares": sp.Sum((delta(p, c) - J[c] / N) * (delta(q, c) - J[c] / N), (c, 1, C)) / N**2,
    "centred": (delta(p, q) - J[p] / N - J[q] / N + sp.Sum((J[c] / N) ** 2, (c, 1, C))) / N**2,
    # The potentials together.
    "qmi": V_IN + V_ALL - 2 * V_BTW,
    "balanced": V_IN - V_ALL,
}


def over_classes(summand: sp.Expr, classes: sp.Expr = C) -> sp.Expr:
    """Sum over the classes, Kronecker deltas carried out: p and q are among them."""
    total = sp.Sum(sp.expand(summand), (c, 1, classes)).doit()
    return reduced(total.xreplace({sp.Ge(C, p): sp.true, sp.Ge(C, q): sp.true}))


def reduced(expression: sp.Expr) -> sp.Expr:
    """Expand; in sums over the classes, take constants out and use that the class sizes add up to N."""

    def constants_out(summand: sp.Expr, limits: sp.Tuple) -> sp.Expr:
        total = sp.Integer(0)
        for term in sp.Add.make_args(sp.expand(summand)):
            constant, rest = term.as_independent(limits[0])
            total += constant * (N if (rest, limits) == (J[c], sp.Tuple(c, 1, C)) else sp.Sum(rest, limits))
        return total

    return sp.expand(sp.expand(expression).replace(sp.Sum, constants_out))


def integral(left: sp.Expr, right: sp.Expr, classes: sp.Expr = C) -> sp.Expr:
    """Coefficient of K_kl in the integral of the product of two densities, summed over the classes."""
    return over_classes(left * right.subs(p, q, simultaneous=True), classes)


def definition(f: Formulas = FORMULAS) -> sp.Expr:
    """The square in the definition, multiplied out; sums over classes and integrals are linear in it."""
    return sp.expand(f["definition"] - f["expansion"])


def mass(f: Formulas = FORMULAS) -> sp.Expr:
    """Over all x the kernel density of a class integrates to the class's prior: its members' weights add up to it."""
    return reduced(sp.Sum(f["joint"].subs(p, c), (j, 1, J[c])).doit() - f["prior"])


def priors(f: Formulas = FORMULAS) -> sp.Expr:
    """The priors add up to 1."""
    return over_classes(f["prior"], f["classes"]) - 1


def marginal(f: Formulas = FORMULAS) -> sp.Expr:
    """Summed over all classes, the joint density is the density of x: each sample once."""
    return over_classes(f["joint"], f["classes"]) - f["marginal"]


def line(f: Formulas = FORMULAS) -> sp.Expr:
    """The integral over one coordinate that remains after completing the square."""
    return sp.simplify(sp.integrate(sp.exp(-(y**2) / v), (y, -sp.oo, sp.oo)) - f["line"])


def gaussian_product(f: Formulas = FORMULAS) -> sp.Expr:
    r"""The square completed in D dimensions: logarithm of the two sides of

    :math:`g_v(x - a) g_v(x - b) = g_{2v}(a - b) \prod_i e^{-(x_i - m_i)^2 / v} / \sqrt{\pi v}`, m the midpoint.
    """

    def log_at(formula: sp.Expr, coordinate: sp.Expr) -> sp.Expr:
        return sp.expand_log(sp.log(formula), force=True).subs(r, sp.Sum(coordinate**2, (i, 1, D)))

    left = log_at(f["density"], x[i] - a[i]) + log_at(f["density"], x[i] - b[i])
    rest = sp.Sum(-((x[i] - (a[i] + b[i]) / 2) ** 2) / v, (i, 1, D))
    right = log_at(f["kernel"], a[i] - b[i]) + rest - D * sp.log(f["line"])
    return sp.simplify(sp.expand_log(reduced(left - right), force=True))


def potential_within(f: Formulas = FORMULAS) -> sp.Expr:
    """The integral of the squared joint density."""
    return reduced(integral(f["joint"], f["joint"], f["classes"]) - f["within"])


def potential_all(f: Formulas = FORMULAS) -> sp.Expr:
    """The integral of the squared product of density and prior."""
    both = f["marginal"] * f["prior"]
    return reduced(integral(both, both, f["classes"]) - f["all"])


def potential_between(f: Formulas = FORMULAS) -> sp.Expr:
    """The integral of the joint density times density and prior; the prior stays inside the sum over the classes."""
    return reduced(integral(f["joint"], f["marginal"] * f["prior"], f["classes"]) - f["between"])


def mutual_information(f: Formulas = FORMULAS) -> sp.Expr:
    """The integral of the squared difference is the three potentials together; K_kl = K_lk meets both orders."""
    difference = f["joint"] - f["marginal"] * f["prior"]
    return reduced(integral(difference, difference) - f["qmi"].subs(_potentials(f)))


def balanced(f: Formulas = FORMULAS) -> sp.Expr:
    """With C classes of N / C samples the third potential is the second, and two are left."""

    def equal_sizes(expression: sp.Expr) -> sp.Expr:
        return expression.replace(lambda e: isinstance(e, sp.Indexed), lambda _: N / C).doit()

    potentials = _potentials(f)
    three, two = f["qmi"].subs(potentials), f["balanced"].subs(potentials)
    return sp.simplify(equal_sizes(three - two))


def centred_labels(f: Formulas = FORMULAS) -> sp.Expr:
    """The matrix of equal labels L, centred on both sides: HLH over the number of pairs."""
    same = delta(p, q)
    row_mean = over_classes(J[c] * same.subs(q, c)) / N  # class c has J_c samples
    column_mean = over_classes(J[c] * same.subs(p, c)) / N
    mean = over_classes(J[c] * row_mean.subs(p, c)) / N
    return reduced((same - row_mean - column_mean + mean) / N**2 - f["centred"])


def hsic(f: Formulas = FORMULAS) -> sp.Expr:
    """The three potentials together have the same coefficients: tr(KHLH) / N^2."""
    return reduced(f["qmi"].subs(_potentials(f)) - f["centred"])


def non_negative(f: Formulas = FORMULAS) -> sp.Expr:
    r"""The coefficients are a Gram matrix :math:`\sum_c u_c u_c^\top`, so that for a positive semi-definite K the sum
    :math:`\sum_{kl} K_{kl} \sum_c u_{ck} u_{cl} = \sum_c u_c^\top K u_c` has no negative term."""
    return reduced(f["squares"].doit().xreplace({sp.Ge(C, p): sp.true, sp.Ge(C, q): sp.true}) - f["centred"])


def _potentials(f: Formulas) -> dict[sp.Symbol, sp.Expr]:
    """Coefficients of K_kl, in both orders alike."""
    other = f["between"].subs(p, q)
    return {V_IN: f["within"], V_ALL: f["all"], V_BTW: (f["between"] + other) / 2}


STEPS: tuple[Step, ...] = (
    Step(
        "definition",
        r"\big(p(x,c) - p(x)P(c)\big)^2 = p(x,c)^2 + \big(p(x)P(c)\big)^2 - 2\,p(x,c)\,p(x)P(c)",
        ("definition", "expansion"),
        definition,
    ),
    Step(
        "density of a class",
        r"p(x,c) = \tfrac1N \sum_{k\in c} g_v(x-x_k) \;\Rightarrow\; \int p(x,c)\,dx = \tfrac{J_c}{N} = P(c)",
        ("joint", "prior"),
        mass,
    ),
    Step("priors", r"\sum_{c=1}^{C} P(c) = 1", ("prior", "classes"), priors),
    Step(
        "density of all",
        r"p(x) = \sum_{c=1}^{C} p(x,c) = \tfrac1N \sum_{k=1}^{N} g_v(x-x_k)",
        ("joint", "marginal", "classes"),
        marginal,
    ),
    Step("one coordinate", r"\int e^{-y^2/v}\,dy = \sqrt{\pi v}", ("line",), line),
    Step(
        "Gaussian product",
        r"\int g_v(x-a)\,g_v(x-b)\,dx = g_{2v}(a-b)",
        ("density", "kernel", "line"),
        gaussian_product,
    ),
    Step(
        "within classes",
        r"\sum_c\!\int p(x,c)^2 dx = \tfrac1{N^2} \sum_{kl} [c_k = c_l]\, K_{kl} = V_{IN}",
        ("joint", "within"),
        potential_within,
    ),
    Step(
        "all pairs",
        r"\sum_c\!\int \big(p(x)P(c)\big)^2 dx = \tfrac1{N^2} \Big(\sum_c \pi_c^2\Big) \sum_{kl} K_{kl} = V_{ALL}",
        ("marginal", "prior", "classes", "all"),
        potential_all,
    ),
    Step(
        "class and all",
        r"\sum_c\!\int p(x,c)\,p(x)P(c)\,dx = \tfrac1{N^2} \sum_{kl} \pi_{c_k} K_{kl} = V_{BTW}",
        ("joint", "marginal", "prior", "between"),
        potential_between,
    ),
    Step(
        "mutual information",
        r"I = V_{IN} + V_{ALL} - 2 V_{BTW}",
        ("joint", "marginal", "prior", "within", "all", "between", "qmi"),
        mutual_information,
    ),
    Step(
        "balanced classes",
        r"\pi_c = \tfrac1C \;\Rightarrow\; V_{BTW} = V_{ALL}, \quad I = V_{IN} - V_{ALL}",
        ("all", "between", "qmi", "balanced"),
        balanced,
    ),
    Step(
        "centred labels",
        r"(HLH)_{kl} = [c_k = c_l] - \pi_{c_k} - \pi_{c_l} + \sum_c \pi_c^2",
        ("centred",),
        centred_labels,
    ),
    Step(
        "biased HSIC",
        r"I = \tfrac1{N^2} \operatorname{tr}(KHLH)",
        ("within", "all", "between", "qmi", "centred"),
        hsic,
    ),
    Step(
        "non-negative",
        r"I = \tfrac1{N^2} \sum_c u_c^\top K u_c \ge 0, \quad u_{ck} = [c_k = c] - \pi_c",
        ("squares", "centred"),
        non_negative,
    ),
)

DERIVATION = Derivation(FORMULAS, STEPS, "for any number of classes of any sizes in any dimension")
evidence, table = DERIVATION.evidence, DERIVATION.table
