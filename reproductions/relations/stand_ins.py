r"""Losses in a few plain lines, under the names and with the arguments of :mod:`kdrefs`.

:mod:`reproductions.relations.proofs` imports them in one place; a loss that :mod:`kdrefs` has is imported from there.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor


def logit_regression_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared distance of the logits, mean over samples (Ba and Caruana, NIPS 2014)."""
    return (student - teacher).square().sum(1).mean() / 2


def ab_loss(student: Tensor, teacher: Tensor, *, margin: float = 1.0) -> Tensor:
    """Squared hinge on each neuron with the teacher's sign as label, mean over samples (Heo et al., AAAI 2019)."""
    signs = torch.where(teacher > 0, 1.0, -1.0).to(student.dtype)
    return (margin - signs * student).relu().square().sum() / len(student)


def soft_darkrank_loss(
    student: Tensor, teacher: Tensor, *, alpha: float = 3.0, beta: float = 3.0, list_length: int = 4
) -> Tensor:
    """Divergence of the distributions over orders of each query's nearest samples (Chen et al., AAAI 2018)."""
    gaps = []
    for query in range(len(student)):
        scores = []
        others = [j for j in range(len(student)) if j != query]
        for rows in (student, teacher):
            unit = rows / rows.norm(dim=1, keepdim=True)
            scores.append(-alpha * (unit[others] - unit[query]).norm(dim=1) ** beta)
        nearest = scores[1].argsort(descending=True)[:list_length]
        orders = torch.tensor(list(permutations(range(len(nearest)))))
        log_s, log_t = (_log_likelihoods(one[nearest], orders) for one in scores)
        gaps.append((log_t.exp() * (log_t - log_s)).sum())
    return torch.stack(gaps).mean()


def _log_likelihoods(scores: Tensor, orders: Tensor) -> Tensor:
    """Plackett-Luce: at each place the first of those that are left is chosen."""
    ordered = scores[orders]
    left = ordered.flip(1).logcumsumexp(1).flip(1)
    return (ordered - left).sum(1)


def end2_loss(student: Tensor, ensemble: Tensor) -> Tensor:
    """Negative log-likelihood of the members' probabilities under the Dirichlet exp(logits) (Malinin et al., 2020)."""
    dirichlet = torch.distributions.Dirichlet(student.exp())
    return -dirichlet.log_prob(ensemble.softmax(-1).movedim(1, 0)).mean()


def pairwise_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs of positions (Liu et al., CVPR 2019)."""
    grams = [
        (unit := maps.flatten(2) / maps.flatten(2).norm(dim=1, keepdim=True)).mT @ unit
        for maps in (student, teacher)
    ]
    return (grams[0] - grams[1]).square().mean()
