"""Training: a loop that survives being killed, checkpoints without pickles, schedules, many runs in one."""

from __future__ import annotations

from kdrefs.training.files import CheckpointError, load_tensors, save_tensors
from kdrefs.training.fit import EpochBatches, fit, update
from kdrefs.training.history import History
from kdrefs.training.modes import evaluation_mode, flushed_denormals
from kdrefs.training.optimizers import fused
from kdrefs.training.parallel import average_gradients, data_parallel, gather_rows, whole_batch
from kdrefs.training.schedules import cosine, multistep, one_cycle
from kdrefs.training.seeds import (
    MemberBatches,
    Members,
    as_one,
    as_several,
    batches_as_one,
    each,
    per_member,
    write_back,
)

__all__ = [
    "CheckpointError",
    "EpochBatches",
    "History",
    "MemberBatches",
    "Members",
    "as_one",
    "as_several",
    "average_gradients",
    "batches_as_one",
    "cosine",
    "data_parallel",
    "each",
    "evaluation_mode",
    "fit",
    "flushed_denormals",
    "fused",
    "gather_rows",
    "load_tensors",
    "multistep",
    "one_cycle",
    "per_member",
    "save_tensors",
    "update",
    "whole_batch",
    "write_back",
]
