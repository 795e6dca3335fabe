"""Networks for degraded images: from scratch, from the clean network, with and without its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Augment, Batch, Batches
from kdrefs.methods.cqd import cqd_loss
from kdrefs.metrics import accuracy, agreement
from kdrefs.nets import Output
from kdrefs.training import (
    as_one,
    batches_as_one,
    fit,
    load_tensors,
    per_member,
    save_tensors,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from reproductions.cqd.degradations import Qualities, load
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PROBE_TEST,
    PROBE_TRAIN,
    Net,
    initialised,
    labelled_subset,
    load_weights,
    representations,
    save_weights,
    sgd_schedule,
)

Answers = Literal["same", "other", "still", "degraded"]


@dataclass(frozen=True)
class Arm:
    """A row.

    Attributes:
        images: What it is trained on: clean images (A), degraded ones (B) or both; None: not at all.
        start: Whether it starts from the network A.
        answers: The teacher's answers beside the labels: A on the clean image moved as the student's (``"same"``),
            moved otherwise (``"other"``) or not at all (``"still"``), or the network B on the degraded image moved as
            the student's (``"degraded"``: distillation without another quality). None for labels alone.
        passes: Times the epochs.
        weight: λ of the answers: 200, the authors' on birds, or 50, theirs on cars.
    """

    images: Literal["clean", "degraded", "both"] | None = "degraded"
    start: bool = False
    answers: Answers | None = None
    passes: int = 1
    weight: float = 200.0


# The authors' seven rows (run_CQD.m of cross_quality_distillation@cb8149f), then controls.
ARMS: dict[str, Arm] = {
    "a": Arm("clean"),
    "b": Arm(),
    "a_on_b": Arm(None, start=True),
    "tuned": Arm(start=True),
    "cqd": Arm(answers="same"),
    "a_cqd": Arm(start=True, answers="same"),
    "mixed": Arm("both"),
    "b_long": Arm(passes=2),
    "a_cqd_50": Arm(start=True, answers="same", weight=50.0),
    "a_self": Arm(start=True, answers="degraded"),
    "a_cqd_other": Arm(start=True, answers="other"),
    "a_cqd_still": Arm(start=True, answers="still"),
}
ALONE = ("a", "b", "a_on_b")  # others start from them or ask them, so that each seed's is trained by itself


@dataclass(frozen=True)
class Recipe:
    """What all rows have in common: SGD with momentum, one cycle of the rate.

    Attributes:
        net: The network, the same for clean and degraded images.
        augment: Random motion of both qualities.
        mean: Per channel, of the normalisation.
        std: Likewise.
        epochs: Of every training.
        rate: Highest learning rate of trainings on labels alone.
        answers_rate: The same where the teacher's answers take part.
        temperature: T of teacher and student.
        batch_size: Images a step.
        weight_decay: Of all parameters.
        precision: Of the forward pass.
        held_out: Evaluate on a tenth of the training images instead of the test set, and train on the rest.
    """

    net: Net
    augment: Augment
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int
    rate: float
    answers_rate: float
    temperature: float = 10.0
    batch_size: int = 128
    weight_decay: float = 5e-4
    precision: Literal["float32", "bf16"] = "float32"
    held_out: bool = False


HELD_OUT, SPLIT_SEED = 0.1, 12345


def qualities(kind: str, recipe: Recipe, context: Context) -> tuple[Qualities, Qualities, int]:
    """The images of a kind to train and to evaluate on, and the number of classes; the first only in a probe."""
    return _qualities(kind, recipe.held_out, context.max_steps is not None)


@cache
def _qualities(kind: str, held_out: bool, probe: bool) -> tuple[Qualities, Qualities, int]:
    train, test, classes = load(kind, probe=(PROBE_TRAIN, PROBE_TEST) if probe else None)
    if held_out:
        chosen = labelled_subset(train.labels, HELD_OUT, SPLIT_SEED).numpy()
        rest = np.setdiff1d(np.arange(len(train.labels)), chosen)
        train, test = (Qualities(*(values[part] for values in train)) for part in (rest, chosen))
    return train, test, classes


def trained(kind: str, name: str, seeds: Sequence[int], recipe: Recipe, context: Context) -> list[nn.Module]:
    """The networks of an arm in eval mode, several seeds in one training, or as they were kept.

    Args:
        kind: Of degradation.
        name: Of the arm, in :data:`ARMS`.
        seeds: Of initial weights and order; an arm of :data:`ALONE` is trained seed by seed.
        recipe: How they are trained.
        context: What the harness gives.
    """
    if name == "a_on_b":
        name = "a"
    if name in ALONE and len(seeds) > 1:
        return [trained(kind, name, [seed], recipe, context)[0] for seed in seeds]
    arm = ARMS[name]
    _, _, classes = qualities(kind, recipe, context)
    networks = [initialised(recipe.net, classes, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        if arm.start:
            for network, seed in zip(networks, seeds, strict=True):
                network.load_state_dict(trained(kind, "a", [seed], recipe, context)[0].state_dict())
        _train(networks, kind, arm, seeds, recipe, context, folder)
        for seed, network in zip(seeds, networks, strict=True):
            save_weights(network, folder / f"weights{seed}.safetensors")

    about = {
        "kind": kind, "arm": asdict(arm), "seeds": list(seeds), "recipe": asdict(recipe),
        "max_steps": context.max_steps,
    }  # fmt: skip
    if name == "a":  # clean images are the same whatever becomes of them
        about["kind"] = kind.partition("-")[0]
    if arm.answers is None:
        about["recipe"] = asdict(replace(recipe, answers_rate=recipe.rate))  # it does not take part
    folder = context.artifact("cqd", about, make, source=source_digest(__name__))
    for seed, network in zip(seeds, networks, strict=True):
        load_weights(network, folder / f"weights{seed}.safetensors")
    return networks


def evaluate(
    network: nn.Module, kind: str, seed: int, recipe: Recipe, context: Context, *, clean: bool = False
) -> dict[str, float]:
    """Metrics on the degraded test images, or on the ``clean`` ones; agreement with network A on the clean ones."""
    _, test, _ = qualities(kind, recipe, context)
    labels = torch.from_numpy(test.labels).long().to(context.device)
    (guide,) = trained(kind, "a", [seed], recipe, context)
    sharp = plain_batches(test.clean, recipe, context)
    seen = sharp if clean else plain_batches(test.degraded, recipe, context)
    logits = representations(network, seen)["logits"]
    return {
        "accuracy": 100 * accuracy(logits, labels),
        "agreement": 100 * agreement(logits, representations(guide, sharp)["logits"]),
        "cross_entropy": F.cross_entropy(logits.double(), labels).item(),
    }


def plain_batches(images: np.ndarray, recipe: Recipe, context: Context) -> Batches:
    """Images in order, not augmented."""
    return Batches(
        images, batch_size=512, shuffle=False, mean=recipe.mean, std=recipe.std, device=context.device
    )


def _train(
    networks: Sequence[nn.Module],
    kind: str,
    arm: Arm,
    seeds: Sequence[int],
    recipe: Recipe,
    context: Context,
    folder: Path,
) -> None:
    epochs = recipe.epochs * arm.passes
    if arm.images == "both":
        epochs = -(-epochs // 2)  # of twice the images: as many steps as the others
    sets = [_batches(kind, arm, seed, epochs, recipe, context) for seed in seeds]
    whole = as_one(networks)
    whole.train()
    optimizer = torch.optim.SGD(
        whole.parameters(),
        lr=recipe.rate if arm.answers is None else recipe.answers_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        **fused(context.device),
    )
    fit(
        _step(arm, recipe),
        {
            "student": whole,
            "optimizer": optimizer,
            "schedule": sgd_schedule(optimizer, epochs, len(sets[0]), milestones=None),
        },
        batches_as_one(sets),
        epochs=epochs,
        checkpoint=folder / "training.safetensors",
        precision=recipe.precision,
        max_steps=context.max_steps,
        progress=context.progress,
    )
    write_back(whole, networks)


def _batches(kind: str, arm: Arm, seed: int, epochs: int, recipe: Recipe, context: Context) -> Batches:
    """The seed's training set; each epoch has a geometry of its own, known beforehand to ask the teacher about it."""
    train, _, _ = qualities(kind, recipe, context)
    parts = {"clean": (train.clean,), "degraded": (train.degraded,), "both": (train.clean, train.degraded)}
    images = parts[arm.images or "clean"]
    batches = Batches(
        np.concatenate(images),
        np.concatenate([train.labels] * len(images)),
        batch_size=recipe.batch_size,
        seed=seed,
        augment=recipe.augment,
        mean=recipe.mean,
        std=recipe.std,
        device=context.device,
        fixed_views=epochs,
        view_seed=seed,
    )
    if arm.answers is None:
        return batches
    if arm.answers == "still":
        return batches.with_extras({"answers": _answers(kind, arm.answers, seed, epochs, recipe, context)[0]})
    answers = _answers(kind, arm.answers, seed, epochs, recipe, context)
    if arm.answers == "other":
        answers = answers.roll(1, dims=0)  # those to the geometry of the epoch before
    return batches.with_extras(view_extras={"answers": answers})


