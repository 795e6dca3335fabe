"""The FitNets column: its plan, its arms, its claims and errata fit each other."""

import pytest
import torch

from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output
from reproductions.fitnets import figures
from reproductions.fitnets import run as fitnets
from reproductions.harness.runs import Context, Run, RunStore

QUICK = fitnets.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", fitnets.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = fitnets.PROFILES[profile]
    plan = fitnets.plan(config)
    for setting in config.settings:
        for arm in (*setting.arms, *setting.few):
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert len(seeds) >= (1 if arm == "teacher" else 3)
            assert seeds == list(config.seeds[: len(seeds)])


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize(
    ("data", "arm"),
    [("digits", "hint"), ("digits", "fitnets"), ("digits", "joint"), ("digits-deep", "fitnets")],
)
def test_a_quick_arm_gives_its_metrics(data, arm, shared):
    scores = fitnets.execute(Run("fitnets", "quick", data, arm, 0), QUICK, shared)
    assert scores.keys() - {"accuracy@best"} == fitnets.METRICS.keys()
    assert 0 <= scores["accuracy"] <= 100
    assert 0 <= scores["agreement"] < 100
    assert scores["cross_entropy"] > 0


@pytest.mark.parametrize("profile", fitnets.PROFILES)
def test_every_method_sees_every_image_equally_often(profile):
    for setting in fitnets.PROFILES[profile].settings:
        for method in fitnets.methods(setting.data).values():
            assert sum(phase.share for phase in method.phases) == pytest.approx(1)


def test_second_stage_is_labels_and_a_teacher_that_fades():
    method = fitnets.methods("digits")["second_stage"]
    (phase,) = method.phases
    logits, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    hard = torch.nn.functional.cross_entropy(logits, labels)
    soft = kd_loss(logits, teacher, temperature=3) / 9
    for share, weight in ((0, 4), (0.5, 2.5), (1, 1)):
        value = phase.loss(Output(logits, {}), {"logits": teacher}, labels, share)
        torch.testing.assert_close(value, hard + weight * soft)


def test_first_stage_trains_regressor_and_guided_layers_but_not_what_follows():
    method = fitnets.methods("digits")["fitnets"]
    assert method.regressors is not None
    (name,) = [target for target in method.targets if target != "logits"]
    modules = method.regressors(dict.fromkeys(("block1", "block2"), (8, 4, 4)), {name: (16, 4, 4)})
    (read,) = modules
    guided = torch.randn(3, 8, 4, 4, requires_grad=True)
    logits = torch.randn(3, 10, requires_grad=True)
    features = {f"{read}_regressed": modules[read](guided)}
    hint = torch.randn(3, 16, 4, 4)
    value = method.phases[0].loss(Output(logits, features), {name: hint}, torch.arange(3), 0.0)
    expected = 100 * (features[f"{read}_regressed"] - hint).square().mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert guided.grad.abs().max() > 0
    assert modules[read].conv.weight.grad.abs().max() > 0
    assert logits.grad is None


def test_weight_figure_starts_after_the_hint_and_ends_at_one_ninth():
    (line,) = figures.weight_figure(0.25).axes[0].lines
    assert line.get_xdata()[0] == 0.25
    assert line.get_ydata()[0] == pytest.approx(4 / 9)
    assert line.get_ydata()[-1] == pytest.approx(1 / 9)
