"""Groups of networks that train together: the arms, their training, and what is measured on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.flop_counter import FlopCounterMode

from kdrefs.data.batches import Batch, Batches
from kdrefs.methods.afd import Discriminators, TransferLayers, train_afd
from kdrefs.metrics import accuracy
from kdrefs.training import Members, as_one, batches_as_one, evaluation_mode, write_back
from kdrefs.training.optimizers import fused
from reproductions.afd.monitors import channel_gap, linear_cka, mean_cosine
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    initialised,
    labelled_subset,
    load_pair_data,
    load_weights,
    make_batches,
    representations,
    save_weights,
    sgd_schedule,
)

WATCHED = 256  # training images on which maps are compared after each epoch


@dataclass(frozen=True)
class Arm:
    """What networks of a group learn from each other."""

    matching: Literal["adversarial", "l1"] | None = None
    mutual: float = 1.0
    scheme: str = "cycle"
    update: Literal["alternating", "simultaneous"] = "alternating"


ARMS = {
    "independent": Arm(mutual=0.0),
    "dml": Arm(),
    "l1": Arm(matching="l1"),
    "afd": Arm(matching="adversarial"),
    "afd_simultaneous": Arm(matching="adversarial", update="simultaneous"),
    "afd_pairwise": Arm(matching="adversarial", scheme="pairwise"),
}


@dataclass(frozen=True)
class Recipe:
    """How a group is trained: SGD with momentum on the predictions, Adam on the maps and the discriminators."""

    pair: str  # of `reproductions.protocols.pairs`: data and augmentation
    epochs: int
    rate: float
    ramp: float  # share of the training in which the weight of the divergence grows
    adversarial_rate: float
    l1_rate: float  # of the second step, where it minimises the distance of the maps instead
    discriminator_rate: float = 1e-3
    temperature: float = 3.0
    batch_size: int = 128
    weight_decay: float = 5e-4
    fraction: float = 1.0  # of the training set, balanced over the classes
    precision: Literal["float32", "bf16"] = "float32"


@dataclass(frozen=True)
class Group:
    """Networks that train together; ``data`` is the third part of their keys."""

    data: str
    nets: tuple[Net, ...]  # ``feature`` names the last feature map
    arms: tuple[str, ...]
    first: int | None = None  # how many of the profile's seeds it gets; None: all


@dataclass(frozen=True)
class Trained:
    """A group after training: network by network and seed by seed, in eval mode, and what was watched."""

    networks: tuple[tuple[nn.Module, ...], ...]
    history: dict[int, dict[str, list[float]]]  # by seed: name to one value an epoch


def trained(group: Group, recipe: Recipe, arm: str, seeds: Sequence[int], context: Context) -> Trained:
    """The networks of a group under an arm, trained once for each content of its configuration."""
    networks = initial_networks(group, recipe, seeds, context)

    def make(folder: Path) -> None:
        history = train(networks, group, recipe, arm, seeds, context, folder)
        (folder / "history.json").write_text(json.dumps(history))
        for k, members in enumerate(networks):
            for seed, network in zip(seeds, members, strict=True):
                save_weights(network, folder / f"network{k}-{seed}.safetensors")

    about = {
        "nets": [asdict(net) for net in group.nets], "recipe": asdict(recipe), "arm": asdict(ARMS[arm]),
        "pair": asdict(PAIRS[recipe.pair]), "seeds": list(seeds), "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("afd", about, make, source=source_digest(__name__))
    history = json.loads((folder / "history.json").read_text())
    for k, members in enumerate(networks):
        for seed, network in zip(seeds, members, strict=True):
            load_weights(network, folder / f"network{k}-{seed}.safetensors")
    return Trained(tuple(map(tuple, networks)), {seed: history[str(seed)] for seed in seeds})


def train(
    networks: Sequence[Sequence[nn.Module]],
    group: Group,
    recipe: Recipe,
    arm: str,
    seeds: Sequence[int],
    context: Context,
    folder: Path,
    *,
    indices: Tensor | None = None,
) -> dict[int, dict[str, list[float]]]:
    """Train ``networks[k][seed]`` in place; several seeds share one training.

    Args:
        networks: Network by network and seed by seed.
        group: What they are.
        recipe: How they are trained.
        arm: Name in :data:`ARMS`.
        seeds: Of batch order, augmentation, transfer layers and discriminators.
        context: What the harness gives.
        folder: Where the checkpoint goes.
        indices: Training images to use; default: the recipe's fraction.

    Returns:
        By seed, what was watched: name to one value an epoch.
    """
    pair, chosen = PAIRS[recipe.pair], ARMS[arm]
    split, _, _ = load_pair_data(pair, probe=context.max_steps is not None)
    device = context.device
    shapes = map_shapes([one[0] for one in networks], group, batch_of(recipe, device))
    transfers, discriminators = zip(
        *(_adversaries(shapes, chosen.scheme, seed, device) for seed in seeds), strict=True
    )
    members = []
    for seed in seeds:
        subset = indices
        if indices is None and recipe.fraction < 1:
            subset = labelled_subset(split.labels, recipe.fraction, seed)
        options = {"seed": seed, "batch_size": recipe.batch_size, "indices": subset}
        members.append(make_batches(pair, split, device=device, training=True, **options))
    batches = batches_as_one(members)
    plain = make_batches(pair, split, device=device, training=False, batch_size=WATCHED)
    images = next(iter(plain.epoch(0))).images
    assert images is not None
    nets = [as_one(one) for one in networks]
    history = train_afd(
        nets,
        batches,
        features=[net.feature for net in group.nets],
        epochs=recipe.epochs,
        transfers=as_one(transfers),
        discriminators=as_one(discriminators),
        evaluate=partial(_watch, len(group.nets), [net.feature for net in group.nets], images),
        checkpoint=folder / "training.safetensors",
        precision=recipe.precision,
        max_steps=context.max_steps,
        progress=context.progress,
        **settings(recipe, arm, len(batches), device),
    )
    for one, net in zip(networks, nets, strict=True):
        write_back(net, one)
    epochs = [a | b for a, b in zip(history.epochs, history.evaluations, strict=True)]
    return {seed: _of_member(epochs, m, len(seeds)) for m, seed in enumerate(seeds)}


def settings(recipe: Recipe, arm: str, steps_per_epoch: int, device: torch.device) -> dict[str, Any]:
    """The arguments of :func:`kdrefs.methods.afd.train_afd` that an arm and a recipe decide."""
    chosen, fast = ARMS[arm], fused(device)

    def schedule(optimizer: Optimizer) -> LRScheduler:
        return sgd_schedule(optimizer, recipe.epochs, steps_per_epoch, milestones=None)

    second = recipe.l1_rate if chosen.matching == "l1" else recipe.adversarial_rate
    return {
        "optimizer": partial(
            torch.optim.SGD,
            lr=recipe.rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            **fast,
        ),
        "adversarial_optimizer": partial(torch.optim.Adam, lr=second, **fast),
        "discriminator_optimizer": partial(torch.optim.Adam, lr=recipe.discriminator_rate, **fast),
        "schedule": schedule,
        "temperature": recipe.temperature,
        "ramp": recipe.ramp,
        **asdict(chosen),
    }


def evaluate(networks: Sequence[nn.Module], recipe: Recipe, context: Context) -> dict[str, float]:
    """Test accuracy in percent of each network, of their mean, and of the ensemble of their probabilities."""
    pair = PAIRS[recipe.pair]
    _, test, _ = load_pair_data(pair, probe=context.max_steps is not None)
    return scores(networks, make_batches(pair, test, device=context.device, training=False), test.labels)


def scores(networks: Sequence[nn.Module], batches: Batches, labels: Any) -> dict[str, float]:
    """Accuracies in percent on unshuffled ``batches`` with these ``labels``."""
    logits = [representations(network, batches)["logits"] for network in networks]
    wanted = torch.as_tensor(labels).long().to(logits[0].device)
    found = {f"accuracy{k + 1}": 100 * accuracy(one, wanted) for k, one in enumerate(logits)}
    together = torch.stack([one.softmax(1) for one in logits]).mean(0)
    return {
        "accuracy": sum(found.values()) / len(found),
        "ensemble": 100 * accuracy(together, wanted),
    } | found


def cost(group: Group, recipe: Recipe, arm: str) -> dict[str, float]:
    """What a step needs: its operations in MFLOP an image, counted, and the discriminators that it trains.

    Discriminators that only watch are left out.
    """
    device, chosen = torch.device("cpu"), ARMS[arm]
    batch = batch_of(recipe, device)
    networks = [initialised(net, 10, k, device) for k, net in enumerate(group.nets)]
    shapes = map_shapes(networks, group, batch)
    transfers, discriminators = _adversaries(shapes, chosen.scheme, 0, device)
    adversarial = chosen.matching == "adversarial"
    with FlopCounterMode(display=False) as counter:
        train_afd(
            networks,
            _One(batch),
            features=[net.feature for net in group.nets],
            epochs=1,
            transfers=None if chosen.matching is None else transfers,
            discriminators=discriminators if adversarial else None,
            progress=False,
            **settings(recipe, arm, 1, device),
        )
    return {
        "mflop": counter.get_total_flops() / len(batch) / 1e6,
        "discriminators": len(discriminators.each) if adversarial else 0,
    }


class _One:
    """A training set of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from [self.batch][start:]


