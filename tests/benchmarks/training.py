"""Batches, training steps and trainings beside plain loops, on random images of CIFAR-10's size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Augment, Batch, Batches
from kdrefs.methods.ft import Paraphraser, factor_channels
from kdrefs.methods.kd import kd_loss
from kdrefs.methods.ksanc import AttentionEstimator
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import fit, update
from kdrefs.training.optimizers import fused
from kdrefs.training.schedules import multistep
from kdrefs.training.seeds import MemberBatches, Members, each
from reproductions.ab import run as ab
from reproductions.at import run as at
from reproductions.fitnets import run as fitnets
from reproductions.ft import run as ft
from reproductions.jacobian_matching import few_images
from reproductions.jacobian_matching import run as jacobian_matching
from reproductions.ksanc import run as ksanc
from reproductions.ksanc import squeezing
from reproductions.ksanc import training as ksanc_training
from reproductions.logit_regression import run as logit_regression
from reproductions.nst import run as nst
from reproductions.pkt import run as pkt
from reproductions.protocols import joint
from reproductions.protocols.pairs import PAIRS, Net, initialised
from reproductions.protocols.rows import BASELINES, Method
from reproductions.protocols.tables import CIFAR10, DIGITS
from reproductions.quest import run as quest
from tests.benchmarks import references
from tests.benchmarks.case import Case, Contest, assert_agree, at_least

BATCH, STEPS, CLASSES = 128, 4, 10
IMAGES = BATCH * STEPS
RATE = 1e-3  # small: steps are repeated until the time is over, on labels that mean nothing
PAIR = PAIRS[CIFAR10.pair]


def random_set(shape: tuple[int, ...] = (32, 32, 3), images: int = IMAGES) -> dict[str, np.ndarray]:
    """Images ``(N, *shape)`` and labels."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 256, (images, *shape), dtype=np.uint8)
    return {"images": drawn, "labels": generator.integers(0, CLASSES, images)}


def batches_of(data: dict[str, np.ndarray], device: torch.device, **options: Any) -> Batches:
    """Batches of CIFAR-10's normalisation."""
    return Batches(data, batch_size=BATCH, mean=PAIR.mean, std=PAIR.std, device=device, **options)


def plain_batches(data: dict[str, np.ndarray], order: Tensor) -> Callable[[], Any]:
    """The same images as floats in memory, channels first, batches in a given order."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PAIR.mean, PAIR.std))
    images = (torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    images, labels = images.contiguous().to(order.device), torch.from_numpy(data["labels"]).to(order.device)
    return lambda: references.slices(images, labels, order, BATCH)


def sgd(modules: Any) -> torch.optim.Optimizer:
    """The shared table's optimiser."""
    trained = [parameter for module in modules for parameter in module.parameters()]
    options = fused(trained[0].device)
    return torch.optim.SGD(trained, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4, **options)


def settled(net: Net, images: Tensor) -> nn.Module:
    """An untrained teacher whose batch normalisation has seen images."""
    teacher = initialised(net, CLASSES, 0, images.device).train()
    with torch.no_grad():
        teacher(images)
    return teacher.eval().requires_grad_(False)


# Batches


def input_contest(device: torch.device) -> Contest:
    """Crop, flip, normalise, batch: an epoch."""
    data = random_set(images=4096)
    labels = torch.from_numpy(data["labels"])
    augmented = batches_of(data, device, augment=Augment(flip=True, crop=4))
    options = {"mean": PAIR.mean, "std": PAIR.std, "batch_size": BATCH}
    loader = references.per_image_loader(data["images"], labels, **options)

    def check() -> None:
        head = {name: values[:256] for name, values in data.items()}
        plain = references.per_image_loader(head["images"], labels, **options, augment=False)
        for batch, (images, _) in zip(batches_of(head, device, shuffle=False), plain, strict=True):
            assert_agree([batch.images.cpu()], [images], 1e-6)

    return Contest(
        lambda: sum(len(batch) for batch in augmented.epoch(0)),
        lambda: sum(len(chosen) for _, chosen in loader),
        check,
        images=4096,
    )


# The training step


