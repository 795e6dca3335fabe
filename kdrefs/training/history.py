"""What a training measures, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class History:
    """What a training measured.

    Attributes:
        epochs: Per epoch, the mean over its steps of each scalar that ``step`` returned.
        evaluations: What ``evaluate`` returned, with the ``"epoch"`` (from 0) after which it was called.
        best_epoch: Epoch of the best evaluation by ``monitor`` (the first of equals), if one was named.
        steps: Steps taken in all.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    steps: int = 0

    @property
    def last(self) -> dict[str, float]:
        """The last evaluation.

        Raises:
            ValueError: If nothing was evaluated.
        """
        if not self.evaluations:
            raise ValueError("nothing was evaluated: pass evaluate to fit")
        return self.evaluations[-1]

    @property
    def best(self) -> dict[str, float]:
        """The evaluation with the best monitored value.

        Raises:
            ValueError: If nothing was monitored, or the monitored value was never a number.
        """
        for values in self.evaluations:
            if values["epoch"] == self.best_epoch:
                return values
        raise ValueError("there is no best epoch: pass evaluate and monitor to fit")


@dataclass
class Progress:
    """Where a training stands: ``step`` batches into ``epoch``, with the sums over them."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)
    finished: bool = False

    def count(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Count one step and what it returned.

        Raises:
            ValueError: If something it returned is no scalar.
        """
        self.step += 1
        self.history.steps += 1
        for name, value in scalars.items():
            scalar = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if scalar.numel() != 1:
                raise ValueError(f"step must return scalars, got {name!r} of shape {tuple(scalar.shape)}")
            # Summed on their device, so that nothing waits for it; in 64 bits except where the device has none.
            scalar = scalar.reshape(()).to(torch.float32 if scalar.device.type == "mps" else torch.float64)
            self.sums[name] = self.sums[name] + scalar if name in self.sums else scalar.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means of this epoch so far; waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        """Start the next epoch, with empty sums."""
        self.epoch, self.step, self.sums, self.counts = self.epoch + 1, 0, {}, {}
