"""BERT's tokens: lower-case words and punctuation, cut into the longest pieces that the vocabulary has."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

_LONGEST_WORD = 100  # characters; BERT's tokeniser does not cut longer ones


class WordPiece:
    """Turns texts into token numbers, as BERT's uncased tokeniser does.

    Source: Devlin et al., "BERT", NAACL 2019, section 3, and the tokeniser released with it: control characters are
    dropped, letters lower-cased, accents stripped, punctuation and Chinese characters stand alone; a word that cannot
    be cut into pieces is unknown.

    Args:
        vocabulary: Pieces in the order of their numbers; those inside a word begin with ``##``. It has the special
            tokens ``[PAD]``, ``[UNK]``, ``[CLS]`` and ``[SEP]``.

    Raises:
        ValueError: If a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.numbers = {piece: number for number, piece in enumerate(vocabulary)}
        for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if name not in self.numbers:
                raise ValueError(f"vocabulary: expected the special token {name}, which is not there")
        self.padding = self.numbers["[PAD]"]

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token numbers int64 ``(texts, length)``, from ``[CLS]`` to ``[SEP]``, cut or padded at the end.

        Raises:
            ValueError: If ``length`` leaves no room for a piece.
        """
        if length < 3:
            raise ValueError(f"length: expected at least 3, got {length}")
        rows = np.full((len(texts), length), self.padding, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            pieces = ["[CLS]", *self.pieces(text)[: length - 2], "[SEP]"]
            row[: len(pieces)] = [self.numbers[piece] for piece in pieces]
        return rows

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens."""
        return [piece for word in _words(text) for piece in self._cut(word)]

    def _cut(self, word: str) -> list[str]:
        if len(word) > _LONGEST_WORD:
            return ["[UNK]"]
        found: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.numbers), None)
            if end is None:
                return ["[UNK]"]
            found.append(prefix + word[start:end])
            start = end
        return found


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in unicodedata.normalize("NFD", _clean(text).lower()):
        kind = unicodedata.category(character)
        if kind == "Mn":  # an accent
            continue
        alone = _is_punctuation(character, kind) or _is_chinese(character)
        if (alone or character == " ") and word:
            yield word
            word = ""
        if alone:
            yield character
        elif character != " ":
            word += character
    if word:
        yield word


def _clean(text: str) -> str:
    kept = []
    for character in text:
        kind = unicodedata.category(character)
        if character in "\t\n\r" or kind == "Zs":
            kept.append(" ")
        elif not kind.startswith("C") and character != "\ufffd":
            kept.append(character)
    return "".join(kept)


def _is_punctuation(character: str, kind: str) -> bool:
    # All ASCII symbols count, such as $ and ^, whose category is another.
    return kind.startswith("P") or (
        character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    )


def _is_chinese(character: str) -> bool:
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )
