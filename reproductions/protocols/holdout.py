"""Training images that are held out where hyper-parameters are chosen, so that the test set is used once."""

from __future__ import annotations

import torch
from torch import Tensor

from reproductions.protocols.pairs import labelled_subset

HELD_OUT = 0.1
SPLIT_SEED = 12345


def held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the training images that are trained on, and of the tenth of each class that is held out."""
    chosen = labelled_subset(labels.numpy(), HELD_OUT, SPLIT_SEED)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().squeeze(1), chosen
