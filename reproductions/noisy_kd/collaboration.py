"""Teachers with dropout or corrupted labels, and the students of every way of putting noise into their distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.methods.noisy_kd import averaged_logits, corrupt_labels, fickle_teacher, soft_randomization_loss
from kdrefs.nets import Output
from kdrefs.nets.small import SmallCNN
from kdrefs.training import (
    as_one,
    batches_as_one,
    evaluation_mode,
    fit,
    one_cycle,
    per_member,
    update,
    write_back,
)
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    labelled_subset,
    load_pair_data,
    load_weights,
    make_batches,
    save_weights,
)

NOISE_SEED = 1_000_000  # beside which seeds of order, labels and weights are small


class DropoutCNN(SmallCNN):
    """A :class:`~kdrefs.nets.small.SmallCNN` with dropout before each of its two linear layers.

    Args:
        rate: Probability of dropping a unit.
        options: Those of the network.
    """

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.dropout = nn.Dropout(rate)

    def forward(self, images: Tensor) -> Output:
        """Classify images ``(B, in_channels, size, size)``."""
        maps = images
        for block in self.blocks:
            maps, _, _ = block(maps)
        embedding = self.embedding(self.dropout(maps.flatten(1)))
        return Output(self.classifier(self.dropout(F.relu(embedding))), {"embedding_pre": embedding})


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common.

    Attributes:
        pair: Of :data:`reproductions.protocols.pairs.PAIRS`: data, augmentation, normalisation.
        teacher: Options of the teacher's network, see :class:`~kdrefs.nets.small.SmallCNN`.
        student: Of the student's.
        teacher_epochs: SGD with momentum, one cycle to 0.
        student_epochs: Likewise.
        rate: Highest learning rate.
        test_sigma: Deviation of the noise on the test images, which are in [0, 1].
        radius: Of the attack, likewise.
        attacked: How many test images are attacked.
        passes: Answers that the averaged teacher's are the mean of.
        fraction: Of the training set, balanced over the classes.
    """

    pair: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    teacher_epochs: int
    student_epochs: int
    rate: float
    test_sigma: float
    radius: float
    attacked: int
    passes: int = 8
    fraction: float = 1.0
    batch_size: int = 128
    weight_decay: float = 5e-4
    temperature: float = 4.0
    alpha: float = 0.9
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class Guide:
    """A teacher: how it is trained."""

    dropout: float = 0.0
    label_noise: float = 0.0


@dataclass(frozen=True)
class Arm:
    """How a student is made.

    Attributes:
        guide: Its teacher; None for labels alone.
        answers: ``"plain"``, the teacher in eval mode; ``"fickle"``, with its dropout active; ``"averaged"``, the mean
            of many fickle answers.
        sigma: Deviation of the noise that the student sees, in units of [0, 1] images.
        label_noise: Share of corrupted labels.
    """

    guide: Guide | None = Guide()
    answers: Literal["plain", "fickle", "averaged"] = "plain"
    sigma: float = 0.0
    label_noise: float = 0.0


DROPOUTS, SIGMAS, LABEL_NOISES = (0.2, 0.4), (0.05, 0.1, 0.2), (0.2, 0.4)


def percent(share: float) -> str:
    """Two digits for the name of an arm: 0.05 is ``"05"``."""
    return f"{round(100 * share):02d}"


