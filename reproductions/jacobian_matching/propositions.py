r"""Both propositions on noise and Jacobians, and what follows from them, derived for general smooth functions.

A smooth function is its Taylor polynomial with a symbol for each coefficient: derivatives of a fixed order at a point
are the same for the function and for the polynomial, so a result that holds for all values of the symbols holds for all
functions. Every step is a function that returns its *residual*, derived less stated, which is exactly 0. The statement
is an argument, so that a wrong one can be put in and found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy as sp

from reproductions.harness.errata import Evidence
from reproductions.jacobian_matching.symbols import (
    EPSILON,
    AffineSoftmax,
    Moment,
    Smooth,
    coefficient,
    dot,
    moment,
    normals,
    vanishes,
)

SIGMA = sp.Symbol("sigma", positive=True)
Terms = Mapping[str, sp.Expr]


# ---------------------------------------------------------------- noise


def even_moments(formula: Moment = moment, highest: int = 8) -> sp.Expr:
    r"""E z^p = (p - 1)!! for even p and 0 for odd p, by integration against the density."""
    z, total = sp.Symbol("z", real=True), sp.Integer(0)
    density = sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)
    for power in range(highest + 1):
        integral = sp.integrate(z**power * density, (z, -sp.oo, sp.oo))
        total += sp.Abs(sp.simplify(integral - formula(power)))
    return total


def along_a_vector(
    formula: Callable[[Sequence[sp.Expr]], sp.Expr] = lambda g: dot(g, g), dimensions: int = 3
) -> sp.Expr:
    """E (ξ · g)² = σ² g · g, for a vector g: what "ξ² (∇S)²" has to mean."""
    z, g = normals(dimensions), sp.symbols(f"g0:{dimensions}", real=True)
    return vanishes(coefficient((EPSILON * dot(z, g)) ** 2, z, 2) - formula(g))


def smooth_function(
    second: Callable[[Smooth], sp.Expr] = lambda f: f.laplacian / 2,
    fourth: Callable[[Smooth], sp.Expr] = lambda f: f.bilaplacian / 8,
    dimensions: int = 2,
) -> sp.Expr:
    """E φ(x + ξ) = φ + σ²/2 Δφ + σ⁴/8 Δ²φ, odd orders vanish."""
    f, z = Smooth.named("f", dimensions, order=4), normals(dimensions)
    expected = {0: f.value, 1: 0, 2: second(f), 3: 0, 4: fourth(f)}
    gaps = [vanishes(coefficient(f.along(z), z, n) - stated) for n, stated in expected.items()]
    return sp.Add(*(gap * EPSILON**n for n, gap in enumerate(gaps)))


# ---------------------------------------------------------------- the two propositions


@dataclass(frozen=True)
class Proposition:
    r"""The coefficient of σ² of one loss: what it is, and what the note keeps of it.

    Attributes:
        name: Of the loss.
        loss: Of one output, from the polynomials of target and student.
        exact: The coefficient's terms by name, from target and student.
        printed: What the note prints for it.
        kept: Names of the terms that the note keeps, with the factor that it has on each.
        labels: Whether the target is a constant.
        formulas: Each term in LaTeX.
    """

    name: str
    loss: Callable[[sp.Expr, sp.Expr], sp.Expr]
    exact: Callable[[Smooth, Smooth], Terms]
    printed: Callable[[Smooth, Smooth], sp.Expr]
    kept: Mapping[str, int]
    labels: bool
    formulas: Mapping[str, str]

    def functions(self, dimensions: int = 2) -> tuple[Smooth, Smooth]:
        """Target and student, general."""
        student = Smooth.named("S", dimensions, positive=True)
        if self.labels:
            return Smooth.constant("y", dimensions), student
        return Smooth.named("T", dimensions, positive=True), student

    def derived(self, dimensions: int = 2) -> sp.Expr:
        """The coefficient, from the Taylor polynomials."""
        target, student = self.functions(dimensions)
        z = normals(dimensions)
        return coefficient(self.loss(target.along(z), student.along(z)), z, 2)

    def residual(
        self, exact: Callable[[Smooth, Smooth], Terms] | None = None, dimensions: int = 2
    ) -> sp.Expr:
        """Derived less stated."""
        stated = (exact or self.exact)(*self.functions(dimensions))
        return vanishes(self.derived(dimensions) - sp.Add(*stated.values()))

    def dropped(self, dimensions: int = 2) -> Terms:
        """What the note lacks: the terms it leaves out, and the wrong part of a factor on those it keeps."""
        terms = self.exact(*self.functions(dimensions))
        return {
            name: (1 - self.kept.get(name, 0)) * term
            for name, term in terms.items()
            if self.kept.get(name, 0) != 1
        }

    def printed_residual(
        self, printed: Callable[[Smooth, Smooth], sp.Expr] | None = None, dimensions: int = 2
    ) -> sp.Expr:
        """Derived less what is printed less what was dropped."""
        stated = (printed or self.printed)(*self.functions(dimensions))
        return vanishes(self.derived(dimensions) - stated - sp.Add(*self.dropped(dimensions).values()))


def _squared(target: Smooth, student: Smooth) -> Terms:
    r = target - student
    return {"Jacobians": dot(r.gradient, r.gradient), "residual times curvature": r.value * r.laplacian}


def _cross_entropy(target: Smooth, student: Smooth) -> Terms:
    t, s = target, student
    return {
        "mixed": -dot(t.gradient, s.gradient) / s.value,
        "square": t.value * dot(s.gradient, s.gradient) / (2 * s.value**2),
        "student's curvature": -t.value * s.laplacian / (2 * s.value),
        "teacher's curvature": -t.laplacian * sp.log(s.value) / 2,
    }


def _label_cross_entropy(target: Smooth, student: Smooth) -> Terms:
    terms = _cross_entropy(target, student)
    return {name: terms[name] for name in ("square", "student's curvature")}


PROPOSITIONS: Mapping[str, Proposition] = {
    one.name: one
    for one in (
        Proposition(
            "squared error",
            loss=lambda t, s: (t - s) ** 2,
            exact=_squared,
            printed=lambda t, s: dot((t - s).gradient, (t - s).gradient),
            kept={"Jacobians": 1},
            labels=False,
            formulas={
                "Jacobians": r"\lVert\nabla T_i-\nabla S_i\rVert^2",
                "residual times curvature": r"(T_i-S_i)\,\Delta(T_i-S_i)",
            },
        ),
        Proposition(
            "squared error, labels",
            loss=lambda y, s: (y - s) ** 2,
            exact=_squared,
            printed=lambda y, s: dot(s.gradient, s.gradient),
            kept={"Jacobians": 1},
            labels=True,
            formulas={
                "Jacobians": r"\lVert\nabla S_i\rVert^2",
                "residual times curvature": r"-(y_i-S_i)\,\Delta S_i",
            },
        ),
        Proposition(
            "cross-entropy",
            loss=lambda t, s: -t * sp.log(s),
            exact=_cross_entropy,
            printed=lambda t, s: -dot(t.gradient, s.gradient) / s.value,
            kept={"mixed": 1},
            labels=False,
            formulas={
                "mixed": r"-\nabla T_i\cdot\nabla S_i/S_i",
                "square": r"\tfrac12 T_i\lVert\nabla S_i\rVert^2/S_i^2",
                "student's curvature": r"-\tfrac12 T_i\,\Delta S_i/S_i",
                "teacher's curvature": r"-\tfrac12\,\Delta T_i\,\log S_i",
            },
        ),
        Proposition(
            "cross-entropy, labels",
            loss=lambda y, s: -y * sp.log(s),
            exact=_label_cross_entropy,
            printed=lambda y, s: y.value * dot(s.gradient, s.gradient) / s.value**2,
            kept={"square": 2},
            labels=True,
            formulas={
                "square": r"\tfrac12 y_i\lVert\nabla S_i\rVert^2/S_i^2",
                "student's curvature": r"-\tfrac12 y_i\,\Delta S_i/S_i",
            },
        ),
    )
}


def squared_error_fourth(formula: Callable[[Smooth], sp.Expr] | None = None, dimensions: int = 2) -> sp.Expr:
    r"""The coefficient of σ⁴ of E r(x + ξ)² is Δ²(r²) / 8, here written out in the derivatives of r."""
    r, z, axes = Smooth.named("r", dimensions, order=4), normals(dimensions), range(dimensions)

    def written_out(r: Smooth) -> sp.Expr:
        return (
            2 * r.value * r.bilaplacian
            + 8 * sp.Add(*(r.d(i) * r.d(i, j, j) for i in axes for j in axes))
            + 2 * r.laplacian**2
            + 4 * sp.Add(*(r.d(i, j) ** 2 for i in axes for j in axes))
        ) / 8

    return vanishes(coefficient(r.along(z) ** 2, z, 4) - (formula or written_out)(r))


# ---------------------------------------------------------------- distributions: outputs that add up to one


def distribution(
    name: str, classes: int = 3, dimensions: int = 2, *, values: str | None = None
) -> list[Smooth]:
    """General smooth probabilities: whatever the first are, the last makes them add up to 1 everywhere."""
    free = [Smooth.named(f"{name}{i}", dimensions, positive=True) for i in range(classes - 1)]
    if values is not None:
        shared = [sp.Symbol(f"{values}{i}", positive=True) for i in range(classes - 1)]
        free = [
            Smooth({**one.derivatives, (): value}, dimensions)
            for one, value in zip(free, shared, strict=True)
        ]
    whole = Smooth({(): sp.Integer(1)}, dimensions)
    for one in free:
        whole = whole - one
    return [*free, whole]


def log_gradient(function: Smooth) -> list[sp.Expr]:
    """Gradient of the logarithm."""
    return [part / function.value for part in function.gradient]


def fisher(target: Sequence[Smooth], student: Sequence[Smooth]) -> sp.Expr:
    r""":math:`\tfrac12 \sum_i T_i \lVert \nabla \log T_i - \nabla \log S_i \rVert^2`."""
    total: sp.Expr = sp.Integer(0)
    for t, s in zip(target, student, strict=True):
        gap = [a - b for a, b in zip(log_gradient(t), log_gradient(s), strict=True)]
        total += t.value * dot(gap, gap) / 2
    return total


Distributions = Callable[[Sequence[Smooth], Sequence[Smooth]], sp.Expr]


def kl_at_matched_outputs(formula: Distributions = fisher, classes: int = 3, dimensions: int = 2) -> sp.Expr:
    """The coefficient of the divergence of S from T where T(x) = S(x), for any smooth networks."""
    z = normals(dimensions)
    target = distribution("T", classes, dimensions, values="P")
    student = distribution("S", classes, dimensions, values="P")
    loss = sp.Add(
        *(t.along(z) * sp.log(t.along(z) / s.along(z)) for t, s in zip(target, student, strict=True))
    )
    return vanishes(coefficient(loss, z, 2) - formula(target, student))


def matched_cross_entropy(
    formula: Distributions = lambda t, s: (
        fisher(t, s) - sp.Add(*(one.value * dot(log_gradient(one), log_gradient(one)) for one in t)) / 2
    ),
    classes: int = 3,
    dimensions: int = 2,
) -> sp.Expr:
    """Where T(x) = S(x), the kept term and the dropped square of the cross-entropy are a matching loss.

    They are :func:`fisher` less what does not depend on the student; its curvature adds up to 0.
    """
    target = distribution("T", classes, dimensions, values="P")
    student = distribution("S", classes, dimensions, values="P")
    pairs = [_cross_entropy(t, s) for t, s in zip(target, student, strict=True)]
    together = sp.Add(*(terms[name] for terms in pairs for name in ("mixed", "square")))
    curvature = sp.Add(*(terms["student's curvature"] for terms in pairs))
    return vanishes(together - formula(target, student)) + vanishes(curvature)


def labels_at_the_optimum(
    formula: Callable[[Sequence[Smooth]], sp.Expr] = lambda s: (
        sp.Add(*(one.value * dot(log_gradient(one), log_gradient(one)) for one in s)) / 2
    ),
    classes: int = 3,
    dimensions: int = 2,
) -> sp.Expr:
    """Label cross-entropy averaged over labels that the student predicts rightly, y = S(x): the ½ stays."""
    student = distribution("S", classes, dimensions)
    total: sp.Expr = sp.Integer(0)
    for one in student:
        label = Smooth({(): one.value}, dimensions)
        total += sp.Add(*_label_cross_entropy(label, one).values())
    return vanishes(total - formula(student))


# ---------------------------------------------------------------- softmax of locally affine logits


def slope_variance(student: AffineSoftmax) -> sp.Expr:
    """V_S: the variance of the logits' gradients under the student's own probabilities."""
    mean = student.mean_slope()
    square = sp.Add(*(p * dot(g, g) for p, g in zip(student.values, student.slopes, strict=True)))
    return square - dot(mean, mean)


def affine_labels(
    formula: Callable[[AffineSoftmax, Sequence[sp.Expr]], sp.Expr] = lambda s, y: slope_variance(s) / 2,
    classes: int = 3,
    dimensions: int = 2,
) -> sp.Expr:
    """Label cross-entropy of softmax of affine logits: V_S / 2, whatever the label."""
    student, z = AffineSoftmax.named("s", classes, dimensions), normals(dimensions)
    free = sp.symbols(f"y0:{classes - 1}", real=True)
    labels = [*free, 1 - sp.Add(*free)]
    loss = -sp.Add(*(y * sp.log(p) for y, p in zip(labels, student.along(z), strict=True)))
    return vanishes(coefficient(loss, z, 2) - formula(student, labels))


def affine_terms(target: AffineSoftmax, student: AffineSoftmax) -> Terms:
    r"""Half the variance V_S, and two covariances under the teacher's probabilities, by name.

    .. math:: \tfrac12 V_S - \mathrm{Cov}(\nabla t, \nabla s)
              - \tfrac12 \mathrm{Cov}(\lVert\nabla t - \mathbb{E} \nabla t\rVert^2, \log S)
    """
    under, mean = target.values, target.mean_slope()
    logs = [sp.log(value) for value in student.values]
    spread = [dot(c, c) for c in ([g - m for g, m in zip(row, mean, strict=True)] for row in target.slopes)]
    mixed = sp.Add(*(p * dot(g, h) for p, g, h in zip(under, target.slopes, student.slopes, strict=True)))
    covariance = sp.Add(*(p * a * b for p, a, b in zip(under, spread, logs, strict=True))) - dot(
        under, spread
    ) * dot(under, logs)
    return {
        "student's variance": slope_variance(student) / 2,
        "covariance of slopes": -(mixed - dot(mean, student.mean_slope(under))),
        "covariance with log S": -covariance / 2,
    }


def affine_distillation(
    formula: Callable[[AffineSoftmax, AffineSoftmax], Terms] = affine_terms,
    classes: int = 3,
    dimensions: int = 1,
) -> sp.Expr:
    """Distillation cross-entropy of softmaxes of affine logits: three terms, see :func:`affine_terms`."""
    target = AffineSoftmax.named("t", classes, dimensions)
    student, z = AffineSoftmax.named("s", classes, dimensions), normals(dimensions)
    loss = -sp.Add(*(t * sp.log(s) for t, s in zip(target.along(z), student.along(z), strict=True)))
    return vanishes(coefficient(loss, z, 2) - sp.Add(*formula(target, student).values()))


# ---------------------------------------------------------------- kinks


def kink_at_a_point(
    formula: Callable[[sp.Symbol], sp.Expr] = lambda c: (
        c**2 + 2 * c * SIGMA / sp.sqrt(2 * sp.pi) + SIGMA**2 / 2
    ),
) -> sp.Expr:
    """E (c + relu(ξ))², the input on the kink: a term of first order in σ."""
    c, z = sp.symbols("c z", real=True)
    density = sp.exp(-(z**2) / 2) / sp.sqrt(2 * sp.pi)
    positive = sp.integrate(((c + SIGMA * z) ** 2 * density).expand(), (z, 0, sp.oo))
    return sp.simplify(positive + c**2 / 2 - formula(c))


def kink_on_average(formula: Callable[[], sp.Expr] = lambda: SIGMA**2 / 2) -> sp.Expr:
    """∫ (E relu(x + ξ) - relu(x)) dx: a kink adds σ²/2 for each unit of density and of jump in slope."""
    x = sp.Symbol("x", real=True)
    density = sp.exp(-(x**2) / (2 * SIGMA**2)) / (SIGMA * sp.sqrt(2 * sp.pi))
    # E relu(x + ξ) = x Φ(x/σ) + σ² φ_σ(x); both sides of 0 differ from relu by the same.
    excess = SIGMA**2 * density - x * sp.erfc(x / (SIGMA * sp.sqrt(2))) / 2
    return sp.simplify(2 * sp.integrate(excess, (x, 0, sp.oo)) - formula())


STEPS: Mapping[str, Callable[[], sp.Expr]] = {
    "even moments of the normal distribution": even_moments,
    "noise along a vector": along_a_vector,
    "noise on a smooth function, up to σ⁴": smooth_function,
    **{name: one.residual for name, one in PROPOSITIONS.items()},
    **{
        f"{name}: the note's terms and the dropped ones": one.printed_residual
        for name, one in PROPOSITIONS.items()
    },
    "squared error, next order": squared_error_fourth,
    "KL divergence where outputs agree": kl_at_matched_outputs,
    "cross-entropy where outputs agree": matched_cross_entropy,
    "label cross-entropy at the optimum": labels_at_the_optimum,
    "affine logits, labels": affine_labels,
    "affine logits, distillation": affine_distillation,
    "kink, at a point": kink_at_a_point,
    "kink, on average": kink_on_average,
}


def kept_and_dropped() -> str:
    """What the note keeps of each coefficient and what it drops, as a Markdown table."""
    lines = ["| loss | kept | dropped |", "|---|---|---|"]
    for one in PROPOSITIONS.values():
        factors = {1: "", 2: " (with twice its factor)"}
        kept = ", ".join(f"${one.formulas[name]}${factors[factor]}" for name, factor in one.kept.items())
        dropped = ", ".join(f"${formula}$" for name, formula in one.formulas.items() if name not in one.kept)
        lines.append(f"| {one.name} | {kept} | {dropped} |")
    return "\n".join(lines)


def residuals() -> dict[str, sp.Expr]:
    """Every step's residual, by name."""
    return {name: step() for name, step in STEPS.items()}


def check() -> Evidence:
    """Whether every residual is exactly 0."""
    wrong = {name: str(value) for name, value in residuals().items() if value != 0}
    summary = f"{len(STEPS)} steps, all residuals exactly 0." if not wrong else f"Residuals: {wrong}."
    return Evidence(not wrong, summary, {"steps": len(STEPS), **wrong})
