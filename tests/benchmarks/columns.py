"""Training steps of the columns that do not train as the shared table does, beside steps from the labels alone."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from book.benchmarks import OWN
from kdrefs.training import fit
from reproductions.harness.runs import Context, Run, RunStore
from tests.benchmarks.case import Case, Contest

STEPS = 4


@dataclass(frozen=True)
class Pair:
    """An arm of a column's quick profile and the arm that learns from the labels alone.

    Attributes:
        data: Third part of their keys.
        arm: The method.
        control: The labels alone.
        teacher: Data and arm of the teacher, which is trained before the arms are looked at.
    """

    data: str
    arm: str
    control: str
    teacher: tuple[str, str] | None = None


PAIRS = {
    "afd": Pair("digits-equal", "afd", "independent"),
    "concept_quantification": Pair("composites", "student", "baseline", ("composites", "teacher")),
    "cqd": Pair("digits-lowres", "a_cqd", "tuned", ("digits-lowres", "a")),
    "darkrank": Pair("digits", "soft", "student", ("digits", "teacher")),
    "data_distillation": Pair("shapes", "multi", "labelled", ("shapes", "teacher")),
    "end2": Pair("digits", "end2", "single", ("digits", "ensemble")),
    "internal_representations": Pair("counting", "all", "student", ("counting", "teacher")),
    "jacobian_matching": Pair("digits-10", "jacobian", "student", ("digits", "teacher")),
    "kcd": Pair("digits", "kcd", "student", ("digits", "teacher")),
    "noisy_kd": Pair("digits", "soft_10", "student", ("digits", "teacher")),
    "structured_kd": Pair("shapes", "pi_pa_ho", "student", ("shapes", "teacher")),
}


@contextmanager
def replaced_fit(other: Callable[..., Any]) -> Iterator[None]:
    """Let the columns' modules and the methods' call ``other`` where they call :func:`~kdrefs.training.fit`."""
    loaded = {
        name: module
        for name, module in sys.modules.items()
        if name.startswith(("reproductions", "kdrefs.methods"))
    }
    users = [module for module in loaded.values() if getattr(module, "fit", None) is fit]
    for module in users:
        module.fit = other  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.fit = fit  # type: ignore[attr-defined]


def training(column: str, arm: str, device: torch.device) -> Callable[[], Any]:
    """Steps of the first training of an arm, as the column makes it for one seed with its teacher at hand."""
    module, pair = importlib.import_module(f"reproductions.{column}.run"), PAIRS[column]
    config = module.PROFILES["quick"]
    if (
        column == "end2" and arm == pair.control
    ):  # one network of an ensemble, not all of them in one training
        config = replace(config, settings=tuple(replace(one, members=1) for one in config.settings))
    calls: list[tuple[Any, Any, Any, dict[str, Any]]] = []

    def once(step: Any, state: Any, batches: Any, **options: Any) -> Any:
        calls.append((step, state, batches, options))
        return fit(step, state, batches, **options | {"max_steps": 1, "checkpoint": None, "progress": False})

    with tempfile.TemporaryDirectory() as store, replaced_fit(once):
        context = Context(store=RunStore(store), device=device, progress=False)
        if pair.teacher is not None and arm != pair.teacher[1]:
            module.execute(Run(column, "quick", *pair.teacher, 0), module.PROFILES["quick"], context)
            calls.clear()
        module.execute(Run(column, "quick", pair.data, arm, 0), config, context)
    step, state, batches, options = calls[0]
    precision = options.get("precision", "float32")

    def call() -> None:
        if "done" in state:  # steps of a schedule in the loss, which has an end: a number or a tensor
            state["done"] = state["done"] * 0
        fit(step, state, batches, epochs=STEPS, max_steps=STEPS, precision=precision, progress=False)

    return call


def contest(column: str, device: torch.device) -> Contest:
    """A method's steps beside those from labels alone."""
    pair = PAIRS[column]
    return Contest(training(column, pair.arm, device), training(column, pair.control, device))


COLUMNS = [
    Case(OWN, column, pair.data, partial(contest, column), comparison="cost", weight=2, cuda=False)
    for column, pair in PAIRS.items()
]
