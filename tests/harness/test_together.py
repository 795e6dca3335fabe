"""Runs that share one training: executed, probed, locked and revalidated as one, recorded each on its own."""

import dataclasses
from types import SimpleNamespace

import pytest

from reproductions.harness import jobs
from reproductions.harness.agreement import agree
from reproductions.harness.jobs import execute_group, groups
from reproductions.harness.ledger import Ledger, load_ledger
from reproductions.harness.profiles import HarnessError, load_column
from reproductions.harness.recording import merged, record
from reproductions.harness.revalidation import revalidate
from reproductions.harness.runs import make_jobs, run_profile
from reproductions.harness.store import Run, RunStore
from tests.harness.fakes import finish, make_column, meeting, start

# Every arm but the teacher trains its seeds together. As in a real column a value depends a little on the partners.
HOOKS = """

def together(run, config, device):
    return None if run.arm == "teacher" else f"{run.arm} on {device}"


def execute_together(runs, config, context):
    work(runs, context)
    shift = 0.01 * sum(run.seed for run in runs)
    return [{name: value + shift for name, value in values(run, context).items()} for run in runs]
"""


@pytest.fixture
def column(columns):
    name = make_column(columns)
    path = columns / name / "run.py"
    path.write_text(path.read_text() + HOOKS)
    return name


@pytest.fixture
def known(column, columns):
    return load_column(column, columns)


@pytest.fixture
def run(column, columns, store):
    def call(profile="quick", **settings):
        settings = {"columns": columns, "store": store, "threads": 1, **settings}
        return run_profile(column, profile, **settings)

    return call


def lines(log):
    return [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()]


def seeds(results):
    return [(result.run.seed, result.provenance.seeds) for result in results]


def test_an_arm_is_one_training_and_every_run_a_result(run, log, column, store):
    seen = []
    results = run(seeds=[2, 0, 1], on_result=seen.append)
    assert lines(log) == ["teacher#2 None", *(f"{arm}#0,1,2 None" for arm in ("student", "method", "twin"))]
    assert [f"{r.run.arm}#{r.run.seed}" for r in results] == [
        "teacher#2", *(f"{arm}#{seed}" for arm in ("student", "method", "twin") for seed in (2, 0, 1)),
    ]  # fmt: skip
    assert {r.run for r in seen} == {r.run for r in results}
    assert len(seen) == 10
    assert seeds(results[:4]) == [(2, (2,)), (2, (0, 1, 2)), (0, (0, 1, 2)), (1, (0, 1, 2))]
    assert len({r.metrics["map"] for r in results}) == 10
    assert results[1].best["map"] == pytest.approx(results[1].metrics["map"] + 1)
    assert all(store.get(r.run, r.key) == r for r in results)
    assert results[1].provenance.command == (
        f"reproduce run {column} --profile quick --data synthetic --arm student --seeds 0,1,2 --device cpu --threads 1"
    )
    assert run(seeds=[2, 0, 1]) == results
    assert len(lines(log)) == 4


def test_the_key_of_a_run_does_not_depend_on_its_partners(run, store):
    """Whatever partners a run had, it is found; what it had stands in its provenance."""
    (single,) = run(seeds=[1], arms=["student"])
    assert [r.key for r in run(seeds=[0, 1], arms=["student"]) if r.run.seed == 1] == [single.key]


def test_only_what_is_missing_is_trained(run, log):
    run(seeds=[1], arms=["student"])
    results = run(seeds=[0, 1, 2, 3], arms=["student"])
    assert lines(log) == ["student#1 None", "student#0,2,3 None"]
    assert seeds(results) == [(0, (0, 2, 3)), (1, (1,)), (2, (0, 2, 3)), (3, (0, 2, 3))]


def test_time_is_shared_out_and_memory_is_not(run, monkeypatch):
    monkeypatch.setattr(jobs, "time", SimpleNamespace(perf_counter=iter([1.0, 7.0]).__next__))
    monkeypatch.setattr(jobs, "peak_memory_mb", lambda device: 40.0)
    origins = [result.provenance for result in run(seeds=[0, 1, 2], arms=["student"])]
    assert [(origin.wall_seconds, origin.peak_memory_mb) for origin in origins] == [(2.0, 40.0)] * 3


