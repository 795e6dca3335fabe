"""The NST column: its plan, its arms, its errata and its figures fit each other."""

from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.methods.nst import nst_loss
from kdrefs.nets import Output
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.nst import figures
from reproductions.nst import run as nst

QUICK = nst.PROFILES["quick"]
ARMS = QUICK.settings[0].arms


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", nst.PROFILES)
def test_plan_has_every_arm(profile):
    config = nst.PROFILES[profile]
    plan = nst.plan(config)
    for setting in config.settings:
        assert {run.arm for run in plan if run.data == setting.data} == {*setting.arms, *setting.few}
        assert {*setting.arms, *setting.few} <= {"teacher", "student", "kd", *nst.methods(setting.data)}


@pytest.mark.parametrize("arm", ARMS)
def test_every_quick_arm_gives_its_metrics(arm, shared):
    scores = nst.execute(Run("nst", "quick", "digits", arm, 0), QUICK, shared)
    assert nst.METRICS.keys() <= scores.keys()
    assert all(0 <= scores[name] <= 100 for name in ("accuracy", "agreement"))
    assert (scores["agreement"] == 100) == (arm == "teacher")


def test_seeds_may_share_a_training(shared):
    runs = [Run("nst", "quick", "digits", "nst", seed) for seed in (0, 1)]
    together = nst.execute_together(runs, QUICK, shared)
    alone = [nst.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


@pytest.mark.parametrize(
    ("arm", "kernel"), [("nst", "polynomial"), ("nst_linear", "linear"), ("nst_gaussian", "gaussian")]
)
def test_arms_add_the_loss_of_the_last_maps_before_their_activation(arm, kernel):
    method = nst.methods("digits")[arm]
    maps = {name: torch.randn(5, 6, 4, 4) for name in ("block1_pre", "block2_pre", "block2")}
    student = Output(torch.zeros(5, 10), {name: torch.randn(5, 3, 4, 4) for name in maps})
    kept = {name: target(Output(torch.zeros(5, 10), maps)) for name, target in method.targets.items()}
    loss = method.phases[0].loss(student, kept, torch.zeros(5, dtype=torch.int64), 0.0)
    expected = 50 * nst_loss(student.features["block2_pre"], maps["block2_pre"], kernel=kernel)
    assert loss.item() == pytest.approx(expected.item() + torch.log(torch.tensor(10.0)).item(), rel=1e-5)


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {
        arm for config in nst.PROFILES.values() for one in config.settings for arm in (*one.arms, *one.few)
    }
    assert arms == figures.ARM_TITLES.keys()


def test_gram_figure_shows_what_the_loss_compares(closed, monkeypatch):
    maps = {arm: torch.randn(20, 5, 3, 3, dtype=torch.float64) for arm in ("teacher", "nst")}
    monkeypatch.setattr(figures, "_last_maps", lambda result, config: maps[result.run.arm])

    class Result:
        def __init__(self, arm: str) -> None:
            self.run = Run("nst", "quick", "digits", arm, 0)

    figure = figures.gram_figure([Result("teacher"), Result("nst")], QUICK)
    teacher, student = (axes for axes in figure.axes if axes.images)
    assert teacher.images[0].get_array().shape == (9, 9)
    loss = nst_loss(maps["nst"], maps["teacher"])
    assert student.get_title() == f"NST, polynomial\nMMD² {loss.item():.4f}"
    gap = figures.gram(maps["nst"]) - figures.gram(maps["teacher"])
    assert gap.square().sum((1, 2)).mean().item() == pytest.approx(loss.item(), rel=1e-10)
