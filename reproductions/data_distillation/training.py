"""Networks that find landmarks: how they are trained, what they predict, the labels they make, what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.data.landmarks import average_precision, heat_maps, matches, peaks
from kdrefs.data.mixture import MixedBatches
from kdrefs.data.shapes import PLACES, mirrored_landmarks
from kdrefs.methods.data_distillation import (
    ensemble_over_transforms,
    hard_labels,
    score_threshold,
    transforms,
)
from kdrefs.training import evaluation_mode, fit, load_tensors, one_cycle, save_tensors, update
from kdrefs.training.optimizers import fused
from reproductions.data_distillation.tasks import Task, annotated, landmarks_of, parts_of
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.dense import MEAN, STD, initial_unet
from reproductions.protocols.pairs import load_weights, save_weights

CANDIDATES = 20  # scored maxima an image that labels and precision are taken from


@dataclass(frozen=True)
class Arm:
    """What a network is trained on.

    Attributes:
        labels: Of the images without annotation: none (they are not used), the teacher's from one view or from several
            transforms, or the true ones.
        ratio: Wanted labels of an unlabelled image, as a fraction of those annotated in a labelled one.
        start: Fresh weights, or the teacher's.
    """

    labels: Literal["none", "single", "multi", "true"] = "none"
    ratio: float = 1.0
    start: Literal["fresh", "teacher"] = "fresh"


ARMS: Mapping[str, Arm] = {
    "labelled": Arm(),
    "single": Arm("single"),
    "multi": Arm("multi"),
    "finetune": Arm("multi", start="teacher"),
    "all": Arm("true"),
    "multi_half": Arm("multi", ratio=0.5),
    "multi_double": Arm("multi", ratio=2.0),
}


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common: Adam, one cycle, mirrored at random.

    Attributes:
        task: The images.
        widths: Of the U-Net, teacher and student alike.
        teacher_steps: Steps of the teacher, on labelled images alone.
        steps: Of every other network.
        rate: Highest learning rate.
        batch_size: Images a step.
        labelled: How many of them are labelled, where there are two kinds.
        scales: Of the transforms; each is also mirrored.
    """

    task: Task
    widths: tuple[int, ...]
    teacher_steps: int
    steps: int
    rate: float = 0.02
    batch_size: int = 16
    labelled: int = 8
    scales: tuple[float, ...] = (5 / 6, 1.0, 7 / 6)


def landmark_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """The focal loss of corner and centre detectors: landmarks against all else, which counts less near a landmark.

    Law and Deng, "CornerNet", ECCV 2018, equation 1 with its exponents 2 and 4, as a mean over images.
    """
    scores = logits.sigmoid()
    found = -(1 - scores).square() * F.logsigmoid(logits)
    missed = -((1 - maps) ** 4) * scores.square() * F.logsigmoid(-logits)
    return torch.where(maps == 1, found, missed).sum((1, 2, 3)).mean()


def teacher_of(recipe: Recipe, seed: int, context: Context) -> nn.Module:
    """The network trained on the seed's labelled images, once and found again; in eval mode."""
    short = replace(recipe, steps=recipe.teacher_steps)
    return _network(Arm(), short, seed, context)


def network_of(arm: str, recipe: Recipe, seed: int, context: Context) -> nn.Module:
    """The network of an arm and a seed, trained once and found again; in eval mode."""
    return (
        teacher_of(recipe, seed, context) if arm == "teacher" else _network(ARMS[arm], recipe, seed, context)
    )


def candidates_of(net: nn.Module, split: Split, recipe: Recipe, context: Context, *, several: bool) -> Tensor:
    """Scored landmarks (N, CANDIDATES, 4) that a network sees in each image, from one view or several transforms."""
    chosen = transforms(recipe.scales) if several else transforms(flip=False)
    found = []
    with evaluation_mode(net):
        for batch in _batches(split, context, training=False, batch_size=128):
            assert batch.images is not None
            maps = ensemble_over_transforms(
                lambda images: net(images).logits.sigmoid(),
                batch.images,
                chosen,
                order=recipe.task.order,
                multiple=2 ** (len(recipe.widths) - 1),
            )
            found.append(peaks(maps, CANDIDATES))
    return torch.cat(found)


def pseudo_labels(arm: Arm, recipe: Recipe, seed: int, context: Context) -> tuple[Tensor, float]:
    """The teacher's hard labels (N, PLACES, 3) of the unlabelled images, and the threshold of their scores."""
    parts = parts_of(recipe.task, seed, probe=context.max_steps is not None)

    def make(folder: Path) -> None:
        guide = teacher_of(recipe, seed, context)
        found = candidates_of(guide, parts.unlabelled, recipe, context, several=arm.labels == "multi")
        save_tensors(folder / "candidates.safetensors", {"candidates": found})

    about = {"recipe": asdict(recipe), "several": arm.labels == "multi", "seed": seed}
    folder = context.artifact("landmark-candidates", about, make, source=source_digest(__name__))
    found = load_tensors(folder / "candidates.safetensors")[0]["candidates"].to(context.device)
    wanted = min(arm.ratio * annotated(parts.labelled), CANDIDATES)
    threshold = score_threshold(found[..., 3], len(found), wanted)
    return hard_labels(found, threshold, CANDIDATES), threshold


