"""The KD column: its plan, its arms, its claims and errata fit each other."""

import pytest
import torch

from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.kd import figures
from reproductions.kd import run as kd
from reproductions.protocols.rows import BASELINES

QUICK = kd.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", kd.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = kd.PROFILES[profile]
    plan = kd.plan(config)
    for setting in config.settings:
        for arm in (*setting.arms, *setting.few):
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert len(seeds) >= (1 if arm == "teacher" else 3)
            assert seeds == list(config.seeds[: len(seeds)])


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize("arm", ["teacher", "student", "kd_t20"])
def test_a_quick_arm_gives_its_metrics(arm, shared):
    scores = kd.execute(Run("kd", "quick", "digits", arm, 0), QUICK, shared)
    assert scores.keys() - {"accuracy@best"} == kd.METRICS.keys()
    assert 0 <= scores["accuracy"] <= 100
    assert scores["cross_entropy"] > 0
    assert (scores["agreement"] == 100) == (arm == "teacher")


def test_seeds_trained_together_are_those_trained_alone(shared, tmp_path):
    runs = [Run("kd", "quick", "digits", "kd_t2", seed) for seed in (0, 1)]
    both = kd.execute_together(runs, QUICK, shared)
    alone = kd.execute(runs[1], QUICK, Context(store=RunStore(tmp_path), max_steps=2))
    assert both[0] != both[1]
    assert both[1]["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("kd", {}),
        ("kd_t1", {"temperature": 1}),
        ("kd_t2", {"temperature": 2}),
        ("kd_t20", {"temperature": 20}),
        ("kd_unscaled", {"scale": False}),
    ],
)
def test_arms_differ_from_the_row_kd_in_what_their_name_says(arm, options):
    (phase,) = (BASELINES | kd.methods("digits"))[arm].phases
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    labels = torch.arange(6) % 5
    value = phase.loss(Output(student, {}), {"logits": teacher}, labels, 0.5)
    expected = kd_loss(student, teacher, labels, **({"temperature": 4, "alpha": 0.9} | options))
    torch.testing.assert_close(value, expected)
    assert phase.share == 1


def test_limit_figure_s_curve_ends_at_the_limit():
    axes = figures.limit_figure([1, 10, 1000]).axes[0]
    curve, limit, raw = (line.get_ydata() for line in axes.lines)
    assert curve[-1] == pytest.approx(limit[0], rel=1e-2)
    assert abs(curve[0] / limit[0] - 1) > 0.05
    assert raw[0] > 1.05 * limit[0]


def test_softened_figure_flattens_with_the_temperature():
    logits = torch.tensor([6.0, 3.0, 0.0])
    panels = figures.softened_figure(logits, [1, 4, 20], picture=torch.zeros(2, 2)).axes[1:]
    tops = [max(bar.get_height() for bar in axes.patches) for axes in panels]
    assert tops == sorted(tops, reverse=True)
    assert all(sum(bar.get_height() for bar in axes.patches) == pytest.approx(1) for axes in panels)
