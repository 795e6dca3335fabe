"""Running a profile: what is missing is executed once, whoever asks and whatever interrupts."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from reproductions.harness.jobs import Context, execute_group, split_metrics
from reproductions.harness.profiles import HarnessError, announcement, get_profile, load_column
from reproductions.harness.runs import make_jobs, run_profile
from tests.harness.fakes import finish, meeting, start


@pytest.fixture
def run(column, columns, store):
    def call(profile="quick", **settings):
        return run_profile(column, profile, columns=columns, store=store, threads=1, **settings)

    return call


def lines(log):
    return [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()]


def command(column, columns, store, wait="", **settings):
    """Code that runs the column in another process, after `wait`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return (
        "from pathlib import Path\n"
        "from reproductions.harness.runs import run_profile, RunStore\n"
        f"{wait}\n"
        "if __name__ == '__main__':\n"
        f"    run_profile({column!r}, columns=Path({str(columns)!r}), store=RunStore({str(store.root)!r}),"
        f" threads=1, {arguments})"
    )


def test_runs_in_plan_order_once(run, log, column):
    seen = []
    results = run(on_result=seen.append)
    plan = [
        f"{arm}#{seed}"
        for arm, seeds in (("teacher", 1), ("student", 5), ("method", 5), ("twin", 5))
        for seed in range(seeds)
    ]
    assert [f"{result.run.arm}#{result.run.seed}" for result in results] == plan
    assert lines(log) == [f"{name} None" for name in plan]
    assert seen == results
    assert results[0].metrics["map"] == pytest.approx(80, abs=5)
    assert results[0].best["map"] == results[0].metrics["map"] + 1
    assert results[0].provenance.command == (
        f"reproduce run {column} --profile quick --data synthetic --arm teacher --seeds 0 --device cpu --threads 1"
    )
    assert run() == results
    assert len(lines(log)) == 16


def test_seeds_and_arms_choose(run, log):
    assert [r.run.seed for r in run(seeds=[7, 3], arms=["method"])] == [7, 3]
    run(seeds=[7], arms=["method", "student"])
    assert lines(log) == ["method#7 None", "method#3 None", "student#7 None"]


def test_a_probe_is_taken_with_the_run_where_it_will_be_needed(run, log):
    (result,) = run("standard", seeds=[0], arms=["student"])
    assert lines(log) == ["student#0 None", "student#0 50"]
    assert result.probe == {"loss": result.metrics["map"] / 100}
    (quick,) = run(seeds=[0], arms=["student"])
    assert quick.probe is None
    (quick,) = run(seeds=[0], arms=["student"], probe=True)
    assert quick.probe == result.probe
    assert lines(log)[2:] == ["student#0 None", "student#0 50"]


def test_processes_give_the_same_results(run, log):
    together = run("quick", seeds=[0, 1], jobs=2)
    assert len({line.split()[-1] for line in log.read_text().splitlines()} - {str(os.getpid())}) >= 1
    values = [(r.run, r.key, r.metrics) for r in together]
    for path in log.parent.glob("store/runs/**/result.json"):
        path.unlink()
    assert [(r.run, r.key, r.metrics) for r in run("quick", seeds=[0, 1])] == values


def test_a_damaged_result_is_run_again(run, store, log):
    (result,) = run(seeds=[0], arms=["student"])
    path = store.folder(result.run, result.key) / "result.json"
    path.write_text(path.read_text().replace("metrics", "metric"))
    with pytest.warns(UserWarning, match="damaged"):
        (again,) = run(seeds=[0], arms=["student"])
    assert again.metrics == result.metrics
    assert len(lines(log)) == 2


def test_two_commands_share_the_work(column, columns, store, log, run, tmp_path):
    code = command(
        column, columns, store, meeting(tmp_path / "ready"), seeds=[0, 1, 2], arms=["student", "method"]
    )
    finish(start(code, FAKE_SLEEP="0.3"), start(code, FAKE_SLEEP="0.3"))
    assert sorted(lines(log)) == [f"{arm}#{seed} None" for arm in ("method", "student") for seed in range(3)]
    assert len({line.split()[-1] for line in log.read_text().splitlines()}) == 2
    run(seeds=[0, 1, 2], arms=["student", "method"])
    assert len(lines(log)) == 6


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_goes_on(column, columns, store, log, run, number):
    process = start(command(column, columns, store, arms=["student"]), FAKE_SLEEP="0.4")
    wait_until(lambda: len(lines(log)) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = len(list(store.root.glob("runs/**/result.json")))
    assert 1 <= done < 5
    assert len(run(arms=["student"])) == 5
    # What was under way is executed again, what was finished is not.
    assert len(lines(log)) == 5 + len(set(lines(log)[:2])) - done


def test_processes_end_with_a_killed_command(column, columns, store, log):
    process = start(command(column, columns, store, jobs=2, arms=["student"]), FAKE_SLEEP="60")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("the system does not tell a process's children")
    workers: list[int] = []

    def two_at_work():
        workers[:] = [int(pid) for pid in children.read_text().split()]
        return len(list(store.root.glob("runs/**/.lock"))) >= 2

    wait_until(two_at_work)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not any(alive(pid) for pid in workers), seconds=30)
    assert lines(log) == []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_an_error_names_the_run_and_keeps_what_is_done(run, monkeypatch, log, column):
    monkeypatch.setenv("FAKE_FAIL", "method")
    with pytest.raises(FloatingPointError) as caught:
        run(seeds=[0])
    assert caught.value.__notes__ == [f"in the run {column}/quick/synthetic/method#0"]
    monkeypatch.delenv("FAKE_FAIL")
    run(seeds=[0])
    assert lines(log) == [f"{arm}#0 None" for arm in ("teacher", "student", "method", "method", "twin")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "quik"}, "has no profile 'quik'; did you mean 'quick'"),
        ({"arms": ["metod"]}, "has no arm 'metod'; did you mean 'method'"),
        ({"data": ["synthetics"]}, "has no data 'synthetics'; did you mean 'synthetic'"),
    ],
)
def test_unknown_names_get_close_matches(run, settings, message):
    with pytest.raises(HarnessError, match=message):
        run(**settings)