def test_a_probe_has_the_partners_of_its_run(run, log):
    results = run("standard", seeds=[0, 1], arms=["student"])
    assert lines(log) == ["student#0,1 None", "student#0,1 50"]
    assert len({result.probe["loss"] for result in results}) == 2
    log.write_text("")
    run(seeds=[0, 1], arms=["student"])
    # Only one of them is asked for, but its partner takes part.
    (late,) = run(seeds=[1], arms=["student"], probe=True)
    assert late.probe == results[1].probe
    assert lines(log) == ["student#0,1 None", "student#0,1 50"]
    # Now beside a run of another training, each with its own partners.
    both = run(seeds=[0, 1, 2], arms=["student"], probe=True)
    assert [r.probe for r in both[:2]] == [r.probe for r in results]
    assert lines(log)[2:] == ["student#2 None", "student#0,1 50", "student#2 50"]


@pytest.mark.slow
def test_groups_go_to_processes(run, log):
    results = run(seeds=[0, 1], jobs=2)
    assert sorted(lines(log)) == ["method#0,1 None", "student#0,1 None", "teacher#0 None", "twin#0,1 None"]
    assert [r.run.arm for r in results[::2]] == ["teacher", "student", "method", "twin"]
    assert seeds(results)[1] == (0, (0, 1))


def command(column, columns, store, ready, chosen):
    return (
        "from pathlib import Path\n"
        "from reproductions.harness.runs import run_profile, RunStore\n"
        f"{ready}\n"
        f"run_profile({column!r}, columns=Path({str(columns)!r}), store=RunStore({str(store.root)!r}), threads=1,"
        f" seeds={chosen}, arms=['student'])"
    )


@pytest.mark.parametrize("others", [[3, 2, 5, 0], pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)])
def test_two_commands_at_once_do_no_run_twice(column, columns, store, log, run, tmp_path, others):
    ready = meeting(tmp_path / "ready")
    finish(
        *(
            start(command(column, columns, store, ready, chosen), FAKE_SLEEP="0.5")
            for chosen in ([0, 1, 2, 3], others)
        )
    )
    trained = [int(seed) for line in lines(log) for seed in line.split()[0].split("#")[1].split(",")]
    assert sorted(trained) == sorted({0, 1, 2, 3, *others})
    assert len(run(seeds=sorted(trained), arms=["student"])) == len(trained)
    assert len(lines(log)) <= 2


def test_a_group_is_left_to_who_works_on_a_part_of_it(column, columns, store, log, known):
    plan = make_jobs(known, "quick", arms=["student"], device="cpu", threads=1, store=store, columns=columns)
    (group,) = groups(plan)
    with store.lock(group[3].run, group[3].key):
        assert execute_group(group, wait=False) is None
        # What it had locked by then is free again.
        assert [result.run.seed for result in execute_group(group[:3], wait=False)] == [0, 1, 2]
    assert [result.provenance.seeds for result in execute_group(group)] == [(0, 1, 2)] * 3 + [(3, 4)] * 2


def test_an_error_names_all_its_runs(run, monkeypatch, column):
    monkeypatch.setenv("FAKE_FAIL", "method")
    with pytest.raises(FloatingPointError) as caught:
        run(seeds=[0, 1])
    name = f"{column}/quick/synthetic/method"
    assert caught.value.__notes__ == [f"in the runs {name}#0, {name}#1"]


@pytest.mark.parametrize("hook", ["together", "execute_together"])
def test_a_column_that_lacks_one_of_the_hooks_is_refused(columns, column, hook):
    path = columns / column / "run.py"
    path.write_text(path.read_text().replace(f"def {hook}(", "def another("))
    with pytest.raises(HarnessError, match="has one of together and execute_together, not both"):
        load_column(column, columns)


def test_metrics_of_each_run_are_needed(columns, column, run):
    path = columns / column / "run.py"
    path.write_text(path.read_text().replace("for run in runs]\n", "for run in runs[1:]]\n"))
    with pytest.raises(HarnessError, match="returned metrics of 1 runs, expected 2"):
        run(seeds=[0, 1])


