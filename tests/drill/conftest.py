"""Programs made for processes of their own are called in this one, too: what they change is put back."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from kdrefs.data import sets
from reproductions import cli


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    with patch.dict(os.environ), patch.dict(sets._SETS), patch.object(cli, "COLUMNS", cli.COLUMNS):
        yield
