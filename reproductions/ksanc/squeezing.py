"""What makes a vector of each layer, on the student's and on the teacher's side, and how the teacher's is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.batches import Batch
from kdrefs.methods.ksanc import AttentionEstimator, TaskDrivenEstimators
from kdrefs.nets import Output
from kdrefs.training import as_one, as_several, batches_as_one, evaluation_mode, fit, per_member, update
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    PAIRS,
    Net,
    load_pair_data,
    load_weights,
    make_batches,
    save_weights,
    teacher,
    teacher_identity,
)
from reproductions.protocols.tables import STAGES

Reading = Literal[
    "lifted", "maps", "average"
]  # of the estimator; or the plain average of each map, the control
RATE = 1e-3  # of Adam, for the teacher's estimators
EPOCHS = {"digits": 6, "cifar10": 2, "cifar100": 5}


@dataclass(frozen=True)
class Layers:
    """Where a network's vectors come from: the features' names."""

    descriptor: str
    maps: tuple[str, ...]

    def of(self, output: Output) -> tuple[Tensor, ...]:
        """The global descriptor and the maps."""
        return output.features[self.descriptor], *(output.features[name] for name in self.maps)


class Average(nn.Module):
    """The plain average of a map's positions, lifted to other channels where they differ."""

    def __init__(self, channels: int, in_channels: int) -> None:
        super().__init__()
        same = channels == in_channels
        self.lift = nn.Identity() if same else nn.Linear(in_channels, channels, bias=False)

    def forward(self, maps: Tensor, _: Tensor) -> Tensor:
        """Squeeze ``maps``; the descriptor is not looked at."""
        return self.lift(maps.float().mean((2, 3))).float()


class Squeezer(nn.Module):
    """The squeezed vectors of several layers, one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, descriptor: Tensor, *maps: Tensor) -> Tensor:
        """``(batch, features)`` of the global descriptor and one map a layer."""
        return torch.cat([layer(one, descriptor) for layer, one in zip(self.layers, maps, strict=True)], 1)


class Guide(nn.Module):
    """A frozen teacher and what squeezes its layers: its output is what students learn from."""

    def __init__(self, network: nn.Module, squeezer: Squeezer | None, layers: Layers) -> None:
        super().__init__()
        self.network, self.squeezer, self.layers = network, squeezer, layers

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The targets by name."""
        output = self.network(images)
        targets = {"logits": output.logits}
        if self.squeezer is not None:
            targets["squeezed"] = self.squeezer(*self.layers.of(output))
        return targets


def layers_of(training: Training) -> tuple[Layers, Layers]:
    """The layers of the student and of the teacher; the descriptor is the vector that the classifier sees."""
    pair = PAIRS[training.pair]
    students, teachers = zip(*STAGES[pair.data], strict=True)
    return _layers(training.student or pair.student, students), _layers(pair.teacher, teachers)


def _layers(net: Net, maps: Sequence[str]) -> Layers:
    return Layers(net.feature.removesuffix("_pre"), tuple(maps))


def shapes_of(network: nn.Module, layers: Layers, images: Tensor) -> tuple[int, tuple[int, ...]]:
    """Width of the descriptor, and the channels of each map."""
    with evaluation_mode(network):
        descriptor, *maps = layers.of(network(images))
    return descriptor.shape[1], tuple(one.shape[1] for one in maps)


