"""The EnD² column: its sets, plan, ensembles, students, what is measured, the limits of the precision, its figures."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from kdrefs.methods.end2 import dirichlet_uncertainty, end2_loss, end_loss, ensemble_uncertainty
from reproductions.end2 import distillation, divergence, figures, sets
from reproductions.end2 import run as end2
from reproductions.end2.distillation import ARMS, Arm
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.protocols.pairs import Net

QUICK = end2.PROFILES["quick"]
SPIRALS, DIGITS = (replace(one, members=3) for one in QUICK.settings)
SMALL = replace(QUICK, settings=(SPIRALS, DIGITS))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=3, progress=False)


# Plan and sets


@pytest.mark.parametrize("profile", end2.PROFILES)
def test_plan_has_every_arm(profile):
    config = end2.PROFILES[profile]
    for setting in config.settings:
        arms = {run.arm for run in end2.plan(config) if run.data == setting.data}
        assert (
            {"single", "ensemble", "end", "end_aux", "end2", "end2_aux"}
            <= arms
            <= {"single", "ensemble", *ARMS}
        )
        assert (
            min(sum(r.arm == arm for r in end2.plan(config) if r.data == setting.data) for arm in arms) >= 3
        )


@pytest.mark.parametrize("data", ["spirals", "digits"])
def test_parts_are_apart(data):
    parts = sets.load(data)
    rows = {
        name: {row.tobytes() for row in getattr(parts, name)}
        for name in ("train", "foreign", "test", "outside")
    }
    names = list(rows)
    for k, name in enumerate(names):
        for other in names[k + 1 :]:
            assert len(rows[name] & rows[other]) <= 2, (name, other)  # scikit-learn's digits have a few twins
    assert len(parts.train) == len(parts.train_labels)
    assert len(parts.test) == len(parts.test_labels)
    assert parts.classes == {"spirals": 3, "digits": 6}[data]


def test_digits_of_the_test_are_no_foreign_digits():
    from kdrefs.data.sets import load_set

    data, parts = load_set("digits"), sets.load("digits")
    label = {
        image.tobytes(): int(y)
        for split in (data.train, data.test)
        for image, y in zip(split.images, split.labels, strict=True)
    }
    for name, wanted in (("train", range(6)), ("test", range(6)), ("foreign", (6, 7)), ("outside", (8, 9))):
        assert {label[image.tobytes()] for image in getattr(parts, name)} == set(wanted)


def test_a_probe_sees_every_class():
    parts = sets.load("spirals", probe=True)
    assert len(parts.train) == sets.PROBE
    assert set(parts.train_labels) == {0, 1, 2}


# Ensembles and students


def test_members_differ_and_are_found_again(shared):
    one, again = (distillation.ensemble(SPIRALS, 0, shared) for _ in range(2))
    other = distillation.ensemble(SPIRALS, 1, shared)
    points = torch.randn(5, 2)
    outputs = [network(points).logits for network in (*one, *other)]
    for k, output in enumerate(outputs):
        assert not any(torch.equal(output, later) for later in outputs[k + 1 :])
    for first, second in zip(one, again, strict=True):
        assert torch.equal(first(points).logits, second(points).logits)
        assert not first.training


def test_students_see_their_own_ensembles_answers(shared):
    parts = sets.load("digits", probe=True)
    for foreign in (False, True):
        batches = distillation._with_answers(DIGITS, Arm(True, foreign=foreign), parts, 0, shared)
        assert batches.num_samples == len(parts.train) + foreign * len(parts.foreign)
        batch = next(batches.with_seed(3).epoch(0))
        members = distillation.ensemble(DIGITS, 0, shared)
        expected = torch.stack([member(batch.images).logits for member in members], 1)
        torch.testing.assert_close(batch.extras["members"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arm", "done", "expected"),
    [
        ("end", 0.0, lambda s, m: end_loss(s, m, temperature=10.0)),
        ("end2", 1.0, lambda s, m: end2_loss(s, m)),
        ("end2", 1 / 3 + 1 / 4, lambda s, m: end2_loss(s, m, temperature=5.5)),
        ("end2_unsmoothed", 0.0, lambda s, m: end2_loss(s, m, temperature=10.0, smoothing=0)),
        ("end2_unannealed", 0.0, lambda s, m: end2_loss(s, m)),
        ("end2_bare", 0.5, lambda s, m: end2_loss(s, m, smoothing=0)),
    ],
)
def test_arms_have_their_losses(arm, done, expected):
    class Batch:
        extras = {"members": torch.randn(6, 4, 3)}  # noqa: RUF012

    logits = torch.randn(6, 3)
    value = distillation._loss(DIGITS, ARMS[arm])(nn.Identity(), logits, Batch, done)
    torch.testing.assert_close(value, expected(logits, Batch.extras["members"]))


@pytest.mark.parametrize("data", ["spirals", "digits"])
def test_every_arm_gives_its_metrics(data, shared):
    setting = end2.setting_of(Run("end2", "quick", data, "end", 0), SMALL)
    for arm in (*setting.arms, *setting.few):
        scores = end2.execute(Run("end2", "quick", data, arm, 0), SMALL, shared)
        assert scores.keys() == end2.METRICS.keys() - ({"log_precision"} if arm == "ensemble" else set())
        assert all(math.isfinite(value) for value in scores.values())
        if arm == "ensemble":
            assert scores["knowledge_rank"] == pytest.approx(1)
            assert scores["knowledge_gap"] == 0


def test_measures_are_those_of_the_definitions(shared):
    parts = sets.load("spirals", probe=True)
    members = distillation.ensemble(SPIRALS, 0, shared)
    found = end2.measure(SPIRALS, members, members, shared)
    logits = torch.stack([member(torch.from_numpy(parts.outside)).logits for member in members], 1)
    assert found["knowledge_outside"] == pytest.approx(
        ensemble_uncertainty(logits).knowledge.mean().item(), rel=1e-4
    )
    alone = end2.measure(SPIRALS, members[:1], members, shared)
    first = members[0](torch.from_numpy(parts.test)).logits
    assert alone["knowledge_inside"] == pytest.approx(
        dirichlet_uncertainty(first).knowledge.mean().item(), rel=1e-4
    )
    assert alone["log_precision"] == pytest.approx(first.logsumexp(1).mean().item(), abs=1e-4)
    assert alone["accuracy"] == pytest.approx(
        100 * (first.argmax(1).numpy() == parts.test_labels).mean(), rel=1e-6
    )


def test_seeds_may_share_a_training(shared):
    runs = [Run("end2", "quick", "spirals", "end2_aux", seed) for seed in (0, 1)]
    together = end2.execute_together(runs, SMALL, shared)
    alone = [end2.execute(run, SMALL, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


def test_what_shares_a_training():
    standard = end2.PROFILES["standard"]
    run = Run("end2", "standard", "cifar10", "end2", 0)
    assert end2.together(run, standard, "cpu") is None
    assert end2.together(run, standard, "cuda") == "cifar10/end2"
    assert end2.together(Run("end2", "quick", "digits", "end2", 0), QUICK, "cpu") == "digits/end2"
    assert end2.together(Run("end2", "quick", "digits", "ensemble", 0), QUICK, "cpu") is None


def test_members_one_by_one_are_those_of_one_training(tmp_path, monkeypatch):
    networks = []
    for name, shared in (("many", True), ("single", False)):
        monkeypatch.setattr(distillation, "in_one_go", lambda setting, device, shared=shared: shared)
        context = Context(store=RunStore(tmp_path / name), max_steps=3, progress=False)
        networks.append(distillation.ensemble(SPIRALS, 0, context))
    for one, other in zip(*networks, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_run_does_not_depend_on_other_arms():
    run = Run("end2", "quick", "digits", "end2", 0)
    fewer = replace(QUICK, settings=(SPIRALS, replace(QUICK.settings[1], arms=("end2",), few=())))
    assert end2.relevant_config(run, QUICK) == end2.relevant_config(run, fewer)
    other = replace(run, arm="end2_bare")
    assert end2.relevant_config(run, QUICK) != end2.relevant_config(other, QUICK)


def test_networks_on_points_are_networks():
    net = Net("point_net", "", {"width": 8})
    one, other = (distillation.made(net, 3, seed, torch.device("cpu")) for seed in (0, 1))
    points = torch.randn(4, 2)
    assert one(points).logits.shape == (4, 3)
    assert not torch.equal(one(points).logits, other(points).logits)


# The limits of the precision


def test_checks_of_the_precision_hold():
    assert divergence.check_no_lower_bound().holds
    assert divergence.check_best_precision().holds


def test_deficit_is_zero_for_equal_members_only():
    assert abs(divergence.deficit(divergence.members_of(0.0)).item()) < 1e-12
    assert divergence.deficit(divergence.members_of(0.1)).item() > 1e-4


def test_growth_follows_the_best_precision():
    curves = divergence.growth(steps=400, rate=0.03, spreads={"equal": 0.0, "apart": 1.0})
    best = divergence.best_precision(divergence.members_of(1.0))
    assert curves["apart"][0.0][-1] == pytest.approx(best, rel=0.02)
    for smoothing in (0.0, 1e-3):
        assert curves["equal"][smoothing][-1] > 50 * best


# Figures


@pytest.fixture
def closed():
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {
        arm for config in end2.PROFILES.values() for one in config.settings for arm in (*one.arms, *one.few)
    }
    assert arms == figures.ARM_TITLES.keys()


def test_maps_have_a_row_an_arm_and_show_the_ensembles_numbers(closed, shared):
    grid = figures.grid(9)
    networks = {"ensemble": distillation.ensemble(SPIRALS, 0, shared)}
    networks["end2"] = networks["ensemble"][:1]
    maps = {arm: figures.maps_of(nets, grid) for arm, nets in networks.items()}
    logits = torch.stack([net(grid).logits for net in networks["ensemble"]], 1)
    np.testing.assert_allclose(
        maps["ensemble"]["knowledge"].flatten(),
        ensemble_uncertainty(logits).knowledge.detach(),
        rtol=1e-4,
        atol=1e-6,
    )
    figure = figures.draw_maps(maps)
    assert len([axes for axes in figure.axes if axes.images]) == 6


def test_precision_figure_has_a_line_a_spread(closed, monkeypatch):
    monkeypatch.setattr(figures, "growth", lambda: divergence.growth(steps=5))
    (axes,) = figures.precision_figure().axes
    assert len(axes.get_lines()) >= len(divergence.SPREADS)
