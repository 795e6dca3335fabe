"""The training sets of a condensed training: which points, which of them blended, and the teacher's answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdrefs.data.batches import Batch, Batches
from kdrefs.data.cache import Split
from kdrefs.methods.kcd import Partition, augment
from kdrefs.nets.fold import fold_batchnorm
from kdrefs.training import MemberBatches, as_one, batches_as_one
from reproductions.harness.runs import Context
from reproductions.kcd.stages import STRENGTH
from reproductions.protocols.joint import Training
from reproductions.protocols.pairs import (
    Pair,
    make_batches,
    representations,
    teacher,
    teacher_identity,
    teacher_views,
)
from reproductions.protocols.rows import Method


class StartingAt:
    """Batches whose first epoch has another number, so that orders and views go on from stage to stage."""

    def __init__(self, batches: Batches | MemberBatches, first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]:
        return self.batches.epoch(self.first + epoch, start)


class TrainingSets:
    """The training set of each seed with its teacher's answers, whole and in parts.

    Where views are fixed the teacher is asked beforehand, and again about the images that were blended; else on every
    batch.
    """

    def __init__(
        self,
        pair: Pair,
        split: Split,
        seeds: Sequence[int],
        method: Method,
        training: Training,
        context: Context,
    ) -> None:
        self.pair, self.split, self.seeds, self.method = pair, split, seeds, method
        self.training, self.context = training, context
        self.guides: nn.Module | None = None
        self._answers: list[dict[str, Tensor]] = []
        if training.views is None:
            folded = [fold_batchnorm(teacher(context, pair, seed)) for seed in seeds]
            self.guides = as_one(folded)
        else:
            cached: dict[str, dict[str, Tensor]] = {}  # a committed teacher is one for all seeds
            for seed in seeds:
                identity = teacher_identity(pair, seed)
                if identity not in cached:
                    cached[identity] = self._named(teacher_views(context, pair, seed, training.views))
                self._answers.append(cached[identity])
        clean = self._batches(split)
        self._clean = [
            self._extended(clean, self._answers[m] if self._answers else {}).with_seed(seed)
            for m, seed in enumerate(seeds)
        ]

    def stage(
        self, kept: Sequence[Tensor], parts: Sequence[Partition] | None = None
    ) -> Batches | MemberBatches:
        """Each seed's points ``kept``, those of K1L, if there are any, blended where ``parts`` are given."""
        members = [
            (self._blended(m, parts[m]) if parts and len(parts[m].low) else self._clean[m]).subset(points)
            for m, points in enumerate(kept)
        ]
        return batches_as_one(members)

    def _blended(self, member: int, parts: Partition) -> Batches:
        low, dropped = parts.low.cpu(), parts.dropped.cpu()
        images = torch.from_numpy(self.split.images).clone()
        images[low] = augment(images[low], images[dropped], maximum=STRENGTH)
        seed = self.seeds[member]
        batches = self._batches(replace(self.split, images=images.numpy())).with_seed(seed)
        if self.training.views is None:
            return batches
        guide = teacher(self.context, self.pair, seed)
        answers = {name: rows.clone() for name, rows in self._answers[member].items()}
        some = batches.subset(parts.low)
        for view in range(self.training.views):
            asked = self._named(representations(guide, some, self.pair.teacher.feature, view=view))
            for name, rows in asked.items():
                answers[name][view, parts.low] = rows
        return self._extended(batches, answers)

    def _batches(self, split: Split) -> Batches:
        return make_batches(
            self.pair,
            split,
            device=self.context.device,
            training=True,
            batch_size=self.training.batch_size,
            fixed_views=self.training.views,
        )

    def _extended(self, batches: Batches, answers: Mapping[str, Tensor]) -> Batches:
        return batches.with_extras(view_extras=answers) if answers else batches

    def _named(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the method asks for, of what a network's logits and representation are called elsewhere."""
        feature = self.pair.teacher.feature
        known = {"logits": found["logits"], feature: found.get("feature", found.get(feature))}
        return {name: rows for name in self.method.targets if (rows := known[name]) is not None}