def batch_of(recipe: Recipe, device: torch.device, count: int = 16) -> Batch:
    """The first training images of a recipe as one batch."""
    split, _, _ = load_pair_data(PAIRS[recipe.pair], probe=True)
    pair = PAIRS[recipe.pair]
    return next(iter(make_batches(pair, split, device=device, training=False, batch_size=count).epoch(0)))


def map_shapes(networks: Sequence[nn.Module], group: Group, batch: Batch) -> list[tuple[int, int, int]]:
    """``(channels, height, width)`` of the last feature map of each network."""
    found = []
    for network, net in zip(networks, group.nets, strict=True):
        with evaluation_mode(network):
            _, channels, height, width = network(batch.images).features[net.feature].shape
        found.append((channels, height, width))
    return found


def initial_networks(
    group: Group, recipe: Recipe, seeds: Sequence[int], context: Context
) -> list[list[nn.Module]]:
    """Fresh networks: network k of a seed starts from the same weights whatever the arm and the group."""
    _, _, classes = load_pair_data(PAIRS[recipe.pair], probe=True)
    return [
        [initialised(net, classes, 1000 * k + seed, context.device) for seed in seeds]
        for k, net in enumerate(group.nets)
    ]


def _adversaries(
    shapes: Sequence[tuple[int, int, int]], scheme: str, seed: int, device: torch.device
) -> tuple[TransferLayers, Discriminators]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transfers = TransferLayers(shapes)
        discriminators = Discriminators(transfers.shape, len(shapes), scheme=scheme)
    return transfers.to(device), discriminators.to(device)