def supervised_step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy."""
    loss = F.cross_entropy(state["student"](batch.images).logits, batch.labels)
    update(state["optimizer"], loss)
    return {"loss": loss.detach()}


def distillation_step(teacher: nn.Module | None, state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
    """KD from a teacher, or from its logits that come with the batch."""
    targets = batch.extras.get("logits")
    if teacher is not None:
        with torch.no_grad():
            targets = teacher(batch.images).logits
    loss = kd_loss(state["student"](batch.images).logits, targets, batch.labels)
    update(state["optimizer"], loss)
    return {"loss": loss.detach()}


def training_contest(
    step: Callable[..., Any],
    batches: Batches,
    plain: Callable[[], Any],
    device: torch.device,
    *,
    teacher: nn.Module | None = None,
    alike: bool = True,
    **options: Any,
) -> Contest:
    """An epoch of ``fit`` beside an epoch of a plain loop, from equal weights."""
    first = initialised(PAIR.student, CLASSES, 0, device).train()
    second = copy.deepcopy(first).to(memory_format=torch.contiguous_format)
    before = flat(first)
    state = {"student": first, "optimizer": sgd([first])}
    optimizer = sgd([second])

    def ours() -> Any:
        return fit(step, state, batches, epochs=1, progress=False, **options)

    def theirs() -> Any:
        return references.train(second, optimizer, plain(), teacher)

    def check() -> None:
        ours(), theirs()
        assert_agree([flat(first) - before], [flat(second) - before], 1e-2)

    return Contest(ours, theirs, check if alike else None, images=IMAGES)


def flat(module: nn.Module) -> Tensor:
    """All parameters in a row."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def student_contest(device: torch.device, **options: Any) -> Contest:
    """Images that lie in memory."""
    data = random_set()
    batches = batches_of(data, device)
    order = torch.cat([batch.indices for batch in batches.epoch(0)])
    return training_contest(supervised_step, batches, plain_batches(data, order), device, **options)


def augmented_contest(device: torch.device) -> Contest:
    """Augmented images: here whole batches, there one after the other."""
    data = random_set()
    batches = batches_of(data, device, augment=PAIR.augment)
    loader = references.per_image_loader(
        data["images"], torch.from_numpy(data["labels"]), PAIR.mean, PAIR.std, batch_size=BATCH
    )

    def plain() -> Any:
        return ((images.to(device), labels.to(device)) for images, labels in loader)

    # Both draw their own crops, so the weights cannot agree; inputs and steps are checked by themselves.
    return training_contest(supervised_step, batches, plain, device, alike=False)


def kd_contest(cached: bool, device: torch.device) -> Contest:
    """Distillation from a teacher that is run on every batch, or was asked once about a fixed view."""
    data = random_set()
    batches = batches_of(data, device, fixed_views=1)
    teacher = settled(PAIR.teacher, next(iter(batches)).images)
    step = partial(distillation_step, None if cached else fold_batchnorm(teacher))
    order = torch.cat([batch.indices for batch in batches.epoch(0)])
    if cached:
        with torch.no_grad():
            logits = torch.cat([teacher(batch.images).logits for batch in batches.view(0)])
        batches = batches.with_extras(view_extras={"logits": logits.unsqueeze(0)})
    plain_teacher = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format)
    return training_contest(step, batches, plain_batches(data, order), device, teacher=plain_teacher)


def folded_contest(device: torch.device) -> Contest:
    """A frozen teacher's forward pass."""
    images = next(iter(batches_of(random_set(), device))).images
    teacher = settled(PAIR.teacher, images)
    plain, folded = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format), fold_batchnorm(teacher)
    contiguous = images.contiguous()

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return module(batch).logits

    one, other = partial(forward, folded, images), partial(forward, plain, contiguous)
    return Contest(one, other, lambda: assert_agree([one()], [other()]), images=BATCH)


# The shared table

ROWS: dict[str, Method] = {
    **{name: BASELINES[name] for name in ("student", "kd")},
    **{name: fitnets.methods("cifar10")[name] for name in fitnets.ROWS},
    **{name: at.methods("cifar10")[name] for name in at.ROWS},
    **{name: nst.methods("cifar10")[name] for name in nst.ROWS},
    **{name: logit_regression.METHODS[name] for name in logit_regression.ROWS},
    **{name: ab.methods("cifar10")[name] for name in ab.ROWS},
    "ft": ft.method("cifar10", "ft", Paraphraser(64, factor_channels(64, 0.5)).eval()),
    "pkt": pkt.row("cifar10-table"),
    "quest": quest.method(
        "cifar10", {0: torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}, 0.1
    ),
}


