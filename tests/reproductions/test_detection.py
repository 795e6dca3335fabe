"""Detection: AUROC against counting pairs, rank correlation, errors."""

import math

import pytest
import torch

from reproductions.protocols.detection import auroc, rank_correlation


def test_auroc_counts_pairs_and_ties_half():
    inside, outside = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, 3.0])
    pairs = [(a < b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist()]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - sum(pairs) / len(pairs), rel=1e-12)
    assert auroc(torch.zeros(3), torch.zeros(2)) == 0.5


def test_rank_correlation_sees_order_only():
    x = torch.randn(50)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert rank_correlation(x, torch.ones(50)) == 0


@pytest.mark.parametrize("bad", [torch.tensor([math.nan]), torch.tensor([]), torch.zeros(2, 2)])
def test_scores_must_be_finite_numbers(bad):
    with pytest.raises(ValueError, match="outside: expected finite numbers"):
        auroc(torch.zeros(2), bad)
    with pytest.raises(ValueError, match="one: expected finite numbers"):
        rank_correlation(bad, torch.zeros(2))
    with pytest.raises(ValueError, match="other: expected as many numbers as one"):
        rank_correlation(torch.zeros(3), torch.zeros(2))
