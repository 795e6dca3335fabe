"""Provenance: complete, comparable, and free of who and where."""

import getpass
import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from reproductions.harness import provenance as module
from reproductions.harness.provenance import Provenance, data_digests, provenance


@pytest.fixture
def origin() -> Provenance:
    return provenance(
        source="a" * 64,
        data={"digits/train": "d" * 64},
        seeds=[3],
        device="cpu",
        threads=2,
        wall_seconds=1.23456,
        peak_memory_mb=100.04,
        command="reproduce run pkt --profile quick",
    )


def test_provenance_says_what_ran_where_and_when(origin):
    assert (origin.seeds, origin.threads, origin.wall_seconds, origin.peak_memory_mb) == (
        (3,),
        2,
        1.235,
        100.0,
    )
    assert origin.versions["numpy"] == np.__version__
    assert {"python", "torch", "scikit-learn"} <= set(origin.versions)
    assert origin.device_name
    assert origin.date.utcoffset().total_seconds() == 0


def test_provenance_names_no_person_host_or_folder(origin):
    text = origin.model_dump_json()
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert f'"{platform.node()}"' not in text
    assert getpass.getuser() not in json.dumps({k: v for k, v in json.loads(text).items() if k != "versions"})


@pytest.mark.parametrize(
    "field", [name for name, info in Provenance.model_fields.items() if info.is_required()]
)
def test_provenance_lacks_no_field(origin, field):
    content = origin.model_dump()
    del content[field]
    with pytest.raises(ValidationError, match=field):
        Provenance.model_validate(content)


def test_one_process_is_not_written_down_and_several_are(origin):
    assert "processes" not in origin.model_dump_json()
    several = origin.model_copy(update={"processes": 4})
    assert Provenance.model_validate_json(several.model_dump_json()).processes == 4


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("source", "b" * 64, False),
        ("data", {}, False),
        ("versions", {"torch": "1"}, False),
        ("device", "cuda", False),
        ("device_name", "another", False),
        ("threads", 1, False),
        ("wall_seconds", 9.0, True),
        ("commit", None, True),
        ("processes", 2, False),
        ("seeds", (4,), True),
    ],
)
def test_equal_bits_are_expected_where_nothing_that_computes_differs(origin, field, value, same):
    assert origin.same_machine(origin.model_copy(update={field: value})) is same


def test_data_digests_are_those_of_the_splits():
    digests = data_digests(["digits", "digits"])
    assert sorted(digests) == ["digits/test", "digits/train"]
    assert all(len(digest) == 64 for digest in digests.values())
    assert data_digests([]) == {}


def commit(folder, files):
    """Make a repository of `folder` with a commit of files, path to content."""
    for path, content in files.items():
        path.write_text(content)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init"], ["add", "."], ["commit", "-m", "one"]):
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_state_tells_the_commit_and_changes(tmp_path):
    assert module.git_state(tmp_path) == (None, False)

    commit(tmp_path, {tmp_path / "file": "one"})
    name, dirty = module.git_state(tmp_path)
    assert len(name) == 40
    assert not dirty
    (tmp_path / "file").write_text("two")
    assert module.git_state(tmp_path) == (name, True)


def test_a_ledger_that_was_written_is_no_change_of_the_code(tmp_path):
    ledger, code = (tmp_path / "reproductions" / "pkt" / name for name in ("ledger.json", "run.py"))
    code.parent.mkdir(parents=True)
    commit(tmp_path, {ledger: "one", code: "one"})
    ledger.write_text("two")
    assert not module.git_state(tmp_path)[1]
    code.write_text("two")
    assert module.git_state(tmp_path)[1]


def test_peak_memory_counts_from_the_reset():
    module.reset_peak_memory("cpu")
    before = module.peak_memory_mb("cpu")
    block = np.ones(50 * 2**17)  # 50 MB of float64
    after = module.peak_memory_mb("cpu")
    assert after - before == pytest.approx(block.nbytes / 2**20, rel=0.2)
