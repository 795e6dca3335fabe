r"""The closed form of the entropy map, step by step, by computer algebra.

A layer's change under noise is taken to first order, :math:`f(x + n) - f(x) = J n`. What is left separates: the loss is
a sum over the cells, so derivatives by one cell's :math:`\sigma` see that cell's part alone, and a part that is the
same for every cell sums to n times itself. That holds for any number n of cells; the mean of the gains
and of their logarithms over the cells are symbols of their own.

A step takes the formulas it speaks about from a table, so that a wrong one can be put in its place: its residual is
exactly 0 for the right ones only.
"""

from __future__ import annotations

from itertools import product

import sympy as sp

from reproductions.harness.derivation import Derivation, Formulas, Step

n, D = sp.symbols("n D", integer=True, positive=True)  # cells, numbers in the layer
s, s0, g, mean_g, scale, trade, b = sp.symbols("sigma sigma_0 g mu sigma_f2 lambda b", positive=True)
mean_log, back_log = sp.symbols(
    "m_log b_log", real=True
)  # mean of log g over all cells, over the background's

FORMULAS: dict[str, sp.Expr] = {
    "change": s**2 * g,  # expected squared change of the layer by the noise of one cell
    "scale": s0**2 * n * mean_g / D,
    "entropy": sp.log(s) + sp.log(2 * sp.pi * sp.E) / 2,
    "optimum": trade * D * scale / (2 * n * g),
    "closed": trade / 2 * s0**2 * mean_g / g,
    "part": trade / (2 * n),
    "curvature": 2 * trade / n,
    "mean entropy": sp.log(s0)
    + sp.log(trade / 2) / 2
    + sp.log(2 * sp.pi * sp.E) / 2
    + (sp.log(mean_g) - mean_log) / 2,
    "threshold": sp.exp(2 * b + back_log),
}


def loss(f: Formulas) -> sp.Expr:
    """One cell's part of the loss."""
    return f["change"] / (D * scale) - trade / n * f["entropy"]


def gaussian(f: Formulas = FORMULAS) -> sp.Expr:
    """Expected squared change by independent standard normal numbers on four pixels, two in the cell with noise s."""
    slopes, noise = sp.symbols("J_1:5", real=True), sp.symbols("e_1:5", real=True)
    strength = (s, s, 0, 0)
    squared = sp.expand(sum(j * k * e for j, k, e in zip(slopes, strength, noise, strict=True)) ** 2)
    # Independent, of mean 0 and variance 1: only squares are left.
    expected = sum(squared.coeff(e, 2) for e in noise)
    return sp.expand(expected - f["change"].subs(g, slopes[0] ** 2 + slopes[1] ** 2))


def probes(f: Formulas = FORMULAS) -> sp.Expr:
    """All signs of a probe in three dimensions, two pixels: the mean of the squared products is the sum of squares."""
    jacobian = sp.Matrix(3, 2, sp.symbols("J_1:7", real=True))
    signs = [sp.Matrix(v) for v in product((-1, 1), repeat=3)]
    mean = sum((jacobian.T * v).dot(jacobian.T * v) for v in signs) / len(signs)
    return sp.expand(mean - (f["change"] / s**2).subs(g, sum(entry**2 for entry in jacobian)))


def reference(f: Formulas = FORMULAS) -> sp.Expr:
    """With the initial noise everywhere, the mean squared change is n times the mean of a cell's, by D numbers."""
    return sp.simplify(n * f["change"].subs({s: s0, g: mean_g}) / D - f["scale"])


def stationary(f: Formulas = FORMULAS) -> sp.Expr:
    """The derivative by a cell's sigma, where the optimum is."""
    return sp.simplify(sp.diff(loss(f), s).subs(s, sp.sqrt(f["optimum"])))


def minimum(f: Formulas = FORMULAS) -> sp.Expr:
    """The second derivative by the logarithm of sigma there; positive, and the loss convex in it."""
    t = sp.Symbol("t", real=True)
    second = sp.diff(loss(f).subs(s, sp.exp(t)), t, 2)
    return sp.simplify(second.subs(t, sp.log(f["optimum"]) / 2) - f["curvature"])


