"""How well a number tells inputs from outside of the training distribution from those inside."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: how often an outside score is above an inside one, ties counting half.

    Args:
        inside: Scores ``(n,)`` of inputs like those of training.
        outside: Scores ``(m,)`` of others, which should be higher.

    Returns:
        Fraction in [0, 1]; 0.5 is chance.

    Raises:
        ValueError: A score is not finite, or there is none.
    """
    scores = np.concatenate([_finite("inside", inside), _finite("outside", outside)])
    labels = np.arange(len(scores)) >= len(inside)
    return float(roc_auc_score(labels, scores))


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two series ``(n,)``, from -1 to 1; 0 where one of them is constant.

    Raises:
        ValueError: Lengths differ, there are fewer than two numbers, or one is not finite.
    """
    first, second = _finite("one", one), _finite("other", other)
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"other: expected as many numbers as one, at least 2, got {len(first)}, {len(second)}"
        )
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)


def _finite(name: str, values: Tensor) -> np.ndarray:
    found = values.detach().double().cpu().numpy()
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{name}: expected finite numbers (n,), at least one, got shape {found.shape}")
    return found
