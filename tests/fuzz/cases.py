"""How a public function is called with tensors of any sizes, and the cases of the table of losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdrefs import divergences
from kdrefs.methods import afd, darkrank, ft, ksanc, structured_kd
from tests.fuzz.tensors import FLOATS, LAYOUTS, Draw, Sizes, made
from tests.methods import losses

SHAPES = losses.SHAPES | {
    "labels": ("batch",), "answers of members": ("members", "batch", "classes"),
    "square": ("batch", "batch"), "database": ("database", "width"), "database labels": ("database",),
    "other rows": ("database", "width"), "same": ("batch", "database"), "entropy": ("batch", "height", "columns"),
    "entropies": ("batch", "members", "height", "columns"), "foreground": ("batch", "height", "columns"),
    "distance": ("members",), "weights": ("members", "width"), "candidates": ("batch", "members", "four"),
    "scores of samples": ("batch",), "small maps": ("batch", "three", "two", "two"),
    "deviation": ("classes",), "descriptor": ("batch", "width"), "shares": ("batch",),
    "directions": ("batch", "directions", "classes"), "statistic": ("classes",), "indices": ("batch",),
    "tokens": ("batch", "length", "width"), "large maps": ("batch", "channels", "sixteen", "sixteen"),
    "images": ("batch", "colours", "height", "columns"), "vocabulary": ("words", "channels"),
}  # fmt: skip
_EVENLY = {"foreground", "mask", "same"}  # of zeros and ones
VALUES = losses.VALUES | {"shares": torch.sigmoid, "distance": torch.relu, "deviation": torch.ones_like}
HIGHEST = {
    "labels": "classes", "landmarks": "batch", "mask": "two", "foreground": "two", "same": "two",
    "database labels": "classes", "indices": "batch",
}  # fmt: skip


def sizes_of(**changes: int) -> dict[str, int]:
    """Sizes by name; those that depend on others follow."""
    sizes = (
        losses.SIZES | {"database": 7, "words": 4, "four": 4, "two": 2, "three": 3, "sixteen": 16} | changes
    )
    sizes["judgements"] = sizes["classes"] + 1
    sizes["teacher height"] = max(sizes["teacher height"], sizes["height"])
    sizes["teacher columns"] = max(sizes["teacher columns"], sizes["columns"])
    return sizes


def tensor(kind: str, sizes: Sizes, draw: Draw) -> Tensor:
    """An argument of a kind, valid but for its magnitude."""
    shape = tuple(sizes[name] for name in SHAPES[kind])
    if kind in HIGHEST:
        generator = torch.Generator().manual_seed(draw.seed)
        drawn = torch.randint(sizes[HIGHEST[kind]], shape, generator=generator)
        if kind == "foreground":
            drawn[..., 0] = 0  # some background in every image
        return LAYOUTS[draw.layout](drawn.bool() if kind in _EVENLY else drawn.to(draw.integer))
    value = made(draw, shape, VALUES.get(kind, lambda x: x))
    return value.requires_grad_(draw.requires_grad)


@dataclass(frozen=True)
class Case:
    """One way to call a public name.

    Attributes:
        of: The public function or class.
        kinds: The kind of each tensor by the name of its argument.
        options: Other arguments.
        make: From sizes to what is called with the tensors by name, where it is not ``of`` itself.
        least: Sizes below which a documented error is raised.
        constant: Arguments into which no gradient flows.
        dtypes: Of floating tensors; a module has that of its weights.
        normalises: Whether a single value a channel is refused by batch normalisation, whose error names nothing.
        unbounded: Why a result may be infinite or NaN, as documented.
        refuses: Why valid tensors may be refused for their values, as documented.
        needs: Arguments that must require a gradient.
        shares: Why a result may lie in an argument's memory.
        names: Further arguments that an error may name.
    """

    of: Callable[..., Any]
    kinds: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Sizes], Callable[..., Any]] | None = None
    least: Mapping[str, int] = field(default_factory=dict)
    constant: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    normalises: bool = False
    unbounded: str = ""
    refuses: str = ""
    needs: tuple[str, ...] = ()
    shares: str = ""
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For the test's id."""
        options = (f"{name}={getattr(value, '__name__', value)}" for name, value in self.options.items())
        return " ".join([self.of.__name__, *list(self.kinds)[2:], *options])

    def function(self, sizes: Sizes) -> Callable[..., Any]:
        """What is called; made anew, it has the same parameters and random numbers."""
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes longer than most calls
        return partial(self.of, **self.options) if self.make is None else self.make(sizes)

    def optional(self, name: str) -> bool:
        """Whether an argument may be None."""
        parameters = inspect.signature(self.of if self.make is None else self.make(sizes_of())).parameters
        return name in parameters and parameters[name].default is None

    def argument_names(self) -> tuple[str, ...]:
        """What an error may name."""
        return (*self.kinds, *inspect.signature(self.of).parameters, *self.names)


_BOTH = {
    divergences.kl_divergence, divergences.jeffreys_divergence, divergences.quadratic_divergence,
    structured_kd.holistic_loss, ksanc.logit_discriminator_loss,
}  # fmt: skip
_FIXED = {"teacher", "peer", "ensemble", "target", "vocabulary"}


def _of_table(loss: Callable[..., Any], kinds: tuple[str, ...], options: Mapping[str, Any]) -> Case:
    named = dict(zip(inspect.signature(loss).parameters, kinds, strict=False))
    constant = set() if loss in _BOTH else _FIXED & set(named)
    if loss is afd.discriminator_loss:
        constant = set()
    if loss is ft.paraphraser_loss:
        constant = {"maps"}
    least = {}
    if loss in (darkrank.soft_darkrank_loss, darkrank.hard_darkrank_loss) or options.get("diagonal") is False:
        least = {"batch": 2}
    if loss is structured_kd.pairwise_loss and ("beta" in options or options.get("variant") == "cirkd"):
        least = {"height": 2, "columns": 2}
    return Case(loss, named, options, least=least, constant=frozenset(constant))


LOSSES = [_of_table(*line) for line in losses.LOSSES]
