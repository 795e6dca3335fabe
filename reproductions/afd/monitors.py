"""How alike two networks' feature maps are: numbers that are watched while they train, never losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def channel_gap(maps: Tensor, other: Tensor) -> float:
    r"""How far apart two networks' channels are in mean and standard deviation.

    .. math:: \frac{\lVert \mu - \mu' \rVert + \lVert \sigma - \sigma' \rVert}
              {\lVert \mu \rVert + \lVert \mu' \rVert + \lVert \sigma \rVert + \lVert \sigma' \rVert}

    with the vectors of each channel's mean and deviation over samples and positions: 0 where all are equal, at most
    1. A monitor, for maps of one shape (after the transfer layers); two maps that are zero everywhere have 0.

    Raises:
        ValueError: The shapes differ or are no maps.
    """
    if maps.ndim != 4 or maps.shape[1:] != other.shape[1:]:
        raise ValueError(f"other: expected the shape of maps {tuple(maps.shape)}, got {tuple(other.shape)}")
    one, two = (_channel_statistics(x.double()) for x in (maps, other))
    norms = torch.linalg.vector_norm
    above, below = norms(one - two, dim=1).sum(), norms(one, dim=1).sum() + norms(two, dim=1).sum()
    return float(above / torch.where(below > 0, below, 1.0))


def linear_cka(features: Tensor, other: Tensor) -> float:
    r"""Linear centred kernel alignment of two networks' features of the same samples, from 0 to 1.

    .. math:: \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F}

    for the centred matrices of samples by features. Blind to rotations and to a common scale. Source: Kornblith et
    al., "Similarity of Neural Network Representations Revisited", ICML 2019. Constant features have 0.

    Raises:
        ValueError: The numbers of samples differ.
    """
    if len(features) != len(other):
        raise ValueError(f"other: expected {len(features)} samples as in features, got {len(other)}")
    one, two = (x.flatten(1).double() for x in (features, other))
    # By inner products of samples, whose number does not grow with the maps.
    one, two = (x @ x.mT for x in (one - one.mean(0), two - two.mean(0)))
    below = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(two)
    return float((one * two).sum() / torch.where(below > 0, below, 1.0))


def mean_cosine(features: Tensor, other: Tensor) -> float:
    """Cosine between two networks' features of one sample, averaged over the samples; for features of one shape."""
    one, two = (x.flatten(1).double() for x in (features, other))
    return float(F.cosine_similarity(one, two, dim=1).mean())


def _channel_statistics(maps: Tensor) -> Tensor:
    rows = maps.transpose(0, 1).flatten(1)
    return torch.stack([rows.mean(1), rows.std(1, correction=0)])
