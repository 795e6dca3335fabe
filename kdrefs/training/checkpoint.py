"""Atomic, pickle-free checkpoints: tensors in safetensors, everything else as JSON in the same file.

A checkpoint is one ``.safetensors`` file. The nested ``state_dict`` of a module, optimiser, scheduler or generator
is flattened: tensors get a name, the rest becomes JSON in the file's metadata, with a digest of both. A new file is
written beside the old one, flushed to the disk and renamed; the file before it stays as ``<name>.previous``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrefs.training.files import CheckpointError, load_tensors, save_tensors, sync_folder, write_partial
from kdrefs.training.parallel import leads

__all__ = ["CheckpointError", "load_checkpoint", "load_tensors", "save_checkpoint", "save_tensors"]

_FORMAT = "kdrefs-1"


# ---------------------------------------------------------------- nested values


def flatten(value: object, name: str, tensors: MutableMapping[str, Tensor]) -> Any:
    """Turn a nested value into JSON, moving its tensors to ``tensors`` under names that begin with ``name``.

    Tuples, counters, dictionaries with integer keys and the strides of channels-last tensors survive.

    Raises:
        TypeError: If the value holds something else than tensors, containers, numbers, text, booleans and None.
    """
    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "'"
        tensors[name] = value
        # The strides that a copy would have: values laid out in another order could take another code path in
        # elementwise kernels, and so other bits.
        return {"tensor": name, "stride": list(torch.empty_like(value, device="meta").stride())}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [flatten(item, f"{name}.{k}", tensors) for k, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise TypeError(f"{name} cannot be checkpointed: {type(value).__qualname__}")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        stored = tensors[value["tensor"]]
        return torch.empty_strided(stored.shape, value["stride"], dtype=stored.dtype).copy_(stored)
    if "tuple" in value:
        return tuple(unflatten(item, tensors) for item in value["tuple"])
    if "counter" in value:
        return Counter({key: unflatten(item, tensors) for key, item in value["counter"]})
    return {key: unflatten(item, tensors) for key, item in value["dict"]}


# ---------------------------------------------------------------- training state


def describe(state: Mapping[str, Any]) -> dict[str, str]:
    """Say what a state consists of, so that a checkpoint of another state is recognised.

    Returns:
        Dotted name -> dtype and shape of a tensor, class of an optimiser or scheduler, or kind of value.

    Raises:
        TypeError: If an entry cannot be checkpointed.
    """
    parts: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            parts[key] = "module"
            for name, entry in value.state_dict().items():
                parts[f"{key}.{name}"] = _shape(entry) if isinstance(entry, Tensor) else "extra state"
        elif isinstance(value, torch.optim.Optimizer):
            parts[key] = type(value).__qualname__
            for number, group in enumerate(value.param_groups):
                parts[f"{key}.group{number}"] = ", ".join(_shape(parameter) for parameter in group["params"])
        elif isinstance(value, torch.Generator):
            parts[key] = f"generator on {value.device.type}"
        elif isinstance(value, Tensor):
            parts[key] = _shape(value)
        elif isinstance(value, int | float):
            parts[key] = "number"
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            parts[key] = type(value).__qualname__
        else:
            raise TypeError(
                f"state[{key!r}] must be a module, optimiser, scheduler, generator, tensor or number, "
                f"got {type(value).__qualname__}"
            )
    return parts


def save_checkpoint(
    path: Path, state: Mapping[str, Any], progress: object, settings: Mapping[str, object] | None = None
) -> None:
    """Write ``state`` and ``progress`` to ``path``; the file before it becomes ``<name>.previous``.

    In a shared training one process writes; the others go on, since clocks differ and with them what is due.

    Args:
        path: The safetensors file.
        state: Modules, optimisers, schedulers, generators, tensors and numbers by name.
        progress: Nested containers of tensors, numbers and text.
        settings: What must be equal when the checkpoint is loaded.

    Raises:
        TypeError: If something cannot be checkpointed.
        ImportError: If safetensors is not installed.
        OSError: If it cannot be written (disk full, no permission); the message names the file.
        CheckpointError: If another process writes to ``path`` at the same time.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {
        "format": _FORMAT,
        "parts": _identity(state, settings),
        "state": flatten({key: _content(value) for key, value in state.items()}, "state", tensors),
        "progress": flatten(progress, "progress", tensors),
    }
    if leads():
        partial = write_partial(path, tensors, metadata)
        try:
            if path.exists():
                path.replace(previous(path))
            partial.replace(path)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} is written by another process, too: a training needs a checkpoint of its own"
            ) from error
        sync_folder(path.parent)


def load_checkpoint(
    path: Path, state: MutableMapping[str, Any], settings: Mapping[str, object] | None = None
) -> Any:
    """Load a checkpoint into ``state``, in place, and return its ``progress``; ``None`` if there is none.

    If ``path`` is damaged or missing and the one before it is sound, that one is loaded; a damaged file is then
    kept as ``<name>.damaged``. Nothing is changed, in ``state`` or on the disk, when an exception is raised.

    Raises:
        CheckpointError: If ``path`` is damaged and no sound checkpoint precedes it.
        ValueError: If the checkpoint belongs to another state or other settings.
    """
    found, damage = path, None
    try:
        tensors, metadata = load_tensors(path)
    except (FileNotFoundError, CheckpointError) as error:
        found, damage = previous(path), error
        if not found.exists():
            if isinstance(error, FileNotFoundError):
                return None
            raise
        tensors, metadata = load_tensors(found)
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(f"{found} is not a training checkpoint in the format {_FORMAT!r}")
    _check_same(found, metadata["parts"], _identity(state, settings))
    contents = unflatten(metadata["state"], tensors)
    for key, value in state.items():
        state[key] = _restored(value, contents[key])
    if isinstance(damage, CheckpointError):
        # Out of the way, lest the next checkpoint push it over the sound one.
        damaged = path.with_name(f"{path.name}.damaged")
        path.replace(damaged)
        warnings.warn(
            f"{damage}; kept as {damaged.name}, going on from {found.name}", RuntimeWarning, stacklevel=2
        )
    return unflatten(metadata["progress"], tensors)


def previous(path: Path) -> Path:
    """Where the checkpoint before ``path`` is kept."""
    return path.with_name(f"{path.name}.previous")


def _identity(state: Mapping[str, Any], settings: Mapping[str, object] | None) -> dict[str, str]:
    return {**{name: repr(value) for name, value in (settings or {}).items()}, **describe(state)}


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _content(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def _restored(value: Any, content: Any) -> Any:
    if isinstance(value, torch.Generator):
        value.set_state(content)
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(content)
    elif hasattr(value, "load_state_dict"):
        value.load_state_dict(content)
    else:
        return content
    return value


def _check_same(path: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{path} belongs to another training: {name!r} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here; give another path, or move the file away to start anew"
            )
