"""Token sequences with a class: a made-up one for the small transformer, sentences of film reviews for MiniLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdrefs.data.texts import load_minilm, load_snippets
from kdrefs.data.wordpiece import WordPiece

PADDING, FIRST = 0, 1  # numbers of the padding and of the classification token
PROBE_TRAIN, PROBE_TEST = 256, 64  # sequences of a probe


@dataclass(frozen=True)
class Counting:
    """How often does the marked value occur again: never, once, or more often?

    A sequence is the classification token, some values, and one *marked* value among them, at any place; values are
    drawn alike. A network has to find the mark, carry its value to the others and count.
    """

    name: Literal["counting"] = "counting"
    values: int = 5
    shortest: int = 5  # tokens, the classification token among them
    length: int = 10
    train: int = 2048
    test: int = 2048
    seed: int = 20200207

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 3

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, of padding, of classification, and of each value plain and marked."""
        return 2 + 2 * self.values


@dataclass(frozen=True)
class Snippets:
    """Is a sentence of a film review positive?"""

    name: Literal["snippets"] = "snippets"
    length: int = 32  # pieces of words
    train: int = 2500
    test: int = 2000

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 2


Task = Counting | Snippets


@dataclass(frozen=True)
class Sequences:
    """Tokens int64 ``(N, length)``, padded with 0 at the end, and labels ``(N,)``."""

    tokens: Tensor
    labels: Tensor


def load_task(task: Task, *, probe: bool = False) -> tuple[Sequences, Sequences]:
    """Training and test sequences; a probe sees the first of each only.

    Raises:
        kdrefs.data.DataError: A text cannot be had; the message names the ways.
    """
    sizes = (PROBE_TRAIN, PROBE_TEST) if probe else (task.train, task.test)
    if isinstance(task, Snippets):
        encoder, sentences = load_minilm(), load_snippets()
        cut = WordPiece(encoder.vocabulary)
        parts = (
            (sentences.train_texts, sentences.train_labels),
            (sentences.test_texts, sentences.test_labels),
        )
        train, test = (
            Sequences(torch.from_numpy(cut(texts[:n], task.length)), torch.from_numpy(labels[:n]))
            for (texts, labels), n in zip(parts, sizes, strict=True)
        )
        return train, test
    generator = torch.Generator().manual_seed(task.seed)
    train, test = (counted(task, n, generator) for n in (task.train, task.test))
    return tuple(
        Sequences(one.tokens[:n], one.labels[:n]) for one, n in zip((train, test), sizes, strict=True)
    )  # type: ignore[return-value]


def counted(task: Counting, count: int, generator: torch.Generator) -> Sequences:
    """Draw sequences of :class:`Counting`."""
    lengths = torch.randint(task.shortest, task.length + 1, (count,), generator=generator)
    values = torch.randint(0, task.values, (count, task.length), generator=generator)
    place = torch.arange(task.length)
    inside = (place > 0) & (place < lengths.unsqueeze(1))
    marked = 1 + (torch.rand(count, generator=generator) * (lengths - 1)).long()
    mark = place == marked.unsqueeze(1)
    same = (values == values.gather(1, marked.unsqueeze(1))) & inside & ~mark
    tokens = 2 + values + task.values * mark
    tokens[:, 0] = FIRST
    return Sequences(tokens.masked_fill(place >= lengths.unsqueeze(1), PADDING), same.sum(1).clamp(max=2))