def _answers(kind: str, answers: Answers, seed: int, epochs: int, recipe: Recipe, context: Context) -> Tensor:
    """The teacher's logits ``(epochs, N, classes)`` in the geometry of every epoch; ``"still"``: of none, once."""
    train, _, _ = qualities(kind, recipe, context)
    of_degraded = answers == "degraded"
    (guide,) = trained(kind, "b" if of_degraded else "a", [seed], recipe, context)
    images = train.degraded if of_degraded else train.clean
    if answers == "still":
        return representations(guide, plain_batches(images, recipe, context))["logits"][None]

    def make(folder: Path) -> None:
        batches = Batches(
            images,
            batch_size=512,
            shuffle=False,
            augment=recipe.augment,
            mean=recipe.mean,
            std=recipe.std,
            device=context.device,
            fixed_views=epochs,
            view_seed=seed,
        )
        found = [representations(guide, batches, view=view)["logits"] for view in range(epochs)]
        save_tensors(folder / "answers.safetensors", {"answers": torch.stack(found)})

    about = {
        "kind": kind if of_degraded else kind.partition("-")[0], "degraded": of_degraded, "seed": seed,
        "epochs": epochs, "recipe": asdict(replace(recipe, answers_rate=recipe.rate)), "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("cqd-answers", about, make, source=source_digest(__name__))
    return load_tensors(folder / "answers.safetensors")[0]["answers"].to(context.device)


def _step(arm: Arm, recipe: Recipe) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    def labels_alone(output: Output, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.float(), labels)

    def with_answers(output: Output, labels: Tensor, answers: Tensor) -> Tensor:
        return cqd_loss(output.logits, answers, labels, weight=arm.weight, temperature=recipe.temperature)

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        assert batch.labels is not None
        student = state["student"]
        given = [batch.labels] if arm.answers is None else [batch.labels, batch.extras["answers"]]
        loss: Callable[..., Tensor] = labels_alone if arm.answers is None else with_answers
        losses = per_member(loss, student)(student(batch.images), *given)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        return {"loss": losses.detach().mean()}

    return step