GUIDES: dict[str, Guide] = {
    "teacher": Guide(),
    **{f"teacher_d{percent(rate)}": Guide(dropout=rate) for rate in DROPOUTS},
    **{f"teacher_n{percent(rate)}": Guide(label_noise=rate) for rate in LABEL_NOISES},
}
ARMS: dict[str, Arm] = {
    "student": Arm(None),
    "kd": Arm(),
    **{
        f"{name}_d{percent(rate)}": Arm(Guide(dropout=rate), answers)  # type: ignore[arg-type]
        for rate in DROPOUTS
        for name, answers in (("kd", "plain"), ("fickle", "fickle"), ("averaged", "averaged"))
    },
    **{f"noise_{percent(sigma)}": Arm(None, sigma=sigma) for sigma in SIGMAS},
    **{f"soft_{percent(sigma)}": Arm(sigma=sigma) for sigma in SIGMAS},
    **{f"student_n{percent(rate)}": Arm(None, label_noise=rate) for rate in LABEL_NOISES},
    **{f"messy_t{percent(rate)}": Arm(Guide(label_noise=rate)) for rate in LABEL_NOISES},
    **{f"messy_s{percent(rate)}": Arm(label_noise=rate) for rate in LABEL_NOISES},
    **{f"messy_ts{percent(rate)}": Arm(Guide(label_noise=rate), label_noise=rate) for rate in LABEL_NOISES},
}