def row_training(method: Method, device: torch.device) -> Callable[[], Any]:
    """Steps of a row of the shared table as it trains: bf16, teacher asked beforehand, phases in their shares."""
    training = CIFAR10
    batches = batches_of(random_set(), device, augment=PAIR.augment, fixed_views=1)
    teacher = settled(PAIR.teacher, next(iter(batches)).images)
    answers = [joint.targets_of(teacher, b.images, b.labels, method) for b in batches.view(0)]
    targets = {name: torch.cat([one[name] for one in answers]) for name in method.targets}
    stored = {name: (v.half() if v.ndim > 2 else v.float()).unsqueeze(0) for name, v in targets.items()}
    batches = batches.with_extras(view_extras=stored)
    student = initialised(PAIR.student, CLASSES, 0, device)
    state: dict[str, Any] = {"student": student.train()}
    if method.regressors is not None:
        shapes = joint._shapes(student, None, batches, method)
        made = joint._regressors(method, shapes, 0, SimpleNamespace(device=device))
        state |= {f"regressor_{name}": module for name, module in made.items()}
    state |= {"optimizer": sgd(state.values()), "done": 0}
    state["schedule"] = multistep(state["optimizer"], (10**9,), steps_per_epoch=1)
    phases = [
        (joint._step(phase.loss, method, None, total=10**9), round(phase.share * STEPS))
        for phase in method.phases
    ]

    def call() -> None:
        for step, count in phases:
            fit(step, state, batches, epochs=1, max_steps=count, precision=training.precision, progress=False)

    return call


def row_contest(arm: str, device: torch.device) -> Contest:
    """A row's steps beside those of the student that learns from labels alone."""
    return Contest(row_training(ROWS[arm], device), row_training(ROWS["student"], device), images=IMAGES)


def squeezed_training(device: torch.device) -> Callable[[], Any]:
    """Steps of KSANC, whose discriminator has updates of its own; the teacher is asked beforehand."""
    arm = ksanc.ARMS["ksanc"]
    batches = batches_of(random_set(), device, augment=PAIR.augment, fixed_views=1)
    teacher = settled(PAIR.teacher, next(iter(batches)).images)
    layers, outputs = squeezing.layers_of(CIFAR10)[1], {"layer1": 16, "layer2": 32, "layer3": 64}
    torch.manual_seed(0)
    estimators = [
        AttentionEstimator(outputs[name], 64, values=arm.reading).to(device) for name in layers.maps
    ]
    guide = squeezing.Guide(teacher, squeezing.Squeezer(estimators), layers).eval()
    with torch.no_grad():
        answers = [guide(batch.images) for batch in batches.view(0)]
    stored = {name: torch.cat([one[name] for one in answers])[None] for name in answers[0]}
    batches = batches.with_extras(view_extras=stored)
    student = initialised(PAIR.student, CLASSES, 0, device)
    own = squeezing.student_squeezer(arm.reading, 64, (8, 16, 32), tuple(outputs.values()), 0).to(device)
    found = [ksanc_training.Trained(student, own)]
    slow = replace(CIFAR10, rate=RATE, milestones=(10**9,))
    state = ksanc_training.prepared(found, arm, slow, (0,), STEPS, CLASSES, device)
    step = ksanc_training.step_of(arm, slow, None)
    return lambda: fit(step, state, batches, epochs=1, precision=CIFAR10.precision, progress=False)


def squeezed_contest(device: torch.device) -> Contest:
    """KSANC's steps beside those of the student that learns from labels alone."""
    return Contest(squeezed_training(device), row_training(ROWS["student"], device), images=IMAGES)


# Jacobian matching

FEW = jacobian_matching.PROFILES["standard"].recipe