def student_squeezer(
    reading: Reading, descriptor: int, channels: Sequence[int], outputs: Sequence[int], seed: int
) -> Squeezer:
    """A student's side: each map is lifted to the teacher's channels and squeezed; trained with the student."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = list(zip(outputs, channels, strict=True))
        if reading == "average":
            return Squeezer([Average(out, own) for out, own in pairs])
        return Squeezer(
            [AttentionEstimator(out, descriptor, in_channels=own, values=reading) for out, own in pairs]
        )


def guides_of(
    reading: Reading | None,
    training: Training,
    seeds: Sequence[int],
    context: Context,
    prepare: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> list[Guide]:
    """The frozen teacher of each seed with its squeezer, trained where it has parameters; in eval mode.

    Args:
        reading: How layers are squeezed; None for teachers whose layers nobody looks at.
        training: The recipe, which names pair and batches.
        seeds: Of the teachers. A committed teacher is one for all, and so are its estimators.
        context: What the harness gives.
        prepare: What to do with each teacher.
    """
    pair, (_, layers) = PAIRS[training.pair], layers_of(training)
    own = (0,) if pair.teacher_weights is not None else tuple(seeds)
    networks = [teacher(context, pair, seed) for seed in own]
    squeezers = _squeezers(reading, networks, training, own, context)
    guides = [
        Guide(prepare(network), squeezer, layers).eval()
        for network, squeezer in zip(networks, squeezers, strict=True)
    ]
    return guides * (len(seeds) // len(own))


def _squeezers(
    reading: Reading | None,
    networks: Sequence[nn.Module],
    training: Training,
    seeds: Sequence[int],
    context: Context,
) -> Sequence[Squeezer | None]:
    """What squeezes the layers of each teacher."""
    if reading is None:
        return [None] * len(seeds)
    pair, (_, layers) = PAIRS[training.pair], layers_of(training)
    split, _, classes = load_pair_data(pair, probe=context.max_steps is not None)
    batches = make_batches(
        pair,
        split,
        device=context.device,
        training=True,
        batch_size=training.batch_size,
        fixed_views=training.views,
    )
    images = next(iter(batches)).images
    assert images is not None
    descriptor, channels = shapes_of(networks[0], layers, images)
    if reading == "average":
        return [Squeezer([Average(width, width) for width in channels]) for _ in seeds]
    modules = [
        _initial(reading, descriptor, channels, classes, seed).to(context.device).train() for seed in seeds
    ]

    def make(folder: Path) -> None:
        estimators = as_one(modules)
        state: dict[str, Any] = {"estimators": estimators}
        state["optimizer"] = torch.optim.Adam(estimators.parameters(), lr=RATE, **fused(context.device))
        cross_entropy = per_member(F.cross_entropy, estimators)

        def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
            assert batch.labels is not None
            found = state["estimators"](*_features(networks, batch.images, layers))
            losses = cross_entropy(found.logits.float(), batch.labels)
            update(state["optimizer"], losses.sum())
            return {"loss": losses.detach().mean()}

        members = [batches.with_seed(seed) for seed in seeds]
        fit(
            step,
            state,
            batches_as_one(members),
            epochs=EPOCHS[pair.data],
            checkpoint=folder / "estimators.safetensors",
            precision=training.precision,
            max_steps=context.max_steps,
            progress=context.progress,
        )
        for seed, module in zip(seeds, as_several(estimators), strict=True):
            save_weights(module, folder / f"estimators{seed}.safetensors")

    about = {
        "reading": reading, "training": asdict(training), "epochs": EPOCHS[pair.data], "rate": RATE, "seeds": seeds,
        "teacher": [teacher_identity(pair, seed) for seed in seeds], "max_steps": context.max_steps,
    }  # fmt: skip
    folder = context.artifact("ksanc-estimators", about, make, source=source_digest(__name__))
    for seed, module in zip(seeds, modules, strict=True):
        load_weights(module, folder / f"estimators{seed}.safetensors")
    return [Squeezer(list(module.estimators)).eval() for module in modules]


def _features(networks: Sequence[nn.Module], images: Tensor | None, layers: Layers) -> list[Tensor]:
    """Descriptor and maps of one network, or of several on a batch each.

    Several are asked one after the other: networks of this width run faster so than mapped over.
    """
    assert images is not None
    batches = images if len(networks) > 1 else images[None]
    found = []
    for network, one in zip(networks, batches, strict=True):
        with evaluation_mode(network):
            found.append(layers.of(network(one)))
    return [torch.stack(parts) if len(networks) > 1 else parts[0] for parts in zip(*found, strict=True)]


def _initial(
    reading: Literal["lifted", "maps"], descriptor: int, channels: Sequence[int], classes: int, seed: int
) -> TaskDrivenEstimators:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskDrivenEstimators(
            [AttentionEstimator(width, descriptor, values=reading) for width in channels], classes
        )


def counting_positions(weights: Tensor) -> float:
    r"""How many positions count, in % of all: :math:`100 e^{H(M)} / HW` with the entropy of the weights.

    Args:
        weights: ``(batch, height, width)``, each sample's adding up to 1.
    """
    entropy = -torch.special.xlogy(weights, weights).flatten(1).sum(1)
    return 100 * (entropy.exp().mean() / weights[0].numel()).item()