def _watch(
    count: int, names: Sequence[str], images: Tensor, state: dict[str, Any], epoch: int
) -> dict[str, float]:
    """How alike the maps of a network and of the one before it are, averaged over the networks; by member."""
    maps = []
    for k, name in enumerate(names):
        network = state[f"network{k}"]
        members = isinstance(network, Members)
        with evaluation_mode(network):
            output = network(images, shared=True) if members else network(images)
        maps.append(output.features[name])
    with evaluation_mode(state["transfers"]):
        brought = state["transfers"](*maps)
    if not members:
        maps, brought = [one[None] for one in maps], [one[None] for one in brought]
    found: dict[str, float] = {}
    for m in range(len(maps[0])):
        values = {
            "channel_gap": [channel_gap(brought[k][m], brought[k - 1][m]) for k in range(count)],
            "cosine": [mean_cosine(brought[k][m], brought[k - 1][m]) for k in range(count)],
            "cka": [linear_cka(maps[k][m], maps[k - 1][m]) for k in range(count)],
        }
        suffix = f"[{m}]" if members else ""
        found |= {f"{name}{suffix}": sum(one) / count for name, one in values.items()}
    return found


def _of_member(epochs: Sequence[dict[str, float]], member: int, members: int) -> dict[str, list[float]]:
    """One member's curves; losses of the networks averaged to one a name."""
    suffix = f"[{member}]" if members > 1 else ""
    curves: dict[str, list[float]] = {}
    for name in ("logit", "discriminator", "adversarial", "channel_gap", "cosine", "cka"):
        for values in epochs:
            own = [
                value
                for key, value in values.items()
                if key.endswith(suffix) and key.removesuffix(suffix).rstrip("0123456789") == name
            ]
            curves.setdefault(name, []).append(sum(own) / len(own))
    return curves
