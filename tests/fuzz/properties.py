"""What holds for every public function of tensors, whatever it is given; each property is a function of one case."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.cases import Case, sizes_of, tensor
from tests.fuzz.tensors import (
    CONTEXTS,
    MUTATIONS,
    PATTERNS,
    Draw,
    Sizes,
    Watched,
    backward,
    documented,
    draws,
    mutated,
    tensors_of,
)  # fmt: skip

_DRAWN = (
    "batch", "classes", "width", "channels", "height", "columns", "teacher width", "teacher height", "members",
    "teacher columns", "directions", "colours", "landmarks", "heads", "length", "database", "words",
)  # fmt: skip

_EXACT = (torch.float32, torch.float64)
_BATCH_NORM = "Expected more than 1 value per channel when training"


def examples(share: int) -> settings:
    """As many examples as the profile has, divided by ``share``: those here make many calls each."""
    return settings(max_examples=max(1, settings().max_examples // share))


@st.composite
def calls(
    draw: st.DrawFn, case: Case, dtypes: tuple[torch.dtype, ...] | None = None
) -> tuple[Sizes, dict[str, Draw]]:
    """Sizes, and how each tensor of a call is made; all floating ones of one dtype."""
    sizes = {name: draw(st.integers(case.least.get(name, 1), 4)) for name in _DRAWN}
    dtype = draw(st.sampled_from(dtypes or case.dtypes))
    found = {name: dataclasses.replace(draw(draws()), dtype=dtype) for name in case.kinds}
    return sizes_of(**sizes), found


def arguments(case: Case, sizes: Sizes, made: Mapping[str, Draw]) -> dict[str, Tensor]:
    """The tensors of a call."""
    found = {name: tensor(kind, sizes, made[name]) for name, kind in case.kinds.items()}
    for name in case.needs:
        found[name].requires_grad_()
    return found


def call(case: Case, sizes: Sizes, given: Mapping[str, Any], context: str = "gradient") -> Any:
    """The result, or None where an error was raised that the caller can act on; arguments stay as they were."""
    function, watched = case.function(sizes), Watched(given)
    try:
        with CONTEXTS[context](), warnings.catch_warnings(action="error"):
            return function(**given)
    except (ValueError, TypeError) as error:
        if not documented(error, case.argument_names()) and not (
            case.normalises and str(error).startswith(_BATCH_NORM)
        ):
            raise AssertionError(f"an error that names no argument: {error}") from error
        return None
    finally:
        watched.check()


def values_and_gradients_are_finite(data: st.DataObject, case: Case) -> None:
    """Nothing is changed in place, nothing flows into a teacher, and what comes out is finite and the caller's own."""
    sizes, made = data.draw(calls(case))
    context = "gradient" if case.needs else data.draw(st.sampled_from(tuple(CONTEXTS)))
    name = data.draw(st.sampled_from(tuple(case.kinds)))
    for pattern in PATTERNS:
        given = arguments(case, sizes, made | {name: dataclasses.replace(made[name], pattern=pattern)})
        watched = Watched(given)
        result = call(case, sizes, given, context)
        if result is None:
            assert case.refuses or case.normalises or context == "inference_mode", (
                "valid arguments were refused"
            )
            continue
        exact = made[name].dtype in _EXACT
        outputs = list(tensors_of(result))
        memory = {value.untyped_storage().data_ptr() for value in given.values() if value.numel()}
        if not case.shares:
            own = (value.untyped_storage().data_ptr() for value in outputs if value.numel())
            assert memory.isdisjoint(own), "the result lies in an argument's memory"
        if exact and not case.unbounded:
            assert all(value.isfinite().all() for value in outputs), f"not finite: {result}"
        if context != "gradient":
            continue
        for argument, gradient in backward(result, given).items():
            assert argument not in case.constant or gradient is None, f"a gradient flows into {argument}"
            assert gradient is None or not exact or gradient.isfinite().all(), f"{argument}: {gradient}"
        watched.check()


def layouts_do_not_matter(data: st.DataObject, case: Case) -> None:
    """A view, strided, transposed or expanded, gives what its contiguous copy does."""
    sizes, made = data.draw(calls(case, tuple(d for d in case.dtypes if d in _EXACT)))
    plain = {name: dataclasses.replace(one, pattern="normal", exponent=0) for name, one in made.items()}
    views = arguments(case, sizes, plain)
    copies = {
        name: value.detach().clone(memory_format=torch.contiguous_format).requires_grad_(value.requires_grad)
        for name, value in views.items()
    }
    ours, theirs = call(case, sizes, views), call(case, sizes, copies)
    assert (ours is None) == (theirs is None)
    if ours is None:
        return
    tolerance = 1e-9 if next(iter(made.values())).dtype == torch.float64 else 2e-4
    if not case.unbounded:
        _assert_close(list(tensors_of(ours)), list(tensors_of(theirs)), tolerance)
    if isinstance(ours, float):
        assert abs(ours - theirs) <= tolerance * max(1, abs(theirs))
    ours, theirs = backward(ours, views), backward(theirs, copies)
    for name, gradient in ours.items():
        other = theirs[name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            _assert_close([gradient], [other], tolerance)


def _assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        size = float(other.detach().double().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, size))


def wrong_arguments_are_refused(data: st.DataObject, case: Case) -> None:
    """Whatever is wrong with one argument, the error names it and is of a documented type."""
    sizes, made = data.draw(calls(case))
    context = "gradient" if case.needs else data.draw(st.sampled_from(tuple(CONTEXTS)))
    plain = {"pattern": "normal", "exponent": 0, "requires_grad": False}
    made = {name: dataclasses.replace(one, **plain) for name, one in made.items()}
    for name in case.kinds:
        for mutation in MUTATIONS:
            given: dict[str, Any] = dict(arguments(case, sizes, made))
            given[name] = mutated(given[name], mutation)
            if name in case.needs and isinstance(given[name], Tensor) and given[name].is_floating_point():
                given[name] = given[name].requires_grad_()
            result = call(case, sizes, given, context)
            if mutation in _NEVER and not (mutation == "None" and case.optional(name)):
                assert result is None, f"{name} as {mutation} gave {result}"
            if not case.unbounded and result is not None:
                values = [v for v in tensors_of(result) if v.dtype in _EXACT]
                assert all(value.isfinite().all() for value in values), f"{name} as {mutation} gave {result}"


_NEVER = {"complex", "None", "a list", "a number", "text", "an array"}


def not_a_number_changes_nothing_else(data: st.DataObject, case: Case) -> None:
    """NaN and infinity make no other error than documented ones, and no change in place."""
    sizes, made = data.draw(calls(case))
    context = "gradient" if case.needs else data.draw(st.sampled_from(tuple(CONTEXTS)))
    place = data.draw(st.integers(0, 7))
    for name in case.kinds:
        for value in (torch.nan, torch.inf, -torch.inf):
            given = arguments(case, sizes, made)
            if not given[name].is_floating_point():
                continue
            spoilt = given[name].detach().clone(memory_format=torch.contiguous_format)
            spoilt.view(-1)[place % spoilt.numel()] = value
            given[name] = spoilt.requires_grad_(given[name].requires_grad)
            watched = Watched(given)
            result = call(case, sizes, given, context)
            if result is not None and context == "gradient":
                backward(result, given)
                watched.check()
