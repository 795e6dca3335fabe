"""Learning-rate schedules that are stepped once per optimiser step.

Each is a factor on the learning rate that the optimiser was built with, so that parameter groups keep their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR


def multistep(
    optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1, *, steps_per_epoch: int
) -> MultiStepLR:
    """Multiply the learning rate by ``gamma`` at the start of each of the epochs in ``milestones``.

    Args:
        optimizer: Whose learning rates are scheduled.
        milestones: Epochs, counted from 0, in increasing order.
        gamma: Positive factor.
        steps_per_epoch: Steps an epoch.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_steps(steps_per_epoch=steps_per_epoch)
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    if list(milestones) != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
        raise ValueError(f"milestones must be increasing epochs from 1 on, got {tuple(milestones)}")
    return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> LambdaLR:
    """Linear warm-up to the full rate, then half a cosine period down to ``final`` of it.

    Step ``t`` of the warm-up uses the factor ``(t + 1) / (warmup_steps + 1)``.
    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5 without restarts.

    Args:
        optimizer: Whose learning rates are scheduled.
        total_steps: Optimiser steps in all.
        warmup_steps: Steps before the full rate is reached, below ``total_steps``.
        final: Factor in [0, 1] that is approached at the end.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_steps(total_steps=total_steps)
    _check_warmup(warmup_steps, total_steps, final)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: Optimizer, total_steps: int, *, warmup_steps: int, final: float = 0.0) -> LambdaLR:
    """Linear warm-up to the full rate, then a straight line down to ``final`` of it.

    Step ``t`` of the warm-up uses the factor ``(t + 1) / (warmup_steps + 1)``; momentum is left alone.
    Source: Smith and Topin, "Super-Convergence", 2018, with a single linear decay.

    Args:
        optimizer: Whose learning rates are scheduled.
        total_steps: Optimiser steps in all.
        warmup_steps: Steps before the full rate is reached, below ``total_steps``.
        final: Factor in [0, 1] that is approached at the end.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_steps(total_steps=total_steps)
    _check_warmup(warmup_steps, total_steps, final)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 1 - (1 - final) * done

    return LambdaLR(optimizer, factor)


def _check_steps(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def _check_warmup(warmup_steps: int, total_steps: int, final: float) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must lie in [0, {total_steps}), got {warmup_steps}")
    if not 0 <= final <= 1:
        raise ValueError(f"final must lie in [0, 1], got {final}")
