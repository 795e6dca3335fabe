"""The fuzzing leaves out no public name."""

from tests.fuzz.cases import LOSSES
from tests.fuzz.estimators import ESTIMATORS, NO_TENSORS, public_names


def test_every_public_name_is_called_or_takes_no_tensor():
    called = {case.of.__name__ for case in (*LOSSES, *ESTIMATORS)}
    others = set().union(*NO_TENSORS.values())
    assert called.isdisjoint(others)
    assert called | others == public_names()
