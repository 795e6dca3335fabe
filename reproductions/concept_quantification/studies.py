"""Four trainings from equal initial weights, with an entropy map of every measured image after each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.methods.concept_quantification import entropy_map, weight_distance
from kdrefs.methods.kd import kd_loss
from kdrefs.metrics import accuracy
from kdrefs.training import fit, update
from kdrefs.training.files import load_tensors, save_tensors
from kdrefs.training.optimizers import fused
from reproductions.concept_quantification import sources
from reproductions.concept_quantification.sources import Source
from reproductions.concept_quantification.vgg import vgg16
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import Net, initialised, load_weights, representations, save_weights

ARMS = ("teacher", "baseline", "student", "kd")
TEACHER_SEEDS = 1000  # a teacher's seed is its student's and so much more


@dataclass(frozen=True)
class Recipe:
    """How the networks of a study are trained and looked at.

    Attributes:
        source: The data.
        net: The network of all arms; its ``feature`` is the layer that is distilled and whose concepts are counted.
        weight: The layer's weights, whose path is measured.
        head: The layer behind it.
        epochs: Each with a checkpoint at its end.
        rate: Learning rate at the beginning.
        feature_rate: That of the student by features, which the authors set a tenth as large; None: the same.
        final: Factor of the rate in the last epoch; falls from epoch to epoch by equal factors.
        head_epochs: In which the student's head is trained behind frozen features.
        optimizer: "adam", or "sgd" with momentum 0.9.
        weight_decay: Of SGD.
        batch_size: Images a step.
        probes: Of the entropy maps.
        every: Epochs from one checkpoint to the next.
        temperature: Of the student by predictions.
        alpha: Weight of the teacher's predictions beside the labels.
    """

    source: Source
    net: Net
    weight: str
    head: str
    epochs: int
    rate: float
    feature_rate: float | None = None
    final: float = 0.1
    head_epochs: int = 10
    optimizer: str = "adam"
    weight_decay: float = 0.0
    batch_size: int = 64
    probes: int = 32
    every: int = 1
    temperature: float = 4.0
    alpha: float = 0.9


@dataclass(frozen=True)
class Study:
    """One trained network and what was seen on the way.

    Attributes:
        network: In eval mode.
        entropy: ``(images, checkpoints, rows, columns)``, nats.
        foreground: bool ``(images, rows, columns)``.
        by_epoch: Weight distance at each checkpoint by the paper's definition, from epoch to epoch.
        by_step: The same by the authors' code's, from step to step.
        accuracy: On all test images at the end, percent.
    """

    network: nn.Module
    entropy: Tensor
    foreground: Tensor
    by_epoch: Tensor
    by_step: Tensor
    accuracy: float


def studied(recipe: Recipe, arm: str, seed: int, context: Context) -> Study:
    """The network of an arm, trained once for each content of its configuration and found again."""
    probe = context.max_steps is not None
    images = sources.load(recipe.source)
    images = sources.head(images) if probe else images
    network = fresh(recipe, arm, seed, images.classes, context.device)

    def make(folder: Path) -> None:
        guide = None if arm in ("teacher", "baseline") else studied(recipe, "teacher", seed, context).network
        _train(network, guide, recipe, arm, seed, images, context, folder)
        save_weights(network, folder / "weights.safetensors")
        score = torch.tensor(_accuracy(network, recipe, images, context), dtype=torch.float64)
        save_tensors(folder / "score.safetensors", {"accuracy": score})

    about = {"recipe": asdict(recipe), "arm": arm, "seed": seed, "max_steps": context.max_steps}
    folder = context.artifact("concept-study", about, make, source=source_digest(__name__))
    load_weights(network, folder / "weights.safetensors")
    seen = [load_tensors(path)[0] for path in sorted(folder.glob("seen-*.safetensors"))]
    return Study(
        network,
        torch.stack([one["entropy"] for one in seen[1:]], dim=1),
        images.foreground,
        weight_distance([one["weight"] for one in seen])[1:],
        torch.stack([one["path"] for one in seen[1:]]),
        load_tensors(folder / "score.safetensors")[0]["accuracy"].item(),
    )


def fresh(recipe: Recipe, arm: str, seed: int, classes: int, device: torch.device) -> nn.Module:
    """The initial network: of one seed the same for all arms but the teacher."""
    number = seed_of(arm, seed)
    if recipe.net.name == "vgg16":
        return vgg16(classes, number, recipe.source.size).to(device)
    return initialised(recipe.net, classes, number, device)


def seed_of(arm: str, seed: int) -> int:
    """Seed of initial weights and batch order."""
    return seed + TEACHER_SEEDS if arm == "teacher" else seed


def _train(
    network: nn.Module,
    guide: nn.Module | None,
    recipe: Recipe,
    arm: str,
    seed: int,
    images: sources.Images,
    context: Context,
    folder: Path,
) -> None:
    """Train ``network`` in place; what is seen of it after each epoch goes into files of its own."""
    batches = sources.batches(
        recipe.source,
        images.train,
        context.device,
        training=True,
        size=recipe.batch_size,
        seed=seed_of(arm, seed),
    )
    by_features = arm == "student"
    rate = recipe.feature_rate if by_features and recipe.feature_rate is not None else recipe.rate
    trained = [
        p for name, p in network.named_parameters() if not (by_features and name.startswith(recipe.head))
    ]
    optimizer = _optimizer(recipe, trained, rate, context.device)
    weight = network.get_parameter(recipe.weight)
    first = weight.detach().clone()
    state: dict[str, Any] = {
        "network": network,
        "optimizer": optimizer,
        "schedule": _schedule(optimizer, recipe, len(batches)),
        "before": first.clone(),
        "path": torch.zeros((), dtype=torch.float64, device=weight.device),
    }
    save_tensors(folder / "seen-000.safetensors", {"weight": first})
    norm = torch.linalg.vector_norm(first.double())

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        loss = _loss(state["network"](batch.images), guide, batch, recipe, by_features)
        update(state["optimizer"], loss)
        state["schedule"].step()
        with torch.no_grad():
            state["path"] += torch.linalg.vector_norm((weight - state["before"]).double()) / norm
            state["before"].copy_(weight)
        return {"loss": loss.detach()}

    measured = sources.pixels(recipe.source, images.measured, context.device)

    def look(state: dict[str, Any], epoch: int) -> Mapping[str, float]:
        found = entropy_map(
            state["network"],
            measured,
            recipe.net.feature,
            recipe.source.grid,
            probes=recipe.probes,
            chunk=100,
        )
        seen = {"entropy": found.entropy.float(), "weight": weight.detach(), "path": state["path"]}
        save_tensors(folder / f"seen-{epoch + 1:03d}.safetensors", seen)
        return {"entropy": found.entropy.mean().item()}

    fit(
        step,
        state,
        batches,
        epochs=recipe.epochs,
        evaluate=look,
        evaluate_every=recipe.every,
        checkpoint=folder / "training.safetensors",
        max_steps=context.max_steps,
        progress=context.progress,
    )
    if by_features:
        _train_head(network, recipe, seed, images, context, folder)


def _accuracy(network: nn.Module, recipe: Recipe, images: sources.Images, context: Context) -> float:
    """On all test images, percent."""
    batches = sources.batches(recipe.source, images.test, context.device, training=False, size=256)
    logits = representations(network, batches)["logits"]
    return 100 * accuracy(logits, torch.from_numpy(images.test.labels).long().to(logits.device))


def _loss(output: Any, guide: nn.Module | None, batch: Batch, recipe: Recipe, by_features: bool) -> Tensor:
    assert batch.labels is not None
    if guide is None:
        return F.cross_entropy(output.logits.float(), batch.labels)
    with torch.no_grad():
        target = guide(batch.images)
    if by_features:
        return F.mse_loss(output.features[recipe.net.feature], target.features[recipe.net.feature])
    return kd_loss(
        output.logits, target.logits, batch.labels, temperature=recipe.temperature, alpha=recipe.alpha
    )


def _train_head(
    network: nn.Module, recipe: Recipe, seed: int, images: sources.Images, context: Context, folder: Path
) -> None:
    """Cross-entropy behind frozen features, which are computed once."""
    plain = sources.batches(recipe.source, images.train, context.device, training=False, size=256)
    features = representations(network, plain, recipe.net.feature)[recipe.net.feature]
    labels = torch.from_numpy(images.train.labels)
    batches = Batches(
        None,
        labels,
        extras={"features": features},
        batch_size=recipe.batch_size,
        seed=seed,
        device=context.device,
    )
    head = network.get_submodule(recipe.head)
    optimizer = _optimizer(recipe, list(head.parameters()), recipe.rate, context.device)
    state: dict[str, Any] = {"head": head, "optimizer": optimizer}

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        loss = F.cross_entropy(state["head"](batch.extras["features"]), batch.labels)
        update(state["optimizer"], loss)
        return {"loss": loss.detach()}

    fit(
        step,
        state,
        batches,
        epochs=recipe.head_epochs,
        checkpoint=folder / "head.safetensors",
        max_steps=context.max_steps,
        progress=context.progress,
    )


def _optimizer(
    recipe: Recipe, parameters: list[nn.Parameter], rate: float, device: torch.device
) -> torch.optim.Optimizer:
    fast = fused(device)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, **fast)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=recipe.weight_decay, **fast)


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(_factor, recipe.epochs, recipe.final, steps_per_epoch)
    )


def _factor(epochs: int, final: float, steps_per_epoch: int, step: int) -> float:
    return final ** (min(step // steps_per_epoch, epochs - 1) / max(1, epochs - 1))
