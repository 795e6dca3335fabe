"""A column that costs nothing: values are made of arm and seed. Tests copy it under names of their own.

Environment: FAKE_LOG names a file that gets a line for each execution, FAKE_SLEEP seconds each takes,
FAKE_SHIFT what is added to every value, FAKE_FAIL the arm that raises.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reproductions.harness.profiles import Metric
from reproductions.harness.runs import Run

COLUMN = Path(__file__).parent.name
TITLE = "A fake column"
PAPER = "hinton2015kd"
METRICS = {
    "map": Metric(unit="%", format=".1f", title="mAP", delta=2.0),
    "error": Metric(unit="%", format=".2f", title="error", higher_is_better=False, delta=2.0),
}
LEVELS = {"teacher": 80.0, "student": 50.0, "method": 55.0, "twin": 55.0}


@dataclass(frozen=True)
class Config:
    profile: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    arms: tuple[str, ...] = ("teacher", "student", "method", "twin")
    data: tuple[str, ...] = ()
    budget_minutes: float = 0.1
    download_mb: float = 0
    disk_mb: float = 1


PROFILES = {name: Config(name) for name in ("quick", "standard", "paper")}


def plan(config):
    return [
        Run(COLUMN, config.profile, "synthetic", arm, seed)
        for arm in config.arms
        for seed in (config.seeds[:1] if arm == "teacher" else config.seeds)
    ]


def execute(run, config, context):
    work([run], context)
    return values(run, context)


def work(runs, context):
    time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
    arm, seeds = runs[0].arm, ",".join(str(run.seed) for run in runs)
    if log := os.environ.get("FAKE_LOG"):
        with Path(log).open("a") as file:
            file.write(f"{arm}#{seeds} {context.max_steps} {os.getpid()}\n")
    if os.environ.get("FAKE_FAIL") == arm:
        raise FloatingPointError("loss is not finite")


def values(run, context):
    noise = (
        np.random.default_rng([run.seed, 7]).normal()
        + 0.2 * np.random.default_rng([run.seed, len(run.arm)]).normal()
    )
    value = LEVELS[run.arm] + float(noise) + float(os.environ.get("FAKE_SHIFT", 0))
    if context.max_steps is not None:
        return {"loss": value / 100}
    return {"map": value, "error": 100 - value, "map@best": value + 1}
