"""Which implementation of an optimiser a device is given."""

from __future__ import annotations

from typing import Any

import torch


def fused(device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments that make an optimiser of :mod:`torch.optim` take its step in one kernel on CUDA.

    ``torch.optim.Adam(net.parameters(), lr=1e-3, **fused(device))``. For SGD, Adam, AdamW and Adagrad. On a CPU
    the default implementation stays: the fused one rounds differently, so that recorded runs would not repeat.

    Args:
        device: Where the parameters lie.
    """
    return {"fused": True} if torch.device(device).type == "cuda" else {}
