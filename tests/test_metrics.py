"""Retrieval against scikit-learn, plain loops and the authors' evaluator; accuracy, agreement and probe."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor

from kdrefs._retrieval_official import descending
from kdrefs.metrics import (
    RetrievalScores,
    accuracy,
    agreement,
    linear_probe_accuracy,
    precision_at,
    retrieval,
    retrieval_map,
)

GOLDEN = Path(__file__).resolve().parent / "golden" / "pkt_official_retrieval_some.npz"
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(
    queries: int = 12,
    database: int = 60,
    width: int = 4,
    classes: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    ties: bool = False,
) -> Problem:
    """Clustered features with labels; for ties some rows become zero or one axis, whose cosines are exact."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.integers(0, classes, queries), rng.integers(0, classes, database)])
    labels[queries : queries + classes] = np.arange(classes)
    x = rng.normal(size=(classes, width))[labels] + rng.normal(size=(queries + database, width))
    if ties:
        x[::2] = 3.0 * (x[::2].argmax(axis=1)[:, None] == np.arange(width))
        x[::5] = 0
    features, labels = torch.from_numpy(x).to(dtype), torch.from_numpy(labels)
    return features[:queries], features[queries:], labels[:queries], labels[queries:]


def cosines(queries: Tensor, database: Tensor) -> np.ndarray:
    def unit(x: Tensor) -> np.ndarray:
        norm = np.linalg.norm(x.numpy(), axis=1, keepdims=True)
        return x.numpy() / np.where(norm == 0, 1, norm)

    return unit(queries) @ unit(database).T


def plain_retrieval(
    queries: Tensor, database: Tensor, query_labels: Tensor, database_labels: Tensor, at: tuple[int, ...]
) -> RetrievalScores:
    """Textbook loops over a stable ranking; no ties expected."""
    average, eleven, precision = [], [], {k: [] for k in at}
    for row, label in zip(cosines(queries, database), query_labels.tolist(), strict=True):
        relevant = (database_labels.numpy() == label)[np.argsort(-row, kind="stable")]
        hits, total, points = 0, int(relevant.sum()), []
        for rank, hit in enumerate(relevant, start=1):
            hits += int(hit)
            points.append((hits, hits / rank))
        average.append(np.mean([p for (_, p), hit in zip(points, relevant, strict=True) if hit]))
        eleven.append(np.mean([max(p for h, p in points if 10 * h >= level * total) for level in range(11)]))
        for k in at:
            precision[k].append(points[k - 1][1])
    return RetrievalScores(
        float(np.mean(average)), float(np.mean(eleven)), {k: float(np.mean(v)) for k, v in precision.items()}
    )


def assert_close(a: RetrievalScores, b: RetrievalScores, rel: float = 1e-12) -> None:
    assert a.mean_average_precision == pytest.approx(b.mean_average_precision, rel=rel)
    assert a.eleven_point == pytest.approx(b.eleven_point, rel=rel)
    assert a.precision == pytest.approx(b.precision, rel=rel)


# Against other definitions


@given(
    queries=st.integers(1, 9),
    database=st.integers(5, 40),
    classes=st.integers(1, 5),
    width=st.integers(2, 6),
    seed=st.integers(0, 2**16),
)
def test_retrieval_equals_plain_loops(queries, database, classes, width, seed):
    args = problem(queries, database, width, classes, seed)
    at = (1, 2, database)
    assert_close(retrieval(*args, at=at), plain_retrieval(*args, at=at))


