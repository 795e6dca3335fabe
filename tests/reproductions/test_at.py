"""The AT column: its plan, its arms, its errata and its figures fit each other."""

from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.methods.at import at_loss, attention_map
from kdrefs.nets import Output
from reproductions.at import figures
from reproductions.at import run as at
from reproductions.harness.runs import Context, Run, RunStore

QUICK = at.PROFILES["quick"]
ARMS = QUICK.settings[0].arms


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", at.PROFILES)
def test_plan_has_every_arm(profile):
    config = at.PROFILES[profile]
    plan = at.plan(config)
    for setting in config.settings:
        assert {run.arm for run in plan if run.data == setting.data} == {*setting.arms, *setting.few}
        assert {*setting.arms, *setting.few} <= {"teacher", "student", "kd", *at.methods(setting.data)}


@pytest.mark.parametrize("arm", ARMS)
def test_every_quick_arm_gives_its_metrics(arm, shared):
    scores = at.execute(Run("at", "quick", "digits", arm, 0), QUICK, shared)
    assert at.METRICS.keys() <= scores.keys()
    assert all(0 <= scores[name] <= 100 for name in ("accuracy", "agreement"))
    assert (scores["agreement"] == 100) == (arm == "teacher")


def test_seeds_may_share_a_training(shared):
    runs = [Run("at", "quick", "digits", "at", seed) for seed in (0, 1)]
    together = at.execute_together(runs, QUICK, shared)
    alone = [at.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


@pytest.mark.parametrize(
    ("arm", "options"),
    [("at", {}), ("at_p1", {"power": 1.0}), ("at_max", {"reduction": "max"})],
)
def test_what_is_kept_of_the_teacher_is_enough(arm, options):
    # One channel a stage, in half precision, instead of all: the loss is that of the whole maps.
    method = at.methods("digits")[arm]
    maps = {name: torch.randn(5, 6, 4, 4).relu() for name in ("block1", "block2")}
    student = Output(torch.zeros(5, 10), {name: torch.randn(5, 3, 4, 4).relu() for name in maps})
    kept = {name: target(Output(torch.zeros(5, 10), maps)).half() for name, target in method.targets.items()}
    assert all(value.shape == (5, 1, 4, 4) for value in kept.values())
    labels = torch.zeros(5, dtype=torch.int64)
    loss = method.phases[0].loss(student, kept, labels, 0.0) - torch.log(torch.tensor(10.0))
    expected = sum(
        at_loss(student.features[name], maps[name], variant="official", **options) for name in maps
    )
    assert loss.item() == pytest.approx(at.BETA["digits"] * expected.item(), rel=2e-3)


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {
        arm for config in at.PROFILES.values() for one in config.settings for arm in (*one.arms, *one.few)
    }
    assert arms == figures.ARM_TITLES.keys()


def test_attention_figure_shows_maps_and_distances(closed, monkeypatch):
    maps = {arm: [torch.randn(360, 3, side, side) for side in (8, 4)] for arm in ("teacher", "at")}
    monkeypatch.setattr(figures, "_stage_maps", lambda result, config: maps[result.run.arm])

    class Result:
        def __init__(self, arm: str) -> None:
            self.run = Run("at", "quick", "digits", arm, 0)

    figure = figures.attention_figure([Result("teacher"), Result("at")], QUICK, images=2)
    assert isinstance(figure, Figure)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 2 * (1 + 2 * 2)
    titles = [axes.get_title() for axes in shown]
    assert f"AT\n{at_loss(maps['at'][0], maps['teacher'][0]).item():.2f}" in titles
    sides = [axes.images[0].get_array().shape for axes in shown]
    assert sides[1:5] == [(8, 8), (8, 8), (4, 4), (4, 4)]
    assert attention_map(maps["at"][0]).shape == (360, 64)
