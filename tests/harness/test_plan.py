"""The plan that the workflow engine reads: each run alone, where its result will lie, and what is done."""

import pytest

from reproductions.harness.plan import plan_runs
from reproductions.harness.profiles import HarnessError
from reproductions.harness.runs import run_profile
from tests.harness.fakes import make_column


@pytest.fixture
def plan(columns, store):
    def call(profile="quick", threads=1, device="cpu", **settings):
        return plan_runs(profile, threads=threads, device=device, store=store, columns=columns, **settings)

    return call


def test_results_lie_where_the_plan_says(plan, column, columns, store):
    planned = plan(names=[column])
    assert [item.done for item in planned] == [False] * 16
    run_profile(column, arms=["twin"], threads=1, store=store, columns=columns)
    assert {(item.run.arm, item.run.seed) for item in plan(names=[column]) if item.done} == {
        ("twin", seed) for seed in range(5)
    }
    assert {item.result for item in planned if item.done} == set(store.root.glob("runs/**/result.json"))


def test_another_seed_adds_its_runs_and_leaves_the_others(plan, column):
    few, more = ({item.result for item in plan(names=[column], seeds=seeds)} for seeds in ([0, 1], [0, 1, 7]))
    assert few < more
    assert {path.parent.name.split("-")[0] for path in more - few} == {"7"}
    assert len(more - few) == 3


@pytest.mark.parametrize("change", [{"threads": 2}, {"device": "cuda"}, {"profile": "standard"}])
def test_what_a_value_depends_on_is_in_the_path(plan, column, change):
    first, second = ({item.result for item in plan(names=[column], **settings)} for settings in ({}, change))
    assert not first & second


def test_all_columns_that_have_the_profile_are_planned(plan, column, columns):
    other = make_column(columns)
    path = columns / other / "run.py"
    path.write_text(path.read_text().replace('("quick", "standard", "paper")', '("quick", "long")'))
    assert [item.run.column for item in plan()] == [*[column] * 16, *[other] * 16]
    assert {item.run.column for item in plan("long")} == {other}
    assert {item.run.column for item in plan("paper")} == {column}
    with pytest.raises(HarnessError, match=f"'{column}' has no profile 'long'"):
        plan("long", names=[column, other])
    with pytest.raises(HarnessError, match="no column has a profile 'quik'; did you mean 'quick'"):
        plan("quik")


def test_a_column_named_twice_is_planned_once(plan, column):
    assert len(plan(names=[column, column])) == 16
