"""`reproduce run` in two processes that torchrun started: one run of both, one result, one command."""

import json

import pytest
import torch

from reproductions.harness.jobs import Context
from reproductions.harness.runs import run_profile
from reproductions.harness.store import RunStore
from tests.harness.fakes import make_column
from tests.torchrun import launch

# A column that trains: its teacher is an artifact, its student another.
RUN = """
from dataclasses import dataclass
import json, os
from pathlib import Path

import torch
from torch import nn

from kdrefs.data.batches import Batches
from kdrefs.training import fit, load_tensors, save_tensors, update
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Run

COLUMN = Path(__file__).parent.name
TITLE, PAPER = "A column that trains", "hinton2015kd"
METRICS = {"norm": Metric(delta=1.0)}


@dataclass(frozen=True)
class Config:
    profile: str
    seeds: tuple[int, ...] = (0, 1)
    data: tuple[str, ...] = ()
    budget_minutes: float = 0.1
    download_mb: float = 0
    disk_mb: float = 1


PROFILES = {"quick": Config("quick")}


def plan(config):
    return [Run(COLUMN, config.profile, "synthetic", "student", seed) for seed in config.seeds]


def together(run, config, device):
    return "all"


def execute(run, config, context):
    with Path(os.environ["TRAININGS"]).open("a") as file:
        file.write(f"{run.seed} {context.max_steps}\\n")
    torch.manual_seed(run.seed)
    net = nn.Linear(3, 2, dtype=torch.float64)

    def step(state, batch):
        loss = (state["net"](batch.extras["x"]) - batch.extras["y"]).square().mean()
        update(state["optimizer"], loss)
        return {"loss": loss}

    def make(folder):
        generator = torch.Generator().manual_seed(run.seed)
        x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
        batches = Batches(None, batch_size=8, seed=run.seed, extras={"x": x, "y": x[:, :2].tanh()})
        state = {"net": net, "optimizer": torch.optim.SGD(net.parameters(), 0.1)}
        fit(step, state, batches, epochs=3, checkpoint=folder / "c.safetensors", max_steps=context.max_steps)
        save_tensors(folder / "weights.safetensors", net.state_dict())

    folder = context.artifact("student", {"seed": run.seed}, make)
    net.load_state_dict(load_tensors(folder / "weights.safetensors")[0])
    return {"norm": net.weight.norm().item()}


def execute_together(runs, config, context):
    return [execute(run, config, context) for run in runs]
"""


@pytest.fixture
def trains(tmp_path, monkeypatch):
    """Name of the column, and the script that calls the command line on it."""
    name = make_column(tmp_path)
    (tmp_path / name / "run.py").write_text(RUN)
    script = tmp_path / "reproduce.py"
    script.write_text(
        f"from pathlib import Path\nfrom reproductions import cli\ncli.COLUMNS = Path({str(tmp_path)!r})\ncli.main()\n"
    )
    monkeypatch.setenv("KDREFS_RUNS", str(tmp_path / "store"))
    monkeypatch.setenv("TRAININGS", str(tmp_path / "trainings"))
    return name, str(script)


def test_two_processes_do_one_run(trains, tmp_path):
    column, script = trains
    done = launch(script, "run", column, "--threads", "1", "--record", "--json")
    rows = json.loads(done.stdout)  # printed once
    assert done.stderr.count("A column that trains, profile quick") == 1
    origins = [origin for row in rows for origin in row["provenance"]]
    assert [(origin["processes"], origin["seeds"]) for origin in origins] == [(2, [0]), (2, [1])]
    assert origins[0]["command"].startswith("torchrun --nproc-per-node 2 --no-python reproduce run ")
    trainings = (tmp_path / "trainings").read_text().split("\n")
    # Each run and its probe, in both processes.
    assert sorted(trainings) == sorted(
        ["", *(f"{seed} {steps}" for seed in (0, 1) for steps in (None, 50))]
        + [f"{seed} {steps}" for seed in (0, 1) for steps in (None, 50)]
    )
    alone = run_profile(column, columns=tmp_path, store=RunStore(tmp_path / "store"), threads=1)
    assert alone[0].key != rows[0]["runs"][0]
    for result, value in zip(alone, rows[0]["values"].values(), strict=True):
        assert result.provenance.processes == 1
        assert result.metrics["norm"] == pytest.approx(value, rel=1e-12)


def test_what_is_wrong_ends_both_processes(trains):
    column, script = trains
    done = launch(script, "run", column, "--jobs", "2", code=1)
    assert "jobs: got 2, expected 1 where 2 processes share trainings" in done.stderr


def test_artifacts_of_several_processes_are_others(store):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").touch()

    for processes in (1, 2, 1):
        Context(store, torch.device("cpu"), processes=processes).artifact("teacher", {}, make)
    assert len(made) == 2