def evaluate(arm: str, recipe: Recipe, seed: int, context: Context) -> dict[str, float]:
    """A network on the test images, alone and under transforms, and what its labels of unlabelled images were like."""
    parts = parts_of(recipe.task, seed, probe=context.max_steps is not None)
    net, task = network_of(arm, recipe, seed, context), recipe.task
    truth = landmarks_of(parts.test).to(context.device)
    values = {}
    for name, several in (("ap", False), ("ap_ensemble", True)):
        found = candidates_of(net, parts.test, recipe, context, several=several)
        values[name] = average_precision(found, truth, len(task.names), task.radius)
    if arm in ARMS and ARMS[arm].labels in ("single", "multi"):
        labels, threshold = pseudo_labels(ARMS[arm], recipe, seed, context)
        values |= {"threshold": threshold, **_quality(labels, parts.unlabelled, task)}
    return values


def _quality(labels: Tensor, split: Split, task: Task) -> dict[str, float]:
    """Precision and recall of labels, in percent, and their number an image."""
    given = labels[..., 2] >= 0
    truth = landmarks_of(split).to(labels.device)
    right = matches(torch.cat([labels, given[..., None].to(labels.dtype)], -1), truth, task.radius)
    return {
        "label_precision": 100 * int(right.sum()) / max(int(given.sum()), 1),
        "label_recall": 100 * int(right.sum()) / int((truth[..., 2] >= 0).sum()),
        "labels": int(given.sum()) / len(labels),
    }


def _network(arm: Arm, recipe: Recipe, seed: int, context: Context) -> nn.Module:
    task = recipe.task
    net: nn.Module = initial_unet(len(task.names), recipe.widths, seed, context.device)

    def make(folder: Path) -> None:
        with torch.no_grad():
            net.get_parameter("classifier.bias").fill_(-3.0)  # landmarks are rare
        if arm.start == "teacher":
            net.load_state_dict(teacher_of(recipe, seed, context).state_dict())
        _train(net, arm, recipe, seed, context, folder)
        save_weights(net, folder / "weights.safetensors")

    about = {"arm": asdict(arm), "recipe": asdict(recipe), "seed": seed}
    folder = context.artifact("landmark-network", about, make, source=source_digest(__name__))
    return load_weights(net, folder / "weights.safetensors")


def _train(net: nn.Module, arm: Arm, recipe: Recipe, seed: int, context: Context, folder: Path) -> None:
    """Train ``net`` in place; resumes from the checkpoint in ``folder``."""
    batches = _training_set(arm, recipe, seed, context)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.rate, **fused(context.device))
    state: dict[str, Any] = {"net": net.train(), "optimizer": optimizer}
    state["schedule"] = one_cycle(optimizer, recipe.steps, warmup_steps=recipe.steps // 8)
    state["draws"] = torch.Generator(context.device).manual_seed(seed)
    task = recipe.task

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        images, landmarks = batch.images, batch.extras["landmarks"]
        flip = torch.rand(len(batch), generator=state["draws"], device=images.device) < 0.5
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        mirrored = mirrored_landmarks(landmarks, images.shape[3], task.order)
        landmarks = torch.where(flip.view(-1, 1, 1), mirrored, landmarks)
        size = (images.shape[2], images.shape[3])
        loss = landmark_loss(
            state["net"](images).logits, heat_maps(landmarks, len(task.names), size, snap=True)
        )
        update(state["optimizer"], loss)
        state["schedule"].step()
        return {"loss": loss.detach()}

    fit(
        step,
        state,
        batches,
        epochs=math.ceil(recipe.steps / len(batches)),
        checkpoint=folder / "training.safetensors",
        max_steps=min(recipe.steps, context.max_steps or recipe.steps),
        progress=context.progress,
    )


def _training_set(arm: Arm, recipe: Recipe, seed: int, context: Context) -> Batches | MixedBatches:
    """Labelled images alone, or both kinds in a fixed mix."""
    parts = parts_of(recipe.task, seed, probe=context.max_steps is not None)
    if arm.labels == "none":
        return _batches(parts.labelled, context, training=True, batch_size=recipe.batch_size, seed=seed)
    labels = landmarks_of(parts.unlabelled)
    if arm.labels != "true":
        labels = pseudo_labels(arm, recipe, seed, context)[0].cpu()
    unlabelled = replace(parts.unlabelled, extras={"landmarks": _padded(labels).numpy()})
    labelled = replace(parts.labelled, extras={"landmarks": _padded(landmarks_of(parts.labelled)).numpy()})
    return MixedBatches(
        _batches(labelled, context, training=True, batch_size=recipe.labelled, seed=seed),
        _batches(
            unlabelled, context, training=True, batch_size=recipe.batch_size - recipe.labelled, seed=seed
        ),
    )


def _padded(landmarks: Tensor) -> Tensor:
    """With empty rows up to the number of candidates, so that both kinds of images fit into one batch."""
    missing = max(CANDIDATES, PLACES) - landmarks.shape[1]
    empty = landmarks.new_tensor([0.0, 0.0, -1.0]).expand(len(landmarks), missing, 3)
    return torch.cat([landmarks, empty], 1)


def _batches(split: Split, context: Context, *, training: bool, batch_size: int, seed: int = 0) -> Batches:
    return Batches(
        split,
        device=context.device,
        batch_size=min(batch_size, len(split)),
        seed=seed,
        shuffle=training,
        drop_last=training,
        mean=MEAN,
        std=STD,
    )
