"""What holds for every test: one thread, fixed seeds, and shape annotations that are checked."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import config, install_import_hook

from tests import typechecker

# Before anything of kdrefs is imported: its public functions then check their shape annotations at every call.
CHECKED = [
    f"kdrefs.{name}" for name in ("kernels", "pair_sums", "divergences", "noise", "metrics", "methods")
]
install_import_hook(CHECKED, f"{typechecker.__name__}.typechecker")

torch.set_num_threads(1)

# Derandomised: a failure on one machine is a failure on all.
settings.register_profile("kdrefs", deadline=None, derandomize=True, max_examples=60)
# More of them, new ones every time: pytest --hypothesis-profile=deep tests/fuzz
settings.register_profile("deep", deadline=None, max_examples=600, database=None, print_blob=True)
settings.load_profile("kdrefs")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks, as users run it: the functions' own errors, and what ``torch.compile`` needs."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def compiler() -> Iterator[None]:
    """A fresh ``torch.compile`` cache; warnings from inside the compiler are not ours to turn into errors."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
