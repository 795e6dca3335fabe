"""The structured_kd column: its plan, its arms, what is measured, its errata and its figures fit each other."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.nn import functional as F

from kdrefs.data import DataError
from kdrefs.methods.structured_kd import pairwise_loss, pixelwise_loss
from kdrefs.nets.unet import UNet
from kdrefs.training import fit
from reproductions.harness.runs import Context, Result, Run, RunStore
from reproductions.protocols import dense
from reproductions.structured_kd import choose, figures, training
from reproductions.structured_kd import run as skd
from reproductions.structured_kd.training import ARMS, FEATURE, Arm

QUICK = skd.PROFILES["quick"]
RECIPE = QUICK.settings[0].recipe


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def test_every_arm_is_planned_in_some_profile():
    arms = {run.arm for config in skd.PROFILES.values() for run in skd.plan(config)}
    assert arms == {"teacher", *ARMS}


@pytest.mark.parametrize("arm", ["teacher", *ARMS])
def test_every_arm_gives_its_metrics(arm, shared):
    scores = skd.execute(Run("structured_kd", "quick", "shapes", arm, 0), QUICK, shared)
    assert scores.keys() == skd.METRICS.keys()
    assert all(0 <= scores[name] <= 100 for name in ("miou", "pixel_accuracy", "agreement"))
    assert (scores["agreement"] == 100) == (arm == "teacher")
    assert (scores["affinity_error"] < 1e-3) == (arm == "teacher")


def test_students_of_a_seed_start_alike_and_seeds_differ(shared):
    nets = [training._initial(RECIPE, RECIPE.student, seed, shared) for seed in (0, 0, 1)]
    first, same, other = (net.classifier.weight for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class Watched:
    """What one step of an arm changes, on a batch whose teacher's answers are given."""

    def __init__(self, arm: Arm, shared: Context) -> None:
        train, _, _ = dense.load_scenes(RECIPE.scenes, probe=True)
        self.batches = dense.dense_batches(
            RECIPE.scenes, train, torch.device("cpu"), training=True, batch_size=8, drop_last=True
        )
        torch.manual_seed(0)
        self.guide = UNet(5, RECIPE.teacher).eval()
        self.seen = []
        step = training._step(arm, RECIPE, self.guide)

        def watching(state, batch):
            output = state["net"](batch.images)
            self.seen.append((batch, output))
            return step(state, batch)

        net = UNet(5, RECIPE.student)
        self.state = {"net": net, "optimizer": torch.optim.SGD(net.parameters(), 0.0)}
        self.state["schedule"] = torch.optim.lr_scheduler.ConstantLR(self.state["optimizer"], 1.0)
        if arm.holistic:
            judge = training.HolisticDiscriminator(
                5, width=4, blocks=2, image_channels=3 if arm.conditional else None
            )
            self.judge_before = deepcopy(judge)
            self.state |= {
                "discriminator": judge,
                "discriminator_optimizer": torch.optim.Adam(judge.parameters(), 1e-2),
                "draws": torch.Generator().manual_seed(0),
            }
        self.history = fit(watching, self.state, self.batches, epochs=1, max_steps=1)