@given(queries=st.integers(1, 9), width=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_average_precision_equals_scikit_learn_with_ties(queries, width, seed):
    args = problem(queries, width=width, seed=seed, ties=True)
    rows = zip(cosines(*args[:2]), args[2].tolist(), strict=True)
    expected = [average_precision_score(args[3].numpy() == label, row) for row, label in rows]
    assert retrieval_map(*args) == pytest.approx(np.mean(expected), rel=1e-12)


def test_official_variant_equals_the_authors_evaluator():
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        case = {key.partition("__")[2]: value for key, value in arrays.items()}
    fields = ("queries", "db", "query_labels", "db_labels")
    args = [torch.from_numpy(case[field]) for field in fields]
    at, batch = tuple(range(1, 61)), int(case["batch_size"])
    scores = retrieval(*args, at=at, variant="official", batch=batch)
    assert scores.mean_average_precision == pytest.approx(case["map"].item(), rel=1e-9)
    assert scores.eleven_point == scores.mean_average_precision
    np.testing.assert_allclose([scores.precision[k] for k in at], case["raw_precision"], rtol=1e-9)
    # One query a batch leaves nothing to interpolate.
    one = retrieval(*args, at=at, variant="official", batch=1)
    assert one.mean_average_precision == pytest.approx(case["ref_map11_nointerp"].item(), rel=1e-9)
    np.testing.assert_allclose([one.precision[k] for k in at], case["ref_plain_precision"], rtol=1e-9)
    # The other definitions, on the same sample.
    ours = retrieval(*args, at=at)
    assert ours.mean_average_precision == pytest.approx(case["ref_map_standard"].item(), rel=1e-9)
    np.testing.assert_allclose([ours.precision[k] for k in at], case["ref_plain_precision"], rtol=1e-9)


def plain_official(args: Problem, batch: int) -> tuple[float, np.ndarray]:
    """The evaluator as it is written: matrices of precision and recall, and the loop over the wrong length."""
    queries, database, query_labels, database_labels = args
    ap, raw = [], []
    for start in range(0, len(queries), batch):
        wanted = query_labels[start : start + batch].numpy()
        order = np.argsort(-cosines(queries[start : start + batch], database), axis=1, kind="stable")
        hits = (database_labels.numpy()[order] == wanted[:, None]).cumsum(axis=1)
        precision = hits / np.arange(1, len(database) + 1)
        for i in reversed(range(len(precision) - 1)):  # queries, not ranks
            precision[:, i] = np.maximum(precision[:, i], precision[:, i + 1])
        recall = hits / hits[:, -1:]
        levels = np.arange(0, 1.01, 0.1)
        nearest = np.stack([np.abs(recall - level).argmin(axis=1) for level in levels], axis=1)
        ap.extend(np.take_along_axis(precision, nearest, axis=1).mean(axis=1))
        raw.extend(precision)
    return float(np.mean(ap)), np.mean(raw, axis=0)


@given(
    queries=st.integers(1, 20),
    database=st.integers(20, 50),
    classes=st.integers(1, 6),
    batch=st.integers(1, 25),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_official_variant_equals_its_matrix_form(queries, database, classes, batch, ties, seed):
    args = problem(queries, database, 3, classes, seed, ties=ties)
    at = tuple(range(1, database + 1))
    scores = retrieval(*args, at=at, variant="official", batch=batch)
    average, raw = plain_official(args, batch)
    assert scores.mean_average_precision == pytest.approx(average, rel=1e-9)
    np.testing.assert_allclose([scores.precision[k] for k in at], raw, rtol=1e-9)


@given(seed=st.integers(0, 2**16), size=st.integers(1, 60))
def test_float32_scores_are_ranked_stably(seed, size):
    rng = np.random.default_rng(seed)
    scores = rng.choice(np.array([-1, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.3, 1], dtype=np.float32), size)
    np.testing.assert_array_equal(descending(scores), np.argsort(-scores, kind="stable"))
    scores = rng.normal(size=size).astype(np.float32)
    np.testing.assert_array_equal(descending(scores), np.argsort(-scores, kind="stable"))


def test_official_variant_ranks_float32_like_float64():
    args = problem(40, 400, 3, dtype=torch.float32)
    args[0][::3], args[1][::4] = 0, -args[1][1]  # ties at zero and elsewhere, of either sign
    exact = retrieval(
        *(x.double() if x.is_floating_point() else x for x in args), variant="official", batch=16
    )
    # Not closer: two scores that float32 cannot tell apart may change places.
    assert_close(retrieval(*args, variant="official", batch=16), exact, rel=1e-3)


def test_official_result_depends_on_the_batch_size_and_ours_does_not():
    args = problem(40, 200)
    official = {b: retrieval(*args, variant="official", batch=b).precision[10] for b in (1, 8, 40)}
    plain = retrieval(*args).precision[10]
    assert official[1] == pytest.approx(plain, rel=1e-12)
    assert plain + 0.01 < official[40]
    assert {retrieval(*args, batch=b).precision[10] for b in (1, 8, 40)} == {plain}


# Ties and zero rows


@pytest.mark.parametrize("constant", [0.0, 2.5])
def test_equal_features_score_the_share_of_the_class(constant):
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    scores = retrieval(
        torch.full((3, 4), constant), torch.full((10, 4), constant), torch.arange(3), labels, at=(1, 4, 10)
    )
    assert scores.mean_average_precision == pytest.approx((0.6 + 0.3 + 0.1) / 3)
    assert scores.eleven_point == pytest.approx((0.6 + 0.3 + 0.1) / 3)
    assert scores.precision == pytest.approx({1: 1 / 3, 4: 1 / 3, 10: 1 / 3})


def test_precision_within_a_tie_is_the_mean_over_its_orders():
    # Cosines 1, then three tied at 0 of which one is relevant, then -1.
    query = torch.tensor([[1.0, 0.0]])
    database = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([7, 7, 3, 3, 7])
    scores = retrieval(query, database, torch.tensor([7]), labels, at=(1, 2, 3, 4, 5))
    assert scores.precision == pytest.approx(
        {1: 1.0, 2: (1 + 1 / 3) / 2, 3: (1 + 2 / 3) / 3, 4: 2 / 4, 5: 3 / 5}
    )
    assert scores.mean_average_precision == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)


@given(seed=st.integers(0, 2**16))
def test_the_order_of_the_database_does_not_matter(seed):
    queries, database, query_labels, database_labels = problem(seed=seed, ties=True)
    order = torch.randperm(len(database), generator=torch.Generator().manual_seed(seed))
    at = (1, 7, 30)
    assert_close(
        retrieval(queries, database, query_labels, database_labels, at=at),
        retrieval(queries, database[order], query_labels, database_labels[order], at=at),
    )


def test_scores_do_not_depend_on_scale_block_threads_or_label_type():
    args = problem(30, 300, dtype=torch.float32)
    reference = retrieval(*args)
    for block in (1, 7, 1000):
        assert_close(retrieval(*args, block=block), reference, rel=1e-5)
    scaled = (args[0] * 1e-12, args[1] * torch.logspace(-12, 12, 300).unsqueeze(1), *args[2:])
    assert_close(retrieval(*scaled), reference, rel=1e-5)
    narrow = (*args[:2], args[2].to(torch.uint8), args[3].to(torch.int32))
    assert_close(retrieval(*narrow), reference, rel=0)
    torch.set_num_threads(2)
    try:
        assert_close(retrieval(*args), reference, rel=1e-5)
        assert_close(
            retrieval(*args, variant="official", batch=9),
            retrieval(*args, variant="official", batch=9),
            rel=0,
        )
    finally:
        torch.set_num_threads(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(retrieval(*args), reference, rel=0)
    half = retrieval(args[0].bfloat16(), args[1].bfloat16(), *args[2:])
    assert half.mean_average_precision == pytest.approx(reference.mean_average_precision, abs=0.02)


def test_arguments_are_left_alone():
    args = problem(9, 100, dtype=torch.float32)
    copies = [x.clone() for x in args]
    retrieval(*args)
    retrieval(*args, variant="official", batch=4)
    for before, after in zip(copies, args, strict=True):
        assert torch.equal(before, after)


def test_short_forms_agree_with_retrieval():
    args = problem(20, 100)
    for options in ({}, {"variant": "official", "batch": 6}):
        scores = retrieval(*args, at=(5,), **options)
        assert retrieval_map(*args, **options) == scores.mean_average_precision
        assert precision_at(5, *args, **options) == scores.precision[5]


def test_perfect_and_worst_rankings():
    database = torch.eye(4)
    labels = torch.tensor([0, 0, 1, 1])
    query = torch.tensor([[1.0, 0.9, 0.1, 0.2]])
    best = retrieval(query, database, torch.tensor([0]), labels, at=(1, 2, 4))
    assert best == RetrievalScores(1.0, 1.0, {1: 1.0, 2: 1.0, 4: 0.5})
    worst = retrieval(query, database, torch.tensor([1]), labels, at=(1, 2, 4))
    assert worst.mean_average_precision == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert worst.eleven_point == pytest.approx(0.5)
    assert worst.precision == {1: 0.0, 2: 0.0, 4: 0.5}


# Accuracy, agreement, probe


def test_accuracy_and_agreement_count():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [0.0, 5.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])) == 0.75  # of equal logits the first counts
    assert agreement(logits, logits * 3 - 1) == 1.0
    assert agreement(logits, -logits) == 0.25


