"""Checkpoint files: exact contents, no pickles, damage found, nothing lost."""

import json
import math
import os
import pickle
import sys
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kdrefs.training import CheckpointError, load_tensors, save_tensors
from kdrefs.training.checkpoint import (
    describe,
    flatten,
    load_checkpoint,
    previous,
    save_checkpoint,
    unflatten,
)

TENSORS = {
    "float32": torch.randn(3, 4),
    "float64": torch.tensor([math.pi, -0.0, math.inf, math.nan], dtype=torch.float64),
    "bfloat16": torch.randn(5).bfloat16(),
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(4, 3).T,
    "slice": torch.randn(9)[::2],
    "expanded": torch.ones(1, 3).expand(2, 3),
}


def same(one, other):
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


# ---------------------------------------------------------------- files


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "folder" / "weights.safetensors"
    metadata = {"config": {"lr": 0.1, "widths": [8, 16]}, "name": "学生", "none": None}
    save_tensors(path, TENSORS, metadata)
    tensors, read = load_tensors(path)
    assert read == metadata
    assert tensors.keys() == TENSORS.keys()
    assert all(same(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_any_safetensors_reader_can_read_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, TENSORS)
    tensors = load_file(path)
    assert all(same(tensors[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["kdrefs"]


def test_equal_content_gives_an_equal_file(tmp_path):
    save_tensors(tmp_path / "one", TENSORS, {"a": 1, "b": 2})
    save_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), {"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.ones(1000)})
    tensors, _ = load_tensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensors["w"], torch.ones(1000))


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    weight = torch.randn(4, 4)
    save_tensors(tmp_path / "tied", {"one": weight, "other": weight, "part": weight[1:]})
    tensors, _ = load_tensors(tmp_path / "tied")
    assert torch.equal(tensors["one"], tensors["other"])
    assert torch.equal(tensors["part"], weight[1:])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.safetensors"):
        load_tensors(tmp_path / "absent.safetensors")


def damage_positions(content):
    header = 8 + int.from_bytes(content[:8], "little")
    return {"length": 3, "header": header // 2, "data": header + 5, "end": len(content) - 1}


@pytest.mark.parametrize("where", ["length", "header", "data", "end", "truncated", "empty", "text"])
def test_damage_is_found_and_names_the_file(tmp_path, where):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.randn(64)}, {"note": "x" * 64})
    content = bytearray(path.read_bytes())
    if where == "truncated":
        content = content[: len(content) // 2]
    elif where == "empty":
        content = b""
    elif where == "text":
        content = b"<html>not found</html>"
    else:
        content[damage_positions(content)[where]] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        load_tensors(path)


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.randn(3)})
    content = path.read_bytes()
    for position in range(len(content) - 12, len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="does not match its digest"):
            load_tensors(path)


def test_foreign_safetensors_file_is_no_damage(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="not one that kdrefs wrote"):
        load_tensors(path)
    with pytest.raises(ValueError, match="not one that kdrefs wrote"):
        load_checkpoint(path, {"x": 1})
    save_tensors(path, {"w": torch.ones(2)}, {"of": "weights"})
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        load_checkpoint(path, {"x": 1})
    save_file({"w": torch.ones(2)}, path)
    assert path.read_bytes() == content


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_is_refused_and_never_executed(tmp_path, kind):
    path, sprung = tmp_path / "weights.safetensors", tmp_path / "sprung"
    content = {"w": torch.ones(2), "trap": Trap(sprung)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["trap"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    pickled = path.read_bytes()
    message = r"weights\.safetensors is damaged, or no safetensors file: "
    with pytest.raises(CheckpointError, match=message):
        load_tensors(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == pickled
    # Where a sound checkpoint precedes it, training goes on from that one.
    save_checkpoint(path, {"x": 1}, 1)
    save_checkpoint(path, {"x": 2}, 2)
    path.write_bytes(pickled)
    with pytest.warns(RuntimeWarning, match=message):
        assert load_checkpoint(path, {"x": 0}) == 1
    assert not sprung.exists()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.ones(2)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*weights\.safetensors'"):
        save_tensors(path, {"w": torch.zeros(2)})
    assert torch.equal(load_tensors(path)[0]["w"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="checkpoints need safetensors"):
        save_tensors(tmp_path / "x", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- nested values

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    plain,
    lambda values: (
        st.lists(values) | st.lists(values).map(tuple) | st.dictionaries(st.text() | st.integers(), values)
    ),
    max_leaves=20,
)


@given(nested)
def test_nested_values_survive_json(value):
    again = unflatten(json.loads(json.dumps(flatten(value, "state", {}))), {})
    assert again == value
    assert repr(again) == repr(value)  # tells tuples from lists, 1 from 1.0 and True, "1" from 1


def test_special_values():
    tensors = {}
    value = {
        0: {"step": torch.tensor(3.0), "moments": [torch.ones(2), (torch.zeros(1), math.inf)]},
        "milestones": Counter({100: 2, 5: 1}), "ordered": OrderedDict(b=1, a=2), "nan": math.nan,
    }  # fmt: skip
    again = unflatten(json.loads(json.dumps(flatten(value, "s", tensors))), tensors)
    assert sorted(tensors) == ["s.0.moments.0", "s.0.moments.1.0", "s.0.step"]
    assert isinstance(again["milestones"], Counter)
    assert again["milestones"] == value["milestones"]
    assert list(again["ordered"]) == ["b", "a"]
    assert math.isnan(again["nan"])
    assert again[0]["moments"][1][1] == math.inf
    assert torch.equal(again[0]["moments"][0], torch.ones(2))


def test_names_that_coincide_are_kept_apart():
    tensors = {}
    value = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), 7: torch.tensor(3), "7": torch.tensor(4)}
    again = unflatten(flatten(value, "s", tensors), tensors)
    assert [again["a"]["b"].item(), again["a.b"].item(), again[7].item(), again["7"].item()] == [1, 2, 3, 4]


def test_layout_of_tensors_survives():
    images = torch.randn(2, 3, 4, 5)
    for tensor in (images, images.contiguous(memory_format=torch.channels_last), images.transpose(0, 2)):
        tensors = {}
        structure = flatten(tensor, "t", tensors)
        again = unflatten(structure, {"t": tensors["t"].contiguous()})
        assert again.stride() == tensor.stride()
        assert torch.equal(again, tensor)


@pytest.mark.parametrize("value", [{1, 2}, lambda: 0, 1j, b"bytes", {(1, 2): 3}, object()])
def test_what_cannot_be_saved_is_named(value):
    with pytest.raises(TypeError, match=r"state\.inner\.0 cannot be checkpointed: "):
        flatten({"inner": [value]}, "state", {})


# ---------------------------------------------------------------- training state


def small_state(fill=0.0):
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, fill)
    return {
        "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "tensor": torch.full((2,), fill),
        "n": fill,
    }


def test_state_is_restored_in_place(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, small_state(3.0), {"epoch": 4, "sums": {"loss": torch.tensor(1.5)}})
    state = small_state()
    objects, weight = dict(state), state["net"].weight
    progress = load_checkpoint(path, state)
    assert progress["epoch"] == 4
    assert progress["sums"]["loss"].item() == 1.5
    assert state["n"] == 3.0
    assert all(state[key] is objects[key] for key in ("net", "optimizer", "tensor"))
    assert state["net"].weight is weight
    assert torch.equal(weight, torch.full((2, 2), 3.0))
    assert torch.equal(state["tensor"], torch.full((2,), 3.0))


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "run.safetensors", small_state()) is None


def test_exactly_one_previous_checkpoint_is_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    for number in range(4):
        save_checkpoint(path, small_state(float(number)), number)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.safetensors", "run.safetensors.previous"]
    assert load_checkpoint(path, small_state()) == 3
    path.unlink()
    assert load_checkpoint(path, small_state()) == 2


def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path):
    path = tmp_path / "run.safetensors"
    for number in range(2):
        save_checkpoint(path, small_state(float(number)), number)
    broken = path.read_bytes()[:-3]
    path.write_bytes(broken)
    state = small_state(9.0)
    with pytest.warns(
        RuntimeWarning, match=r"run\.safetensors is damaged.*going on from run\.safetensors\.previous"
    ):
        assert load_checkpoint(path, state) == 0
    assert state["n"] == 0.0
    assert path.with_name("run.safetensors.damaged").read_bytes() == broken
    # The damaged file is out of the way: the next checkpoint does not push it over the sound one.
    save_checkpoint(path, state, 5)
    assert load_checkpoint(path, small_state()) == 5
    path.unlink()
    assert load_checkpoint(path, small_state()) == 0


