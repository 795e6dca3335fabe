"""Modes a training runs in, each a context that puts back what it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Calls = Mapping[nn.Module, Callable[..., Any]]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluate ``module`` without gradients; every training flag within it is restored afterwards."""
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in flags.items():
            part.training = training


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero on the CPU, where they are many times slower; restore the mode afterwards."""
    # Threads inherit the mode they are created in and would keep it, so torch's are created before it changes.
    torch.ones(1 << 18).add_(1)
    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes_denormals() -> bool:
    """Whether the calling thread flushes denormal numbers to zero (torch has no getter)."""
    smallest_normal = torch.tensor([torch.finfo(torch.float32).tiny])
    # Looked at as an integer: a comparison of floats would flush its operands too.
    return not (smallest_normal / 2).view(torch.int32).item()


def autocast(device: str, precision: str) -> torch.autocast:
    """Autocast to bfloat16 where ``precision`` is ``"bf16"``.

    Without autocast's cache of cast weights, because a step may change weights and then use them again.
    """
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def compile_calls(state: Mapping[str, Any]) -> Calls:
    """Compile the forward pass of every module in ``state`` for :func:`compiled_calls`."""
    modules = (value for value in state.values() if isinstance(value, nn.Module))
    return {module: torch.compile(module._call_impl) for module in modules}


@contextmanager
def compiled_calls(calls: Calls) -> Iterator[None]:
    """Let modules call their compiled forward pass; without a wrapper, so that parameters keep their names."""
    for module, call in calls.items():
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for module in calls:
            module._compiled_call_impl = None


def device_type(state: Mapping[str, Any]) -> str:
    """Where a state trains: the device of its first parameter, else of its first tensor, else the CPU."""
    modules = [value for value in state.values() if isinstance(value, nn.Module)]
    tensors: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
    tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors[0].device.type if tensors else "cpu"
