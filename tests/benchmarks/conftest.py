"""Benchmarks run only when asked for: ``pytest tests/benchmarks --benchmark-only``."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only") or config.getoption("benchmark_enable"):
        return
    skip = pytest.mark.skip(reason="benchmark: needs --benchmark-only or --benchmark-enable")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)