def probe_problem(seed: int = 0) -> Problem:
    train = problem(90, 60, 5, 3, seed)
    return train[0], train[2], train[1], train[3]


@pytest.mark.parametrize("l2", [1e-3, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_probe_equals_scikit_learn(seed, l2):
    train_x, train_y, test_x, test_y = probe_problem(seed)
    mean, std = train_x.mean(dim=0), train_x.std(dim=0, correction=0)
    reference = LogisticRegression(C=1 / (l2 * len(train_x)), tol=1e-8, max_iter=10_000)
    reference.fit(((train_x - mean) / std).numpy(), train_y.numpy())
    expected = reference.score(((test_x - mean) / std).numpy(), test_y.numpy())
    assert 0.4 < expected < 1
    assert linear_probe_accuracy(train_x, train_y, test_x, test_y, l2=l2) == pytest.approx(expected)


def test_probe_is_deterministic_and_ignores_scale_shift_and_dead_columns():
    train_x, train_y, test_x, test_y = probe_problem()
    reference = linear_probe_accuracy(train_x, train_y, test_x, test_y)
    assert linear_probe_accuracy(train_x, train_y, test_x, test_y) == reference
    assert linear_probe_accuracy(100 * train_x - 3, train_y, 100 * test_x - 3, test_y) == reference
    padded = [torch.nn.functional.pad(x, (0, 2), value=0.1) for x in (train_x, test_x)]
    assert linear_probe_accuracy(padded[0], train_y, padded[1], test_y) == reference
    shifted = linear_probe_accuracy(train_x, train_y + 40, test_x, test_y + 40)
    assert shifted == reference


def test_probe_separates_what_is_separable_and_leaves_the_features_alone():
    x = torch.cat([torch.randn(50, 2) + 6, torch.randn(50, 2) - 6]).requires_grad_()
    y = torch.arange(100) // 50
    assert linear_probe_accuracy(x, y, x, y) == 1.0
    assert x.grad is None


ARGS = problem(4, 20)
NAN = ARGS[0].clone()
NAN[1, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, d, a, b: retrieval(q, d[:, :2], a, b), "database: expected width 4 as in queries, got 2"),
        (
            lambda q, d, a, b: retrieval(q, d, a[:2], b),
            r"query_labels: expected as many rows as queries \(4\), got 2",
        ),
        (lambda q, d, a, b: retrieval(q, d, a, b.double()), "database_labels: expected class indices"),
        (
            lambda q, d, a, b: retrieval(q, d, a + 90, b),
            r"query_labels: label 9\d does not occur in the database",
        ),
        (lambda q, d, a, b: retrieval(q, d, a, b, at=(21,)), r"at: expected 1 to 20 .* got 21"),
        (lambda q, d, a, b: retrieval(q, d, a, b, at=(0,)), r"at: expected 1 to 20 .* got 0"),
        (lambda q, d, a, b: retrieval(q, d, a, b, at=(1,), block=0), "block: expected at least 1, got 0"),
        (lambda q, d, a, b: retrieval(q, d, a, b, at=(1,), variant="other"), "variant: expected one of"),
        (
            lambda q, d, a, b: retrieval(d, q, b, torch.tensor([0, 1, 2, 0]), at=(1,), variant="official"),
            "batch: expected at most 4",
        ),
        (lambda q, d, a, b: retrieval(NAN, d, a, b), "queries: expected finite values"),
        (lambda q, d, a, b: accuracy(q, a[:2]), "labels: expected as many rows as logits"),
        (lambda q, d, a, b: accuracy(NAN, a), "logits: expected finite values"),
        (lambda q, d, a, b: agreement(q, d), "other: expected the shape of logits"),
        (
            lambda q, d, a, b: linear_probe_accuracy(q, a, d[:, :2], b),
            "test_features: expected width 4, got 2",
        ),
        (
            lambda q, d, a, b: linear_probe_accuracy(q, a, d, b, l2=0.0),
            "l2: expected a finite number above 0",
        ),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call(*ARGS)
