"""Vocabularies of the pairs' teachers, and the inverse temperature that goes with each; both kept as artifacts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kdrefs.methods.quest import fit_vocabulary, propose_beta
from kdrefs.training import load_tensors, save_tensors
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    load_pair_data,
    make_batches,
    representations,
    teacher,
    teacher_identity,
)

# Images whose vectors are clustered, by data set; the authors take all. 5,000 of CIFAR-10's have 320,000 vectors.
IMAGES: dict[str, int | None] = {"digits": None, "cifar10": 5000, "cifar100": None}
PROPOSED_FROM = 8192  # vectors


def teacher_maps(context: Context, pair: str, layer: str, seed: int) -> Tensor:
    """Maps of a teacher for training images without augmentation, drawn with ``seed`` where not all are taken."""
    given = PAIRS[pair]
    train, _, _ = load_pair_data(given, probe=context.max_steps is not None)
    indices, count = None, IMAGES[given.data]
    if count is not None and count < len(train.labels):
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(train.labels), generator=generator)[:count].sort().values
    batches = make_batches(given, train, device=context.device, training=False, indices=indices)
    return representations(teacher(context, given, seed), batches, layer)[layer]


def vocabulary(context: Context, pair: str, layer: str, words: int, seed: int) -> Tensor:
    """The visual words of the teacher of ``seed``; the seed also starts k-means."""

    def make(folder: Path) -> None:
        maps = teacher_maps(context, pair, layer, seed)
        found = fit_vocabulary(maps, words, torch.Generator().manual_seed(seed))
        save_tensors(folder / "words.safetensors", {"words": found})

    about = _about(context, pair, layer, words) | {
        "seed": seed,
        "teacher": teacher_identity(PAIRS[pair], seed),
    }
    folder = context.artifact("vocabulary", about, make, source=source_digest(__name__))
    return load_tensors(folder / "words.safetensors")[0]["words"].to(context.device)


def beta_of(context: Context, pair: str, layer: str, words: int, mean_largest: float) -> float:
    r""":math:`\beta` for all seeds: proposed from the teacher and the vocabulary of seed 0."""

    def make(folder: Path) -> None:
        maps = teacher_maps(context, pair, layer, 0).movedim(1, -1).flatten(0, -2)
        chosen = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))[:PROPOSED_FROM]
        beta = propose_beta(
            maps[chosen.to(maps.device)], vocabulary(context, pair, layer, words, 0), mean_largest
        )
        save_tensors(folder / "beta.safetensors", {"beta": torch.tensor(beta, dtype=torch.float64)})

    about = _about(context, pair, layer, words) | {"mean_largest": mean_largest}
    about |= {"teacher": teacher_identity(PAIRS[pair], 0)}
    folder = context.artifact("beta", about, make, source=source_digest(__name__))
    return load_tensors(folder / "beta.safetensors")[0]["beta"].item()


def _about(context: Context, pair: str, layer: str, words: int) -> dict[str, object]:
    return {"data": PAIRS[pair].data, "layer": layer, "words": words, "max_steps": context.max_steps}
