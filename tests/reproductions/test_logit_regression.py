"""The column of logit regression: its plan, its students, their rates, its errata and its figures."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.methods.logit_regression import FactorizedLinear, logit_regression_loss
from kdrefs.nets import Output
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.logit_regression import choose, figures, rates, shallow
from reproductions.logit_regression import run as column
from reproductions.logit_regression.shallow import ARMS, Rates
from reproductions.logit_regression.students import ShallowNet, cost
from reproductions.protocols.pairs import labelled_subset, load_pair_data

QUICK = column.PROFILES["quick"]
RECIPE = QUICK.shallow[0].recipe


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def one(data: str, arm: str, seed: int = 0) -> Run:
    return Run("logit_regression", "quick", data, arm, seed)


@pytest.mark.parametrize("profile", column.PROFILES)
def test_every_arm_is_known(profile):
    config = column.PROFILES[profile]
    plan = column.plan(config)
    for part in config.shallow:
        assert {run.arm for run in plan if run.data == part.data} == {"teacher", *part.arms}
        assert set(part.arms) <= ARMS.keys()
    for part in config.swept:
        assert len([run for run in plan if run.data == part.data]) == part.first * len(part.sweep.arms)
    assert {"student", "kd", *column.METHODS} <= {run.arm for run in plan}


@pytest.mark.parametrize("arm", column.METHODS)
def test_rows_of_the_table(arm, shared):
    scores = column.execute(one("digits", arm), QUICK, shared)
    assert {"accuracy", "agreement", "cross_entropy"} <= scores.keys()
    (phase,) = column.METHODS[arm].phases
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    value = phase.loss(Output(student, {}), {"logits": teacher}, labels, 0.0)
    expected = logit_regression_loss(student, teacher) / 5
    if arm == "logit_regression_labels":  # 0.1 times the mean of the squares, as in the Zoo
        expected = torch.nn.functional.cross_entropy(student, labels) + 0.2 * expected
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("arm", ["teacher", *QUICK.shallow[0].arms])
def test_every_shallow_arm_gives_its_metrics(arm, shared):
    scores = column.execute(one("digits-shallow", arm), QUICK, shared)
    wanted = {"accuracy", "agreement", "cross_entropy", "parameters", "mflop"}
    if arm in ARMS and ARMS[arm].target == "logits":
        wanted |= {"explained"}
    assert scores.keys() == wanted
    assert (scores["agreement"] == 100) == (arm == "teacher")


def test_a_bottleneck_has_fewer_parameters_and_operations(shared):
    full, narrow = (
        column.execute(one("digits-shallow", arm), QUICK, shared) for arm in ("mimic", "mimic_bottleneck")
    )
    saved = 64 * 512 - RECIPE.rank * (64 + 512)
    assert 1000 * (full["parameters"] - narrow["parameters"]) == pytest.approx(saved)
    assert 1e6 * (full["mflop"] - narrow["mflop"]) == pytest.approx(2 * saved)


def test_seeds_may_share_a_training(shared):
    runs = [one("digits-shallow", "mimic", seed) for seed in (0, 1)]
    together = column.execute_together(runs, QUICK, shared)
    alone = [column.execute(run, QUICK, shared) for run in runs]
    for first, second in zip(together, alone, strict=True):
        assert first["cross_entropy"] == pytest.approx(second["cross_entropy"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


def test_students_and_teacher_see_the_same_labelled_images(tmp_path):
    context = Context(store=RunStore(tmp_path), max_steps=1)
    split, _, _ = load_pair_data(shallow.pair_of(RECIPE), probe=True)
    labelled = set(labelled_subset(split.labels, RECIPE.labelled, 3).tolist())
    few = shallow.inputs_of(RECIPE, ARMS["mimic"], 3, context).batches
    more = shallow.inputs_of(RECIPE, ARMS["mimic_more"], 3, context).batches
    assert set(few.indices.tolist()) == labelled
    assert set(more.indices.tolist()) == set(range(len(split)))
    assert abs(len(few) - len(more)) <= 1
    held = choose.held_out(split.labels, RECIPE.labelled, 3)
    assert not labelled & set(held.tolist())
    assert len(held) == pytest.approx(0.1 * len(split), rel=0.1)


def test_standardised_students_answer_on_the_teacher_s_scale(tmp_path):
    context = Context(store=RunStore(tmp_path), max_steps=1)
    inputs = shallow.inputs_of(RECIPE, ARMS["mimic"], 0, context)
    (student,) = shallow.trained(RECIPE, "mimic", [0], context)
    torch.testing.assert_close(student.std, inputs.statistics.std)
    output = student(torch.randn(5, 1, 8, 8))
    torch.testing.assert_close(output.logits, output.features["outputs"] * student.std + student.mean)
    (raw,) = shallow.trained(RECIPE, "mimic_raw", [0], context)
    assert raw.std.tolist() == [1.0] * 10


def test_explained_variance():
    guide = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert shallow.explained(guide, guide) == 100
    assert shallow.explained(guide.mean(0).expand(2, 2), guide) == 0
    assert shallow.explained(guide + 100, guide) == -100


def test_students_are_built_as_their_options_say():
    assert isinstance(ShallowNet(1, 8, 10, 32, rank=4).hidden, FactorizedLinear)
    net = ShallowNet(3, 32, 10, 7, conv=5)
    assert net.hidden.in_features == 5 * 8 * 8
    counted = cost(net, torch.zeros(2, 3, 32, 32))
    assert counted["parameters"] == sum(p.numel() for p in net.parameters()) / 1000
    assert counted["mflop"] == pytest.approx(2e-6 * (75 * 5 * 1024 + 320 * 7 + 70), rel=1e-6)


# Learning rates

SMALL = rates.Sweep((0.01, 64.0), 6, (("full", ("mimic", 1.0)), ("twice", ("mimic_bottleneck", 2.0))))


def test_a_rate_that_explodes_leaves_the_others_alone(tmp_path):
    context = Context(store=RunStore(tmp_path))
    both = rates.swept(RECIPE, SMALL, "full", [0], context)[0]
    alone = rates.swept(RECIPE, replace(SMALL, rates=(0.01,)), "full", [0], context)[0]
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-4)
    assert both[1][-1] > 1000
    (values,) = rates.measures(RECIPE, SMALL, "full", [0], context)
    assert values["log2_rate"] == pytest.approx(math.log2(0.01) if both[0][-1] < 1 else math.log2(0.005))
    assert values["best_loss"] == pytest.approx(both[0][-1], rel=1e-6)
    assert SMALL.arm("twice") == ("mimic_bottleneck", 12)


def test_a_multiplied_loss_is_a_multiplied_rate(tmp_path):
    context = Context(store=RunStore(tmp_path))
    pair = rates.swept(RECIPE, replace(SMALL, rates=(0.002, 0.02)), "full", [0], context)[0]
    alone = rates.swept(RECIPE, replace(SMALL, rates=(0.02,)), "full", [0], context)[0]
    np.testing.assert_allclose(pair[1], alone[0], rtol=1e-3)


def test_choice_takes_the_best_rate_of_each_target():
    wanted = {
        "labels": 1e-3,
        "mimic": 3e-3,
        "softened": 1e-2,
        "labels_bottleneck": 3e-4,
        "mimic_bottleneck": 1e-3,
    }

    def trial(name, recipe):
        kinds = recipe.bottleneck_rates if ARMS[name].bottleneck else recipe.rates
        return -abs(getattr(kinds, ARMS[name].target) - wanted[name])

    chosen = choose.choose(RECIPE, trial)
    assert chosen.rates == Rates(1e-3, 3e-3, 1e-2)
    assert (chosen.bottleneck_rates.labels, chosen.bottleneck_rates.logits) == (3e-4, 1e-3)


# Figures


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {arm for config in column.PROFILES.values() for part in config.shallow for arm in part.arms}
    assert figures.ARM_TITLES.keys() == {"teacher", "student", "kd", *column.METHODS, *arms}
    swept = {
        arm for config in column.PROFILES.values() for part in config.swept for arm, _ in part.sweep.arms
    }
    assert figures.LAYERS.keys() == swept


def test_rates_figure_shows_the_losses(closed, monkeypatch):
    losses = np.array([[[2.0, 0.5], [2.0, 0.1], [9.0, 1e6]]])
    monkeypatch.setattr(figures, "_curves", lambda results, part, arm: losses)
    part = replace(QUICK.swept[0], sweep=replace(QUICK.swept[0].sweep, rates=(0.1, 0.2, 0.4)))
    left, right = figures.rates_figure([], part).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.5, 0.1, 10])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [2.0, 0.1])
