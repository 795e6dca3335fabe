"""The PKT column: its plan, its arms, its claims, errata and ledger fit each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.feature import hog

from kdrefs.nets import Output
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.pkt import run as pkt
from reproductions.protocols import embeddings
from reproductions.protocols.handcrafted import hog_features
from reproductions.protocols.transfer import random_projection

QUICK = pkt.PROFILES["quick"]
SETTINGS = [(setting.data, arm) for setting in QUICK.settings for arm in setting.arms]


def context_in(folder, steps=2):
    return Context(store=RunStore(folder), max_steps=steps)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return context_in(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("profile", pkt.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = pkt.PROFILES[profile]
    plan = pkt.plan(config)
    assert len(plan) == len(set(plan))
    for setting in config.settings:
        for arm in setting.arms:
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert seeds in (list(config.seeds), [config.seeds[0]])
    assert all(run.profile == profile == config.profile for run in plan)


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize(("data", "arm"), SETTINGS)
def test_every_quick_arm_gives_its_metrics(data, arm, shared):
    scores = pkt.execute(Run("pkt", "quick", data, arm, 0), QUICK, shared)
    assert scores.keys() - {"accuracy"} == pkt.METRICS.keys() - {"accuracy", "agreement", "cross_entropy"}
    assert all(0 <= value <= 100 for value in scores.values())
    assert ("accuracy" in scores) == (arm in ("teacher", "student", "kd"))


def test_row_of_the_shared_table(shared):
    (scores,) = pkt.execute_together([Run("pkt", "quick", "digits-table", "pkt", 0)], QUICK, shared)
    assert scores.keys() == {"accuracy", "agreement", "cross_entropy", "accuracy@best"}
    assert scores == pkt.execute(Run("pkt", "quick", "digits-table", "pkt", 0), QUICK, shared)


def test_runs_of_the_shared_table_do_not_depend_on_the_rest_of_the_profile():
    run = Run("pkt", "quick", "digits-table", "pkt", 0)
    other = replace(QUICK, transfer_stages=((1, 1e-3),))
    assert pkt.relevant_config(run, QUICK) == pkt.relevant_config(run, other)
    assert pkt.relevant_config(replace(run, data="digits"), QUICK) != pkt.relevant_config(
        replace(run, data="digits"), other
    )


@pytest.mark.parametrize("arm", ["pkt", "hint", "kd"])
def test_same_seed_same_numbers_and_other_seed_others(arm, tmp_path):
    runs = [Run("pkt", "quick", "digits-10pct", arm, seed) for seed in (0, 0, 1)]
    first, again, other = (
        pkt.execute(run, QUICK, context_in(tmp_path / str(place))) for place, run in enumerate(runs)
    )
    assert first == again != other


def test_arms_of_a_seed_change_the_same_start_differently(shared):
    weights = {}
    for arm in ("student", "kd", "hint", "pkt"):
        module, _ = embeddings.trained(Run("pkt", "quick", "digits", arm, 0), QUICK, shared)
        weights[arm] = torch.cat([value.flatten() for value in module.parameters()]).detach()
    for arm in ("kd", "hint", "pkt"):
        moved = (weights[arm] - weights["student"]).abs().max()
        assert 0 < moved < 0.05
        assert not any(torch.equal(weights[arm], weights[other]) for other in weights if other != arm)


def test_a_teacher_run_live_gives_what_cached_answers_give(tmp_path):
    run = Run("pkt", "quick", "digits", "pkt", 0)
    cached, _ = embeddings.trained(run, QUICK, context_in(tmp_path / "cached"))
    live, _ = embeddings.trained(run, replace(QUICK, views=None), context_in(tmp_path / "live"))
    for name, value in cached.state_dict().items():
        torch.testing.assert_close(value, live.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_hint_trains_its_projection_with_the_student():
    generator = torch.Generator().manual_seed(0)
    loss, modules = embeddings._loss("hint", "f", 4, 6, QUICK, generator, torch.device("cpu"))
    student = torch.randn(5, 4, requires_grad=True)
    target = torch.randn(5, 6)
    value = loss(pkt_output(student), {"feature": target})
    projected = student @ modules["projection"].weight.T
    assert value.item() == pytest.approx(((projected - target) ** 2).sum().item() / 5, rel=1e-5)
    value.backward()
    assert modules["projection"].weight.grad.abs().max() > 0


def test_random_hint_projects_the_teacher_and_trains_nothing():
    generator = torch.Generator().manual_seed(0)
    loss, modules = embeddings._loss("hint_random", "f", 4, 6, QUICK, generator, torch.device("cpu"))
    assert modules == {}
    student, target = torch.randn(5, 4), torch.randn(5, 6)
    fixed = random_projection(6, 4, torch.Generator().manual_seed(0))
    expected = ((student - target @ fixed) ** 2).sum() / 5
    assert loss(pkt_output(student), {"feature": target}).item() == pytest.approx(expected.item(), rel=1e-5)


def test_unknown_arm_is_named():
    with pytest.raises(ValueError, match="'attention'"):
        embeddings._loss("attention", "f", 4, 6, QUICK, torch.Generator(), torch.device("cpu"))


def pkt_output(feature):
    return Output(torch.zeros(len(feature), 2), {"f": feature})


def test_hog_features_are_those_of_scikit_image():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    ours = hog_features(images, cell=4)
    theirs = hog(images[1], orientations=9, pixels_per_cell=(4, 4), cells_per_block=(2, 2), channel_axis=-1)
    assert ours.shape == (3, 3 * 3 * 4 * 9)
    np.testing.assert_allclose(ours[1], theirs, rtol=1e-5)
    assert hog_features(np.full((1, 8, 8, 1), 7, np.uint8), cell=2).abs().max() == 0
