"""Retrieval, accuracy, agreement and linear probe: figures about features and predictions, never gradients.

Every result is a Python float, a fraction in [0, 1]. Unlike the losses these functions look at the values
they get and raise ``ValueError`` for anything that is not finite.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdrefs._checks import (
    check_choice,
    check_class_indices,
    check_matrix,
    check_positive,
    check_same_batch,
    check_same_shape,
)
from kdrefs._retrieval_official import official_scores
from kdrefs._typing import Float, Integer
from kdrefs.kernels import inner_products, unit_rows

_LEVELS = 11  # recall 0, 0.1, ..., 1


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the queries, as fractions in [0, 1].

    Attributes:
        mean_average_precision: Mean over the relevant items of the precision at their rank.
        eleven_point: Interpolated precision (the best at this recall or a higher one), mean over the recall
            levels 0, 0.1, ..., 1.
        precision: Share of relevant items among the first *k*, by *k*.
    """

    mean_average_precision: float
    eleven_point: float
    precision: dict[int, float]


@torch.no_grad()
def retrieval(
    queries: Float[Tensor, "queries width"],
    database: Float[Tensor, "database width"],
    query_labels: Integer[Tensor, "queries"],
    database_labels: Integer[Tensor, "database"],
    *,
    at: Sequence[int] = (1, 10, 100),
    variant: str | None = None,
    batch: int = 128,
    block: int = 250,
) -> RetrievalScores:
    """Rank the database by cosine similarity to each query; items with the query's label are relevant.

    A zero row has cosine 0 with everything. Ties (scores equal to the last bit) are treated without regard to
    the order of the database: in average precision tied items share the last rank of their tie, as in
    scikit-learn; precision at *k* takes the expectation over the orders of the tie that *k* cuts. Equal
    features for all thus score the share of the query's class.

    Args:
        queries: Features ``(queries, width)``.
        database: Features ``(database, width)``.
        query_labels: Class indices ``(queries,)``; each must occur in the database.
        database_labels: Class indices ``(database,)``.
        at: The *k* of the precisions, each between 1 and the database size.
        variant: None, the definitions above. ``"official"``: the evaluator of
            passalis/probabilistic_kt@a58fd1b, ``nn/retrieval_evaluation.py``, with its defect: precision is
            interpolated only over the first ``batch`` ranks, because a loop runs over the queries of a batch
            in place of the ranks. Both averages are then its "mAP" (eleven recall levels, each read at the
            rank whose recall is nearest), precision at *k* is what it prints as top-*k*, and ties go by
            position in the database.
        batch: Queries that the official evaluator takes at a time; its result depends on it.
        block: Queries ranked at a time, for memory only: ``4 * block * database`` bytes of float32 scores and
            about as much again.

    Returns:
        The scores. On the CPU rows are sorted by ``torch.get_num_threads()`` threads.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, a feature is not finite, or a query's label
            does not occur in the database.
    """
    queries, database, query_labels, database_labels = _check_retrieval(
        queries, database, query_labels, database_labels
    )
    for k in at:
        if not 1 <= k <= database.shape[0]:
            raise ValueError(f"at: expected 1 to {database.shape[0]} (the database size), got {k}")
    for name, value in (("batch", batch), ("block", block)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if variant is not None:
        check_choice("variant", variant, ("official",))
        if min(batch, queries.shape[0]) > database.shape[0]:
            raise ValueError(f"batch: expected at most {database.shape[0]} (the database size), got {batch}")
        batches = zip(queries.split(batch), query_labels.split(batch), strict=True)
        scored = ((inner_products(part, database), labels) for part, labels in batches)
        mean = official_scores(scored, database_labels, at, torch.get_num_threads())
        return RetrievalScores(mean[0], mean[0], dict(zip(at, mean[1:], strict=True)))

    # With the database grouped by class, the relevant scores of a query are a slice of its row.
    order = torch.argsort(database_labels, stable=True)
    classes, sizes = torch.unique_consecutive(database_labels[order], return_counts=True)
    stops = dict(zip(classes.tolist(), sizes.cumsum(0).tolist(), strict=True))
    counts = dict(zip(classes.tolist(), sizes.tolist(), strict=True))
    database = database[order]
    totals = torch.zeros(2 + len(at), dtype=torch.float64, device=queries.device)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for label in torch.unique(query_labels).tolist():
            for rows in torch.nonzero(query_labels == label).squeeze(1).split(block):
                scores = inner_products(queries[rows], database)
                own = scores[:, stops[label] - counts[label] : stops[label]].clone()
                totals += _row_scores(_sort_rows(own, pool), _sort_rows(scores, pool), at).sum(dim=0)
    mean = (totals / queries.shape[0]).tolist()
    return RetrievalScores(mean[0], mean[1], dict(zip(at, mean[2:], strict=True)))


def retrieval_map(
    queries: Float[Tensor, "queries width"],
    database: Float[Tensor, "database width"],
    query_labels: Integer[Tensor, "queries"],
    database_labels: Integer[Tensor, "database"],
    *,
    variant: str | None = None,
    batch: int = 128,
    block: int = 250,
) -> float:
    """Mean average precision of :func:`retrieval`, a fraction; arguments and errors as there."""
    scores = retrieval(
        queries, database, query_labels, database_labels, at=(), variant=variant, batch=batch, block=block
    )
    return scores.mean_average_precision


def precision_at(
    k: int,
    queries: Float[Tensor, "queries width"],
    database: Float[Tensor, "database width"],
    query_labels: Integer[Tensor, "queries"],
    database_labels: Integer[Tensor, "database"],
    *,
    variant: str | None = None,
    batch: int = 128,
    block: int = 250,
) -> float:
    """Precision among the first ``k`` of :func:`retrieval`, a fraction; arguments and errors as there."""
    scores = retrieval(
        queries, database, query_labels, database_labels, at=(k,), variant=variant, batch=batch, block=block
    )
    return scores.precision[k]


@torch.no_grad()
def accuracy(logits: Float[Tensor, "samples classes"], labels: Integer[Tensor, "samples"]) -> float:
    """Share of samples whose largest logit (the first of equals) is the label's.

    Raises:
        ValueError: A shape or dtype does not fit, or a logit is not finite.
    """
    _check_finite("logits", logits)
    _check_labels("labels", labels, "logits", logits)
    return (logits.argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
def agreement(logits: Float[Tensor, "samples classes"], other: Float[Tensor, "samples classes"]) -> float:
    """Share of samples for which two nets predict the same class (largest logit, the first of equals).

    Raises:
        ValueError: A shape or dtype does not fit, or a logit is not finite.
    """
    _check_finite("logits", logits)
    _check_finite("other", other)
    check_same_shape("other", other, "logits", logits)
    return (logits.argmax(dim=1) == other.argmax(dim=1)).double().mean().item()


def linear_probe_accuracy(
    train_features: Float[Tensor, "train width"],
    train_labels: Integer[Tensor, "train"],
    test_features: Float[Tensor, "test width"],
    test_labels: Integer[Tensor, "test"],
    *,
    l2: float = 1e-3,
    max_iterations: int = 500,
) -> float:
    r"""Accuracy on the test set of a linear classifier trained on frozen features.

    Multinomial logistic regression on features standardised by the training set's mean and deviation:
    mean cross-entropy plus :math:`\tfrac{\lambda}{2} \lVert W \rVert^2` (no penalty on the bias). The problem
    is strictly convex in :math:`W` and solved in float64 by L-BFGS from zero, so nothing depends on a seed.

    Args:
        train_features: ``(train, width)``.
        train_labels: Class indices ``(train,)``.
        test_features: ``(test, width)``.
        test_labels: Class indices ``(test,)``.
        l2: The penalty :math:`\lambda`, above 0.
        max_iterations: Limit on L-BFGS iterations.

    Returns:
        Fraction in [0, 1].

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or a feature is not finite.
    """
    _check_finite("train_features", train_features)
    _check_finite("test_features", test_features)
    _check_labels("train_labels", train_labels, "train_features", train_features)
    _check_labels("test_labels", test_labels, "test_features", test_features)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected width {train_features.shape[1]}, got {test_features.shape[1]}"
        )
    check_positive("l2", l2)
    with torch.inference_mode(False), torch.no_grad():  # nothing can be fitted in inference mode
        train, test = (
            features.detach().to(torch.float64, copy=True) for features in (train_features, test_features)
        )
        mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
        # A constant column stays at zero.
        deviation = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
        train, test = (train - mean) / deviation, (test - mean) / deviation
        classes, targets = torch.unique(train_labels, return_inverse=True)

        with torch.enable_grad():
            weight = torch.zeros(train.shape[1], len(classes), dtype=train.dtype, device=train.device)
            bias = torch.zeros(len(classes), dtype=train.dtype, device=train.device)
            parameters = [weight.requires_grad_(), bias.requires_grad_()]
            optimizer = torch.optim.LBFGS(
                parameters, max_iter=max_iterations, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
            )

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(train @ weight + bias, targets)
                loss = loss + l2 / 2 * weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        predicted = classes[(test @ weight + bias).argmax(dim=1)]
        return (predicted == test_labels).double().mean().item()


def _row_scores(own: Tensor, every: Tensor, at: Sequence[int]) -> Tensor:
    """Average precision, eleven-point precision and precisions at k of each row, ``(rows, 2 + len(at))``.

    ``own (rows, relevant)`` and ``every (rows, database)`` are scores in ascending order. How many scores are
    at or above a relevant one is its rank; a binary search finds it without ever sorting the labels along.
    """
    relevant, items = own.shape[1], every.shape[1]
    hits = relevant - torch.searchsorted(own, own)
    precision = hits.double() / (items - torch.searchsorted(every, own))
    average = precision.mean(dim=1, keepdim=True)

    # Ascending scores are descending ranks: a running maximum from the left is "this recall or a higher one".
    best = precision.cummax(dim=1).values
    needed = [max(1, -(-level * relevant // (_LEVELS - 1))) for level in range(_LEVELS)]
    eleven = best[:, [relevant - count for count in needed]].mean(dim=1, keepdim=True)

    cut = every[:, [items - k for k in at]].contiguous()
    above, own_above = (x.shape[1] - torch.searchsorted(x, cut, right=True) for x in (every, own))
    tied, own_tied = (
        x.shape[1] - torch.searchsorted(x, cut) - n for x, n in ((every, above), (own, own_above))
    )
    k = torch.tensor(at, dtype=torch.float64, device=own.device)
    return torch.cat([average, eleven, (own_above + own_tied * (k - above) / tied) / k], dim=1)


def _sort_rows(scores: Tensor, pool: ThreadPoolExecutor) -> Tensor:
    """Sort each row in ascending order; on the CPU in place, by numpy, whose value sort is vectorised."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    list(pool.map(lambda rows: rows.sort(axis=1), _chunks(scores.numpy(), torch.get_num_threads())))
    return scores


def _chunks(rows: np.ndarray, count: int) -> Iterator[np.ndarray]:
    size = -(-len(rows) // count)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _check_retrieval(
    queries: Tensor, database: Tensor, query_labels: Tensor, database_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_finite("queries", queries)
    _check_finite("database", database)
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"database: expected width {queries.shape[1]} as in queries, got {database.shape[1]}"
        )
    _check_labels("query_labels", query_labels, "queries", queries)
    _check_labels("database_labels", database_labels, "database", database)
    query_labels, database_labels = (
        x.to(queries.device, torch.int64) for x in (query_labels, database_labels)
    )
    missing = query_labels[~torch.isin(query_labels, database_labels)]
    if len(missing):
        raise ValueError(f"query_labels: label {missing[0].item()} does not occur in the database")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, database.dtype), torch.float32)
    return unit_rows(queries.to(dtype)), unit_rows(database.to(dtype)), query_labels, database_labels


def _check_finite(name: str, value: Tensor) -> None:
    check_matrix(name, value)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _check_labels(name: str, labels: Tensor, other_name: str, other: Tensor) -> None:
    check_class_indices(name, labels)
    check_same_batch(name, labels, other_name, other)
