"""Teacher/student pairs and recipes that several columns share.

A pair names a data set, two networks with the layer that stands for "the representation", their supervised
recipes and the augmentation. Everything trained here goes through ``Context.artifact``: it is found again by
content, so one teacher serves every column that names the same pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from kdrefs.data.batches import Augment, Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.data.sets import load_set
from kdrefs.nets import build
from kdrefs.training import evaluation_mode, fit, load_tensors, save_tensors, update
from kdrefs.training.optimizers import fused
from kdrefs.training.schedules import multistep, one_cycle
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context

WEIGHTS = Path(__file__).parent / "weights"
PROBE_TRAIN, PROBE_TEST = 1024, 256  # what a probe trains and evaluates on: enough for its 50 steps

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


@dataclass(frozen=True)
class Net:
    """A network by its name in :func:`kdrefs.nets.build`, and the layer whose output is its representation."""

    name: str
    feature: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Supervised training with cross-entropy; each stage is ``(epochs, learning rate)`` with a fresh optimiser."""

    stages: tuple[tuple[int, float], ...]
    optimizer: str = "adam"  # "adam" (constant rate) or "sgd" (momentum 0.9)
    weight_decay: float = 0.0
    batch_size: int = 128
    nesterov: bool = True  # of "sgd"
    milestones: tuple[int, ...] | None = (
        None  # of "sgd": epochs where the rate falls to a tenth; None: one cycle to 0
    )
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class Pair:
    """One data set, one teacher, one student."""

    name: str
    data: str
    teacher: Net
    student: Net
    teacher_recipe: Recipe
    student_recipe: Recipe
    augment: Augment
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher_weights: str | None = None  # file in `weights/`: the page then says "given this teacher"


_TINY = Net("tiny_cnn", "fc1")
_ADAM_30 = Recipe(((20, 1e-3), (10, 1e-4)))
_ADAM_100 = Recipe(((50, 1e-3), (50, 1e-4)))
_SGD_12 = Recipe(((12, 0.2),), optimizer="sgd", weight_decay=5e-4, precision="bf16")
# HobbitLong/RepDistiller@b84f547, train_teacher.py and train_student.py with their defaults.
_REPDISTILLER = Recipe(
    ((240, 0.05),),
    optimizer="sgd",
    weight_decay=5e-4,
    batch_size=64,
    nesterov=False,
    milestones=(150, 180, 210),
)
_SHIFT = Augment(flip=True, crop=4)

PAIRS: dict[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair(
            name="digits",
            data="digits",
            teacher=Net("small_cnn", "embedding_pre", {"channels": (32, 64), "feature": 64}),
            student=Net("small_cnn", "embedding_pre", {"channels": (8, 16), "feature": 16}),
            teacher_recipe=Recipe(((12, 3e-3), (4, 3e-4))),
            student_recipe=Recipe(((16, 3e-3), (4, 3e-4))),
            augment=Augment(),
            mean=(0.5,),
            std=(0.5,),
        ),
        # The PKT paper's student below a teacher that two CPU cores can train.
        Pair(
            name="cifar10-tiny",
            data="cifar10",
            teacher=Net("resnet20", "pool"),
            student=_TINY,
            teacher_recipe=_SGD_12,
            student_recipe=_ADAM_30,
            augment=_SHIFT,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            teacher_weights="cifar10_resnet20.safetensors",
        ),
        # The PKT paper's own pair and recipe.
        Pair(
            name="cifar10-pkt",
            data="cifar10",
            teacher=Net("preact_resnet18", "pool"),
            student=_TINY,
            teacher_recipe=_ADAM_100,
            student_recipe=_ADAM_100,
            augment=_SHIFT,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
        ),
        # A plain student whose three maps have the sizes of the teacher's, at half its channels.
        Pair(
            name="cifar10-small",
            data="cifar10",
            teacher=Net("resnet20", "pool"),
            student=Net(
                "small_cnn",
                "embedding_pre",
                {"in_channels": 3, "channels": (8, 16, 32), "feature": 64, "size": 32},
            ),
            teacher_recipe=_SGD_12,
            student_recipe=_SGD_12,
            augment=_SHIFT,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            teacher_weights="cifar10_resnet20.safetensors",
        ),
        Pair(
            name="cifar10-resnet",
            data="cifar10",
            teacher=Net("resnet20", "pool"),
            student=Net("resnet8", "pool"),
            teacher_recipe=_SGD_12,
            student_recipe=_SGD_12,
            augment=_SHIFT,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            teacher_weights="cifar10_resnet20.safetensors",
        ),
        Pair(
            name="cifar100-resnet",
            data="cifar100",
            teacher=Net("resnet56", "pool"),
            student=Net("resnet20", "pool"),
            teacher_recipe=_REPDISTILLER,
            student_recipe=_REPDISTILLER,
            augment=_SHIFT,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
        ),
    )
}
# Images padded with their reflection before they are cropped.
PAIRS |= {
    f"{name}-reflect": replace(
        PAIRS[name], name=f"{name}-reflect", augment=replace(_SHIFT, pad_mode="reflect")
    )
    for name in ("cifar10-small", "cifar100-resnet")
}


