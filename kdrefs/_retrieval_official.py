"""The retrieval evaluator of the PKT repository, defect included, from scores.

passalis/probabilistic_kt@a58fd1b, ``nn/retrieval_evaluation.py``. Precision is to be interpolated over the ranks
(each replaced by the largest at this rank or a later one), but the loop runs over the queries of the batch, so
only as many of the first ranks are; see :func:`kdrefs.metrics.retrieval`.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor


def official_scores(
    batches: Iterable[tuple[Tensor, Tensor]], database_labels: Tensor, at: Sequence[int], threads: int
) -> list[float]:
    """Means over all queries of the official "AP" and of its precisions at ``at``.

    Args:
        batches: Pairs of scores ``(queries, database)`` and the queries' labels, batch by batch.
        database_labels: ``(database,)``.
        at: Ranks, from 1.
        threads: Rows ranked at the same time.
    """
    known = database_labels.cpu().numpy()
    rows: list[np.ndarray] = []
    with ThreadPoolExecutor(threads) as pool:
        for scores, labels in batches:
            queries = len(labels)

            def evaluate(row: np.ndarray, label: int, queries: int = queries) -> np.ndarray:
                ranks = np.flatnonzero(known[descending(row)] == label)
                return official_row(ranks, queries, at)

            rows.extend(pool.map(evaluate, scores.cpu().numpy(), labels.tolist()))
    return np.mean(rows, axis=0).tolist()


def official_row(ranks: np.ndarray, filtered: int, at: Sequence[int]) -> np.ndarray:
    """The "AP" and the precisions at ``at`` of one query.

    Args:
        ranks: Ranks of the relevant items in ascending order, from 0.
        filtered: Ranks over which precision is interpolated: the size of the batch.
        at: Ranks, from 1.
    """
    head = np.searchsorted(ranks, np.arange(filtered), side="right") / np.arange(1, filtered + 1)
    head = np.maximum.accumulate(head[::-1])[::-1]

    def precision(rank: int) -> float:
        return head[rank] if rank < filtered else np.searchsorted(ranks, rank, side="right") / (rank + 1)

    # Each level is read at the first rank whose recall is nearest: that of the last item counted.
    recalls = np.arange(len(ranks) + 1) / len(ranks)
    counts = [int(np.abs(recalls - level).argmin()) for level in np.arange(0, 1.01, 0.1)]
    average = np.mean([precision(int(ranks[count - 1]) if count else 0) for count in counts])
    return np.array([average, *(precision(k - 1) for k in at)])


def descending(scores: np.ndarray) -> np.ndarray:
    """Positions in descending order of score, equals in order of position."""
    if scores.dtype != np.float32:
        return np.argsort(-scores, kind="stable")
    # A float's bits, those of negative ones flipped, sort like the float. With the position in the low half,
    # one vectorised sort of 64-bit integers is a stable argsort.
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 makes -0 equal to 0
    keys = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(len(scores))
    keys.sort()
    return keys & 0xFFFFFFFF
