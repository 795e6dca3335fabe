"""Named tensors and JSON in one safetensors file: written atomically, checked against a digest when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdrefs.training.parallel import agreed, leads


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message names the file."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: object = None) -> None:
    """Write named tensors and JSON metadata to ``path``, atomically and durably.

    In a shared training (:mod:`kdrefs.training.parallel`) one process writes, the others wait for it.

    Args:
        path: The safetensors file. It is either replaced as a whole or left as it was.
        tensors: Any dtype and device; written from the CPU in their logical order.
        metadata: Anything that JSON can hold. Equal content gives an equal file.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If it cannot be written (disk full, no permission); the message names the file.
    """
    if leads():
        write_partial(path, tensors, metadata).replace(path)
        sync_folder(path.parent)
    agreed(None)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file that :func:`save_tensors` wrote, and check it against its digest.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged.
        ValueError: If the file is a sound safetensors file of another origin.
        ImportError: If safetensors is not installed.
    """
    safetensors = _safetensors()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # Cloned, because the tensors of an open file are views of the file itself.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    if "kdrefs" not in header:
        raise ValueError(f"{path} is a safetensors file, but not one that kdrefs wrote")
    try:
        record = json.loads(header["kdrefs"])
        intact = record["digest"] == _digest(tensors, record["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata cannot be read ({error!r})") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return tensors, record["metadata"]


def write_partial(path: Path, tensors: Mapping[str, Tensor], metadata: object) -> Path:
    """Write the file of :func:`save_tensors` beside ``path``, down to the disk, and return where it is."""
    # A fixed name: what a killed writer left is overwritten by the next one and does not pile up.
    partial = path.with_name(f".{path.name}.partial")
    arrays = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
    record = {"digest": _digest(arrays, metadata), "metadata": metadata}
    content = _safetensors().torch.save(arrays, {"kdrefs": json.dumps(record, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)  # on a full disk it would be in the way of what comes next
        if error.errno:
            error.filename = error.filename or str(path)
        raise
    return partial


def _on_cpu(tensor: Tensor) -> Tensor:
    # Copied, so that tensors that share memory (tied weights) become independent, as the format demands.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def _digest(tensors: Mapping[str, Tensor], metadata: object) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` down to the disk, so that a rename outlives a power failure."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from error
    return safetensors
