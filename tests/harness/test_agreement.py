"""Two recordings of one number: equal bits where they are due, else a test of the difference."""

import numpy as np
import pytest
from scipy import stats

from reproductions.harness.agreement import agree, agree_all, compare
from reproductions.harness.ledger import Ledger
from reproductions.harness.profiles import HarnessError, load_column
from reproductions.harness.recording import merged
from tests.harness.fakes import make_result

OTHER = {"versions": {"torch": "2.6.0"}}


@pytest.fixture
def number(column, columns):
    known = load_column(column, columns)

    def make(values, arm="student", **settings):
        results = [make_result(column, arm, seed, value, **settings) for seed, value in enumerate(values)]
        return merged(Ledger.empty(column, "a" * 64), results, known).number(
            f"{column}/quick/synthetic/map/{arm}"
        )

    return make


VALUES = [50.0, 50.2, 50.4, 50.1, 50.3]


def test_on_one_machine_bits_must_be_equal(number):
    assert agree(number(VALUES), number(VALUES)).verdict == "agrees"
    off = [*VALUES[:4], np.nextafter(VALUES[4], 99)]
    assert agree(number(VALUES), number(off)).verdict == "differs"
    assert agree(number(VALUES), number(VALUES[:3])).verdict == "agrees"


def test_elsewhere_the_difference_is_tested(number):
    assert agree(number(VALUES), number([v + 0.1 for v in VALUES], **OTHER)).verdict == "agrees"
    assert agree(number(VALUES), number([v + 1.0 for v in VALUES], **OTHER)).verdict == "differs"
    wide = [46.0, 54.0, 50.0, 48.0, 52.0]  # the width is above the metric's δ of 2
    assert agree(number(wide), number(wide[::-1], **OTHER)).verdict == "cannot tell"
    assert agree(number([50.0]), number([51.0], **OTHER)).verdict == "cannot tell"


def test_the_width_is_that_of_the_t_test(number):
    second = [v + 0.1 * i for i, v in enumerate(VALUES[:4])]
    found = agree(number(VALUES), number(second, **OTHER), comparisons=4)
    test = stats.ttest_ind(VALUES, second)
    low, high = test.confidence_interval(1 - 0.05 / 4)
    assert found.difference == pytest.approx((low + high) / 2)
    assert found.width == pytest.approx((high - low) / 2)


def test_several_comparisons_share_the_level(number):
    pair = number(VALUES), number([v + 0.1 for v in VALUES], **OTHER)
    one, many = agree(*pair), agree_all([pair] * 10)
    assert all(item.width == agree(*pair, comparisons=10).width > one.width for item in many)


def test_equal_recordings_differ_at_most_at_the_nominal_rate(number):
    generator, differs = np.random.default_rng(0), 0
    for _ in range(200):
        first, second = generator.normal(50, 0.3, (2, 5))
        differs += agree(number(first), number(second, **OTHER)).verdict == "differs"
    assert stats.binom.sf(differs - 1, 200, 0.05) > 1e-3


def test_values_without_chance_agree_to_rounding(number):
    for other, expected in ((80.00001, "agrees"), (80.2, "differs")):
        assert agree(number([80.0], "teacher"), number([other], "teacher", **OTHER)).verdict == expected


def test_compare_pairs_arms_by_seed(number):
    found = compare(number([v + 1 for v in VALUES], "method"), number(VALUES))
    assert (found.verdict, found.difference) == ("differs", pytest.approx(1.0))
    assert "paired difference +1 points" in found.text
    same = compare(number(VALUES, "method"), number(VALUES))
    assert same.verdict == "cannot tell"


def test_compare_of_one_number_is_agreement(number):
    assert compare(number(VALUES), number(VALUES)).text.startswith("equal bits on 5 seeds")


def test_compare_needs_one_unit(number):
    first = number(VALUES)
    entry = first.entry.model_copy(update={"unit": "nat"})
    other = type(first)(first.key, entry, first.runs, first.source)
    with pytest.raises(HarnessError, match="is in '%'"):
        compare(first, other)