@pytest.mark.parametrize(
    "name", ["student", "pi", "pi_pa", "pi_double", "pi_pa_near", "pi_pa_coarse", "pi_printed"]
)
def test_a_step_s_loss_is_the_weighted_sum_of_its_terms(name, shared):
    arm = ARMS[name]
    watched = Watched(arm, shared)
    ((batch, output),) = watched.seen
    with torch.no_grad():
        known = watched.guide(batch.images)
    expected = F.cross_entropy(output.logits, batch.masks.long())
    expected += arm.pixel * pixelwise_loss(output.logits, known.logits, variant=arm.pixel_variant)
    expected += arm.pair * pairwise_loss(
        output.features[FEATURE], known.features[FEATURE], alpha=arm.alpha, beta=arm.beta or RECIPE.beta
    )
    assert watched.history.epochs[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("conditional", [True, False])
def test_student_and_discriminator_are_updated_in_turn(conditional, shared):
    arm = replace(ARMS["pi_pa_ho"], conditional=conditional)
    watched = Watched(arm, shared)
    ((batch, output),) = watched.seen
    judge, before = watched.state["discriminator"], watched.judge_before.eval()
    # The student is judged by the discriminator as it was, and wants to be liked.
    with torch.no_grad():
        known = watched.guide(batch.images)
        expected = F.cross_entropy(output.logits, batch.masks.long())
        expected += 10 * pixelwise_loss(output.logits, known.logits)
        expected += 10 * pairwise_loss(output.features[FEATURE], known.features[FEATURE], beta=RECIPE.beta)
        expected -= 0.1 * before(output.logits, batch.images if conditional else None).mean()
    assert watched.history.epochs[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    # Then the discriminator takes a step.
    assert judge.training
    assert not torch.equal(judge.last.weight, before.last.weight)


def test_scores_equal_counting():
    predicted = torch.tensor([[[0, 1, 1], [2, 0, 0]]])
    masks = torch.tensor([[[0, 1, 0], [1, 0, 0]]])
    # Class 0: 3 of 4; class 1: 1 of 3; class 2: 0 of 1; class 3 is on neither side.
    scores = dense.segmentation_scores(predicted, masks, 4)
    assert scores["miou"] == pytest.approx(100 * (3 / 4 + 1 / 3 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    with pytest.raises(ValueError, match="masks: expected the shape of predicted"):
        dense.segmentation_scores(predicted, masks[:, :1], 4)


def test_affinity_error_is_the_loss_on_test_images(shared):
    guide, net = skd.teacher_of(RECIPE, 0, shared), training.student_of("pi", RECIPE, 0, shared)
    _, test, _ = dense.load_scenes(RECIPE.scenes, probe=True)
    batches = dense.dense_batches(RECIPE.scenes, test, torch.device("cpu"), training=False)
    maps = [dense.dense_outputs(one, batches, FEATURE)[FEATURE] for one in (net, guide)]
    expected = 100 * pairwise_loss(*maps, beta=RECIPE.beta).item()
    found = training.evaluate(net, guide, RECIPE, shared)["affinity_error"]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Two photographs a part, with persons (1), things (17) and stuff (120)."""
    generator = np.random.default_rng(0)
    for part in ("train2017", "val2017"):
        for name in ("a", "b"):
            image = tmp_path / dense.SAMPLE / "images" / part / f"{name}.jpg"
            mask = tmp_path / dense.SAMPLE / "semantic_segmentation" / "masks" / part / f"{name}.png"
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(image)
            values = np.full((40, 60), 120, dtype=np.uint8)
            values[:20, :30], values[20:, 30:] = 1, 17
            Image.fromarray(values).save(mask)
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    dense.load_scenes.cache_clear()
    yield
    dense.load_scenes.cache_clear()


def test_photographs_have_stuff_things_and_persons(sample):
    scenes = dense.Scenes("coco128seg", size=16)
    train, test, classes = dense.load_scenes(scenes)
    assert (len(train), len(test), classes) == (2, 2, ("stuff", "thing", "person"))
    expected = np.zeros((16, 16), dtype=np.uint8)
    expected[:8, :8], expected[8:, 8:] = 2, 1
    assert (train.extras["masks"] == expected).all()
    assert dense.scene_digests([scenes]).keys() == {"coco128seg-16/train", "coco128seg-16/test"}


def test_without_the_photographs_the_error_names_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"coco128seg: .*no such folder.* Put images/train2017"):
        dense.photographs("train2017", 16)


def test_photographs_are_inputs_of_the_profile_that_uses_them(sample):
    assert skd.inputs(QUICK) == {}
    assert len(skd.inputs(skd.PROFILES["standard"])) == 2


# Figures


def result(arm: str, shared: Context) -> Result:
    run = Run("structured_kd", "quick", "shapes", arm, 0)
    return Result.model_construct(run=run, metrics=skd.execute(run, QUICK, shared))


@pytest.fixture
def drawn(shared, monkeypatch) -> Iterator[list[Result]]:
    monkeypatch.setattr(figures.Context, "of", lambda result: shared)
    small = replace(
        QUICK.settings[0], recipe=replace(RECIPE, scenes=replace(RECIPE.scenes, train=64, test=32))
    )
    monkeypatch.setattr(figures, "setting_of", lambda run, config: small)
    monkeypatch.setattr(
        figures, "network_of", lambda run, config, context: skd.network_of(run, QUICK, shared)
    )
    yield [result(arm, shared) for arm in ("teacher", "pi")]
    plt.close("all")


def test_every_arm_has_a_title():
    assert figures.ARM_TITLES.keys() == {"teacher", *ARMS}


def test_maps_figure_shows_images_masks_and_predictions(drawn):
    figure = figures.maps_figure(drawn, QUICK, count=3)
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["image", "mask", "teacher", "pixels"]
    _, test, _ = dense.load_scenes(replace(RECIPE.scenes, train=64, test=32))
    assert (figure.axes[4].images[0].get_array() == test.extras["masks"][1]).all()


def test_affinities_figure_marks_a_node_on_an_object(drawn):
    figure = figures.affinities_figure(drawn, QUICK)
    _, test, _ = dense.load_scenes(replace(RECIPE.scenes, train=64, test=32))
    x, y = (int(values[0]) for values in figure.axes[0].lines[0].get_data())
    assert (test.extras["masks"][0][y : y + 2, x : x + 2] > 0).any()
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (12, 12)
    assert shown[y // 2, x // 2] == pytest.approx(1, abs=1e-6)


def test_affinities_are_cosines():
    maps = torch.randn(1, 3, 4, 4)
    found = figures.affinities(maps, 4, 0, 1)
    nodes = F.avg_pool2d(maps, 2)[0].flatten(1)
    expected = F.cosine_similarity(nodes, nodes[:, 1:2], dim=0).view(2, 2)
    torch.testing.assert_close(found, expected)


def test_the_discriminators_rate_is_the_best_of_the_trials_and_the_first_of_equals():
    assert choose.choose(lambda rate: -abs(rate - 1e-5)) == 1e-5
    assert choose.choose(lambda rate: 0.0) == choose.RATES[0]
    assert RECIPE.discriminator_rate in choose.RATES


def test_trials_of_the_discriminators_rate_never_see_the_test_set(shared, monkeypatch, capsys):
    original, seen = choose.shapes, []

    def watched(split, count, **options):
        seen.append((split, options["seed"]))
        return original(split, count, **options)

    monkeypatch.setattr(choose, "shapes", watched)
    score = choose.trial_on(RECIPE, (0,), shared)(1e-3)
    assert 0 <= score <= 100
    assert f"{score:.2f} %" in capsys.readouterr().out
    assert seen == [("train", RECIPE.scenes.seed + 1)]


def test_only_arms_with_a_discriminator_depend_on_its_recipe():
    other = replace(RECIPE, discriminator_rate=1.0)
    changed = replace(QUICK, settings=(replace(QUICK.settings[0], recipe=other),))
    differ = {
        run.arm
        for run in skd.plan(QUICK)
        if skd.relevant_config(run, QUICK) != skd.relevant_config(run, changed)
    }
    assert differ == {arm for arm in ARMS if ARMS[arm].holistic} & set(QUICK.settings[0].arms)
