"""Tables for the terminal."""

import pytest
from rich.console import Console

from reproductions.harness.ledger import Ledger
from reproductions.harness.profiles import load_column
from reproductions.harness.recording import merged
from reproductions.harness.report import numbers_table
from tests.harness.fakes import make_result


@pytest.mark.parametrize(("metrics", "header"), [(2, "arm"), (3, "metric")])
def test_numbers_table_puts_the_fewer_of_metrics_and_arms_side_by_side(columns, column, metrics, header):
    known = load_column(column, columns)
    values = {"loss": 7.0, "probe": 9.0}
    results = [
        make_result(column, arm, seed, 50).model_copy(
            update={"metrics": {"map": 50.0 + seed} | dict(list(values.items())[: metrics - 1])}
        )
        for arm in ("method", "twin")
        for seed in range(5)
    ]
    known.metrics.update(dict.fromkeys(values, known.metrics["map"]))
    table = numbers_table(merged(Ledger.empty(column), results, known).numbers.values())
    console = Console(width=160, record=True)
    console.print(table)
    text = console.export_text()
    assert [str(c.header) for c in table.columns][1] == header
    assert len(table.columns) == 3 + 2
    assert table.row_count == {"arm": 2, "metric": 3}[header]
    assert "52.0" in text
    assert "method" in text
    assert "twin" in text
