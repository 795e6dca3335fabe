"""Mini-batches with a fixed number of samples from each of two sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kdrefs.data.batches import Batch, Batches


class MixedBatches:
    """Batches that hold one batch of each of two sets, the first set's samples first.

    Each set goes through its own epochs, whatever their lengths: batch k of the training takes batch k of either. An
    epoch here is as many batches as one of the second set has. Small last batches must have been dropped.

    Args:
        first: The labelled set, say.
        second: The unlabelled one.

    Raises:
        ValueError: A set keeps its small last batch, or one has what the other lacks.
    """

    def __init__(self, first: Batches, second: Batches) -> None:
        for name, batches in (("first", first), ("second", second)):
            if not batches.drop_last:
                raise ValueError(f"{name}: expected drop_last, so that every mini-batch has the same mix")
        self.first, self.second = first, second

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.second)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, … of an epoch."""
        done = epoch * len(self) + start
        own, begin = divmod(done, len(self.first))
        one = self.first.epoch(own, begin)
        for other in self.second.epoch(epoch, start):
            batch = next(one, None)
            if batch is None:
                own += 1
                one = self.first.epoch(own)
                batch = next(one)
            yield Batch(
                **{
                    f.name: _joined(f.name, getattr(batch, f.name), getattr(other, f.name))
                    for f in fields(Batch)
                }
            )


def _joined(name: str, first: Any, second: Any) -> Any:
    if type(first) is not type(second):
        raise ValueError(f"{name}: is in one set and not in the other")
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, tuple):
        return tuple(_joined(name, a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        if first.keys() != second.keys():
            raise ValueError(
                f"{name}: {sorted(first.keys() ^ second.keys())} in one set and not in the other"
            )
        return {key: _joined(key, first[key], second[key]) for key in first}
    return first
