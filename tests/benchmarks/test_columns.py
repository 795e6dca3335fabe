"""The steps that are timed are those of the arm, and nothing stays replaced."""

import importlib

import pytest
import torch

from kdrefs.training import fit
from reproductions.harness.profiles import column_names, load_column
from tests.benchmarks import columns
from tests.benchmarks.columns import PAIRS, replaced_fit, training


def test_every_column_that_trains_has_a_cost():
    modules = {name: importlib.import_module(f"reproductions.{name}.run") for name in column_names()}
    without_row = {name for name, module in modules.items() if not hasattr(module, "ROWS")}
    assert without_row - {"qmi"} == PAIRS.keys()  # what QMI's networks are trained with is PKT's


@pytest.mark.parametrize("name", PAIRS)
def test_arms_are_in_the_plan(name):
    column, pair = load_column(name), PAIRS[name]
    planned = {(run.data, run.arm) for run in column.plan(column.profiles["quick"])}
    assert {(pair.data, pair.arm), (pair.data, pair.control)} <= planned
    assert pair.teacher is None or pair.teacher in planned


def test_the_captured_training_is_the_students(monkeypatch):
    seen = []

    def watched(step, state, batches, **options):
        seen.append((sorted(state), options["max_steps"]))
        return fit(step, state, batches, **options)

    call = training("noisy_kd", "soft_10", torch.device("cpu"))
    collaboration = importlib.import_module("reproductions.noisy_kd.collaboration")
    assert collaboration.fit is fit
    monkeypatch.setattr(columns, "fit", watched)
    call(), call()
    assert seen == [(["network", "noise0", "optimizer", "schedule"], columns.STEPS)] * 2


def test_fit_is_put_back_after_an_error():
    collaboration = importlib.import_module("reproductions.noisy_kd.collaboration")

    def failing():
        with replaced_fit(lambda *_: None):
            assert collaboration.fit is not fit
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert collaboration.fit is fit
