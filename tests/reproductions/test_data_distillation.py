"""The data_distillation column: its plan, its arms, the labels they use, its errata and its figures fit each other."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from kdrefs.data.cache import Split, write_set
from kdrefs.data.landmarks import heat_maps, matches
from kdrefs.data.mixture import MixedBatches
from reproductions.data_distillation import figures, tasks, training
from reproductions.data_distillation import run as column
from reproductions.data_distillation.training import ARMS, CANDIDATES
from reproductions.harness.runs import Context, Result, Run, RunStore

QUICK = column.PROFILES["quick"]
RECIPE = QUICK.settings[0].recipe


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def test_every_arm_is_planned():
    for config in column.PROFILES.values():
        assert {run.arm for run in column.plan(config)} == {"teacher", *ARMS}


@pytest.mark.parametrize("arm", ["teacher", *ARMS])
def test_every_arm_gives_its_metrics(arm, shared):
    scores = column.execute(Run("data_distillation", "quick", "shapes", arm, 0), QUICK, shared)
    labels = {"threshold", "labels", "label_precision", "label_recall"}
    expected = {"ap", "ap_ensemble"} | (
        labels if arm in ARMS and ARMS[arm].labels in ("single", "multi") else set()
    )
    assert scores.keys() == expected
    assert all(0 <= scores[name] <= 100 for name in expected - {"labels", "threshold"})


# Images


def test_parts_share_no_image_and_the_seed_says_which_are_labelled():
    one, other = (tasks.parts_of(RECIPE.task, seed, probe=True) for seed in (0, 1))
    keys = [{image.tobytes() for image in split.images} for split in (one.labelled, one.unlabelled, one.test)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert {image.tobytes() for image in other.labelled.images} != keys[0]
    assert len(keys[0] | keys[1]) == 96


def test_annotated_counts_landmarks():
    split = tasks.parts_of(RECIPE.task, 0, probe=True).labelled
    rows = split.extras["landmarks"].reshape(-1, 3)
    assert tasks.annotated(split) == pytest.approx(sum(kind >= 0 for *_, kind in rows.tolist()) / len(split))


@pytest.fixture
def boxed(tmp_path, monkeypatch) -> Iterator[None]:
    """A set of the name of Tiny ImageNet with a bright box in every image."""
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = generator.integers(0, 60, (count, 32, 32, 3), dtype=np.uint8)
        boxes = np.stack([generator.integers(2, 12, (count, 2)), generator.integers(16, 32, (count, 2))], 1)
        for image, ((left, top), (right, bottom)) in zip(images, boxes, strict=True):
            image[top:bottom, left:right] = 255
        return Split(
            images, np.zeros(count, dtype=np.uint8), {"boxes": boxes.reshape(-1, 4).astype(np.float32)}
        )

    write_set("tinyimagenet32", split(200), split(60), ("all",), root=tmp_path)
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    tasks._pool.cache_clear()
    yield
    tasks._pool.cache_clear()


def test_corners_and_middles_are_those_of_the_boxes(boxed):
    task = column.BOXES.task
    parts = tasks.parts_of(task, 0, probe=True)
    for image, rows in zip(parts.labelled.images, parts.labelled.extras["landmarks"], strict=True):
        bright = np.argwhere((image == 255).all(-1))
        (top, left), (bottom, right) = bright.min(0), bright.max(0) + 1
        middle = [(left + right) / 2, (top + bottom) / 2, 4]
        expected = [[left, top, 0], [right, top, 1], [left, bottom, 2], [right, bottom, 3], middle]
        assert rows.tolist() == expected
    assert tasks.annotated(parts.labelled) == 5


def test_the_set_of_boxes_runs(boxed, shared):
    run = Run("data_distillation", "standard", "boxes", "multi", 0)
    scores = column.execute(run, column.PROFILES["standard"], shared)
    assert scores["labels"] == pytest.approx(5, abs=0.1)


# Training


def test_loss_is_a_plain_loop_and_least_at_the_landmarks():
    maps = heat_maps(torch.tensor([[[2.3, 1.6, 0.0]], [[0.0, 0.0, -1.0]]]), 2, (3, 4), snap=True)
    logits = torch.randn(2, 2, 3, 4)
    total = 0.0
    for z, t in zip(logits.flatten().double(), maps.flatten().double(), strict=True):
        p = torch.sigmoid(z)
        total += -((1 - p) ** 2) * p.log() if t == 1 else -((1 - t) ** 4) * p**2 * (1 - p).log()
    assert training.landmark_loss(logits, maps).item() == pytest.approx(float(total) / 2, rel=1e-5)
    right = torch.where(maps == 1, 9.0, -9.0)
    assert training.landmark_loss(right, maps) < 1e-6 < training.landmark_loss(-right, maps)


def test_mini_batches_hold_a_fixed_share_of_labelled_images(shared):
    batches = training._training_set(ARMS["multi"], RECIPE, 0, shared)
    assert isinstance(batches, MixedBatches)
    parts = tasks.parts_of(RECIPE.task, 0, probe=True)
    known = {row.tobytes() for row in parts.labelled.extras["landmarks"]}
    for batch in batches.epoch(0):
        assert len(batch) == RECIPE.batch_size
        rows = batch.extras["landmarks"][:, : parts.labelled.extras["landmarks"].shape[1]]
        assert all(row.numpy().tobytes() in known for row in rows[: RECIPE.labelled])
        assert (batch.extras["landmarks"][: RECIPE.labelled, 8:, 2] == -1).all()


def test_true_labels_are_the_annotation_and_labelled_images_alone_have_no_others(shared):
    parts = tasks.parts_of(RECIPE.task, 0, probe=True)
    true = {row.tobytes() for row in parts.unlabelled.extras["landmarks"]}
    batch = next(iter(training._training_set(ARMS["all"], RECIPE, 0, shared).epoch(0)))
    rows = batch.extras["landmarks"][RECIPE.labelled :, :8]
    assert all(row.numpy().tobytes() in true for row in rows)
    alone = next(iter(training._training_set(ARMS["labelled"], RECIPE, 0, shared).epoch(0)))
    known = {row.tobytes() for row in parts.labelled.extras["landmarks"]}
    assert all(row.numpy().tobytes() in known for row in alone.extras["landmarks"])
    assert len(alone) == RECIPE.batch_size


@pytest.mark.parametrize(
    ("arm", "ratio"), [("single", 1.0), ("multi", 1.0), ("multi_half", 0.5), ("multi_double", 2.0)]
)
def test_there_are_as_many_labels_as_wanted(arm, ratio, shared):
    parts = tasks.parts_of(RECIPE.task, 0, probe=True)
    labels, threshold = training.pseudo_labels(ARMS[arm], RECIPE, 0, shared)
    wanted = ratio * tasks.annotated(parts.labelled)
    assert (labels[..., 2] >= 0).sum() / len(labels) == pytest.approx(wanted, abs=0.02)
    assert 0 < threshold < 1


def test_the_teacher_goes_on_where_it_was_and_students_do_not(shared, monkeypatch):
    started = {}

    def watched(net, arm, *arguments):
        started[arm.start] = net.classifier.bias.detach().clone()

    teacher = training.teacher_of(RECIPE, 0, shared)
    monkeypatch.setattr(training, "_train", watched)
    fresh = replace(RECIPE, steps=RECIPE.steps + 1)  # trained by nobody yet
    for arm in ("multi", "finetune"):
        training._network(ARMS[arm], replace(fresh, teacher_steps=RECIPE.teacher_steps), 0, shared)
    assert (started["fresh"] == -3).all()
    assert torch.equal(started["teacher"], teacher.classifier.bias)


def test_several_transforms_are_undone(shared):
    """A network that returns a smoothed copy of the image finds its bright spots in the same places."""

    class Copy(torch.nn.Module):
        def forward(self, images):
            output = type("Output", (), {})()
            # Kinds 1 and 2 are told apart by the side they are on: the left spot is 1, the right one 2.
            dark = 8 * (images.mean(1, keepdim=True) - 1)
            left = torch.arange(images.shape[3]) < images.shape[3] / 2
            output.logits = torch.cat(
                [torch.full_like(dark, -9), torch.where(left, dark, -9.0), torch.where(left, -9.0, dark),
                 torch.full_like(dark, -9), torch.full_like(dark, -9)], 1,
            )  # fmt: skip
            return output

    images = np.zeros((3, 24, 24, 3), dtype=np.uint8)
    truth = torch.tensor([[[5.5, 7.5, 1.0], [17.5, 11.5, 2.0]]]).repeat(3, 1, 1)
    for x, y, _ in truth[0].int().tolist():
        images[:, y - 1 : y + 2, x - 1 : x + 2] = 140
        images[:, y, x] = 255
    split = Split(images, np.zeros(3, dtype=np.uint8), {"landmarks": truth.numpy()})
    for several in (False, True):
        found = training.candidates_of(Copy(), split, RECIPE, shared, several=several)[:, :2]
        assert matches(found, truth, 0.8).all(), several


def test_quality_of_true_labels_is_perfect():
    split = tasks.parts_of(RECIPE.task, 0, probe=True).unlabelled
    truth = tasks.landmarks_of(split)
    quality = training._quality(truth, split, RECIPE.task)
    assert quality["label_precision"] == quality["label_recall"] == 100
    half = truth.clone()
    half[:, ::2] = torch.tensor([0.0, 0.0, -1.0])
    quality = training._quality(half, split, RECIPE.task)
    assert quality["label_precision"] == 100
    assert quality["label_recall"] < 60


def test_both_kinds_of_images_have_as_many_rows():
    split = tasks.parts_of(RECIPE.task, 0, probe=True).labelled
    padded = training._padded(tasks.landmarks_of(split))
    assert padded.shape[1] == CANDIDATES
    assert torch.equal(padded[:, :8], tasks.landmarks_of(split))
    assert torch.equal(padded[:, 8:], F.pad(torch.zeros(len(split), 12, 2), (0, 1), value=-1.0))


# Figures


@pytest.fixture
def results(shared, monkeypatch) -> Iterator[list[Result]]:
    monkeypatch.setattr(figures.Context, "of", lambda result: shared)
    parts = tasks.parts_of(RECIPE.task, 0, probe=True)
    monkeypatch.setattr(figures, "parts_of", lambda task, seed: parts)
    found = []
    for seed in (0, 1):
        for arm in ("labelled", "multi_half", "multi", "multi_double"):
            run = Run("data_distillation", "quick", "shapes", arm, seed)
            found.append(Result.model_construct(run=run, metrics=column.execute(run, QUICK, shared)))
    yield found
    plt.close("all")


def test_every_arm_has_a_title():
    assert figures.ARM_TITLES.keys() == {"teacher", *ARMS}


def test_labels_figure_marks_every_label(results, shared):
    figure = figures.labels_figure(results[2], QUICK, count=3)
    labels, _ = training.pseudo_labels(ARMS["multi"], RECIPE, 0, shared)
    shown = [len(axes.lines) for axes in figure.axes[3:6]]
    assert shown == [(rows[:, 2] >= 0).sum().item() for rows in labels[:3]]


def test_threshold_figure_shows_gains_over_labelled_images_alone(results):
    figure = figures.threshold_figure(results, QUICK.settings[0])
    by_arm = {(result.run.arm, result.run.seed): result.metrics for result in results}
    gains = [by_arm["multi", seed]["ap"] - by_arm["labelled", seed]["ap"] for seed in (0, 1)]
    dots = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "."]
    assert list(dots[1]) == pytest.approx(gains)
