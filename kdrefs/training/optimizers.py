"""Which implementation of an optimiser a device is given."""

from __future__ import annotations

import torch


def fused(device: torch.device | str) -> dict[str, bool]:
    """Keyword arguments that make an optimiser of :mod:`torch.optim` take its step in one kernel on CUDA.

    ``torch.optim.Adam(net.parameters(), lr=1e-3, **fused(device))``. For SGD, Adam, AdamW and Adagrad. On a CPU
    the default implementation stays, because the fused one rounds differently and recorded runs were made without.

    Args:
        device: Where the parameters lie.
    """
    return {"fused": True} if torch.device(device).type == "cuda" else {}