def test_a_column_without_hooks_trains_one_at_a_time(known):
    alone = dataclasses.replace(known, execute_together=None)
    runs = [Run(known.name, "quick", "synthetic", "student", seed) for seed in (0, 1)]
    with pytest.raises(HarnessError, match="has no execute_together"):
        alone.execute_all(runs, known.profiles["quick"], None)


# ---------------------------------------------------------------- comparing and revalidating


@pytest.fixture
def number(run, known, tmp_path):
    """The number of the student's mAP from trainings of the given seeds, in a store of its own."""

    def call(*trainings):
        own = RunStore(tmp_path / f"store{trainings}")
        results = [r for chosen in trainings for r in run(seeds=chosen, arms=["student"], store=own)]
        ledger = merged(Ledger.empty(known.name, results[0].provenance.source), results, known)
        return ledger.number(f"{known.name}/quick/synthetic/map/student")

    return call


def test_equal_bits_are_demanded_of_equal_partners_only(number):
    five = number([0, 1, 2, 3, 4])
    assert "equal bits" in agree(five, five).text
    split = number([0, 1], [2, 3, 4])
    other = agree(five, split)
    assert "by chance up to" in other.text
    assert other.verdict != "differs"
    # Not only the seeds that both numbers have, but also their partners count.
    assert "by chance" in agree(number([0, 1, 2]), five).text
    assert "equal bits on 2 seeds" in agree(number([0, 1]), split).text
    assert "equal bits on 5 seeds" in agree(number([1, 0], [4, 3, 2]), split).text


def test_bits_that_differ_among_equal_partners_differ(number):
    first = number([0, 1])
    changed = first.runs[0].model_copy(update={"metrics": {"map": first.runs[0].metrics["map"] + 1e-9}})
    second = dataclasses.replace(first, runs=(changed, *first.runs[1:]))
    assert agree(first, second).verdict == "differs"


@pytest.fixture
def recorded(known, run):
    """Record a profile as if by earlier code; two trainings of the student, `first` being one of them."""

    def call(first=(0, 1)):
        run(seeds=first, arms=["student"], probe=True)
        results = run(arms=["teacher", "student"], probe=True)
        old = {"source": "0" * 64}
        return record(
            [
                r.model_copy(update={"provenance": r.provenance.model_copy(update=old)}).sealed()
                for r in results
            ],
            known,
        )

    return call


def test_revalidation_probes_with_the_same_partners(known, recorded, columns, store, log):
    recorded()
    log.write_text("")
    outcomes = revalidate(known.name, columns=columns, store=store)
    assert {item.status for item in outcomes} == {"revalidated"}
    assert sorted(lines(log)) == ["student#0,1 50", "student#2,3,4 50", "teacher#0 50"]
    ledger = load_ledger(known.folder / "ledger.json")
    assert {n.status for n in ledger.numbers.values()} == {"revalidated"}
    assert [item.difference for r in ledger.runs.values() for item in r.revalidated] == [0.0] * 6


def test_a_changed_probe_of_a_group_stays_stale(known, recorded, columns, store, monkeypatch):
    recorded()
    monkeypatch.setenv("FAKE_SHIFT", "0.01")
    assert {item.status for item in revalidate(known.name, columns=columns, store=store)} == {"stale"}


def test_shared_trainings_stay_stale_where_none_are_shared_any_more(
    known, recorded, columns, store, monkeypatch
):
    recorded(first=(0,))
    module = __import__(known.module, fromlist=["run"])
    monkeypatch.delattr(module, "together")
    monkeypatch.delattr(module, "execute_together")
    outcomes = {item.id.split("@")[0]: item for item in revalidate(known.name, columns=columns, store=store)}
    single = outcomes.pop(f"{known.name}/quick/synthetic/student#0")
    assert single.status == outcomes.pop(f"{known.name}/quick/synthetic/teacher#0").status == "revalidated"
    assert {item.reason for item in outcomes.values()} == {
        "its training was shared, which the column no longer does"
    }
    assert len(outcomes) == 4