def made(options: Mapping[str, Any], rate: float, seed: int, device: torch.device) -> nn.Module:
    """A fresh network: the same seed gives the same weights, whatever its dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DropoutCNN(rate, **options).to(memory_format=torch.channels_last).to(device)


def teachers(guide: Guide, seeds: Sequence[int], recipe: Recipe, context: Context) -> list[nn.Module]:
    """The teachers of some seeds in eval mode; each is a training of its own, so that every arm finds the same."""
    found = []
    for seed in seeds:
        network = made(recipe.teacher, guide.dropout, 1000 + seed, context.device)

        def make(folder: Path, network: nn.Module = network, seed: int = seed) -> None:
            arm = Arm(None, label_noise=guide.label_noise)
            _train([network], None, arm, [1000 + seed], recipe, recipe.teacher_epochs, context, folder)
            save_weights(network, folder / "weights.safetensors")

        about = {
            "recipe": _training_of(recipe, "teacher"), "guide": asdict(guide), "seed": seed,
            "max_steps": context.max_steps,
        }  # fmt: skip
        folder = context.artifact("noisy-teacher", about, make, source=source_digest(__name__))
        found.append(load_weights(network, folder / "weights.safetensors"))
    return found


def students(arm: str, seeds: Sequence[int], recipe: Recipe, context: Context) -> list[nn.Module]:
    """The students of an arm in eval mode, each of its own seed's teacher."""
    chosen = ARMS[arm]
    networks = [made(recipe.student, 0.0, seed, context.device) for seed in seeds]

    def make(folder: Path) -> None:
        guides = None if chosen.guide is None else teachers(chosen.guide, seeds, recipe, context)
        _train(networks, guides, chosen, seeds, recipe, recipe.student_epochs, context, folder)
        for seed, network in zip(seeds, networks, strict=True):
            save_weights(network, folder / f"weights{seed}.safetensors")

    about = {
        "recipe": _training_of(recipe, "teacher", "student"), "arm": asdict(chosen), "seeds": list(seeds),
        "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("noisy-student", about, make, source=source_digest(__name__))
    return [
        load_weights(one, folder / f"weights{seed}.safetensors")
        for seed, one in zip(seeds, networks, strict=True)
    ]


def splits(recipe: Recipe, context: Context) -> tuple[Split, Split, int]:
    """Training and test images and the number of classes; a probe sees the first of each only."""
    return load_pair_data(PAIRS[recipe.pair], probe=context.max_steps is not None)


def corrupted(split: Split, rate: float, classes: int, seed: int) -> Split:
    """The split with a share of wrong labels, drawn once for a seed; those of teacher and student are drawn apart."""
    if rate == 0:
        return split
    generator = torch.Generator().manual_seed(seed)
    labels = corrupt_labels(torch.from_numpy(split.labels).long(), rate, classes, generator=generator)
    return Split(split.images, labels.numpy().astype(split.labels.dtype))


def _training_of(recipe: Recipe, *sides: str) -> dict[str, Any]:
    """What of a recipe decides the weights of teachers, or of teachers and students."""
    measured = {"test_sigma", "radius", "attacked"}
    if "student" not in sides:
        measured |= {"student", "student_epochs", "passes", "temperature", "alpha"}
    return {name: value for name, value in asdict(recipe).items() if name not in measured}


def _train(
    networks: Sequence[nn.Module],
    guides: Sequence[nn.Module] | None,
    arm: Arm,
    seeds: Sequence[int],
    recipe: Recipe,
    epochs: int,
    context: Context,
    folder: Path,
) -> None:
    """Train ``networks`` in place, one a seed, in one training if they are several."""
    pair, (split, _, classes) = PAIRS[recipe.pair], splits(recipe, context)
    order: list[Batches] = []
    for seed in seeds:
        options: dict[str, Any] = {"batch_size": recipe.batch_size, "seed": seed}
        if recipe.fraction < 1:  # of the true labels, the same images for teacher and student
            options["indices"] = labelled_subset(split.labels, recipe.fraction, seed % 1000)
        labelled = corrupted(split, arm.label_noise, classes, seed)
        order.append(make_batches(pair, labelled, device=context.device, training=True, **options))
    total = epochs * len(order[0])
    one = as_one(networks)
    guide = None if guides is None else as_one(guides)
    optimizer = torch.optim.SGD(
        one.parameters(),
        lr=recipe.rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        **fused(context.device),
    )
    state: dict[str, Any] = {
        "network": one.train(),
        "optimizer": optimizer,
        "schedule": one_cycle(optimizer, total, warmup_steps=total // 8),
    }
    for k, seed in enumerate(seeds):
        state[f"noise{k}"] = torch.Generator(context.device).manual_seed(NOISE_SEED + seed)
    deviation = arm.sigma / torch.tensor(pair.std, device=context.device).view(-1, 1, 1)
    loss = per_member(_loss(arm, recipe), one)

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        assert batch.labels is not None
        images = batch.images
        if arm.sigma:
            images = images + deviation * _normal(state, images, len(networks))
        logits = state["network"](images).logits.float()
        answers = logits if guide is None else answer(guide, batch.images, arm, recipe).detach()
        losses = loss(logits, answers, batch.labels)
        update(state["optimizer"], losses.sum())
        state["schedule"].step()
        return {"loss": losses.detach().mean()}

    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        torch.manual_seed(seeds[0])  # of dropout
        fit(
            step,
            state,
            batches_as_one(order),
            epochs=epochs,
            checkpoint=folder / "training.safetensors",
            precision=recipe.precision,
            max_steps=context.max_steps,
            progress=context.progress,
        )
    write_back(one, networks)


def answer(guide: nn.Module, images: Tensor, arm: Arm, recipe: Recipe) -> Tensor:
    """What a teacher, or one teacher a member, says of clean images: float32 logits ``(..., batch, classes)``."""
    if arm.answers == "plain":
        with evaluation_mode(guide):
            return guide(images).logits.float()
    with fickle_teacher(guide), torch.no_grad():
        if arm.answers == "fickle":
            return guide(images).logits.float()
        every = torch.stack([guide(images).logits.float() for _ in range(recipe.passes)])
        return averaged_logits(every, recipe.temperature)


def _normal(state: Mapping[str, Any], images: Tensor, members: int) -> Tensor:
    """Standard normal numbers of the shape of ``images``, each member's from a generator of its own."""
    options: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
    shape = images.shape if members == 1 else images.shape[1:]
    drawn = [torch.randn(shape, generator=state[f"noise{k}"], **options) for k in range(members)]
    return drawn[0] if members == 1 else torch.stack(drawn)


def _loss(arm: Arm, recipe: Recipe) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        if arm.guide is None:
            return F.cross_entropy(logits, labels)
        return soft_randomization_loss(
            logits, answers, labels, temperature=recipe.temperature, alpha=recipe.alpha
        )

    return loss
