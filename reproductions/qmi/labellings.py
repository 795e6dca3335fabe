r"""How far the QMI of two feature spaces differs over all labellings at once, in closed form.

By the theorem of :mod:`reproductions.qmi.theorem` it is 0 exactly when the kernels are equal: the transfer of mutual
information for labels that nobody knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrefs.kernels import unit_rows


def information_over_labellings(features: Tensor, other: Tensor | None = None) -> float:
    r"""Root mean square, over all labellings with two classes, of the QMI or of the difference of two; cosine kernel.

    For uniform :math:`s \in \{-1, 1\}^N` and a symmetric M the quadratic form :math:`s^\top M s` has the mean
    :math:`\operatorname{tr} M` and the variance :math:`2 (\lVert M \rVert^2 - \sum_k M_{kk}^2)`, and the QMI is
    :math:`s^\top H K H s / 2 N^2`. With the unit rows U, :math:`H K H = \frac12 (H U) (H U)^\top`, so that no matrix of
    all pairs is needed.

    Args:
        features: ``(N, width)``.
        other: Features of the same samples ``(N, other_width)``; the QMI of each labelling is subtracted.
    """
    sides = [(1.0, features)] if other is None else [(1.0, features), (-1.0, other)]
    units = [unit_rows(side.double()) for _, side in sides]
    rows = torch.cat([unit - unit.mean(dim=0) for unit in units], dim=1)
    signs = torch.cat([rows.new_full((side.shape[1],), sign) for sign, side in sides])
    gram = rows.T @ rows
    trace = (signs * gram.diagonal()).sum() / 2
    norm = (signs * (gram.square() @ signs)).sum() / 4
    diagonal = (rows.square() @ signs / 2).square().sum()
    return float((trace.square() + 2 * (norm - diagonal).clamp(min=0)).sqrt() / (2 * rows.shape[0] ** 2))
