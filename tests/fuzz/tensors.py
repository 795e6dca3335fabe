"""Tensors that callers have: every layout, dtype and magnitude, in memory that is watched for changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Sizes = Mapping[str, int]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradient": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode
}  # fmt: skip


def _rows(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of the matrix of samples, whatever the tensor's shape."""
    return lambda x: change(x.reshape(len(x), -1)).view(x.shape) if x.ndim and len(x) else x


def _norms(rows: Tensor) -> Tensor:
    return rows * 10.0 ** torch.linspace(-12, 12, len(rows), dtype=rows.dtype)[:, None]


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "ReLU": torch.relu,
    "zero row": _rows(lambda rows: torch.cat([0 * rows[:1], rows[1:]])),
    "duplicate rows": _rows(lambda rows: rows[:1].repeat(len(rows), 1)),
    "opposite rows": _rows(lambda rows: torch.cat([-rows[1:2], rows[1:]]) if len(rows) > 1 else -rows),
    "one-hot": _rows(lambda rows: (rows == rows.amax(1, keepdim=True)).to(rows.dtype)),
    "norms from 1e-12 to 1e12": _rows(_norms),
}


def _reversed(x: Tensor) -> Tensor:
    return (
        x.permute(*reversed(range(x.ndim)))
        .clone(memory_format=torch.contiguous_format)
        .permute(*reversed(range(x.ndim)))
    )


def _strided(x: Tensor) -> Tensor:
    """Every other element of memory whose gaps must be neither read nor written."""
    gaps = torch.full((*x.shape, 2), torch.nan if x.is_floating_point() else 1, dtype=x.dtype)
    gaps[..., 0] = x
    return gaps[..., 0]


def _expanded(x: Tensor) -> Tensor:
    """All samples are the first, in the memory of one."""
    return x[:1].clone(memory_format=torch.contiguous_format).expand(x.shape) if x.ndim and len(x) else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "reversed": _reversed,
    "strided": _strided,
    "offset": lambda x: torch.cat([x[:1], x])[1:] if x.ndim else x.clone(),
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else _reversed(x)
    ),
    "expanded": _expanded,
}


@dataclass(frozen=True)
class Draw:
    """How one tensor is made.

    Attributes:
        pattern: Of ``PATTERNS``.
        exponent: Of the power of ten that the pattern is multiplied by.
        layout: Of ``LAYOUTS``.
        dtype: Of a floating tensor.
        integer: Of a tensor of whole numbers.
        requires_grad: Of a floating tensor.
        seed: Of the numbers.
    """

    pattern: str = "normal"
    exponent: int = 0
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    integer: torch.dtype = torch.int64
    requires_grad: bool = True
    seed: int = 0


def draws() -> st.SearchStrategy[Draw]:
    """Every way to make a tensor, with norms from 1e-12 to 1e12."""
    return st.builds(
        Draw,
        pattern=st.sampled_from(tuple(PATTERNS)),
        exponent=st.integers(-12, 12),
        layout=st.sampled_from(tuple(LAYOUTS)),
        dtype=st.sampled_from(FLOATS),
        integer=st.sampled_from(INTEGERS),
        requires_grad=st.booleans(),
        seed=st.integers(0, 7),
    )


def made(draw: Draw, shape: tuple[int, ...], values: Callable[[Tensor], Tensor]) -> Tensor:
    """A floating tensor as drawn; ``values`` brings its numbers into the argument's range."""
    generator = torch.Generator().manual_seed(draw.seed)
    numbers = PATTERNS[draw.pattern](torch.randn(shape, generator=generator, dtype=torch.float64))
    if draw.pattern != "norms from 1e-12 to 1e12":
        numbers = numbers * 10.0**draw.exponent
    most = 4e3 if draw.dtype == torch.float16 else 1e13  # half precision has no 1e12
    return LAYOUTS[draw.layout](values(numbers.clamp(-most, most)).to(draw.dtype))


class Watched:
    """Arguments of a call: their bits, those around them and their version counters, as they were before."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self.tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self.before = {name: self._state(value) for name, value in self.tensors.items()}

    @staticmethod
    def _state(value: Tensor) -> tuple[object, ...]:
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        return memory.numpy().tobytes(), value._version, value.shape, value.stride(), value.requires_grad

    def check(self) -> None:
        """Raise unless all is as it was."""
        for name, value in self.tensors.items():
            assert self._state(value) == self.before[name], f"{name} was changed in place"
            assert not value.is_leaf or value.grad is None, f"{name}.grad was set"


def tensors_of(result: object) -> Iterator[Tensor]:
    """All tensors in what a function returned."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        yield from (tensor for value in result.values() for tensor in tensors_of(value))
    elif isinstance(result, tuple | list):
        yield from (tensor for value in result for tensor in tensors_of(value))


MUTATIONS: dict[str, Callable[[Tensor], object]] = {
    "no batch": lambda x: x[:0],
    "no last dimension": lambda x: x[..., :0],
    "no second dimension": lambda x: x[:, :0],
    "one sample": lambda x: x[:1],
    "another sample": lambda x: torch.cat([x, x[:1]]),
    "wider": lambda x: torch.cat([x, x[..., :1]], -1),
    "another channel": lambda x: torch.cat([x, x[:, :1]], 1),
    "a dimension less": lambda x: x[0],
    "a dimension more": lambda x: x[None],
    "a last dimension more": lambda x: x[..., None],
    "a number in a tensor": lambda x: x.sum(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float32": lambda x: x.float(),
    "float64": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.clamp(0, 1).to(torch.uint8),
    "bool": lambda x: x != 0,
    "complex": lambda x: x.to(torch.complex64),
    "None": lambda _: None,
    "a list": lambda x: x.tolist(),
    "a number": lambda _: 1.5,
    "text": lambda _: "text",
    "an array": lambda x: np.zeros(tuple(x.shape), dtype=np.float32),
}  # fmt: skip


def mutated(value: Tensor, name: str) -> object:
    """``value`` with one thing wrong, or itself where it has nothing that could be so."""
    try:
        return MUTATIONS[name](value.detach())
    except (IndexError, RuntimeError):
        return value


def documented(error: Exception, names: Iterator[str] | tuple[str, ...]) -> bool:
    """Whether an error is one that a caller can act on: of a documented type, and naming an argument."""
    message = str(error)
    return type(error) in (ValueError, TypeError) and any(
        re.match(rf"{re.escape(name)}\b", message) or re.search(rf"\b{re.escape(name)}:", message)
        for name in names
    )


def backward(result: object, arguments: Mapping[str, object]) -> dict[str, Tensor | None]:
    """The gradient of the sum of all that was returned, for each argument that requires one."""
    wanted = {
        name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad
    }
    outputs = [value.sum() for value in tensors_of(result) if value.requires_grad and not value.is_complex()]
    if not outputs or not wanted:
        return dict.fromkeys(wanted)
    found = torch.autograd.grad(sum(outputs), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))