def test_damage_without_a_sound_previous_one(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, small_state(), 0)
    path.write_bytes(path.read_bytes()[:-3])
    state = small_state(9.0)
    with pytest.raises(CheckpointError, match=r"run\.safetensors is damaged"):
        load_checkpoint(path, state)
    previous(path).write_bytes(b"")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"run\.safetensors\.previous is damaged"):
        load_checkpoint(path, state)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert state["n"] == 9.0


def test_previous_checkpoint_of_another_state_changes_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, {"x": 1}, 0)
    save_checkpoint(path, {"x": 1}, 1)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"run\.safetensors\.previous belongs to another training"):
        load_checkpoint(path, {"y": 1})
    assert path.read_bytes() == b""


def test_settings_must_be_equal(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, {"x": 1}, None, {"epochs": 3, "mode": "max"})
    with pytest.raises(ValueError, match="'epochs' is 3 there and 4 here"):
        load_checkpoint(path, {"x": 0}, {"epochs": 4, "mode": "max"})
    state = {"x": 0}
    load_checkpoint(path, state, {"mode": "max", "epochs": 3})
    assert state == {"x": 1}


def test_describe_names_every_part():
    state = {**small_state(), "generator": torch.Generator()}
    state["schedule"] = torch.optim.lr_scheduler.StepLR(state["optimizer"], 3)
    assert describe(state) == {
        "net": "module", "net.weight": "float32 (2, 2)", "net.bias": "float32 (2,)",
        "optimizer": "Adam", "optimizer.group0": "float32 (2, 2), float32 (2,)",
        "tensor": "float32 (2,)", "n": "number", "generator": "generator on cpu", "schedule": "StepLR",
    }  # fmt: skip
