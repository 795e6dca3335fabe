"""One command in several processes that `torchrun` started: the first does it, the others help with its trainings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Another command may train the teacher that this one waits for, in one of its processes.
PATIENCE = timedelta(days=7)


@contextmanager
def process_group(device: str) -> Iterator[bool]:
    """Join the processes that `torchrun` started and give whether this one leads; one alone does.

    Args:
        device: `"cpu"`, or `"cuda"`, of which each process then has one.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield True
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank() == 0
        lead(None)
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Return how many processes do the present command."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def lead(task: Any) -> None:
    """Tell the other processes what to do at the same time; `None` that nothing is left."""
    if size() > 1 and dist.get_rank() == 0:
        dist.broadcast_object_list([task], src=0)


def tasks() -> Iterator[Any]:
    """Yield what the leading process tells."""
    while True:
        received = [None]
        dist.broadcast_object_list(received, src=0)
        if received[0] is None:
            return
        yield received[0]
