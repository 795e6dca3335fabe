"""One training in several processes, each with a part of every batch: started by ``torchrun``, one process a GPU.

Within :func:`data_parallel`, :func:`kdrefs.training.fit` gives each process its rows of every batch and the training
is that of one process with the whole batch, up to rounding:

- :func:`kdrefs.training.update` averages the gradients over the processes, weighted by their rows, before the
  optimiser steps; a column that steps by hand calls :func:`average_gradients`;
- batch normalisation takes the mean and variance of the whole batch;
- a loss that compares samples with each other is given :func:`whole_batch` of its inputs;
- the means that ``fit`` keeps are over the whole batch, and one process alone writes files.

Gradients are averaged where they are used, not while they are computed as in ``DistributedDataParallel``, which asks
that networks are called through its wrapper, that their gradients come from ``backward`` and that all processes have
equally many rows. Losses of :mod:`kdrefs.methods` work in a loop of one's own with it: :func:`gather_rows`.

What a process draws at random in a step, it draws as the others do: dropout has the same mask, and noise the same
values, for the rows of each. What a step keeps of a batch other than through gradients must be computed from
:func:`whole_batch`; :func:`kdrefs.training.fit` compares the networks of all processes after each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class _Share:
    """How many rows of a batch each process has; ``rank`` is this one. None where each has all of them."""

    rank: int
    sizes: tuple[int, ...] | None

    @property
    def weight(self) -> float:
        """What this process counts in a mean over the batch."""
        return 1 / dist.get_world_size() if self.sizes is None else self.sizes[self.rank] / sum(self.sizes)


_active = False
_share: _Share | None = None  # of the batch whose step is running


# ---------------------------------------------------------------- what a caller uses


@contextmanager
def data_parallel() -> Iterator[None]:
    """Share the trainings within among the processes of ``torch.distributed``; nothing changes for a single one.

    All processes must do the same, on the same data.
    """
    global _active
    before, _active = _active, dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    try:
        yield
    finally:
        _active = before


def processes() -> int:
    """Processes that share the present training; 1 outside of :func:`data_parallel`."""
    return dist.get_world_size() if _active else 1


def leads() -> bool:
    """Whether this process writes the files of the present training."""
    return not _active or dist.get_rank() == 0


def agreed(value: Any) -> Any:
    """``value`` as the leading process has it; waits until all have come here."""
    if not _active:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def whole_batch(tensor: Tensor) -> Tensor:
    """The rows of all processes for those of this one, with gradients, within a step of a shared training.

    Anywhere else it is ``tensor`` itself. Losses that compare samples with each other need it: PKT, DarkRank, QMI.

    Args:
        tensor: ``(rows of this process, ...)``.

    Returns:
        ``(rows of the whole batch, ...)``, equal in all processes.
    """
    if _share is None or _share.sizes is None:
        return tensor
    return _all_rows(tensor, _share.rank, _share.sizes, _share.weight)


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes of ``torch.distributed``, with gradients, for a training loop of one's own.

    With the mean of the processes' gradients, which ``DistributedDataParallel`` takes, a loss of the gathered rows
    trains as in one process::

        loss = pkt_loss(gather_rows(student(images)), gather_rows(teacher(images)))

    Args:
        tensor: ``(rows of this process, ...)``; the other dimensions are the same in all processes.

    Returns:
        ``(rows of all processes, ...)`` in the order of their ranks; ``tensor`` itself without ``torch.distributed``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = torch.zeros(world, dtype=torch.int64, device=tensor.device)
    sizes[rank] = len(tensor)
    dist.all_reduce(sizes)
    return _all_rows(tensor, rank, sizes.tolist(), 1 / world)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters of ``optimizer`` the gradient of the whole batch, before it steps.

    A parameter has a gradient in all processes or in none. Does nothing outside of a shared step.
    """
    if _share is None:
        return
    by_kind: dict[Any, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter.grad)
    for gradients in by_kind.values():
        _average(gradients, _share.weight)


# ---------------------------------------------------------------- what the training loop uses


