"""The column concept_quantification: its plan, its trainings, its measures, how its settings were chosen."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.data import Split, load_set
from kdrefs.data.cache import write_set
from reproductions.concept_quantification import agreement, choose, figures, sources, studies
from reproductions.concept_quantification import run as concepts
from reproductions.concept_quantification.errata import path_length
from reproductions.concept_quantification.studies import Study, studied
from reproductions.harness.runs import Context, Result, Run, RunStore

QUICK = concepts.PROFILES["quick"]
RECIPE = concepts.COMPOSITES
NAME = "concept_quantification"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=3, progress=False)


@pytest.mark.parametrize("profile", concepts.PROFILES)
def test_plan_has_controls_thresholds_and_the_ablation(profile):
    config = concepts.PROFILES[profile]
    plan = concepts.plan(config)
    first = config.settings[0]
    assert {run.arm for run in plan if run.data == first.data} == set(studies.ARMS)
    assert first.kind == "all"
    assert len({setting.threshold for setting in config.settings}) >= 3
    assert any(setting.kind == "rejected" for setting in config.settings)
    assert len(config.seeds) >= (5 if profile == "quick" else 3)


@pytest.mark.parametrize("setting", QUICK.settings, ids=[setting.data for setting in QUICK.settings])
def test_every_quick_arm_gives_its_metrics(setting, shared):
    expected = {
        "all": set(concepts.METRICS)
        - {"kept", "concepts", "rank_gap", "count_gap", "mean_entropy", "passes"},
        "sweep": set(concepts._SWEPT),
        "rejected": {*concepts._SWEPT, "kept"},
        "ways": {"foreground", "background", "concepts", "rank_gap", "count_gap", "mean_entropy", "passes"},
    }[setting.kind]
    for arm in setting.arms:
        found = concepts.execute(Run(NAME, "quick", setting.data, arm, 0), QUICK, shared)
        assert found.keys() <= expected <= concepts.METRICS.keys()
        assert all(math.isfinite(value) for value in found.values())
        if setting.kind == "all":
            assert {"accuracy", "foreground", "background", "chance", "d_mean", "path_ratio"} <= found.keys()
            assert found["d_variance"] == pytest.approx(found["d_std"] ** 2)
            assert 0.05 <= found["chance"] <= 0.75
        if setting.kind == "rejected":
            assert 0 <= found["kept"] <= 100


def test_arms_share_their_initial_weights_but_for_the_teacher():
    nets = {arm: studies.fresh(RECIPE, arm, 3, 10, torch.device("cpu")) for arm in studies.ARMS}
    weights = {arm: net.get_parameter(RECIPE.weight) for arm, net in nets.items()}
    assert torch.equal(weights["baseline"], weights["student"])
    assert torch.equal(weights["baseline"], weights["kd"])
    assert not torch.equal(weights["baseline"], weights["teacher"])


def test_student_learns_features_then_its_head_only(tmp_path):
    """Two epochs of few images: the trunk goes towards the teacher's feature; the head is trained behind it."""
    source = replace(RECIPE.source, train=256, measured=4)
    recipe = replace(RECIPE, source=source, epochs=2, head_epochs=2, probes=2)
    context = Context(store=RunStore(tmp_path), progress=False)
    teacher, student = (studied(recipe, arm, 0, context) for arm in ("teacher", "student"))
    images = sources.pixels(source, sources.load(source).test, torch.device("cpu"))
    start = studies.fresh(recipe, "student", 0, 10, torch.device("cpu")).train()
    for _ in range(20):
        start(images)  # running statistics
    with torch.no_grad():
        wanted = teacher.network(images).features["embedding"]
        near, far = (
            (net.eval()(images).features["embedding"] - wanted).square().mean()
            for net in (student.network, start)
        )
    assert near < far
    assert not torch.equal(student.network.classifier.weight, start.classifier.weight)
    assert student.entropy.shape == (4, 2, 8, 8)
    assert (student.by_step >= student.by_epoch - 1e-9).all()
    assert (student.by_epoch.diff() > 0).all()
    again = studied(recipe, "student", 0, context)
    assert torch.equal(again.entropy, student.entropy)