def closed(f: Formulas = FORMULAS) -> sp.Expr:
    """The reference put in."""
    return sp.simplify(f["optimum"].subs(scale, f["scale"]) - f["closed"])


def shares(f: Formulas = FORMULAS) -> sp.Expr:
    """A cell's part of the change at the optimum, in units of the reference: the same for every cell."""
    return sp.simplify(f["change"].subs(s, sp.sqrt(f["optimum"])) / (D * scale) - f["part"])


def mean_entropy(f: Formulas = FORMULAS) -> sp.Expr:
    """A cell's entropy with log g replaced by its mean, in which it is linear."""
    cell = sp.expand_log(f["entropy"].subs(s, sp.sqrt(f["closed"])), force=True)
    linear = sp.expand(cell).subs(sp.log(g), mean_log)
    return sp.simplify(sp.expand_log(linear - f["mean entropy"], force=True))


def concept(f: Formulas = FORMULAS) -> sp.Expr:
    """At the threshold the background's mean entropy is b above the cell's; trade-off and initial noise are gone."""
    cell = sp.expand(sp.expand_log(f["entropy"].subs(s, sp.sqrt(f["closed"])), force=True))
    at = sp.expand_log(cell.subs(g, f["threshold"]), force=True)
    return sp.simplify(cell.subs(sp.log(g), back_log) - at - b)


STEPS: tuple[Step, ...] = (
    Step(
        "noise",
        r"\mathbb E\,\lVert J_i \sigma_i \epsilon \rVert^2 = \sigma_i^2 g_i, "
        r"\quad g_i = \sum_{p \in i} \lVert J_{:,p} \rVert^2",
        ("change",),
        gaussian,
    ),
    Step("probes", r"\mathbb E_{v = \pm 1} \sum_{p \in i} (J^\top v)_p^2 = g_i", ("change",), probes),
    Step(
        "reference",
        r"D \sigma_f^2 = \sigma_0^2 \sum_i g_i = n \sigma_0^2 \bar g",
        ("change", "scale"),
        reference,
    ),
    Step(
        "stationary",
        r"\frac{\partial}{\partial \sigma_i} = 0 \;\Rightarrow\; \sigma_i^2 = \frac{\lambda D \sigma_f^2}{2 n g_i}",
        ("change", "entropy", "optimum"),
        stationary,
    ),
    Step(
        "minimum",
        r"\frac{\partial^2}{\partial (\log \sigma_i)^2} = \frac{2 \lambda}{n} > 0",
        ("change", "optimum", "curvature"),
        minimum,
    ),
    Step(
        "closed form",
        r"\sigma_i^2 = \tfrac\lambda2\, \sigma_0^2\, \bar g / g_i",
        ("optimum", "scale", "closed"),
        closed,
    ),
    Step(
        "equal shares",
        r"\frac{\sigma_i^2 g_i}{D \sigma_f^2} = \frac{\lambda}{2n}, \text{ in all } \frac\lambda2",
        ("change", "optimum", "part"),
        shares,
    ),
    Step(
        "mean entropy",
        r"\bar H = \log \sigma_0 \sqrt{\lambda / 2} + \tfrac12 \log 2 \pi e "
        r"+ \tfrac12 (\log \bar g - \overline{\log g})",
        ("entropy", "closed", "mean entropy"),
        mean_entropy,
    ),
    Step(
        "concepts",
        r"\bar H_{bg} - H_i > b \iff g_i > e^{2b} \exp \overline{\log g}_{bg}",
        ("entropy", "closed", "threshold"),
        concept,
    ),
)

DERIVATION = Derivation(FORMULAS, STEPS, "for any number of cells")
evidence, table = DERIVATION.evidence, DERIVATION.table


def least_mean_entropy(trade_off: float, sigma: float = 0.01) -> float:
    """The mean entropy at the optimum is at least this, because no mean is below its geometric mean."""
    value = FORMULAS["mean entropy"].subs({s0: sigma, trade: trade_off, mean_log: sp.log(mean_g)})
    return float(sp.simplify(value))
