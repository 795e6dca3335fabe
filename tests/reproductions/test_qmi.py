"""The QMI column: its plan, arms, claims, errata and theorem fit each other and the networks of the PKT column."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from kdrefs.kernels import cosine_kernel
from kdrefs.methods.qmi import biased_hsic, quadratic_mutual_information
from reproductions.harness.claims import load_claims
from reproductions.harness.runs import Context, Result, Run, RunStore
from reproductions.pkt import run as pkt
from reproductions.protocols import embeddings
from reproductions.protocols.pairs import load_pair_data
from reproductions.qmi import figures, theorem
from reproductions.qmi import run as qmi
from reproductions.qmi.errata import dense_potentials, draw
from reproductions.qmi.labellings import information_over_labellings

QUICK = qmi.PROFILES["quick"]
ALL_LABELS = QUICK.settings[-1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def run_of(arm, seed=0):
    return Run("qmi", "quick", "digits", arm, seed)


@pytest.fixture(scope="module")
def values(shared):
    return {arm: qmi.execute(run_of(arm), QUICK, shared) for arm in ALL_LABELS.arms}


# The plan and the PKT column


@pytest.mark.parametrize("profile", qmi.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = qmi.PROFILES[profile]
    plan = qmi.plan(config)
    assert len(plan) == len(set(plan))
    for setting in config.settings:
        for arm in setting.arms:
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert seeds in (list(config.seeds), [config.seeds[0]])
    assert all((run.column, run.profile) == ("qmi", profile) for run in plan)


@pytest.mark.parametrize("profile", qmi.PROFILES)
def test_networks_are_runs_of_the_pkt_column(profile):
    config, theirs = qmi.PROFILES[profile], pkt.PROFILES[profile]
    assert (config.pair, config.seeds) == (theirs.pair, theirs.seeds)
    trained = set(pkt.plan(theirs))
    for run in qmi.plan(config):
        if run.arm not in ("across", "teacher"):  # not every setting of theirs lists its teacher
            assert replace(run, column="pkt") in trained


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


def test_another_recipe_of_the_networks_makes_other_runs(monkeypatch):
    before = [qmi.relevant_config(run_of(arm), QUICK) for arm in ("pkt", "across")]
    changed = replace(pkt.PROFILES["quick"], transfer_stages=((1, 1e-3),))
    monkeypatch.setitem(pkt.PROFILES, "quick", changed)
    assert all(
        qmi.relevant_config(run_of(arm), QUICK) != b for arm, b in zip(("pkt", "across"), before, strict=True)
    )


def test_features_are_those_of_the_network_that_pkt_trained(shared, monkeypatch):
    module, feature = embeddings.trained(
        Run("pkt", "quick", "digits", "kd", 0), pkt.PROFILES["quick"], shared
    )

    def no_training(*_args, **_kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(embeddings, "distil", no_training)
    _, test, _ = load_pair_data(qmi.PAIRS["digits"], probe=True)
    (found,) = qmi.features_of(run_of("kd"), QUICK, shared, test)
    images = torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 255
    expected = module((images - 0.5) / 0.5).features[feature]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


# Values


def test_every_arm_gives_its_metrics(values):
    kernels = tuple(qmi.KERNEL_TITLES)
    own = {"map"} | {f"{term}_{k}" for k in kernels for term in ("qmi", "within", "all", "between")}
    gaps = {f"gap_{k}" for k in (*kernels, "potentials", "unknown")}
    ranks = {f"rank_{k}" for k in (*kernels, "spread")}
    assert own | gaps | ranks == qmi.METRICS.keys()
    for arm, found in values.items():
        assert found.keys() == (ranks if arm == "across" else own if arm == "teacher" else own | gaps), arm
        for k in kernels if arm != "across" else ():
            three = found[f"within_{k}"] + found[f"all_{k}"] - 2 * found[f"between_{k}"]
            assert found[f"qmi_{k}"] == pytest.approx(three, abs=1e-15)
            assert found[f"qmi_{k}"] > 0


def test_values_are_those_of_the_definitions(values, shared):
    _, test, _ = load_pair_data(qmi.PAIRS["digits"], probe=True)
    labels = torch.from_numpy(test.labels).long()
    sides = [qmi.features_of(run_of(arm), QUICK, shared, test)[0].double() for arm in ("hint", "teacher")]
    hint, teacher = (dense_potentials(cosine_kernel(side), labels) for side in sides)
    assert values["hint"]["qmi_cosine"] == pytest.approx(hint["qmi"], rel=1e-9)
    gap = 100 * abs(hint["qmi"] - teacher["qmi"]) / teacher["qmi"]
    assert values["hint"]["gap_cosine"] == pytest.approx(gap, rel=1e-6)
    largest = max(abs(hint[term] - teacher[term]) for term in ("within", "all", "between"))
    assert values["hint"]["gap_potentials"] == pytest.approx(100 * largest / teacher["qmi"], rel=1e-6)
    squares = torch.cdist(sides[0], sides[0]).square()
    kernel = torch.exp(-squares / (0.3 * squares.mean()))
    assert values["hint"]["qmi_medium"] == pytest.approx(dense_potentials(kernel, labels)["qmi"], rel=1e-6)


def test_mean_average_precision_is_the_pkt_column_s(values, shared):
    theirs = pkt.execute(Run("pkt", "quick", "digits", "hint", 0), pkt.PROFILES["quick"], shared)
    assert values["hint"]["map"] == theirs["map"]


def test_correlation_is_over_the_students_of_a_seed(values):
    students = [arm for arm in ALL_LABELS.arms if arm not in ("teacher", "across")]
    quality = [values[arm]["map"] for arm in students]
    for name, metric, sign in (("rank_wide", "qmi_wide", 1), ("rank_spread", "all_cosine", -1)):
        expected = spearmanr([sign * values[arm][metric] for arm in students], quality).statistic
        assert values["across"][name] == pytest.approx(expected)


def test_one_space_does_not_differ_from_itself_whatever_its_units():
    points, labels = draw(width=5)
    first, second = (qmi.potentials_by_kernel(scale * points, labels) for scale in (1.0, 40.0))
    for kernel, terms in first.items():
        assert terms == pytest.approx(second[kernel], rel=1e-9)


# Every labelling at once


def test_closed_form_over_all_labellings():
    one, two = draw(width=3, seed=1)[0][:7], draw(width=4, seed=2)[0][:7]
    labels = torch.from_numpy((theorem.labellings(7) > 0).astype(int))

    def every(x):
        return torch.stack([quadratic_mutual_information(x, y, kernel="cosine") for y in labels])

    assert information_over_labellings(one) == pytest.approx(
        every(one).square().mean().sqrt().item(), rel=1e-10
    )
    apart = (every(one) - every(two)).square().mean().sqrt().item()
    assert information_over_labellings(one, two) == pytest.approx(apart, rel=1e-10)
    assert information_over_labellings(one, two) == pytest.approx(information_over_labellings(two, one))
    rotated = 3 * one @ torch.linalg.qr(draw(width=3, seed=3)[0][:3]).Q
    assert information_over_labellings(one, rotated) < 1e-7  # the square root of a rounding error


# The theorem


def test_theorem_holds():
    found = theorem.evidence()
    assert found.holds, found.summary


def test_integer_information_is_the_biased_hsic():
    generator = np.random.default_rng(0)
    kernel = generator.integers(-3, 4, (5, 5))
    kernel = kernel + kernel.T
    signs = theorem.labellings(5)
    (found,) = theorem.information(signs, kernel[None])
    (inside,) = theorem.within(signs, kernel[None])
    for s, value, potential in zip(signs, found, inside, strict=True):
        labels = torch.from_numpy(s)
        same = (labels.unsqueeze(1) == labels).double()
        expected = biased_hsic(torch.from_numpy(kernel).double(), same).item()
        assert value / (2 * 5**4) == pytest.approx(expected, abs=1e-12)
        assert potential / 25 == pytest.approx(
            dense_potentials(torch.from_numpy(kernel).double(), labels)["within"]
        )


def test_theorem_needs_the_equal_diagonals():
    shift = theorem.shifted_kernel(5)
    signs = theorem.labellings(5)
    assert (np.diag(shift) != 0).all()
    assert (theorem.information(signs, shift[None]) == 0).all()
    # Nor does any labelling with more classes see it.
    for labels in ([0, 1, 2, 3, 4], [0, 0, 1, 2, 2], [2, 1, 0, 1, 2]):
        seen = dense_potentials(torch.from_numpy(shift).double(), torch.tensor(labels))["qmi"]
        assert seen == pytest.approx(0, abs=1e-14)
    traceless = np.diag([1, -1, 0, 0, 0])
    assert (theorem.within(signs, traceless[None]) == 0).all()
    assert (theorem.information(signs, traceless[None]) != 0).any()


def test_theorem_needs_more_than_one_labelling():
    # With one labelling, and with those of single samples alone, other differences have the same information.
    basis = theorem.differences(4, diagonal=False)
    assert theorem.rank(theorem.information(theorem.labellings(4)[5:6], basis)) == 1
    assert theorem.rank(theorem.information(theorem.labellings(4, most=1), basis)) < 6
    assert theorem.rank(theorem.information(theorem.labellings(4, most=2), basis)) == 6


def test_rank_is_exact():
    assert theorem.rank(np.array([[10**9, 10**9 + 1], [10**9 - 1, 10**9]])) == 2
    assert theorem.rank(np.array([[1, 2], [2, 4], [3, 6]])) == 1


# Claims


def test_claims_ask_students_for_gaps_and_all_together_for_ranks():
    for key in (key for claim in load_claims("qmi") for keys in claim.keys.values() for key in keys):
        *_, metric, arm = key.split("/")
        assert (arm == "across") == metric.startswith("rank_")
        assert not (arm == "teacher" and metric.startswith("gap_"))


# Figures


@pytest.fixture
def results(values):
    return [
        Result.model_construct(run=run_of(arm, seed), metrics={k: v + seed for k, v in found.items()})
        for arm, found in values.items()
        for seed in (0, 1)
    ]


def test_arms_figure_has_the_networks_with_that_metric(results):
    figure = figures.arms_figure(results, ALL_LABELS, "gap_cosine", label="gap, %")
    titles = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert titles == [figures.ARM_TITLES[arm] for arm in qmi.STUDENTS]
    everyone = figures.arms_figure(results, ALL_LABELS, "qmi_cosine", label="QMI")
    assert len(everyone.axes[0].get_yticklabels()) == len(titles) + 1


def test_potentials_and_correlation_figures_draw_every_seed(results, values):
    axes = figures.potentials_figure(results, ALL_LABELS).axes[0]
    pkt_line = next(line for line in axes.lines if line.get_label() == "PKT")
    assert pkt_line.get_ydata()[0] == pytest.approx(values["pkt"]["within_cosine"])
    assert len(pkt_line.get_ydata()) == 2
    panels = figures.correlation_figure(results, ALL_LABELS).axes
    assert len(panels) == len(qmi.KERNEL_TITLES)
    assert f"{values['across']['rank_cosine'] + 0.5:.2f}" in panels[0].get_title()
    assert all(len(axes.lines) == len(qmi.STUDENTS) for axes in panels)


def test_bandwidth_figure_computes_the_information():
    points, labels = draw(width=3)
    axes = figures.bandwidth_figure(
        [("teacher", points), ("pkt", 2 * points)], labels, [0.1, 1.0, 10.0]
    ).axes[0]
    one, two = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(one, two, rtol=1e-9)
    assert one[1] == pytest.approx(quadratic_mutual_information(points, labels).item(), rel=1e-9)
