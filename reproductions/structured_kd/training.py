"""Teachers and students of dense prediction: what an arm adds to the labels, how it trains, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch
from kdrefs.methods.structured_kd import (
    Beta,
    HolisticDiscriminator,
    discriminator_objective,
    pairwise_loss,
    pixelwise_loss,
)
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import evaluation_mode, fit, one_cycle, update
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.dense import (
    Scenes,
    dense_batches,
    dense_outputs,
    initial_unet,
    load_scenes,
    segmentation_scores,
)
from reproductions.protocols.pairs import load_weights, save_weights

FEATURE = "up1"  # the last maps before the classifier


@dataclass(frozen=True)
class Arm:
    """What a student learns beside the labels.

    Attributes:
        pixel: Weight of the pixel-wise loss.
        pair: Of the pair-wise loss.
        holistic: Of the discriminator's answer on the student's map.
        alpha: Connection range of the affinity graph, None for all nodes.
        beta: Its granularity; None: the recipe's, or the variant's own.
        pixel_variant: Of the pixel-wise loss.
        pair_variant: Of the pair-wise loss.
        conditional: Whether the discriminator sees the image.
    """

    pixel: float = 0.0
    pair: float = 0.0
    holistic: float = 0.0
    alpha: int | None = None
    beta: Beta | None = None
    pixel_variant: str | None = None
    pair_variant: str | None = None
    conditional: bool = True


# Weights of the paper's total loss: 10 for the first two terms, 0.1 for the third.
_BOTH = Arm(pixel=10.0, pair=10.0)
ARMS: Mapping[str, Arm] = {
    "student": Arm(),
    "pi": Arm(pixel=10.0),
    "pi_pa": _BOTH,
    "pi_pa_ho": replace(_BOTH, holistic=0.1),
    "pi_double": Arm(pixel=20.0),
    "pi_pa_ho_plain": replace(_BOTH, holistic=0.1, conditional=False),
    "pi_pa_near": replace(_BOTH, alpha=25),
    "pi_pa_coarse": replace(_BOTH, beta=64),
    "pi_pa_official": replace(_BOTH, pair_variant="official"),
    "pi_printed": Arm(pixel=10.0, pixel_variant="printed"),
}


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common: Adam, one cycle.

    Attributes:
        scenes: The images.
        teacher: Widths of the teacher's U-Net.
        student: Of the student's.
        teacher_epochs: Epochs of the teacher.
        epochs: Of the students.
        rate: Highest learning rate of teacher and students.
        batch_size: Of both.
        beta: Granularity of the affinity graph, of training and measurement.
        discriminator_width: Channels of its first block.
        discriminator_blocks: How often it halves the map; at least 4 pixels are left.
        discriminator_attention: After how many of them there is self-attention.
        discriminator_rate: Learning rate of the discriminator's Adam.
    """

    scenes: Scenes
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    teacher_epochs: int
    epochs: int
    rate: float
    batch_size: int = 16
    beta: Beta = 4
    discriminator_width: int = 8
    discriminator_blocks: int = 2
    discriminator_attention: int = 1
    discriminator_rate: float = 3e-5  # chosen by `reproductions.structured_kd.choose`

    @property
    def asked_once(self) -> bool:
        """Whether the teacher answers beforehand, as it can where images do not move."""
        return not (self.scenes.flip or self.scenes.crop) and self.scenes.train <= 1000


def teacher_of(recipe: Recipe, seed: int, context: Context) -> nn.Module:
    """The teacher of a seed, trained with labels once and found again; in eval mode."""
    about = {
        "scenes": asdict(recipe.scenes), "widths": recipe.teacher, "epochs": recipe.teacher_epochs,
        "rate": recipe.rate, "batch_size": recipe.batch_size, "seed": seed,
    }  # fmt: skip
    net = _initial(recipe, recipe.teacher, seed, context)

    def make(folder: Path) -> None:
        _train(net, None, Arm(), recipe, recipe.teacher_epochs, seed, context, folder)
        save_weights(net, folder / "weights.safetensors")

    folder = context.artifact("segmentation-teacher", about, make, source=source_digest(__name__))
    return load_weights(net, folder / "weights.safetensors")


def student_of(arm: str, recipe: Recipe, seed: int, context: Context) -> nn.Module:
    """The student of an arm and a seed, trained once and found again; in eval mode."""
    about = {"arm": asdict(ARMS[arm]), "recipe": asdict(recipe), "seed": seed}
    net = _initial(recipe, recipe.student, seed, context)

    def make(folder: Path) -> None:
        guide = None if arm == "student" else teacher_of(recipe, seed, context)
        _train(net, guide, ARMS[arm], recipe, recipe.epochs, seed, context, folder)
        save_weights(net, folder / "weights.safetensors")

    folder = context.artifact("segmentation-student", about, make, source=source_digest(__name__))
    return load_weights(net, folder / "weights.safetensors")


