"""The column of cross quality distillation: its images, its arms, its plan, its errata and its figures."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.data.composites import composites
from kdrefs.data.sets import load_set
from reproductions.cqd import choose, degradations, figures, training
from reproductions.cqd import run as cqd
from reproductions.cqd.training import ARMS
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.protocols.pairs import representations

QUICK = cqd.PROFILES["quick"]
LOWRES = QUICK.settings[0]
SHORT = replace(cqd.DIGITS, epochs=2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def one(arm: str, seed: int = 0, kind: str = "digits-lowres") -> Run:
    return Run("cqd", "quick", kind, arm, seed)


# Images


@pytest.mark.parametrize(
    "kind", ["digits-lowres", "digits-edges", "digits-distorted", "composites-localised"]
)
def test_both_qualities_are_of_the_same_images(kind):
    train, test, classes = degradations.load(kind, probe=(40, 20))
    assert classes == 10
    for part, count in ((train, 40), (test, 20)):
        assert part.clean.shape == part.degraded.shape
        assert part.clean.dtype == part.degraded.dtype == np.uint8
        assert len(part.clean) == len(part.labels) == count
        assert (part.clean != part.degraded).any(axis=(1, 2, 3)).all()
    again, _, _ = degradations.load(kind, probe=(40, 20))
    assert np.array_equal(again.degraded, train.degraded)
    if kind.startswith("digits"):
        assert np.array_equal(train.clean, load_set("digits").train.images[:40])


def test_low_resolution_keeps_means_of_blocks_only():
    images = torch.rand(3, 2, 8, 8)
    small = torch.nn.functional.avg_pool2d(images, 4)
    constant = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(
        degradations.low_resolution(images, 0, size=2), degradations.low_resolution(constant, 0, size=2)
    )


def test_edges_are_the_length_of_the_gradient():
    ramp = torch.arange(8.0).expand(8, 8)[None, None] / 20
    found = degradations.edges(ramp, 0)
    torch.testing.assert_close(found[0, 0, :, 1:-1], torch.full((8, 6), 0.1))
    assert degradations.edges(torch.full((1, 3, 8, 8), 0.3), 0).abs().max() < 1e-6


def test_distortion_moves_pixels_and_is_the_seed_s():
    images = torch.rand(2, 1, 8, 8)
    still = degradations.distorted(images, 0, knots=4, strength=0.0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)
    moved = degradations.distorted(images, 1, knots=4, strength=0.2)
    assert torch.equal(moved, degradations.distorted(images, 1, knots=4, strength=0.2))
    assert not torch.allclose(moved, degradations.distorted(images, 2, knots=4, strength=0.2))


def test_localised_objects_are_cut_out_by_their_boxes():
    train, _, _ = degradations.load("composites-localised", probe=(8, 1))
    whole = composites("train", 8, size=32, digit=12, jitter=20)
    assert np.array_equal(train.degraded, whole.images)
    for cut, image, box in zip(train.clean, whole.images, whole.extras["boxes"].astype(int), strict=True):
        left, top, right, bottom = box
        inside = image[top:bottom, left:right]
        assert abs(float(cut.mean()) - float(inside.mean())) < 15  # the same pixels, enlarged


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind: expected one of .* got 'digits-grey'"):
        degradations.load("digits-grey")


# Arms


@pytest.mark.parametrize("profile", cqd.PROFILES)
def test_plan_has_known_arms(profile):
    config = cqd.PROFILES[profile]
    plan = cqd.plan(config)
    assert {run.arm for run in plan} <= ARMS.keys()
    assert set(cqd.SEVEN) <= {run.arm for run in plan if run.data == config.settings[0].data}
    for setting in config.settings:
        assert setting.data in degradations.KINDS or setting.data == degradations.LOCALISED


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gives_its_metrics(arm, shared):
    scores = cqd.execute(one(arm), QUICK, shared)
    assert scores.keys() == cqd.METRICS.keys()
    assert all(0 <= scores[name] <= 100 for name in ("accuracy", "agreement"))
    assert scores["agreement"] == 100 or arm != "a"


def test_a_on_b_is_the_network_a_on_other_images(shared):
    clean, degraded = (cqd.execute(one(arm), QUICK, shared) for arm in ("a", "a_on_b"))
    assert clean["cross_entropy"] != degraded["cross_entropy"]
    (first,), (second,) = (
        training.trained("digits-lowres", arm, [0], LOWRES.recipe, shared) for arm in ("a", "a_on_b")
    )
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_seeds_may_share_a_training(shared):
    runs = [one("a_cqd", seed) for seed in (0, 1)]
    together = cqd.execute_together(runs, QUICK, shared)
    alone = [cqd.execute(run, QUICK, shared) for run in runs]
    for first, second in zip(together, alone, strict=True):
        assert first["cross_entropy"] == pytest.approx(second["cross_entropy"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


def test_answers_are_to_the_image_as_the_student_s_is_moved(shared):
    """The teacher is asked about the clean image in the geometry in which the student sees the degraded one."""
    batches = {
        arm: training._batches("digits-lowres", ARMS[arm], 0, 2, SHORT, shared)
        for arm in ("a", "a_cqd", "a_cqd_other", "a_cqd_still")
    }
    (guide,) = training.trained("digits-lowres", "a", [0], SHORT, shared)
    found = {}
    for epoch in (0, 1):
        clean = next(iter(batches["a"].epoch(epoch)))
        answers = {arm: next(iter(one.epoch(epoch))).extras for arm, one in batches.items() if arm != "a"}
        with torch.no_grad():
            expected = guide(clean.images).logits
        torch.testing.assert_close(answers["a_cqd"]["answers"], expected, rtol=1e-4, atol=1e-4)
        found[epoch] = {arm: value["answers"] for arm, value in answers.items()}
        assert not torch.allclose(found[epoch]["a_cqd_other"], expected)
        assert not torch.allclose(found[epoch]["a_cqd_still"], expected)
    train, _, _ = training.qualities("digits-lowres", SHORT, shared)
    plain = representations(guide, training.plain_batches(train.clean, SHORT, shared))["logits"]
    order = next(iter(batches["a_cqd_still"].epoch(0))).indices
    torch.testing.assert_close(found[0]["a_cqd_still"], plain[order])


def test_networks_of_clean_images_are_shared_between_degradations(shared):
    runs = [one("a", kind=kind) for kind in ("digits-lowres", "digits-edges")]
    before = len(list(shared.store.root.rglob("weights0.safetensors")))
    for run in runs:
        cqd.execute(run, QUICK, shared)
    assert len(list(shared.store.root.rglob("weights0.safetensors"))) - before <= 1


def test_mixed_has_both_qualities_and_as_many_steps(shared):
    both = training._batches("digits-lowres", ARMS["mixed"], 0, 1, SHORT, shared)
    single = training._batches("digits-lowres", ARMS["b"], 0, 2, SHORT, shared)
    assert both.num_samples == 2 * single.num_samples
    assert len(both) == pytest.approx(2 * len(single), abs=1)


def test_choice_takes_the_best_rate_of_either_training():
    def trial(name, recipe):
        rate, wanted = (recipe.rate, 0.1) if name == "tuned" else (recipe.answers_rate, 0.03)
        return -abs(rate - wanted)

    chosen = choose.choose(cqd.DIGITS, trial)
    assert (chosen.rate, chosen.answers_rate) == (0.1, 0.03)


def test_held_out_images_are_not_trained_on(shared):
    whole, _, _ = training.qualities("digits-lowres", SHORT, shared)
    kept, held, _ = training.qualities("digits-lowres", replace(SHORT, held_out=True), shared)
    assert len(kept.labels) + len(held.labels) == len(whole.labels)
    assert len(held.labels) == pytest.approx(0.1 * len(whole.labels), rel=0.1)
    images = {image.tobytes() for image in kept.clean}
    assert not images & {image.tobytes() for image in held.clean}


# Figures


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_and_kind_has_a_title():
    assert figures.ARM_TITLES.keys() == ARMS.keys()
    kinds = {
        setting.data.partition("-")[2] for config in cqd.PROFILES.values() for setting in config.settings
    }
    assert figures.KIND_TITLES.keys() == kinds


def test_qualities_figure_shows_both(closed):
    figure = figures.qualities_figure(["digits-lowres"], count=3)
    _, test, _ = degradations.load("digits-lowres", probe=(1, 3))
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown[0], test.clean[0, ..., 0])
    np.testing.assert_array_equal(shown[3], test.degraded[0, ..., 0])