def load_pair_data(pair: Pair, *, probe: bool = False) -> tuple[Split, Split, int]:
    """Training split, test split and number of classes; a probe sees the first images of each only.

    Raises:
        kdrefs.data.DataError: The set is neither in the cache nor to be had; the message names the ways.
    """
    data = load_set(pair.data)
    train, test = data.train, data.test
    if probe:
        train, test = _head(train, PROBE_TRAIN), _head(test, PROBE_TEST)
    return train, test, len(data.classes)


def _head(split: Split, count: int) -> Split:
    extras = {name: values[:count] for name, values in split.extras.items()}
    return replace(split, images=split.images[:count], labels=split.labels[:count], extras=extras)


def make_batches(
    pair: Pair, split: Split, *, device: torch.device, training: bool, **options: Any
) -> Batches:
    """Batches of a pair's data with its normalisation; augmented and shuffled only for training."""
    defaults: dict[str, Any] = {"batch_size": 128 if training else 512, "shuffle": training}
    defaults["augment"] = pair.augment if training else None
    return Batches(split, device=device, mean=pair.mean, std=pair.std, **{**defaults, **options})


def labelled_subset(labels: np.ndarray, fraction: float, seed: int) -> Tensor:
    """Indices of a class-balanced random ``fraction`` of the samples, ascending; at least one a class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in np.unique(labels):
        members = torch.from_numpy(np.flatnonzero(labels == label))
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def initialised(net: Net, classes: int, seed: int, device: torch.device) -> nn.Module:
    """A freshly initialised network: the same seed gives the same weights whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(net.name, classes=classes, **net.options)
    return module.to(memory_format=torch.channels_last).to(device)


