import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import properties
from tests.fuzz.estimators import ESTIMATORS

every_function = pytest.mark.parametrize("case", ESTIMATORS, ids=[case.title for case in ESTIMATORS])


@every_function
@properties.examples(60)
@given(data=st.data())
def test_values_and_gradients_are_finite(data, case):
    properties.values_and_gradients_are_finite(data, case)


@every_function
@properties.examples(30)
@given(data=st.data())
def test_layouts_do_not_matter(data, case):
    properties.layouts_do_not_matter(data, case)


@every_function
@properties.examples(60)
@given(data=st.data())
def test_wrong_arguments_are_refused(data, case):
    properties.wrong_arguments_are_refused(data, case)


@every_function
@properties.examples(60)
@given(data=st.data())
def test_not_a_number_changes_nothing_else(data, case):
    properties.not_a_number_changes_nothing_else(data, case)
