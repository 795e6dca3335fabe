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
    """Where a training stands: ``step`` batches into ``epoch``, with what each of them gave.

    Attributes:
        epoch: Counted from 0.
        step: Batches of this epoch that have been trained on.
        values: For each scalar, its value at each step of this epoch in a tensor of at least that many; 0 at steps
            that did not return it.
        counts: For each scalar, the steps of this epoch that returned it.
        history: What was measured.
        finished: Whether nothing is left to do.
    """

    epoch: int = 0
    step: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)
    finished: bool = False

    def count(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Count one step and what it returned.

        Raises:
            ValueError: If something it returned is no scalar.
        """
        for name, value in scalars.items():
            scalar = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if scalar.numel() != 1:
                raise ValueError(f"step must return scalars, got {name!r} of shape {tuple(scalar.shape)}")
            # Kept on their device, so that nothing waits for it; in 64 bits except where the device has none.
            row = self.values.get(name)
            if row is None:
                kind = torch.float32 if scalar.device.type == "mps" else torch.float64
                row = self.values[name] = torch.zeros(
                    max(64, 2 * self.step), dtype=kind, device=scalar.device
                )
            elif len(row) <= self.step:
                row = self.values[name] = torch.cat([row, torch.zeros_like(row)])
            row[self.step] = scalar.reshape(())
            self.counts[name] = self.counts.get(name, 0) + 1
        self.step += 1
        self.history.steps += 1

    def means(self) -> dict[str, float]:
        """The means of this epoch so far; waits for the device."""
        return {name: float(row.sum()) / self.counts[name] for name, row in self.values.items()}

    def first_unsound(self) -> int | None:
        """The first step of this epoch (from 0) with a scalar that is not finite; waits for the device."""
        steps = [
            int(row.isfinite().logical_not().nonzero()[0])
            for row in self.values.values()
            if not row.sum().isfinite()
        ]
        return min(steps, default=None)

    def at(self, step: int) -> dict[str, float]:
        """The scalars of a step of this epoch (from 0)."""
        return {name: float(row[step]) for name, row in self.values.items() if step < len(row)}

    def next_epoch(self) -> None:
        """Start the next epoch, without values."""
        self.epoch, self.step, self.values, self.counts = self.epoch + 1, 0, {}, {}
