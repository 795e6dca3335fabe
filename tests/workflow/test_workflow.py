"""The workflow engine in a checkout of its own: killed, failing and grown, it ends with the ledger of one run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness.fakes import REPOSITORY

SNAKEMAKE = REPOSITORY / ".venv-workflow" / "bin" / "snakemake"
pytestmark = pytest.mark.skipif(not SNAKEMAKE.exists(), reason="needs the workflow engine: make workflow")


class Checkout:
    """A copy of what a workflow needs, with the toy as its only column."""

    def __init__(self, root: Path, seeds: int) -> None:
        self.root, self.log, self.kills = root, root / "log", root / "kills"
        for name in ("kdrefs", "workflow", "reproductions/harness"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "cli.py"):
            shutil.copy(REPOSITORY / "reproductions" / name, root / "reproductions")
        toy = root / "reproductions" / "toy"
        toy.mkdir()
        (toy / "__init__.py").touch()
        text = Path(__file__).with_name("toy_run.py").read_text()
        (toy / "run.py").write_text(text.replace("tuple(range(6))", f"tuple(range({seeds}))"))
        self.ledger_file = toy / "ledger.json"
        self.asked: Counter[str] = Counter()
        self.kills.mkdir()
        self.log.touch()

    def call(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a session of its own and return it with what it printed."""
        folders = {"KDREFS_RUNS": "store", "TOY_LOG": "log", "TOY_KILLS": "kills", "XDG_CACHE_HOME": "cache"}
        places = {name: str(self.root / folder) for name, folder in folders.items()}
        with subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, "OMP_NUM_THREADS": "1", **places, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=300)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def reproduce(self, *arguments: str) -> None:
        """Run a command of the command line, which must succeed."""
        done = self.call(sys.executable, "-m", "reproductions.cli", *arguments, "--threads", "1")
        assert done.returncode == 0, done.stdout

    def workflow(
        self, *settings: str, options: Sequence[str] = (), profile: str = "local", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the engine with two cores."""
        command = [SNAKEMAKE, "--profile", f"workflow/profiles/{profile}", "--cores", "2", *options]
        return self.call(*command, "--config", f"python={sys.executable}", *settings, **environment)

    def lines(self, kind: str) -> list[str]:
        """Return the lines of one kind that the toy wrote."""
        return [line for line in self.log.read_text().splitlines() if f" {kind} " in line]

    def executed(self) -> Counter[str]:
        """Return how often each run was executed, probes aside, since this was last asked."""
        found = Counter(line.split()[0] for line in self.lines("execute") if line.endswith("None"))
        self.asked, found = found, found - self.asked
        return found

    def result(self, run: str) -> Path:
        """Return the result file of a run such as `wide#1`."""
        arm, seed = run.split("#")
        (path,) = self.root.glob(f"store/runs/toy/quick/synthetic/{arm}/{seed}-*/result.json")
        return path

    def recorded(self) -> dict:
        """Return the ledger without times, dates, memory and what is derived of them."""
        content = json.loads(self.ledger_file.read_text())
        runs = content["runs"]
        for entry in runs.values():
            del entry["digest"]
            for name in ("date", "wall_seconds", "peak_memory_mb"):
                del entry["provenance"][name]
        for number in (entry for versions in content["numbers"].values() for entry in versions):
            del number["digest"]
            number["runs"] = [runs[name]["key"] for name in number["runs"]]
        return {**content, "runs": {entry["key"]: entry for entry in runs.values()}}


def test_a_killed_job_and_a_killed_engine_end_with_the_ledger_of_an_unbroken_run(tmp_path):
    unbroken = Checkout(tmp_path / "unbroken", seeds=5)
    unbroken.reproduce("run", "toy", "--record")
    broken = Checkout(tmp_path / "broken", seeds=5)
    for number, order in enumerate(["35 job None", "50 engine None", "20 job 50"]):
        (broken.kills / str(number)).write_text(order)

    first = broken.workflow()
    assert first.returncode == -signal.SIGKILL, first.stdout
    assert len(list(broken.kills.iterdir())) == 1
    assert not broken.ledger_file.exists()
    done = {path.parent for path in broken.root.glob("store/runs/**/result.json")}
    assert 2 <= len(done) < 10
    before = broken.executed()

    second = broken.workflow()
    assert second.returncode == 0, second.stdout
    assert list(broken.kills.iterdir()) == []
    assert broken.recorded() == unbroken.recorded()
    assert len(broken.recorded()["runs"]) == 10

    # Done runs were left alone, the one that was killed in its probe included; the one that was killed in its training
    # went on from the end of an epoch (16 steps) both times.
    assert sum(broken.executed().values()) == 10 - len(done)
    victim = broken.lines("killed")[0].split()[0]
    assert before[victim] == 2
    begun = [line.split() for line in broken.lines("step") if line.endswith("None")]
    assert [step for run, _, step, *_ in begun if run == victim] == ["0", "32", "48"]


def test_a_job_that_fails_a_seed_that_is_added_and_a_result_that_is_deleted(tmp_path):
    checkout = Checkout(tmp_path, seeds=2)
    checkout.reproduce("run", "toy", "--probe")
    assert checkout.executed().keys() == {"narrow#0", "narrow#1", "wide#0", "wide#1"}

    failed = checkout.workflow("seeds=0-2", options=["--retries", "0", "--cores", "1"], TOY_FAIL="1")
    assert failed.returncode == 1
    assert "loss is not finite" in failed.stdout
    executed = checkout.executed()
    assert executed == {"narrow#2": 1, "wide#2": 1}
    failing, other = executed  # in this order
    assert checkout.result(other).exists()
    assert not checkout.ledger_file.exists()

    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "__init__.py").touch()
    (tmp_path / "book" / "build.py").write_text(
        "from pathlib import Path\n"
        "page = Path('build/book/html/index.html')\n"
        "page.parent.mkdir(parents=True)\n"
        "page.write_text(Path('reproductions/toy/ledger.json').read_text())\n"
    )
    grown = checkout.workflow("seeds=0-2", "book=true")
    assert grown.returncode == 0, grown.stdout
    assert checkout.executed() == {failing: 1}
    assert len(checkout.recorded()["runs"]) == 6
    assert (tmp_path / "build/book/html/index.html").read_text() == checkout.ledger_file.read_text()

    before, result = checkout.ledger_file.read_text(), checkout.result("narrow#1")
    metrics = json.loads(result.read_text())["metrics"]
    result.unlink()
    again = checkout.workflow("seeds=0-2")
    assert again.returncode == 0, again.stdout
    assert checkout.executed() == {"narrow#1": 1}
    assert json.loads(result.read_text())["metrics"] == metrics
    assert checkout.ledger_file.read_text() == before

    # Everything is done; a ledger that git took back is written again, on a cluster as well.
    checkout.ledger_file.unlink()
    dry = checkout.workflow("seeds=0-2", options=["-n"], profile="slurm")
    assert dry.returncode == 0, dry.stdout
    assert dict(re.findall(r"^(\w+) +(\d+)$", dry.stdout, re.MULTILINE)) == {"ledger": "1", "all": "1", "total": "2"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("colums=toy", "config: got colums, expected some of columns, profile, seeds,"),
        ("book=no", "config: book: got 'no', expected true or false"),
        ("python=nowhere", "nowhere; `make venv` makes .venv"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, setting, message):
    done = Checkout(tmp_path, seeds=2).workflow(setting, options=["-n"])
    assert done.returncode == 1
    assert message in done.stdout
