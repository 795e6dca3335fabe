"""Clipping of gradients by their norm, for one network or for many that train together."""

from __future__ import annotations

import torch
from torch import nn

from kdrefs.training.seeds import Members


@torch.no_grad()
def clip_gradients(module: nn.Module, largest: float) -> None:
    """Scale the gradients down where their norm over all parameters is above ``largest``, in place.

    Each member of :class:`~kdrefs.training.seeds.Members` has a norm of its own, so that it trains as it would alone;
    ``torch.nn.utils.clip_grad_norm_`` would take one over all. Does not wait for the device.

    Args:
        module: Whose parameters have gradients; those without are left out.
        largest: Above 0.

    Raises:
        ValueError: ``largest`` is not above 0.
    """
    if not largest > 0:
        raise ValueError(f"largest: expected a number above 0, got {largest}")
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return
    rows = len(module) if isinstance(module, Members) else 1
    parts = [gradient.reshape(rows, -1) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).norm(dim=0)
    factors = (largest / norms).clamp(max=1.0)  # a norm of 0 gives infinity, which is cut to 1
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)) if rows > 1 else factors.view(()))