def evaluate(net: nn.Module, guide: nn.Module, recipe: Recipe, context: Context) -> dict[str, float]:
    """A network on the test images, and how far its maps and affinities are from the teacher's."""
    _, test, classes = load_scenes(recipe.scenes, probe=context.max_steps is not None)
    batches = dense_batches(recipe.scenes, test, context.device, training=False)
    found, known = (dense_outputs(one, batches, FEATURE) for one in (net, guide))
    predicted = found["logits"].argmax(1)
    masks = torch.from_numpy(test.extras["masks"]).long().to(context.device)
    parts = zip(found[FEATURE].split(16), known[FEATURE].split(16), strict=True)
    error = sum(len(s) * pairwise_loss(s, t, beta=recipe.beta).item() for s, t in parts)
    return {
        **segmentation_scores(predicted, masks, len(classes)),
        "agreement": 100 * (predicted == known["logits"].argmax(1)).double().mean().item(),
        "cross_entropy": F.cross_entropy(found["logits"], masks).item(),
        "divergence": pixelwise_loss(found["logits"], known["logits"]).item(),
        "affinity_error": 100 * error / len(test),
    }


def _initial(recipe: Recipe, widths: tuple[int, ...], seed: int, context: Context) -> nn.Module:
    classes = len(load_scenes(recipe.scenes, probe=True)[2])
    return initial_unet(classes, widths, seed, context.device)


def _train(
    net: nn.Module,
    guide: nn.Module | None,
    arm: Arm,
    recipe: Recipe,
    epochs: int,
    seed: int,
    context: Context,
    folder: Path,
) -> None:
    """Train ``net`` in place; resumes from the checkpoint in ``folder``."""
    train, _, classes = load_scenes(recipe.scenes, probe=context.max_steps is not None)
    batches = dense_batches(
        recipe.scenes,
        train,
        context.device,
        training=True,
        batch_size=recipe.batch_size,
        seed=seed,
        drop_last=True,
    )
    fast = fused(context.device)
    if guide is not None:
        guide = fold_batchnorm(guide)
        if recipe.asked_once:
            plain = dense_batches(recipe.scenes, train, context.device, training=False)
            batches, guide = batches.with_extras(dense_outputs(guide, plain, FEATURE)), None
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.rate, **fast)
    state: dict[str, Any] = {"net": net.train(), "optimizer": optimizer}
    total = epochs * len(batches)
    state["schedule"] = one_cycle(optimizer, total, warmup_steps=total // 8)
    if arm.holistic:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state["discriminator"] = HolisticDiscriminator(
                len(classes),
                image_channels=3 if arm.conditional else None,
                width=recipe.discriminator_width,
                blocks=recipe.discriminator_blocks,
                attention=recipe.discriminator_attention,
            ).to(context.device)
        state["discriminator_optimizer"] = torch.optim.Adam(
            state["discriminator"].parameters(), lr=recipe.discriminator_rate, betas=(0.5, 0.999), **fast
        )
        state["draws"] = torch.Generator(context.device).manual_seed(seed)
    fit(
        _step(arm, recipe, guide),
        state,
        batches,
        epochs=epochs,
        checkpoint=folder / "training.safetensors",
        max_steps=context.max_steps,
        progress=context.progress,
    )


def _step(
    arm: Arm, recipe: Recipe, guide: nn.Module | None
) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    """First the student's step, then the discriminator's on the same maps, as in the authors' code."""
    beta = recipe.beta if arm.beta is None and arm.pair_variant is None else arm.beta

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        assert batch.masks is not None
        known = batch.extras
        if guide is not None:
            with evaluation_mode(guide):
                output = guide(batch.images)
            known = {"logits": output.logits, FEATURE: output.features[FEATURE]}
        output = state["net"](batch.images)
        loss = F.cross_entropy(output.logits, batch.masks.long())
        seen = {}
        if arm.pixel:
            seen["pixel"] = pixelwise_loss(output.logits, known["logits"], variant=arm.pixel_variant)
            loss = loss + arm.pixel * seen["pixel"]
        if arm.pair:
            maps = output.features[FEATURE]
            seen["pair"] = pairwise_loss(
                maps, known[FEATURE], alpha=arm.alpha, beta=beta, variant=arm.pair_variant
            )
            loss = loss + arm.pair * seen["pair"]
        if not arm.holistic:
            update(state["optimizer"], loss)
        else:
            judge, images = state["discriminator"], batch.images if arm.conditional else None
            # To the student it is a fixed function, of one map at a time.
            judge.requires_grad_(False).eval()
            loss = loss - arm.holistic * judge(output.logits, images).mean()
            update(state["optimizer"], loss)
            judge.requires_grad_(True).train()
            shares = torch.rand(len(batch), generator=state["draws"], device=batch.images.device)
            seen["discriminator"] = discriminator_objective(
                judge, output.logits, known["logits"], images, shares
            )
            update(state["discriminator_optimizer"], seen["discriminator"])
        state["schedule"].step()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in seen.items()}}

    return step
