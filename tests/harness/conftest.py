"""A fake column, a store and a log of executions for every test of the harness."""

from pathlib import Path

import pytest

from reproductions.harness.store import RunStore
from tests.harness.fakes import make_column


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    return tmp_path / "columns"


@pytest.fixture
def column(columns: Path) -> str:
    return make_column(columns)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "store")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "executions"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path
