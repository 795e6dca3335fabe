"""The run store and the files it writes: damage is found, nothing is half-written, nothing made twice."""

import dataclasses
import json
import os

import pytest

from reproductions.harness.files import canonical_json, content_digest, write_atomic
from reproductions.harness.jobs import Context
from reproductions.harness.store import Run, RunStore, run_key
from tests.harness.fakes import finish, make_result, start


@pytest.mark.parametrize("field", ["column", "profile", "data", "arm"])
@pytest.mark.parametrize("value", ["", "a/b", "..", "a b", None])
def test_a_run_has_names_that_are_folders(field, value):
    fields = {"column": "pkt", "profile": "quick", "data": "digits", "arm": "pkt", "seed": 0} | {field: value}
    with pytest.raises(ValueError, match=field):
        Run(**fields)


@pytest.mark.parametrize("seed", [-1, 0.0, "0", None])
def test_a_run_has_a_seed(seed):
    with pytest.raises(ValueError, match="seed"):
        Run("pkt", "quick", "digits", "pkt", seed)


def test_run_keys():
    run = Run("pkt", "standard", "cifar10-10pct", "pkt", 2)
    assert run.arm_key == "pkt/standard/cifar10-10pct/pkt"
    assert run.key == "pkt/standard/cifar10-10pct/pkt#2"


def test_run_key_depends_on_all_that_values_depend_on():
    run = Run("pkt", "quick", "digits", "pkt", 0)
    base = (run, {"rate": 0.1}, "a" * 64, "cpu", 2, {"digits/train": "d"})
    others = (dataclasses.replace(run, seed=1), {"rate": 0.2}, "b" * 64, "cuda", 1, {"digits/train": "e"})
    keys = {run_key(*base)} | {run_key(*base[:i], other, *base[i + 1 :]) for i, other in enumerate(others)}
    assert len(keys) == 7
    assert run_key(*base) == run_key(run, {"rate": 0.1}, *base[2:])


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": (1, 2.5), "a": {3: None}}) == '{"a":{"3":null},"b":[1,2.5]}'
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})
    with pytest.raises(TypeError, match="no place in a configuration"):
        canonical_json({"a": object()})


def test_a_result_is_found_again(store):
    result = make_result("pkt", "pkt", 0, 51.25)
    assert store.get(result.run, result.key) is None
    store.put(result)
    assert store.get(result.run, result.key) == result
    assert list(store.results("pkt", "quick")) == [result]
    assert list(store.results("pkt", "standard")) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" * 50,
        lambda text: text.replace("51.25", "52.25"),
        lambda text: text.replace('"threads"', '"thread"'),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "digest"}),
    ],
    ids=["cut", "empty", "zeros", "edited", "missing field", "missing digest"],
)
def test_a_damaged_result_is_named_and_set_aside(store, damage):
    result = make_result("pkt", "pkt", 0, 51.25)
    store.put(result)
    path = store.folder(result.run, result.key) / "result.json"
    path.write_text(damage(path.read_text()))
    with pytest.warns(
        UserWarning, match=r"runs/pkt/quick/synthetic/pkt/0-.*result.json is damaged .* set aside"
    ):
        assert store.get(result.run, result.key) is None
    assert not path.exists()
    assert path.with_name("result.json.damaged").exists()


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    code = (
        "import os, signal; from pathlib import Path; from reproductions.harness import files\n"
        "files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"files.write_atomic(Path({str(path)!r}), 'new' * 10000)"
    )
    process = start(code)
    process.communicate(timeout=60)
    assert process.returncode < 0
    assert path.read_text() == "old"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file.json"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_the_argument_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("KDREFS_RUNS", raising=False)
    assert RunStore().root == tmp_path / "data" / "runs"
    monkeypatch.setenv("KDREFS_RUNS", str(tmp_path / "runs"))
    assert RunStore().root == tmp_path / "runs"
    assert RunStore(tmp_path).root == tmp_path


class TestArtifacts:
    @pytest.fixture
    def context(self, store):
        return Context(store=store, source_digest="a" * 64, threads=1)

    def make(self, folder):
        (folder / "weights").write_text("weights")

    def fail(self, folder):
        raise AssertionError("made twice")

    def test_made_once(self, context):
        first = context.artifact("teacher", {"rate": 0.1}, self.make)
        assert (first / "weights").read_text() == "weights"
        assert context.artifact("teacher", {"rate": 0.1}, self.fail) == first

    def test_keyed_by_content(self, context):
        others = [
            {"source_digest": "b" * 64},
            {"threads": 2},
            {"max_steps": 50},
        ]
        folders = {context.artifact("teacher", {"rate": 0.1}, self.make)}
        folders |= {
            dataclasses.replace(context, **o).artifact("teacher", {"rate": 0.1}, self.make) for o in others
        }
        folders.add(context.artifact("teacher", {"rate": 0.2}, self.make))
        folders.add(context.artifact("student", {"rate": 0.1}, self.make))
        folders.add(context.artifact("teacher", {"rate": 0.1}, self.make, source="c" * 64))
        assert len(folders) == 7

    def test_shared_by_columns_that_name_the_same_source(self, context):
        first = context.artifact("teacher", {}, self.make, source="c" * 64)
        other = dataclasses.replace(context, source_digest="b" * 64)
        assert other.artifact("teacher", {}, self.fail, source="c" * 64) == first

    def test_interrupted_making_goes_on_from_what_it_left(self, context):
        def interrupted(folder):
            (folder / "checkpoint").write_text("half")
            raise KeyboardInterrupt

        def resumed(folder):
            assert (folder / "checkpoint").read_text() == "half"
            self.make(folder)

        with pytest.raises(KeyboardInterrupt):
            context.artifact("teacher", {}, interrupted)
        assert (context.artifact("teacher", {}, resumed) / "weights").exists()

    def test_what_a_killed_process_left_of_the_digests_is_no_file_of_the_artifact(self, context, monkeypatch):
        from reproductions.harness import store as module

        def make(folder):
            (folder / ".artifact.json.left-by-a-kill.tmp").write_text("{")
            self.make(folder)

        folder = context.artifact("teacher", {}, make)
        assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "weights"]
        monkeypatch.setattr(module, "_CHECKED", set())
        assert context.artifact("teacher", {}, self.fail) == folder

    @pytest.mark.parametrize("damage", ["changed", "deleted", "unnamed"])
    def test_damage_is_found_by_the_next_process(self, context, monkeypatch, damage):
        from reproductions.harness import store as module

        folder = context.artifact("teacher", {}, self.make)
        if damage == "changed":
            (folder / "weights").write_text("weightz")
        elif damage == "deleted":
            (folder / "weights").unlink()
        else:
            (folder / "artifact.json").write_text("{}")
        monkeypatch.setattr(module, "_CHECKED", set())
        with pytest.warns(UserWarning, match="artifacts/teacher/.* is damaged: set aside"):
            again = context.artifact("teacher", {}, self.make)
        assert (again / "weights").read_text() == "weights"
        assert folder.with_name(f"{folder.name}.damaged").exists()

    def test_two_processes_make_it_once(self, store):
        code = (
            "import time; from reproductions.harness.store import RunStore\n"
            "def make(folder):\n"
            "    time.sleep(1)\n"
            "    (folder / 'weights').open('x').close()\n"
            "    print('made')\n"
            f"RunStore({str(store.root)!r}).artifact('teacher', 'k' * 64, make)"
        )
        assert sorted(finish(start(code), start(code))) == ["", "made\n"]

    def test_a_task_is_a_folder_name(self, context):
        with pytest.raises(ValueError, match="task"):
            context.artifact("../teacher", {}, self.make)
