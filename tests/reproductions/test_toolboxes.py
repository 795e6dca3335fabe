"""The mistakes of public toolboxes: every check holds, and fails where what is right is changed."""

from __future__ import annotations

import re

import pytest

from reproductions.harness.errata import errata_columns, errata_title, load_errata
from reproductions.harness.profiles import column_names
from reproductions.toolboxes import loops, losses
from reproductions.toolboxes.errata import ERRATA

IDS = [erratum.id for erratum in ERRATA]
BY_ID = dict(zip(IDS, ERRATA, strict=True))

# What is right, changed in the way one would get it wrong.
MUTANTS = {
    "T1": (losses, "similarity_preserving", lambda right: lambda s, t, norm=2: right(s, t, norm) * len(s)),
    "T2": (losses, "activation_boundary", lambda right: lambda s, t: right(s, t, margin=2)),
    "T3": (losses, "factor_transfer", lambda right: losses.factor_transfer_repdistiller),
    "T4": (losses, "correlation_congruence", lambda right: lambda s, t: float((s - t).square().mean())),
    "T5": (losses, "correlation_congruence", lambda right: lambda s, t, gamma: right(s, t, gamma) ** 0.5),
    "T6": (losses, "best_variance", lambda right: lambda residual: residual.abs().mean(0)),
    "T7": (losses, "kd_loss", lambda right: lambda s, t, temperature: losses.noisy_teacher_kd_lib(s, t)),
    "T8": (losses, "relation", lambda right: lambda s, t, tau: tau**2 * right(s, t, tau)),
    "T9": (loops, "train", lambda right: lambda mode_every_epoch: right(mode_every_epoch=False)),
    "T10": (loops, "distillation_step", lambda right: lambda teacher_graph: right(teacher_graph=True)),
    "T11": (loops, "expected_maximum", lambda right: lambda count: right(2 * count)),
}


@pytest.mark.parametrize("erratum", ERRATA, ids=IDS)
def test_erratum_is_proved(erratum):
    evidence = erratum.check()
    assert evidence.holds, evidence.summary
    assert not re.search(r"\b(nan|inf)\b", evidence.summary)


@pytest.mark.parametrize("name", IDS)
def test_check_fails_where_what_is_right_is_changed(name, monkeypatch):
    module, function, mutate = MUTANTS[name]
    monkeypatch.setattr(module, function, mutate(getattr(module, function)))
    assert not BY_ID[name].check().holds


def test_every_erratum_names_repository_commit_and_file():
    assert len(ERRATA) >= 8
    for erratum in ERRATA:
        assert erratum.kind == "code"
        assert re.search(r"\w+@[0-9a-f]{7}: \w+/[\w/]+\.py", erratum.where), erratum.where


def test_toolboxes_are_found_without_being_a_column():
    assert "toolboxes" in errata_columns()
    assert "toolboxes" not in column_names()
    assert load_errata("toolboxes") == ERRATA
    assert errata_title("toolboxes") == "Public toolboxes"


def test_largest_of_few_normal_numbers():
    # 1 / sqrt(pi) for two, 3 / (2 sqrt(pi)) for three
    assert loops.expected_maximum(2) == pytest.approx(0.5641895835)
    assert loops.expected_maximum(3) == pytest.approx(0.8462843753)