def sgd_schedule(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, *, milestones: tuple[int, ...] | None
) -> LRScheduler:
    """A tenth of the rate from each of ``milestones`` on; without any, one cycle to zero, an eighth of it warm-up."""
    if milestones is not None:
        return multistep(optimizer, milestones, steps_per_epoch=steps_per_epoch)
    total = epochs * steps_per_epoch
    return one_cycle(optimizer, total, warmup_steps=total // 8)


def train_supervised(
    module: nn.Module, batches: Batches, recipe: Recipe, *, folder: Path, max_steps: int | None = None
) -> None:
    """Train with cross-entropy, stage after stage; resumes from the checkpoints in ``folder``."""

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        logits = state["net"](batch.images).logits
        loss = F.cross_entropy(logits.float(), batch.labels)
        update(state["optimizer"], loss)
        if "schedule" in state:
            state["schedule"].step()
        return {"loss": loss.detach(), "accuracy": (logits.argmax(1) == batch.labels).float().mean()}

    fast = fused(batches.device)
    for number, (epochs, rate) in enumerate(recipe.stages):
        state: dict[str, Any] = {"net": module}
        if recipe.optimizer == "adam":
            state["optimizer"] = torch.optim.Adam(
                module.parameters(), lr=rate, weight_decay=recipe.weight_decay, **fast
            )
        else:
            state["optimizer"] = torch.optim.SGD(
                module.parameters(),
                lr=rate,
                momentum=0.9,
                nesterov=recipe.nesterov,
                weight_decay=recipe.weight_decay,
                **fast,
            )
            state["schedule"] = sgd_schedule(
                state["optimizer"], epochs, len(batches), milestones=recipe.milestones
            )
        fit(
            step,
            state,
            batches.with_seed(batches.seed + 1000 * number),
            epochs=epochs,
            checkpoint=folder / f"stage{number}.safetensors",
            precision=recipe.precision,
            max_steps=max_steps,
        )


def supervised(
    context: Context, pair: Pair, role: str, seed: int, *, recipe: Recipe | None = None, fraction: float = 1.0
) -> nn.Module:
    """The pair's teacher or student (``role``), trained with labels of a ``fraction`` of the training set.

    Trained once for each content of its configuration and found again; in eval mode.
    """
    net: Net = getattr(pair, role)
    recipe = recipe or getattr(pair, f"{role}_recipe")
    probe = context.max_steps is not None
    train, _, classes = load_pair_data(pair, probe=probe)
    module = initialised(net, classes, seed, context.device)

    def make(folder: Path) -> None:
        indices = None if fraction == 1.0 else labelled_subset(train.labels, fraction, seed)
        batches = make_batches(
            pair,
            train,
            device=context.device,
            training=True,
            seed=seed,
            batch_size=recipe.batch_size,
            indices=indices,
        )
        train_supervised(module, batches, recipe, folder=folder, max_steps=context.max_steps)
        save_weights(module, folder / "weights.safetensors")

    config = {
        "net": asdict(net), "recipe": asdict(recipe), "data": pair.data, "augment": asdict(pair.augment),
        "mean": pair.mean, "std": pair.std, "seed": seed, "fraction": fraction, "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("supervised", config, make, source=source_digest(__name__))
    return load_weights(module, folder / "weights.safetensors")


def teacher(context: Context, pair: Pair, seed: int) -> nn.Module:
    """The pair's teacher in eval mode: the committed weights where the pair has them, else trained with ``seed``."""
    if pair.teacher_weights is None:
        return supervised(context, pair, "teacher", seed)
    classes = len(load_set(pair.data).classes)
    module = initialised(pair.teacher, classes, 0, context.device)
    return load_weights(module, WEIGHTS / pair.teacher_weights)


def weights_digest(pair: Pair) -> str | None:
    """SHA-256 of the pair's committed teacher weights; None where it has none, or before they are made."""
    path = WEIGHTS / (pair.teacher_weights or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def teacher_identity(pair: Pair, seed: int) -> str:
    """What makes two runs share a teacher: the digest of its committed weights, or its recipe and seed."""
    recipe = [asdict(pair.teacher), asdict(pair.teacher_recipe), pair.data, seed]
    return weights_digest(pair) or json.dumps(recipe, sort_keys=True)


def save_weights(module: nn.Module, path: Path) -> None:
    """Parameters and buffers as one safetensors file with its digest."""
    save_tensors(path, module.state_dict())


def load_weights(module: nn.Module, path: Path) -> nn.Module:
    """Load what :func:`save_weights` wrote; returns the module in eval mode.

    Raises:
        FileNotFoundError: There is no such file.
        kdrefs.training.checkpoint.CheckpointError: The file is damaged.
    """
    tensors, _ = load_tensors(path)
    module.load_state_dict(tensors)
    return module.eval()


def representations(
    module: nn.Module, batches: Batches, *names: str, view: int | None = None
) -> dict[str, Tensor]:
    """Logits and the named features of every sample in order, in eval mode, as float32.

    Args:
        module: A network returning :class:`kdrefs.nets.Output`.
        batches: Unshuffled batches, or any batches when ``view`` is given.
        names: Feature names; ``"logits"`` is always included.
        view: Number of the fixed view to read, or None for the plain images.

    Returns:
        Name to tensor ``(samples, ...)``.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("logits", *names)}
    with evaluation_mode(module):
        for batch in batches if view is None else batches.view(view):
            output = module(batch.images)
            parts["logits"].append(output.logits.float())
            for name in names:
                parts[name].append(output.features[name].float())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def teacher_views(context: Context, pair: Pair, seed: int, views: int) -> dict[str, Tensor]:
    """The teacher's logits and feature on ``views`` fixed augmented copies of the training set.

    Returns:
        ``{"logits": (views, N, classes), "feature": (views, N, width)}``, to be given to ``Batches`` as
        ``view_extras``; computed once and kept as an artifact.
    """
    probe = context.max_steps is not None

    def make(folder: Path) -> None:
        train, _, _ = load_pair_data(pair, probe=probe)
        batches = make_batches(
            pair, train, device=context.device, training=True, batch_size=512, fixed_views=views
        )
        module = teacher(context, pair, seed)
        each = [representations(module, batches, pair.teacher.feature, view=view) for view in range(views)]
        stacked = {
            "logits": torch.stack([item["logits"] for item in each]),
            "feature": torch.stack([item[pair.teacher.feature] for item in each]),
        }
        save_tensors(folder / "views.safetensors", stacked)

    config = {
        "teacher": teacher_identity(pair, seed), "data": pair.data, "augment": asdict(pair.augment), "views": views,
        "mean": pair.mean, "std": pair.std, "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("teacher-views", config, make, source=source_digest(__name__))
    tensors, _ = load_tensors(folder / "views.safetensors")
    return {name: value.to(context.device) for name, value in tensors.items()}
