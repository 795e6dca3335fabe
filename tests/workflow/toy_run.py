"""A column of real trainings of a second, which tests copy into a checkout of their own.

Environment: TOY_LOG names a file that gets a line for each execution, for the step that each training begins with and
for each kill. TOY_KILLS is a folder with what is to happen, in order, once two runs are done: `35 job None` kills the
first process to reach step 35 of a training (`50` instead of `None`: of a probe), a following `50 engine None` the
process group of that run's next attempt at step 50. With TOY_FAIL the first run to be executed raises, again and again.
"""

import contextlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kdrefs.training import fit, update
from reproductions.harness.files import write_atomic
from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Run

TITLE = "A toy"
PAPER = "hinton2015kd"
METRICS = {"accuracy": Metric(unit="%", format=".1f", title="accuracy", delta=2.0), "loss": Metric(title="loss")}
EPOCHS, STEPS = 4, 16
WIDTHS = {"narrow": 4, "wide": 16}


@dataclass(frozen=True)
class Config:
    profile: str
    seeds: tuple[int, ...] = tuple(range(6))
    data: tuple[str, ...] = ()
    budget_minutes: float = 0.1
    download_mb: float = 0
    disk_mb: float = 1


PROFILES = {"quick": Config("quick")}


def plan(config):
    return [Run("toy", config.profile, "synthetic", arm, seed) for arm in WIDTHS for seed in config.seeds]


class Batches:
    def __init__(self, seed):
        self.seed = seed

    def __len__(self):
        return STEPS

    def epoch(self, epoch, start=0):
        generator = torch.Generator().manual_seed(100 * self.seed + epoch)
        images = torch.randn(STEPS, 32, 8, generator=generator)
        for batch in images[start:]:
            yield batch, (batch[:, 0] + batch[:, 1] > 0).long()


def execute(run, config, context):
    name = f"{run.arm}#{run.seed}"
    log(f"{name} execute {context.max_steps}")
    failed = {line.split()[0] for line in logged() if line.endswith("fails")}
    if "TOY_FAIL" in os.environ and failed <= {name}:
        log(f"{name} fails")
        raise FloatingPointError("loss is not finite")

    def train(folder):
        torch.manual_seed(run.seed)
        net = nn.Sequential(nn.Linear(8, WIDTHS[run.arm]), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTHS[run.arm], 2))
        state = {"net": net, "optimizer": torch.optim.Adam(net.parameters(), 0.02), "steps": 0}
        begun = False

        def step(state, batch):
            nonlocal begun
            if not begun:
                log(f"{name} step {state['steps']} of {context.max_steps}")
                begun = True
            kill(name, state["steps"], context.max_steps)
            loss = F.cross_entropy(net(batch[0]), batch[1])
            update(state["optimizer"], loss)
            state["steps"] += 1
            return {"loss": loss}

        history = fit(
            step,
            state,
            Batches(run.seed),
            epochs=EPOCHS,
            checkpoint=folder / "checkpoint.safetensors",
            progress=False,
            max_steps=context.max_steps,
        )
        images, labels = next(Batches(99).epoch(0))
        accuracy = 100 * (net.eval()(images).argmax(1) == labels).float().mean().item()
        values = {"accuracy": accuracy, "loss": history.epochs[-1]["loss"]}
        write_atomic(folder / "values.json", json.dumps(values))

    folder = context.artifact("toy", {"arm": run.arm, "seed": run.seed}, train)
    return json.loads((folder / "values.json").read_text())


def log(line):
    with Path(os.environ["TOY_LOG"]).open("a") as file:
        file.write(f"{line}\n")


def logged():
    return Path(os.environ["TOY_LOG"]).read_text().splitlines()


def kill(name, steps, max_steps):
    """Kill this process or its group, if it is its turn."""
    orders, happened = sorted(Path(os.environ["TOY_KILLS"]).iterdir()), logged()
    if not orders or len([line for line in happened if line.endswith("execute 50")]) < 2:
        return
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        after, whom, kind = orders[0].read_text().split()
        if kind != str(max_steps) or steps < int(after):
            return
        if whom == "engine" and f"{name} killed job" not in happened:
            return
        orders[0].unlink()
        log(f"{name} killed {whom}")
        os.kill(0 if whom == "engine" else os.getpid(), signal.SIGKILL)
