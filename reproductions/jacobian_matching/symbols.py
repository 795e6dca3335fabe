"""General smooth functions as their derivatives at a point, and Gaussian expectations of polynomials in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy as sp

# The noise is ε z, z standard normal: ε stands for σ in everything below.
EPSILON = sp.Symbol("epsilon", positive=True)
Moment = Callable[[int], sp.Expr]


def moment(power: int) -> sp.Expr:
    """E z^p of a standard normal z: (p - 1)!! for even p, 0 for odd p."""
    return sp.Integer(0) if power % 2 else sp.factorial2(power - 1)


@dataclass(frozen=True)
class Smooth:
    """A general smooth function around a point, by its derivatives there.

    Attributes:
        derivatives: Axes, in ascending order, to the derivative along them: ``()`` the value, ``(0, 1)`` ∂0∂1.
        dimensions: Number of axes.
    """

    derivatives: Mapping[tuple[int, ...], sp.Expr]
    dimensions: int

    @classmethod
    def named(cls, name: str, dimensions: int = 2, order: int = 2, *, positive: bool = False) -> Smooth:
        """A function of which nothing is known but its name (and the sign of its value)."""
        found: dict[tuple[int, ...], sp.Expr] = {}
        for size in range(order + 1):
            for axes in itertools.combinations_with_replacement(range(dimensions), size):
                label = name + "".join(f"_{axis}" for axis in axes)
                found[axes] = sp.Symbol(label, real=True, positive=True if positive and not axes else None)
        return cls(found, dimensions)

    @classmethod
    def constant(cls, name: str, dimensions: int = 2) -> Smooth:
        """A number, such as a label's probability."""
        return cls({(): sp.Symbol(name, real=True)}, dimensions)

    def d(self, *axes: int) -> sp.Expr:
        """The derivative along ``axes``."""
        return self.derivatives.get(tuple(sorted(axes)), sp.Integer(0))

    @property
    def value(self) -> sp.Expr:
        return self.d()

    @property
    def gradient(self) -> list[sp.Expr]:
        return [self.d(axis) for axis in range(self.dimensions)]

    @property
    def laplacian(self) -> sp.Expr:
        return sp.Add(*(self.d(axis, axis) for axis in range(self.dimensions)))

    @property
    def bilaplacian(self) -> sp.Expr:
        axes = range(self.dimensions)
        return sp.Add(*(self.d(i, i, j, j) for i in axes for j in axes))

    def along(self, noise: Sequence[sp.Symbol]) -> sp.Expr:
        """The Taylor polynomial at x + ε z, every order of the derivatives that there are."""
        total: sp.Expr = sp.Integer(0)
        for axes, derivative in self.derivatives.items():
            repeats = sp.Mul(*(sp.factorial(axes.count(axis)) for axis in set(axes)))
            total += derivative * EPSILON ** len(axes) * sp.Mul(*(noise[axis] for axis in axes)) / repeats
        return total

    def __sub__(self, other: Smooth) -> Smooth:
        keys = {**self.derivatives, **other.derivatives}
        return Smooth({axes: self.d(*axes) - other.d(*axes) for axes in keys}, self.dimensions)


def dot(a: Sequence[sp.Expr], b: Sequence[sp.Expr]) -> sp.Expr:
    """Inner product."""
    return sp.Add(*(x * y for x, y in zip(a, b, strict=True)))


def normals(dimensions: int) -> list[sp.Symbol]:
    """The coordinates of the standard normal z."""
    return list(sp.symbols(f"z0:{dimensions}", real=True))


def coefficient(loss: sp.Expr, noise: Sequence[sp.Symbol], power: int, moments: Moment = moment) -> sp.Expr:
    """What stands before ε^power in the expectation of ``loss`` over the noise."""
    at_zero = sp.diff(loss, EPSILON, power).subs(EPSILON, 0) / sp.factorial(power)
    polynomial = sp.Poly(sp.expand(at_zero), *noise)
    return sp.Add(*(c * sp.Mul(*(moments(p) for p in powers)) for powers, c in polynomial.terms()))


def vanishes(expression: sp.Expr) -> sp.Expr:
    """``expression`` as the expanded numerator of one fraction: 0 exactly if it is 0."""
    return sp.expand(sp.fraction(sp.together(expression))[0])


@dataclass(frozen=True)
class AffineSoftmax:
    """Softmax of affine logits, by its probabilities at a point and the logits' gradients."""

    values: Sequence[sp.Expr]
    slopes: Sequence[Sequence[sp.Symbol]]

    @classmethod
    def named(cls, name: str, classes: int, dimensions: int) -> AffineSoftmax:
        """Any probabilities that add up to 1, any slopes."""
        free = sp.symbols(f"{name}0:{classes - 1}", positive=True)
        slopes = [sp.symbols(f"{name}g{i}_0:{dimensions}", real=True) for i in range(classes)]
        return cls([*free, 1 - sp.Add(*free)], slopes)

    def along(self, noise: Sequence[sp.Symbol]) -> list[sp.Expr]:
        """The probabilities at x + ε z."""
        moved = [
            value * sp.exp(EPSILON * dot(slope, noise))
            for value, slope in zip(self.values, self.slopes, strict=True)
        ]
        return [one / sp.Add(*moved) for one in moved]

    def mean_slope(self, under: Sequence[sp.Expr] | None = None) -> list[sp.Expr]:
        """Mean of the logits' gradients under a distribution, its own by default."""
        weights = self.values if under is None else under
        axes = range(len(self.slopes[0]))
        return [sp.Add(*(w * g[a] for w, g in zip(weights, self.slopes, strict=True))) for a in axes]
