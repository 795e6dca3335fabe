"""Every step of the derivations leaves exactly 0, and a sign, a half or an index put wrong does not."""

import pytest
import sympy as sp

from reproductions.jacobian_matching import propositions as steps
from reproductions.jacobian_matching.propositions import PROPOSITIONS, SIGMA
from reproductions.jacobian_matching.symbols import Smooth, coefficient, dot, moment, normals


@pytest.mark.parametrize("name", steps.STEPS)
def test_residual_is_exactly_zero(name):
    assert steps.STEPS[name]() == 0


def test_check_says_so_and_finds_a_wrong_step(monkeypatch):
    assert steps.check().holds
    monkeypatch.setattr(steps, "STEPS", {"wrong": lambda: sp.Integer(1)})
    evidence = steps.check()
    assert not evidence.holds
    assert "wrong" in evidence.summary


@pytest.mark.parametrize("name", PROPOSITIONS)
@pytest.mark.parametrize("dimensions", [1, 3])
def test_propositions_hold_in_other_dimensions(name, dimensions):
    assert PROPOSITIONS[name].residual(dimensions=dimensions) == 0
    assert PROPOSITIONS[name].printed_residual(dimensions=dimensions) == 0


# ---------------------------------------------------------------- mutations


TERMS = [(name, term) for name, one in PROPOSITIONS.items() for term in one.formulas]


@pytest.mark.parametrize(("name", "term"), TERMS)
@pytest.mark.parametrize("factor", [-1, 2, sp.Rational(1, 2), 0], ids=["sign", "double", "half", "dropped"])
def test_a_wrong_factor_on_a_term_is_found(name, term, factor):
    one = PROPOSITIONS[name]

    def wrong(target, student):
        return {
            key: (factor if key == term else 1) * value for key, value in one.exact(target, student).items()
        }

    assert one.residual(wrong) != 0


def shifted(function: Smooth) -> Smooth:
    """Its derivatives along the first axis in place of the second."""
    return Smooth(
        {axes: function.d(*(0 for _ in axes)) for axes in function.derivatives}, function.dimensions
    )


@pytest.mark.parametrize("name", PROPOSITIONS)
def test_a_shifted_index_is_found(name):
    one = PROPOSITIONS[name]
    assert one.residual(lambda target, student: one.exact(target, shifted(student))) != 0


@pytest.mark.parametrize("name", PROPOSITIONS)
def test_what_the_note_prints_is_not_the_coefficient(name):
    one = PROPOSITIONS[name]
    target, student = one.functions()
    assert sp.expand(one.derived() - one.printed(target, student)) != 0
    assert one.printed_residual(lambda t, s: -one.printed(t, s)) != 0
    assert set(one.dropped()) <= set(one.formulas)
    assert one.exact(target, student).keys() == one.formulas.keys()


def test_what_is_dropped_has_its_name():
    assert PROPOSITIONS["squared error"].dropped().keys() == {"residual times curvature"}
    assert PROPOSITIONS["cross-entropy"].dropped().keys() == {
        "square",
        "student's curvature",
        "teacher's curvature",
    }
    assert PROPOSITIONS["cross-entropy, labels"].dropped().keys() == {"square", "student's curvature"}


HALF = sp.Rational(1, 2)
MUTATIONS = {
    "moments: all even ones 1": lambda: steps.even_moments(lambda p: sp.Integer(1 - p % 2)),
    "moments: index shifted": lambda: steps.even_moments(lambda p: moment(p) if p < 4 else sp.factorial2(p)),
    "vector: norm of the noise": lambda: steps.along_a_vector(lambda g: len(g) * dot(g, g)),
    "vector: square of the sum": lambda: steps.along_a_vector(lambda g: sp.Add(*g) ** 2),
    "smooth: no half": lambda: steps.smooth_function(second=lambda f: f.laplacian),
    "smooth: sign": lambda: steps.smooth_function(second=lambda f: -f.laplacian / 2),
    "smooth: one axis": lambda: steps.smooth_function(second=lambda f: f.d(0, 0)),
    "smooth: fourth / 24": lambda: steps.smooth_function(fourth=lambda f: f.bilaplacian / 24),
    "smooth: fourth without mixed": lambda: steps.smooth_function(
        fourth=lambda f: (f.d(0, 0, 0, 0) + f.d(1, 1, 1, 1)) / 8
    ),
    "fourth order: square of the Laplacian only": lambda: steps.squared_error_fourth(
        lambda r: r.laplacian**2 / 4
    ),
    "KL: no half": lambda: steps.kl_at_matched_outputs(lambda t, s: 2 * steps.fisher(t, s)),
    "KL: classes shifted": lambda: steps.kl_at_matched_outputs(lambda t, s: steps.fisher(t, [*s[1:], s[0]])),
    "KL: unweighted": lambda: steps.kl_at_matched_outputs(
        lambda t, s: sp.Add(*(dot((a - b).gradient, (a - b).gradient) for a, b in zip(t, s, strict=True))) / 2
    ),
    "matched: constant left out": lambda: steps.matched_cross_entropy(steps.fisher),
    "matched: sign": lambda: steps.matched_cross_entropy(lambda t, s: -steps.fisher(t, s)),
    "optimum: no half": lambda: steps.labels_at_the_optimum(
        lambda s: sp.Add(*(dot(one.gradient, one.gradient) / one.value for one in s))
    ),
    "affine labels: no half": lambda: steps.affine_labels(lambda s, y: steps.slope_variance(s)),
    "affine labels: mean under the label": lambda: steps.affine_labels(
        lambda s, y: (
            (
                sp.Add(*(p * dot(g, g) for p, g in zip(s.values, s.slopes, strict=True)))
                - dot(s.mean_slope(y), s.mean_slope(y))
            )
            / 2
        )
    ),
    **{
        f"affine distillation: {term}": lambda term=term: steps.affine_distillation(
            lambda t, s: {k: (-1 if k == term else 1) * v for k, v in steps.affine_terms(t, s).items()}
        )
        for term in ("student's variance", "covariance of slopes", "covariance with log S")
    },
    "kink: no first order": lambda: steps.kink_at_a_point(lambda c: c**2 + SIGMA**2 / 2),
    "kink: whole slope": lambda: steps.kink_at_a_point(
        lambda c: c**2 + 2 * c * SIGMA / sp.sqrt(2 * sp.pi) + SIGMA**2
    ),
    "kink, average: none": lambda: steps.kink_on_average(lambda: sp.Integer(0)),
    "kink, average: no half": lambda: steps.kink_on_average(lambda: SIGMA**2),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name):
    assert MUTATIONS[name]() != 0


def test_derivation_itself_needs_the_right_moments():
    # The step that every proposition rests on: with the note's moments the fourth order comes out wrong.
    function, z = Smooth.named("f", 1, order=4), normals(1)
    right = coefficient(function.along(z), z, 4)
    assert sp.expand(right - function.bilaplacian / 8) == 0
    note = coefficient(function.along(z), z, 4, moments=lambda p: sp.Integer(1 - p % 2))
    assert sp.expand(note - function.bilaplacian / 24) == 0