def few_training(arm: str, probes: int, device: torch.device) -> Callable[[], Any]:
    """Steps of an arm of the column; what it knows of the teacher are numbers of the right shape."""
    recipe = replace(FEW, probes=probes)
    generator = torch.Generator().manual_seed(0)
    known = {
        "logits": torch.randn(IMAGES, CLASSES, generator=generator),
        "jacobian": torch.randn(IMAGES, CLASSES, 3, 32, 32, generator=generator).half(),
    }
    batches = Batches(
        random_set(), batch_size=recipe.batch_size, mean=PAIR.mean, std=PAIR.std, device=device, extras=known
    )
    torch.manual_seed(0)
    student = few_images.StridedNet(3, 32, CLASSES, recipe.channels).to(memory_format=torch.channels_last)
    state: dict[str, Any] = {"student": student.to(device)}
    state["optimizer"] = torch.optim.Adam(student.parameters(), lr=RATE, **fused(device))
    state["schedule"] = multistep(state["optimizer"], (10**9,), steps_per_epoch=1)
    state["draws_0"] = torch.Generator(device).manual_seed(0)
    step = few_images._step(few_images.ARMS[arm], recipe, None)
    return lambda: fit(step, state, batches, epochs=1, progress=False)


def few_contest(arm: str, probes: int, device: torch.device) -> Contest:
    """An arm's steps beside those from labels alone."""
    return Contest(few_training(arm, probes, device), few_training("student", 1, device), images=IMAGES)


# Many seeds in one training


def seeds_contest(count: int, device: torch.device) -> Contest:
    """The digits' student of the shared table."""
    assert DIGITS.student is not None
    base = Batches(random_set((8, 8, 1)), batch_size=BATCH, mean=(0.5,), std=(0.5,), device=device)
    sets = [base.with_seed(seed) for seed in range(count)]
    singles = [initialised(DIGITS.student, CLASSES, seed, device).train() for seed in range(count)]
    members = Members(singles)
    before = [flat(single) for single in singles]

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        losses = each(F.cross_entropy)(state["student"](batch.images).logits, batch.labels)
        update(state["optimizer"], losses.sum())
        return {"loss": losses.detach().mean()}

    together = {"student": members, "optimizer": sgd([members])}
    alone = [{"student": single, "optimizer": sgd([single])} for single in singles]

    def ours() -> None:
        fit(step, together, MemberBatches(sets), epochs=1, progress=False)

    def theirs() -> None:
        for state, batches in zip(alone, sets, strict=True):
            fit(supervised_step, state, batches, epochs=1, progress=False)

    def check() -> None:
        ours(), theirs()
        for one, other, start in zip(members.unstacked(), singles, before, strict=True):
            assert_agree([flat(one) - start], [flat(other) - start], 1e-2)

    return Contest(ours, theirs, check, images=IMAGES * count)


SIZE = f"B {BATCH}"
BATCHES = [
    Case("Batches", "crop, flip, normalise", SIZE, input_contest, (at_least(8.0),), cuda=False),
]
TRAINING = [
    Case("Training", "student", SIZE, student_contest, weight=2),
    Case(
        "Training",
        "student, bf16",
        SIZE,
        partial(student_contest, alike=False, precision="bf16"),
        weight=2,
    ),
    Case("Training", "student, augmented images", SIZE, augmented_contest, weight=2),
    Case("Training", "KD, teacher on every batch", SIZE, partial(kd_contest, False), weight=2),
    Case("Training", "KD, teacher asked once", SIZE, partial(kd_contest, True), weight=2),
    Case("Training", "teacher's forward pass, folded", SIZE, folded_contest),
]
TABLE = [
    *(
        Case("Shared table", arm, SIZE, partial(row_contest, arm), comparison="cost", weight=2)
        for arm in ROWS
    ),
    Case("Shared table", "ksanc", SIZE, squeezed_contest, comparison="cost", weight=2),
]
JACOBIANS = [
    Case(
        "Jacobian matching",
        name,
        f"B {FEW.batch_size}",
        partial(few_contest, arm, probes),
        comparison="cost",
    )
    for name, arm, probes in (
        ("top class", "jacobian_top", 1),
        ("one random direction", "jacobian", 1),
        ("ten random directions", "jacobian", 10),
        ("outputs and one direction", "both", 1),
    )
]
SEEDS = [
    Case("Seeds in one", f"{count} digits students", SIZE, partial(seeds_contest, count)) for count in (5, 10)
]
