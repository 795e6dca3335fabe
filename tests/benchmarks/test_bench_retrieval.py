"""Retrieval of 1,000 queries against 50,000 rows of width 64 (a tenth of CIFAR-10), beside a sort of every row.

The table's figures in brackets are ratios to the fastest of the group; the seconds depend on the machine.
"""

import pytest
import torch
from torch import Tensor

from kdrefs.metrics import retrieval_map


def argsort_map(queries: Tensor, database: Tensor, query_labels: Tensor, database_labels: Tensor) -> float:
    """Average precision from the ranking itself, 250 queries at a time."""
    queries, database = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(database)
    total = 0.0
    for part, labels in zip(queries.split(250), query_labels.split(250), strict=True):
        order = (part @ database.T).argsort(dim=1, descending=True)
        relevant = database_labels[order] == labels.unsqueeze(1)
        precision = relevant.cumsum(dim=1) / torch.arange(1, len(database) + 1)
        total += ((precision * relevant).sum(dim=1) / relevant.sum(dim=1)).sum().item()
    return total / len(queries)


RANKINGS = {
    "argsort of every row": argsort_map,
    "default": retrieval_map,
    "official variant": lambda *args: retrieval_map(*args, variant="official"),
}


@pytest.mark.benchmark(group="retrieval, 1,000 x 50,000 x 64")
@pytest.mark.parametrize("name", RANKINGS)
def test_retrieval(benchmark, name):
    labels = torch.randint(10, (51_000,))
    features = torch.randn(10, 64)[labels] + 2 * torch.randn(51_000, 64)
    args = features[:1000], features[1000:], labels[:1000], labels[1000:]
    value = benchmark.pedantic(RANKINGS[name], args=args, rounds=3, warmup_rounds=1)
    assert value == pytest.approx(argsort_map(*args), abs=1e-5 if name == "default" else 0.05)