def test_data_chooses(run, column, columns):
    path = columns / column / "run.py"
    path.write_text(
        path.read_text().replace('"synthetic", arm', '"other" if arm == "twin" else "synthetic", arm')
    )
    assert {(found.run.data, found.run.arm) for found in run(data=["other"])} == {("other", "twin")}
    with pytest.raises(HarnessError, match="none of the arms on this data"):
        run(data=["other"], arms=["method"])


def test_an_unknown_column_gets_close_matches(column, columns):
    with pytest.raises(HarnessError, match=f"no column '{column[:-1]}q'; did you mean '{column}'"):
        run_profile(column[:-1] + "q", columns=columns)


def test_a_column_that_lacks_a_name_is_refused(columns, column):
    path = columns / column / "run.py"
    path.write_text(path.read_text().replace("TITLE =", "NAME ="))
    with pytest.raises(HarnessError, match="has no TITLE"):
        load_column(column, columns)


def jobs_of(column, columns, store, **settings):
    known = load_column(column, columns)
    return make_jobs(known, "quick", device="cpu", threads=1, store=store, columns=columns, **settings)


def test_the_key_ignores_bookkeeping_and_nothing_else(column, columns, store):
    job = jobs_of(column, columns, store, seeds=[0])[0]
    known = load_column(column, columns)

    def key(**changes):
        config = dataclasses.replace(job.config, **changes)
        return dataclasses.replace(job, relevant=known.relevant_config(job.run, config)).key

    assert key(seeds=(1, 2), budget_minutes=9.0, disk_mb=5.0, download_mb=3.0) == job.key
    assert key(arms=("teacher",)) != job.key
    narrow = dataclasses.replace(known, narrow=lambda run, config: {"profile": config.profile})
    assert narrow.relevant_config(job.run, job.config) == {"profile": "quick"}


def test_inputs_beside_the_data_sets_are_part_of_the_key(column, columns, store):
    path = columns / column / "run.py"
    path.write_text(path.read_text() + "\n\ndef inputs(config):\n    return {'weights': 'w' * 64}\n")
    (job, *_) = jobs_of(column, columns, store, seeds=[0])
    assert job.data == {"weights": "w" * 64}
    assert dataclasses.replace(job, data={"weights": "v" * 64}).key != job.key
    (result,) = execute_group([job])
    assert result.provenance.data == job.data


def test_code_that_changed_on_disk_is_not_run(column, columns, store):
    job = jobs_of(column, columns, store, seeds=[0])[0]
    with pytest.raises(HarnessError, match="changed since this command began"):
        execute_group([dataclasses.replace(job, source="0" * 64)])


def test_a_plan_with_a_run_twice_is_refused(column, columns, store):
    with pytest.raises(HarnessError, match="a run twice"):
        jobs_of(column, columns, store, seeds=[1, 1])


def test_metrics_of_last_and_best_epoch():
    expected = {"map": 51.0, "p1": 3.0}, {"map": 52.0}
    assert split_metrics({"map": 51, "p1": 3, "map@best": 52.0}) == expected
    assert split_metrics({"last": {"map": 51, "p1": 3}, "best": {"map": 52.0}}) == expected
    with pytest.raises(ValueError, match="'map': got nan, expected a finite number"):
        split_metrics({"map": float("nan")})


def test_metrics_that_are_not_announced_are_refused(column, columns, store):
    path = columns / column / "run.py"
    path.write_text(path.read_text().replace('"map@best"', '"other@best"'))
    with pytest.raises(HarnessError, match="execute returned other, not in METRICS"):
        run_profile(column, columns=columns, store=store, seeds=[0])


def test_the_context_of_a_result_finds_its_artifacts(run, store):
    (result,) = run(seeds=[0], arms=["student"])
    context = Context.of(result, store)
    assert (context.device.type, context.threads, context.max_steps) == ("cpu", 1, None)
    assert context.source_digest == result.provenance.source


def test_the_announcement_names_time_download_and_disk(column, columns):
    config = get_profile(load_column(column, columns), "standard")
    assert announcement(config) == "about 6 s · no download · 1 MB on disk · data: synthetic"
    config = dataclasses.replace(config, budget_minutes=120, download_mb=170, disk_mb=700, data=("cifar10",))
    assert announcement(config) == "about 2.0 h · download 170 MB · 700 MB on disk · data: cifar10"
