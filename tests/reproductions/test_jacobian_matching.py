"""The Jacobian-matching column: its plan, its arms, its claims, errata and figures fit each other."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.divergences import softened_kl
from kdrefs.noise import noise_expansion
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.jacobian_matching import expansions, few_images, figures
from reproductions.jacobian_matching import run as column
from reproductions.protocols.pairs import PAIRS, load_pair_data, teacher

QUICK = column.PROFILES["quick"]
ARMS = (*column.MAIN, *column.FORMS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def run_of(arm: str, seed: int = 0, size: int = 5) -> Run:
    return Run(column.COLUMN, "quick", f"digits-{size}", arm, seed)


@pytest.mark.parametrize("profile", column.PROFILES)
def test_plan_has_every_arm_size_and_seed_once(profile):
    config = column.PROFILES[profile]
    plan = column.plan(config)
    assert len(plan) == len(set(plan))
    assert len(config.seeds) >= 3
    for size in config.sizes:
        arms = {run.arm for run in plan if run.data == f"{config.data[0]}-{size}"}
        assert arms == {*column.MAIN, *(column.FORMS if size == config.forms_at else ())}
    for run in plan:
        partners = [one.seed for one in plan if (one.data, one.arm) == (run.data, run.arm)]
        assert partners == list(config.seeds[: 1 if run.arm == "teacher" and profile != "quick" else None])


def test_every_arm_is_described():
    assert set(ARMS) == few_images.ARMS.keys()
    assert {"teacher", *ARMS} == figures.ARM_TITLES.keys()
    sizes = {str(size) for config in column.PROFILES.values() for size in config.sizes}
    assert {"", *sizes} == figures.SETTING_TITLES.keys()


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize("arm", ["teacher", *ARMS])
def test_every_arm_gives_its_metrics(arm, shared):
    run = Run(column.COLUMN, "quick", "digits", "teacher", 0) if arm == "teacher" else run_of(arm)
    found = column.execute(run, QUICK, shared)
    assert found.keys() == column.METRICS.keys()
    assert all(0 <= found[name] <= 100 for name in ("accuracy", "noisy_accuracy"))
    assert found["jacobian_gap"] >= 0
    assert (found["jacobian_gap"] < 1e-4) == (arm == "teacher")


@pytest.mark.parametrize("arm", ["both", "noise"])
def test_seeds_trained_together_are_those_trained_alone(arm, shared):
    runs = [run_of(arm, seed) for seed in (0, 1)]
    both = column.execute_together(runs, QUICK, shared)
    alone = [column.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(both, alone, strict=True):
        assert one["jacobian_gap"] == pytest.approx(other["jacobian_gap"], rel=1e-3)
    assert both[0]["jacobian_gap"] != both[1]["jacobian_gap"]


def test_few_images_are_balanced_nested_and_of_the_seed():
    labels = np.repeat(np.arange(4), 30)[np.random.default_rng(0).permutation(120)]
    small, large = few_images.few(labels, 3, 0), few_images.few(labels, 10, 0)
    assert (np.bincount(labels[small]) == 3).all()
    assert (np.bincount(labels[large]) == 10).all()
    assert set(small) < set(large)
    assert set(small) != set(few_images.few(labels, 3, 1))
    assert len(few_images.few(labels, 1000, 0)) == 120


@pytest.mark.parametrize("size", [1, 5, 100])
def test_steps_are_the_same_for_every_number_of_images(size, tmp_path, monkeypatch):
    seen = []
    original = few_images.fit

    def spy(*arguments, **options):
        history = original(*arguments, **options)
        seen.append((history.steps, options["max_steps"]))
        return history

    monkeypatch.setattr(few_images, "fit", spy)
    recipe = few_images.replace(QUICK.recipe, steps=3)
    context = Context(store=RunStore(tmp_path))
    few_images.train(few_images.ARMS["student"], size, [0], recipe, context, name="student")
    assert seen == [(3, 3)]


def test_what_is_known_of_the_teacher_is_its_jacobian(shared):
    pair = PAIRS["digits"]
    _, test, _ = load_pair_data(pair, probe=True)
    some = few_images._part(test, np.arange(3))
    known = few_images._known(shared, pair, 0, some, {"test": 3})
    guide = teacher(shared, pair, 0)
    batch = next(iter(few_images._ordered(pair, some, shared)))
    for place in range(3):
        expected = torch.func.jacrev(lambda one: guide(one[None]).logits[0])(batch.images[place])
        torch.testing.assert_close(known["jacobian"][place].float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(known["logits"], guide(batch.images).logits.detach(), rtol=1e-4, atol=1e-4)


def of_images(net):
    """A net of rows as a net of images."""
    return lambda images: net(images.flatten(1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_jacobian_term_is_the_part_of_the_noise_in_the_divergence(temperature):
    # Where outputs agree, the term with all rows is σ² times the coefficient of T² KL, which the run's kd term is.
    recipe = few_images.replace(QUICK.recipe, temperature=temperature)
    guide, other = (of_images(expansions.random_net(seed)) for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 1, 2, dtype=torch.float64, generator=generator).requires_grad_()
    shift = (guide(x) - other(x)).detach()
    logits, target = other(x) + shift, guide(x)
    jacobian = few_images.output_jacobian(target, x, create_graph=False)
    rows = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    term = few_images._jacobian_term(
        "fisher", logits, x, target.detach(), jacobian, rows, recipe, lambda function: function
    )

    def divergence(inputs):
        t, s = (net.div(temperature).log_softmax(1) for net in (guide(inputs), other(inputs) + shift))
        return temperature**2 * (t.exp() * (t - s)).sum(1)

    torch.testing.assert_close(divergence(x).mean(), softened_kl(logits, target, temperature))
    expected = recipe.sigma**2 * noise_expansion(divergence, x.detach()).second.mean()
    torch.testing.assert_close(term.detach(), expected)


# ---------------------------------------------------------------- networks of the errata


def test_quadrature_agrees_with_automatic_differentiation_and_monte_carlo():
    target, student = expansions.smooth_pair()
    loss = expansions.squared_error(target, student)
    second = expansions.second_coefficient(loss, expansions.POINT)
    torch.testing.assert_close(expansions.extrapolated(loss, expansions.POINT), second, rtol=1e-4, atol=1e-7)
    exact = expansions.gauss_hermite(loss, expansions.POINT, 0.3).item()
    mean, error = expansions.monte_carlo(
        loss, expansions.POINT.expand(500, -1), 0.3, 100, torch.Generator().manual_seed(0)
    )
    assert abs(mean - exact) < 4 * error
    assert abs(loss(expansions.POINT).item() - exact) > 20 * error


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_unbounded_figure_shows_a_line_and_a_parabola_with_its_minimum_at_the_teacher(closed):
    kept, whole, _ = figures.unbounded_figure().axes[0].lines
    slopes = np.diff(kept.get_ydata())
    assert np.allclose(slopes, slopes[0])
    assert slopes[0] < 0
    assert whole.get_xdata()[np.argmin(whole.get_ydata())] == pytest.approx(1)


def test_kink_figure_ends_at_the_orders_it_states(closed):
    on_kink, average = figures.kink_figure().axes
    exact, _, first = (line.get_ydata() for line in on_kink.lines)
    assert exact[0] / first[0] == pytest.approx(1, abs=0.02)
    exact, jacobians, all_terms = (line.get_ydata() for line in average.lines)
    assert np.allclose(exact[3:], all_terms[3:], rtol=0.05)
    assert np.allclose(exact[3:] / jacobians[3:], 2, rtol=0.05)


def test_expansion_figure_s_repaired_curve_meets_the_measured_points(closed):
    figure = figures.expansion_figure(sigmas=(0.02, 0.1), images=40, draws=200)
    for axes in figure.axes:
        (measured,) = axes.containers
        points = measured.lines[0].get_ydata()
        printed, repaired = (line for line in axes.lines if len(line.get_xdata()) == 60)
        right, wrong = (np.interp(0.1, line.get_xdata(), line.get_ydata()) for line in (repaired, printed))
        assert abs(right - points[1]) < 0.2 * abs(wrong - points[1])