@contextmanager
def shared(batch: Any) -> Iterator[Any]:
    """Give this process its rows of ``batch`` for one step; all of them where there are fewer rows than processes.

    Raises:
        ValueError: The tensors of the batch differ in their number of rows.
    """
    global _share
    if not _active:
        yield batch
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = _rows(batch)
    few = rows < world
    sizes = tuple(rows // world + (number < rows % world) for number in range(world))
    _share = _Share(rank, None if few else sizes)
    start = sum(sizes[:rank])
    try:
        yield batch if few else _each_tensor(batch, lambda tensor: tensor[start : start + sizes[rank]])
    finally:
        _share = None


@contextmanager
def whole_statistics(state: Mapping[str, Any]) -> Iterator[None]:
    """Let the batch normalisation of the modules in ``state`` see the whole batch in a shared training."""
    layers: list[nn.Module] = []
    if _active:
        modules = [value for value in state.values() if isinstance(value, nn.Module)]
        layers = [part for module in modules for part in module.modules() if isinstance(part, _BatchNorm)]
    with ExitStack() as stack:
        for layer in layers:
            if "forward" not in vars(layer):  # a network that is in the state twice
                vars(layer)["forward"] = partial(_batch_norm, layer)
                stack.callback(vars(layer).pop, "forward")
        yield


def averaged(scalars: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scalars of a shared step as means over the whole batch."""
    if _share is None or not scalars:
        return scalars
    values = [torch.as_tensor(value).detach() for value in scalars.values()]
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    # In one message: small ones take as long.
    vector = _share.weight * torch.stack([value.to(device, torch.float64).reshape(()) for value in values])
    dist.all_reduce(vector)
    return dict(zip(scalars, vector.unbind(), strict=True))


def check_equal(state: Mapping[str, Any]) -> None:
    """Compare the networks of all processes.

    Raises:
        RuntimeError: They differ; the message names the first tensor that does.
    """
    if not _active:
        return
    tensors = {
        f"{key}.{name}": tensor
        for key, value in state.items()
        if isinstance(value, nn.Module)
        for name, tensor in value.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    sums = torch.stack([tensor.detach().to(device, torch.float64).sum() for tensor in tensors.values()])
    all_sums = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(all_sums, sums)
    for other in all_sums[1:]:
        different = [
            name for name, equal in zip(tensors, (other == all_sums[0]).tolist(), strict=True) if not equal
        ]
        if different:
            raise RuntimeError(
                f"{different[0]} differs between the processes of this training: what a step keeps of a batch must be "
                "computed from whole_batch(...), and what it draws must be the same in all of them"
            )


# ---------------------------------------------------------------- the sums


class _Sum(torch.autograd.Function):
    """Sum over the processes, whose losses count ``weight`` each: the gradient is that of their weighted mean."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Divided again, because the gradients of the parameters will be multiplied by the weight.
        return _Sum.apply(gradient * ctx.weight, ctx.weight) / ctx.weight, None


def _all_rows(tensor: Tensor, rank: int, sizes: Any, weight: float) -> Tensor:
    if len(tensor) != sizes[rank]:
        raise ValueError(f"tensor: got {len(tensor)} rows, expected the {sizes[rank]} of this process")
    before, after = sum(sizes[:rank]), sum(sizes[rank + 1 :])
    padded = torch.cat(
        [tensor.new_zeros(before, *tensor.shape[1:]), tensor, tensor.new_zeros(after, *tensor.shape[1:])]
    )
    if not tensor.is_floating_point():
        wide = padded.to(torch.int64)
        dist.all_reduce(wide)
        return wide.to(tensor.dtype)
    return _Sum.apply(padded, weight)


def _average(gradients: list[Tensor], weight: float) -> None:
    """Replace gradients of one device and type by their weighted means over the processes, in one message."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).mul_(weight)
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def _batch_norm(layer: Any, inputs: Tensor) -> Tensor:
    """Batch normalisation by the mean and variance of the rows of all processes (Ioffe & Szegedy 2015)."""
    if not layer.training or _share is None or _share.sizes is None:
        return type(layer).forward(layer, inputs)
    layer._check_input_dim(inputs)
    dims = [0, *range(2, inputs.ndim)]
    shape = [1, -1, *[1] * (inputs.ndim - 2)]
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    local = values.new_full((1,), values.numel() / values.shape[1])
    sums = _Sum.apply(torch.cat([values.sum(dims), local]), _share.weight)
    count = sums[-1].detach()
    mean = sums[:-1] / count
    # Not from the squares of the values, whose sum cancels where the mean is large.
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims), _share.weight) / count
    if layer.track_running_stats:
        layer.num_batches_tracked.add_(1)
        factor = layer.momentum if layer.momentum is not None else 1 / layer.num_batches_tracked
        with torch.no_grad():
            unbiased = variance * count / (count - 1)
            for kept, now in ((layer.running_mean, mean), (layer.running_var, unbiased)):
                kept.add_(factor * (now.to(kept.dtype) - kept))
    outputs = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        outputs = outputs * layer.weight.view(shape) + layer.bias.view(shape)
    return outputs.to(inputs.dtype)


# ---------------------------------------------------------------- nests of tensors


def _each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _each_tensor(getattr(value, f.name), function) for f in fields(value)}
        )
    if isinstance(value, Mapping):
        return {name: _each_tensor(item, function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_each_tensor(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _rows(batch: Any) -> int:
    found: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(len(tensor))
        return tensor

    _each_tensor(batch, look)
    if len(set(found)) != 1:
        raise ValueError(
            f"batch: its tensors have {sorted(set(found))} rows, expected one number to share among processes"
        )
    return found[0]