def test_interrupted_training_goes_on_with_the_maps_that_it_had(tmp_path):
    source = replace(RECIPE.source, train=256, measured=2)
    recipe = replace(RECIPE, source=source, epochs=2, probes=2)
    images = sources.load(source)
    whole, broken = Context(store=RunStore(tmp_path / "a"), progress=False), Context(progress=False)
    expected = studied(recipe, "baseline", 0, whole)
    folder = tmp_path / "b"
    folder.mkdir()

    class Killed(Exception):
        pass

    calls = []
    saved = studies.save_tensors

    def save(path, tensors):
        saved(path, tensors)
        calls.append(path)
        if path.name == "seen-002.safetensors" and calls.count(path) == 1:
            raise Killed

    for attempt in range(2):
        net = studies.fresh(recipe, "baseline", 0, images.classes, broken.device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(studies, "save_tensors", save)
            if attempt == 0:
                with pytest.raises(Killed):
                    studies._train(net, None, recipe, "baseline", 0, images, broken, folder)
            else:
                studies._train(net, None, recipe, "baseline", 0, images, broken, folder)
    seen = [studies.load_tensors(path)[0] for path in sorted(folder.glob("seen-*"))]
    assert torch.equal(torch.stack([one["entropy"] for one in seen[1:]], dim=1), expected.entropy)
    assert torch.equal(torch.stack([one["path"] for one in seen[1:]]), expected.by_step)


def test_rate_falls_by_equal_factors_from_epoch_to_epoch():
    rates = [studies._factor(3, 0.1, 10, step) for step in range(35)]
    assert rates[0] == 1
    assert rates[9] == 1
    assert rates[10] == pytest.approx(0.1**0.5)
    assert rates[34] == pytest.approx(0.1)


# What is measured


def study(entropy, inside, distances=None):
    count = entropy.shape[1]
    steps = torch.arange(1.0, count + 1, dtype=torch.float64) if distances is None else distances
    return Study(torch.nn.Identity(), entropy, inside, steps, 2 * steps, 50.0)


def test_rejection_looks_at_late_checkpoints_of_both_networks(monkeypatch):
    inside = torch.zeros(4, 2, 2, dtype=torch.bool)
    inside[:, 0, 0] = True
    fine = torch.zeros(4, 8, 2, 2)
    fine[:, :, 0, 0] = -1
    one, other = fine.clone(), fine.clone()
    one[0, 0, 0, 0] = 1  # early: not looked at
    one[1, 7, 0, 0] = 1
    other[2, 2, 0, 0] = 1  # after the third of eight, as 40 of 150
    found = {"baseline": study(one, inside), "student": study(other, inside)}
    monkeypatch.setattr(concepts, "studied", lambda recipe, arm, seed, context: found[arm])
    kept = concepts.effective(RECIPE, 0, Context())
    assert kept.tolist() == [True, False, False, True]
    values = concepts.execute(Run(NAME, "quick", "composites-rejected", "baseline", 0), QUICK, Context())
    assert values["kept"] == 50
    assert values["foreground"] == 1
    one[:] = 1
    one[:, :, 0, 0] = 2
    assert concepts.execute(Run(NAME, "quick", "composites-rejected", "baseline", 0), QUICK, Context()) == {
        "kept": 0
    }


def test_measured_images_have_an_object_and_a_background():
    images = sources.load(RECIPE.source)
    share = images.foreground.double().mean((1, 2))
    assert len(images.measured) == RECIPE.source.measured
    assert sources.SHARES[0] <= share.min()
    assert share.max() <= sources.SHARES[1]
    with pytest.raises(ValueError, match=r"measured: \d+ test images have a fitting object, 5000 are wanted"):
        sources.load(replace(RECIPE.source, measured=5000))


def test_held_out_images_are_training_images():
    whole = sources.load(RECIPE.source)
    held = sources.load(replace(RECIPE.source, held_out=True))
    digests = [
        {image.tobytes() for image in split.images}
        for split in (whole.train, held.train, held.test, whole.test)
    ]
    assert digests[2] <= digests[0]
    assert not digests[1] & digests[2]
    assert not digests[2] & digests[3]


def test_boxes_and_every_other_class(tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    draw = np.random.default_rng(0)

    def split(count):
        boxes = np.tile(np.array([[0, 0, 16, 16]], dtype=np.float32), (count, 1))
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Split(images, (np.arange(count) % 4).astype(np.uint8), {"boxes": boxes})

    write_set("boxed", split(40), split(24), tuple("abcd"))
    found = sources.load(replace(concepts.TINY_IMAGENET.source, kind="boxed", every=2, measured=5))
    assert found.classes == 2
    assert set(found.train.labels) == {0, 1}
    assert len(found.train) == 20
    assert found.foreground.sum((1, 2)).tolist() == [16] * 5
    assert load_set("boxed").train.images.shape[0] == 40


# Ways of making a map


def test_passes_are_counted(shared):
    config = Run(NAME, "quick", "composites-ways", "closed-form", 0)
    assert concepts.execute(config, QUICK, shared)["passes"] == 17
    optimised = concepts.execute(replace(config, arm="converged"), QUICK, shared)["passes"]
    assert optimised == 1 + 2 * 16 * (1 + 3)  # plain; both ways: the initial scale and three steps


def test_rank_correlation():
    one = torch.arange(16.0).view(1, 4, 4)
    assert agreement.rank_correlation(one, one.exp()) == pytest.approx(1)
    assert agreement.rank_correlation(one, -one) == pytest.approx(-1)
    assert agreement.rank_correlation(torch.ones(1, 4, 4), one) == 0
    assert agreement.rank_correlation(torch.ones(2, 4, 4), torch.ones(2, 4, 4)) == 1


# The choice


def test_threshold_makes_half_of_the_objects_cells_concepts():
    draw = torch.randn(50, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(50, 4, 4, dtype=torch.bool)
    inside[:, 1:3, 1:3] = True
    draw[:, :, 1:3, 1:3] -= 2
    chosen = choose.threshold([study(draw, inside)])
    gaps = choose.gap(draw[:, -1].double(), inside)
    assert gaps.shape == (200,)
    assert (gaps > chosen).double().mean() == pytest.approx(0.5, abs=0.05)


def test_choice_takes_the_best_rate_on_held_out_images(monkeypatch, capsys):
    seen = []

    def trial(recipe, arm, seed, context):
        seen.append((recipe.source.held_out, arm, seed))
        inside = torch.zeros(1, 2, 2, dtype=torch.bool)
        inside[0, 0, 0] = True
        entropy = torch.zeros(1, 1, 2, 2)
        entropy[0, 0, 0, 0] = -100 * recipe.rate
        return replace(study(entropy, inside), accuracy={1e-3: 10.0, 3e-3: 30.0, 1e-2: 20.0}[recipe.rate])

    monkeypatch.setattr(choose, "studied", trial)
    assert choose.choose(RECIPE, (100, 101), Context()) == (3e-3, 0.3)
    assert {arm for _, arm, _ in seen} == {"baseline"}
    assert all(held for held, _, _ in seen)
    assert "rate 0.003: 30.00 %" in capsys.readouterr().out


def test_seeds_of_the_choice_are_in_no_profile():
    for config in concepts.PROFILES.values():
        for seeds in choose.SEEDS.values():
            assert not set(config.seeds) & set(seeds)


# The paper's settings on a tiny sample


@pytest.mark.slow
def test_paper_profile_runs_on_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    draw = np.random.default_rng(0)

    def split(count):
        masks = np.zeros((count, 224, 224), dtype=np.uint8)
        masks[:, 56:168, 56:168] = 1
        images = draw.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
        return Split(images, (np.arange(count) % 2).astype(np.uint8), {"masks": masks})

    write_set("cub224", split(4), split(2), ("a", "b"))
    sources.load.cache_clear()
    monkeypatch.setattr(sources, "PROBE_IMAGES", 1)
    config = concepts.PROFILES["paper"]
    assert concepts.CUB.feature_rate == concepts.CUB.rate / 10
    few = {"probes": 2, "source": replace(concepts.CUB.source, measured=2)}
    monkeypatch.setattr(concepts, "studied", lambda recipe, *rest: studied(replace(recipe, **few), *rest))
    context = Context(store=RunStore(tmp_path / "runs"), max_steps=1, progress=False)
    found = concepts.execute(Run(NAME, "paper", "cub", "baseline", 0), config, context)
    assert {"foreground", "background", "chance", "d_mean"} <= found.keys()
    assert found["chance"] == pytest.approx(0.25)
    sources.load.cache_clear()


# Errata


def test_paths_are_as_long_as_the_rate_makes_them():
    assert path_length(2e-3) / path_length(1e-3) == pytest.approx(2, rel=0.05)


# Figures


@pytest.fixture
def closed():
    yield
    plt.close("all")


@pytest.fixture
def seen(monkeypatch):
    """Synthetic studies behind the figures: the object's cells lie lower, more so with each epoch."""
    inside = sources.load(RECIPE.source).foreground
    entropy = torch.randn(len(inside), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    entropy -= torch.tensor([0.0, 1.0, 4.0]).view(3, 1, 1) * inside[:, None]
    net = studies.fresh(RECIPE, "baseline", 0, 10, torch.device("cpu")).eval()
    one = replace(study(entropy, inside), network=net)
    monkeypatch.setattr(figures, "_studies", lambda results, setting, arm: [one, one])
    return one


def test_every_arm_and_way_has_a_title():
    arms = {arm for setting in QUICK.settings for arm in setting.arms}
    assert arms <= figures.ARM_TITLES.keys() | figures.WAY_TITLES.keys()
    assert figures.STYLES.keys() == figures.ARM_TITLES.keys() == set(studies.ARMS)


def test_epochs_figure_draws_the_metrics_of_each_epoch(seen, closed):
    panels = figures.epochs_figure([], QUICK).axes
    expected = concepts.concept_metrics(
        seen.entropy.double(), seen.foreground, seen.by_epoch, QUICK.settings[0].threshold
    )
    for axes, name in zip(panels, ("ratio", "foreground", "background"), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), getattr(expected, name))
    assert panels[0].lines[-1].get_ydata()[0] == pytest.approx(expected.chance)


def test_sweep_figure_draws_paired_differences(closed):
    results = [
        Result.model_construct(
            run=Run(NAME, "quick", setting.data, arm, seed),
            metrics=dict.fromkeys(("ratio", "d_mean", "rho"), seed + bonus),
        )
        for setting in QUICK.settings
        if setting.kind in ("all", "sweep")
        for arm, bonus in (("baseline", 0.0), ("student", 0.5), ("kd", -0.25))
        for seed in (0, 1)
    ]
    panels = figures.sweep_figure(results, QUICK).axes
    labels = [text.get_text() for text in panels[0].get_xticklabels()]
    assert labels == ["0.2", "0.5", "0.9", "1.3"]
    for axes in panels:
        heights = [container.lines[0].get_ydata()[0] for container in axes.containers]
        assert heights == [0.5] * 4 + [-0.25] * 4


def test_maps_figures_frame_the_concepts(seen, closed):
    figure = figures.maps_figure([], QUICK, count=2)
    counts = concepts.concept_metrics(
        seen.entropy[:2].double(), seen.foreground[:2], seen.by_epoch, QUICK.settings[0].threshold
    )
    framed = sum(len(axes.patches) for axes in figure.axes)
    expected = 2 * (counts.foreground[-1] + counts.background[-1]).item()  # two images, three arms
    assert framed == pytest.approx(3 * expected)
    assert len(figures.ways_figure([], QUICK, count=1).axes) == 5
