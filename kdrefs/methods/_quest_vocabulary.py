"""k-means for :mod:`kdrefs.methods.quest`: mini-batches or all vectors in blocks, and no word without a vector."""

import torch
from torch import Tensor

# Numbers in one block of distances.
_BLOCK = 2**24
_RESEEDINGS = 20


def fit_words(
    rows: Tensor, words: int, generator: torch.Generator, *, minibatch: bool, iterations: int
) -> Tensor:
    """Centres ``(words, channels)`` of ``rows``; see :func:`kdrefs.methods.quest.fit_vocabulary`."""
    if minibatch:
        centres = _minibatch(rows, words, generator, iterations)
    else:
        # Distances from the mean: expanded squares of vectors far from 0 would cancel.
        start = torch.randperm(rows.shape[0], generator=generator)[:words]
        centres = rows[start.to(rows.device)]
        for _ in range(iterations):
            counts, sums, distances = _assign(rows, centres)
            centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centres)
            centres = _reseeded(rows, centres, counts, distances)
    for _ in range(_RESEEDINGS):
        counts, _, distances = _assign(rows, centres)
        if bool((counts > 0).all() | (distances.max() == 0)):
            break
        centres = _reseeded(rows, centres, counts, distances)
    return centres


def _minibatch(rows: Tensor, words: int, generator: torch.Generator, iterations: int) -> Tensor:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise ImportError(
            "mini-batch k-means needs scikit-learn: install it, or take method='lloyd'"
        ) from None
    seed = int(torch.randint(2**31, (), generator=generator))
    fitted = MiniBatchKMeans(
        words, batch_size=max(4096, 2 * words), max_iter=iterations, n_init=1, random_state=seed
    ).fit(rows.numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(rows.dtype)


def _assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each centre the number and the sum of its rows, and of each row the squared distance to its centre."""
    counts, sums = centres.new_zeros(len(centres)), torch.zeros_like(centres)
    origin = centres.mean(dim=0)
    around = centres - origin
    table, bias = around.mT, around.square().sum(dim=1) / -2
    distances = []
    for block in rows.split(max(1, _BLOCK // len(centres))):
        shifted = block - origin
        scores = torch.addmm(bias, shifted, table)
        best, nearest = scores.max(dim=1)
        distances.append((shifted.square().sum(dim=1) - 2 * best).clamp_(min=0))
        # A product, because sums by index have no fixed order on CUDA.
        hits = scores.zero_().scatter_(1, nearest.unsqueeze(1), 1)
        counts += hits.sum(dim=0)
        sums.addmm_(hits.mT, block)
    return counts, sums, torch.cat(distances)


def _reseeded(rows: Tensor, centres: Tensor, counts: Tensor, distances: Tensor) -> Tensor:
    """Centres of which those without a row stand on distinct rows that are far from theirs."""
    empty = (counts == 0).nonzero().flatten()
    found = distances.topk(min(4 * len(empty), len(rows)))
    far = rows[found.indices[found.values > 0]].unique(dim=0)[: len(empty)]
    centres = centres.clone()
    centres[empty[: len(far)]] = far
    return centres
