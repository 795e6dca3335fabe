"""A transformer encoder with the layers of BERT that returns its attention, small enough to train within seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrefs.nets.output import Output, check_counts

_EPS = 1e-12  # of BERT's layer normalisation


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, each added to its input and normalised afterwards.

    Args:
        width: Of the hidden states.
        heads: Number of heads; divides ``width``.
        feedforward: Width of the feed-forward part.
    """

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.expand, self.contract = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm_feedforward = nn.LayerNorm(width, eps=_EPS)

    def forward(self, states: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Map hidden states ``(B, L, width)`` to the next, with the attention's scores and its probabilities."""
        batch, length, width = states.shape
        split = (batch, length, self.heads, width // self.heads)
        query, key, value = (
            part(states).view(split).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.mT / math.sqrt(width // self.heads)
        masked = scores if outside is None else scores.masked_fill(outside, torch.finfo(scores.dtype).min)
        attention = masked.softmax(-1)
        mixed = (attention.to(value.dtype) @ value).transpose(1, 2).reshape(batch, length, width)
        states = self.norm(states + self.output(mixed))
        states = self.norm_feedforward(states + self.contract(F.gelu(self.expand(states))))
        return states, scores, attention


class Transformer(nn.Module):
    """Token and position embeddings, encoder layers, and a classifier on the first token.

    The layers are BERT's (Devlin et al. 2019), without dropout and without segments. The first token of a sequence
    stands for the whole of it; its last state goes through a linear layer with tanh to the classifier.

    Features, numbered from the bottom: ``layer1`` … the hidden states ``(B, L, width)``, ``attention1`` … the
    probabilities ``(B, heads, L, L)``, in which padding has none, ``scores1`` … the same before mask and softmax, and
    ``pooled`` ``(B, width)``.

    Args:
        vocabulary: Number of tokens.
        classes: Number of classes.
        width: Of the hidden states.
        heads: Number of heads; divides ``width``.
        depth: Number of layers.
        feedforward: Width of the feed-forward part.
        length: Longest sequence.

    Raises:
        ValueError: If a size is not positive or ``heads`` does not divide ``width``.
    """

    def __init__(
        self,
        vocabulary: int = 32,
        classes: int = 10,
        width: int = 32,
        heads: int = 4,
        depth: int = 4,
        feedforward: int = 64,
        *,
        length: int = 32,
    ) -> None:
        super().__init__()
        check_counts(
            vocabulary=vocabulary,
            classes=classes,
            width=width,
            heads=heads,
            depth=depth,
            feedforward=feedforward,
            length=length,
        )
        if width % heads:
            raise ValueError(f"heads must divide width {width}, got {heads}")
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, feedforward) for _ in range(depth))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 * math.sqrt(768 / width))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Output:
        """Classify token sequences.

        Args:
            tokens: int64 ``(B, L)``, the first of which is the classification token.
            mask: ``(B, L)``, true or 1 at tokens, false or 0 at padding; None: no padding.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"tokens must have shape (B, 1 to {self.length}), got {tuple(tokens.shape)}")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(mask.shape)}"
            )
        outside = None if mask is None else (mask == 0)[:, None, None, :]
        states = self.norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        features: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers, start=1):
            states, features[f"scores{number}"], features[f"attention{number}"] = layer(states, outside)
            features[f"layer{number}"] = states
        features["pooled"] = torch.tanh(self.pooler(states[:, 0]))
        return Output(self.classifier(features["pooled"]), features)

    def copy_layers(self, teacher: Transformer, layers: Sequence[int]) -> None:
        """Take the teacher's embeddings, pooler and classifier, and some of its layers in order, as a start.

        Args:
            teacher: Of the same widths.
            layers: For each layer its number in the teacher, counted from 1 at the bottom.

        Raises:
            ValueError: If there are not as many as layers, or the teacher has no such layer.
            RuntimeError: If shapes differ.
        """
        depth = len(teacher.layers)
        if len(layers) != len(self.layers) or not all(1 <= number <= depth for number in layers):
            raise ValueError(
                f"layers must be {len(self.layers)} numbers from 1 to {depth}, got {tuple(layers)}"
            )
        for name in ("tokens", "positions", "norm", "pooler", "classifier"):
            getattr(self, name).load_state_dict(getattr(teacher, name).state_dict())
        for layer, number in zip(self.layers, layers, strict=True):
            layer.load_state_dict(teacher.layers[number - 1].state_dict())


def from_bert(weights: Mapping[str, Tensor], heads: int, classes: int, *, length: int) -> Transformer:
    """A transformer with the weights of a BERT encoder and a classifier that is still to be trained.

    Args:
        weights: Tensors by the names of the transformers library's ``BertModel``. Every text is its first segment,
            whose embedding is added to the positions'.
        heads: Number of heads.
        classes: Number of classes.
        length: Longest sequence to be read; the positions after it are left out.

    Raises:
        ValueError: If a tensor is missing.
    """
    try:
        embeddings = weights["embeddings.word_embeddings.weight"]
        positions = weights["embeddings.position_embeddings.weight"][:length]
        segment = weights["embeddings.token_type_embeddings.weight"][0]
        feedforward = weights["encoder.layer.0.intermediate.dense.weight"].shape[0]
        depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        module = Transformer(
            embeddings.shape[0],
            classes,
            embeddings.shape[1],
            heads,
            depth,
            feedforward,
            length=len(positions),
        )
        state = {"tokens.weight": embeddings, "positions.weight": positions + segment}
        names = {"norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}
        for k in range(depth):
            for ours, theirs in _BERT_LAYER.items():
                names[f"layers.{k}.{ours}"] = f"encoder.layer.{k}.{theirs}"
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                state[f"{ours}.{part}"] = weights[f"{theirs}.{part}"]
    except KeyError as error:
        raise ValueError(f"weights: no tensor {error.args[0]!r}, expected those of a BERT encoder") from None
    module.load_state_dict(state | {f"classifier.{k}": v for k, v in module.classifier.state_dict().items()})
    return module


_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "norm_feedforward": "output.LayerNorm",
}
