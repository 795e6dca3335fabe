"""The cache: layout, canonical order, digests, damage, atomic writes, locks."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrefs.data.cache import (
    DamagedError,
    DataError,
    Split,
    cache_root,
    canonical_order,
    check_split,
    read_set,
    write_atomically,
    write_set,
)


def random_split(rng: np.random.Generator, count: int, extras: bool = False) -> Split:
    images = rng.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, count, dtype=np.uint8)
    boxes = {"boxes": rng.random((count, 4), dtype=np.float32)} if extras else {}
    return Split(images, labels, boxes)


def written(root: Path, extras: bool = False) -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    train, test = random_split(rng, 20, extras), random_split(rng, 7, extras)
    write_set("toy", train, test, ("a", "b", "c"), root=root)
    return train, test


def test_root_is_argument_then_environment_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path / "env"))
    assert cache_root(tmp_path) == tmp_path
    assert cache_root() == tmp_path / "env"
    monkeypatch.delenv("KDREFS_DATA")
    assert cache_root() == Path.home() / ".cache" / "kdrefs"


def test_canonical_order_is_the_order_of_hashes_and_its_digest_their_hash() -> None:
    split = random_split(np.random.default_rng(1), 30)
    keys = [
        hashlib.sha256(bytes([label]) + image.tobytes()).hexdigest()
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    order, digest = canonical_order(split.images, split.labels)
    assert [keys[i] for i in order] == sorted(keys)
    assert digest == hashlib.sha256(bytes.fromhex("".join(sorted(keys)))).hexdigest()


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_any_order_of_the_source_gives_the_same_tensors(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 2, (count, 2, 1, 1), dtype=np.uint8)  # many equal images
    labels = rng.integers(0, 2, count, dtype=np.uint8)
    shuffled = rng.permutation(count)
    order, digest = canonical_order(images, labels)
    again, same = canonical_order(images[shuffled], labels[shuffled])
    assert digest == same
    np.testing.assert_array_equal(images[order], images[shuffled][again])
    np.testing.assert_array_equal(labels[order], labels[shuffled][again])


def test_non_contiguous_images_have_the_same_digest() -> None:
    split = random_split(np.random.default_rng(2), 6)
    planes = np.ascontiguousarray(split.images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert canonical_order(planes, split.labels)[1] == canonical_order(split.images, split.labels)[1]


def test_written_set_is_read_back_in_canonical_order_with_its_extras(tmp_path: Path) -> None:
    train, _ = written(tmp_path, extras=True)
    found = read_set("toy", tmp_path)
    order, digest = canonical_order(train.images, train.labels)
    np.testing.assert_array_equal(found.train.images, train.images[order])
    np.testing.assert_array_equal(found.train.labels, train.labels[order])
    np.testing.assert_array_equal(found.train.extras["boxes"], train.extras["boxes"][order])
    assert found.digests["train"] == digest
    assert found.classes == ("a", "b", "c")
    assert (len(found.train), len(found.test)) == (20, 7)


def test_layout_is_plain_arrays_and_json(tmp_path: Path) -> None:
    written(tmp_path, extras=True)
    names = sorted(path.name for path in (tmp_path / "toy").iterdir())
    arrays = [f"{split}_{part}.npy" for split in ("test", "train") for part in ("boxes", "images", "labels")]
    assert names == sorted([*arrays, "meta.json"])
    meta = json.loads((tmp_path / "toy" / "meta.json").read_text())
    assert meta["classes"] == ["a", "b", "c"]
    assert set(meta["content_digest"]) == {"train", "test"}


def test_meta_with_only_classes_and_content_digest_is_enough(tmp_path: Path) -> None:
    written(tmp_path, extras=True)
    path = tmp_path / "toy" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({key: meta[key] for key in ("classes", "content_digest")}, indent=1))
    assert set(read_set("toy", tmp_path).test.extras) == {"boxes"}


def test_missing_set_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="toy"):
        read_set("toy", tmp_path)
    written(tmp_path)
    (tmp_path / "toy" / "test_labels.npy").unlink()
    with pytest.raises(DamagedError, match=r"test_labels\.npy"):
        read_set("toy", tmp_path)


@pytest.mark.parametrize("part", ["train_images", "test_images", "train_labels", "test_boxes"])
def test_every_changed_byte_of_an_array_is_found(tmp_path: Path, part: str) -> None:
    written(tmp_path, extras=True)
    path = tmp_path / "toy" / f"{part}.npy"
    good = path.read_bytes()
    before = read_set("toy", tmp_path)
    for position in [*range(0, 128, 3), *range(128, len(good), 1 + len(good) // 40), len(good) - 1]:
        bad = bytearray(good)
        bad[position] ^= 0x15
        path.write_bytes(bad)
        try:
            after = read_set("toy", tmp_path)
        except DamagedError as error:
            assert "toy" in str(error)  # noqa: PT017 - the other outcome is checked below
            continue
        # A byte of the header's padding may change without any effect; the arrays may not.
        assert position < 128
        for split in ("train", "test"):
            a, b = getattr(before, split), getattr(after, split)
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.labels, b.labels)
            np.testing.assert_array_equal(a.extras["boxes"], b.extras["boxes"])


@pytest.mark.parametrize("keep", [0, 1, 60, 128, 700])
def test_truncated_file_is_found_and_named(tmp_path: Path, keep: int) -> None:
    written(tmp_path)
    path = tmp_path / "toy" / "train_images.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=r"train_images\.npy"):
        read_set("toy", tmp_path)


def test_reordered_set_is_damaged_although_it_holds_the_same_images(tmp_path: Path) -> None:
    written(tmp_path)
    for part in ("images", "labels"):
        path = tmp_path / "toy" / f"train_{part}.npy"
        np.save(path, np.load(path)[::-1])
    with pytest.raises(DamagedError, match="content digest"):
        read_set("toy", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"classes": ["a"]}', '{"classes": 3}', "\x00"])
def test_damaged_meta_is_found(tmp_path: Path, text: str) -> None:
    written(tmp_path)
    (tmp_path / "toy" / "meta.json").write_text(text)
    with pytest.raises(DamagedError, match=r"meta\.json"):
        read_set("toy", tmp_path)


def test_changed_class_name_is_found(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "toy" / "meta.json"
    path.write_text(path.read_text().replace('"b"', '"d"'))
    with pytest.raises(DamagedError, match="class names"):
        read_set("toy", tmp_path)


def test_no_array_is_ever_unpickled(tmp_path: Path) -> None:
    written(tmp_path)
    trap = np.empty(20, dtype=object)
    trap[:] = [Trap(tmp_path / "sprung")] * 20
    np.save(tmp_path / "toy" / "train_labels.npy", trap, allow_pickle=True)
    with pytest.raises(DamagedError, match=r"train_labels\.npy"):
        read_set("toy", tmp_path)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["", "..", "../toy", "a/b", "/toy", "Toy", ".toy", "a\\b", "to y"])
def test_names_cannot_lead_out_of_the_cache(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        read_set(name, tmp_path)


def test_wrong_arrays_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = random_split(rng, 5)
    bad = {
        r"images: expected uint8.*float32": Split(good.images.astype(np.float32), good.labels),
        r"images: expected uint8.*\(5, 4, 5\)": Split(good.images[..., 0], good.labels),
        r"labels: expected uint8 \(5,\).*int64": Split(good.images, good.labels.astype(np.int64)),
        r"labels: expected uint8 \(5,\).*\(4,\)": Split(good.images, good.labels[:4]),
        r"largest is 9": Split(good.images, np.full(5, 9, dtype=np.uint8)),
        r"boxes: expected 5 numeric rows": Split(good.images, good.labels, {"boxes": np.zeros((4, 4))}),
        r"extras: '\.\./boxes' is no name": Split(good.images, good.labels, {"../boxes": np.zeros((5, 4))}),
        r"extras: 'images' is no name": Split(good.images, good.labels, {"images": np.zeros((5, 4))}),
        r"boxes: not all values are finite": Split(
            good.images, good.labels, {"boxes": np.full((5, 4), np.nan)}
        ),
    }
    for message, split in bad.items():
        with pytest.raises(ValueError, match=message):
            write_set("toy", good, split, ("a", "b", "c"), root=tmp_path)
        with pytest.raises(ValueError, match=message):
            check_split(split, 3, "toy test")
    assert list(tmp_path.iterdir()) == []


def test_unexpected_content_is_not_written(tmp_path: Path) -> None:
    split = random_split(np.random.default_rng(0), 5)
    with pytest.raises(DamagedError, match="toy test: content digest"):
        write_set("toy", split, split, ("a", "b", "c"), root=tmp_path, expected={"test": "0" * 64})
    assert not (tmp_path / "toy").exists()


def test_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"former"))

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writer_killed_between_two_files_leaves_no_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdrefs.data.cache as cache

    split = random_split(np.random.default_rng(0), 5)
    write, count = cache.write_atomically, 0

    def killed(path: Path, writer: object) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        write(path, writer)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write_set("toy", split, split, ("a", "b", "c"), root=tmp_path)
    with pytest.raises(FileNotFoundError):
        read_set("toy", tmp_path)


def test_writing_again_leaves_nothing_of_the_former_set(tmp_path: Path) -> None:
    written(tmp_path, extras=True)
    (tmp_path / "toy" / ".train_images.npy-killed").write_bytes(b"half")
    written(tmp_path)
    assert dict(read_set("toy", tmp_path).train.extras) == {}
    assert len(list((tmp_path / "toy").iterdir())) == 5


def test_missing_filelock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(DataError, match="filelock"):
        written(tmp_path)


def test_a_cache_without_write_permission_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    for left in tmp_path.glob(".*"):
        left.unlink()
    monkeypatch.setitem(sys.modules, "filelock", None)  # reading takes no lock
    assert len(read_set("toy", tmp_path).train) == 20
    assert list(tmp_path.glob(".*")) == []
