"""Many runs of one architecture in one training, for networks so small that the overhead of a step dominates.

The members share nothing but the step: each has its own weights, running statistics and batches. A training of M
members differs from a training of one in four places:

- ``Members([build(seed) for seed in seeds])`` is the network, ``MemberBatches([...])`` the training set;
- ``each(loss)`` gives one loss a member, and :func:`~kdrefs.training.update` is given their sum, whose gradient is
  each member's own;
- the optimiser must treat every element alone (SGD, Adam, AdamW): no clipping by a norm over all parameters, no
  LARS or LAMB, whose norms would be those of all members together;
- what is not finite in one member ends the training of all.

A member is the run made alone up to rounding. In float64 that stays invisible; in float32 rounding grows with every
step, so that the record of a run must say which runs shared its training. ``precision="bf16"`` is of little use
here: under ``torch.vmap`` convolutions on the CPU stay in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdrefs.data.batches import Batch, Batches


class Members(nn.Module):
    """M networks of one architecture as one module, whose parameters and buffers have a leading dimension M.

    They are parameters and buffers like any others, named ``network.<name in one member>``, so that optimisers,
    checkpoints and training flags work as usual. In training mode batch normalisation updates the running
    statistics of each member, and dropout draws another mask for each.

    Args:
        modules: The members. Their weights are copied; what is no tensor (sizes, rates) is taken from the first.

    Raises:
        ValueError: If there is none, or they differ in more than the values of their parameters and buffers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        _check_alike(modules)
        parts = [_tensors(module) for module in modules]
        stacked = {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}
        self._count = len(modules)
        self.network = _copy_with(modules[0], stacked)
        self.training = self.network.training

    def __len__(self) -> int:
        return self._count

    def forward(self, *inputs: Tensor, shared: bool = False) -> Any:
        """Run every member.

        Args:
            inputs: ``(M, B, ...)``, one batch a member; or ``(B, ...)`` with ``shared``.
            shared: Whether all members get the same batch.

        Returns:
            What a member returns, a tensor, :class:`~kdrefs.nets.Output` or other nest of tensors; every tensor
            has a leading dimension M.

        Raises:
            ValueError: If an input has not one batch a member.
        """
        for number, value in enumerate(inputs):
            if not shared and (value.ndim == 0 or len(value) != len(self)):
                shape = tuple(value.shape)
                raise ValueError(f"inputs[{number}]: expected ({len(self)}, B, ...), got {shape}")
        dims = (0, *[None if shared else 0 for _ in inputs])
        output, replaced = torch.vmap(self._member, dims, randomness="different")(
            _tensors(self.network), *inputs
        )
        for name, value in replaced.items():
            self.network.get_buffer(name).data = value.detach()
        return output

    def unstacked(self) -> list[nn.Module]:
        """The members as ordinary modules: copies with their weights, buffers and training flags."""
        parts = _tensors(self.network)
        return [
            _copy_with(self.network, {name: part.detach()[k].clone() for name, part in parts.items()})
            for k in range(len(self))
        ]

    def _member(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """One member's output, and the buffers that it assigned anew; changes in place reach the stack itself."""
        after = dict(tensors)
        output = functional_call(self.network, after, inputs)
        return output, {name: value for name, value in after.items() if value is not tensors[name]}


class MemberBatches:
    """The batches of M members in lockstep, for :func:`~kdrefs.training.fit`: every tensor is ``(M, B, ...)``.

    Where all members see the same batches, give plain :class:`~kdrefs.data.batches.Batches` and
    ``Members(...)(images, shared=True)`` instead.

    Args:
        members: One training set a member.

    Raises:
        ValueError: If there is none, or their batches differ in number or size.
    """

    def __init__(self, members: Sequence[Batches]) -> None:
        if not members:
            raise ValueError("members: expected at least one, got none")
        sizes = [(len(member), member.batch_size, _last_size(member)) for member in members]
        for number, size in enumerate(sizes):
            if size != sizes[0]:
                raise ValueError(
                    f"members[{number}]: expected (batches, batch size, size of the last batch) {sizes[0]} "
                    f"as in members[0], got {size}"
                )
        self.members = tuple(members)

    @property
    def seed(self) -> int:
        """Seed of the first member."""
        return self.members[0].seed

    def with_seed(self, seed: int) -> MemberBatches:
        """The same sets in other orders: ``seed`` for the first member, the others as far from it as they were."""
        return MemberBatches([member.with_seed(seed + member.seed - self.seed) for member in self.members])

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.members[0])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, … of an epoch; their ``len`` is M."""
        for batches in zip(*(member.epoch(epoch, start) for member in self.members), strict=True):
            names = [field.name for field in fields(Batch)]
            yield Batch(**{name: _stacked(name, [getattr(one, name) for one in batches]) for name in names})


def each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make of a loss of one member the losses ``(M,)`` of all; :func:`~kdrefs.training.fit.update` takes their sum.

    Positional arguments, tensors or nests of tensors such as :class:`~kdrefs.nets.Output`, have a leading dimension
    M: outputs of :class:`Members`, labels of :class:`MemberBatches`, a tensor of loss weights. Keyword arguments are
    the same for all members: a temperature, labels or a teacher's output on a shared batch.

    Args:
        loss: Takes what belongs to one member, returns a scalar; any of :mod:`kdrefs.methods`.
    """
    return torch.vmap(loss, randomness="different")


def as_one(modules: Sequence[nn.Module]) -> nn.Module:
    """The networks of one training as its one network: :class:`Members` of several, a single one as it is.

    :func:`batches_as_one` and :func:`per_member` do the same for training sets and losses, so that code for one network
    and for several is the same; :func:`as_several` and :func:`write_back` lead back.

    Raises:
        ValueError: There is none, or they differ in more than the values of their parameters and buffers.
    """
    return modules[0] if len(modules) == 1 else Members(modules)


def batches_as_one(members: Sequence[Batches]) -> Batches | MemberBatches:
    """The training sets of one training as its one: :class:`MemberBatches` of several, a single one as it is.

    Raises:
        ValueError: There is none, or their batches differ in number or size.
    """
    return members[0] if len(members) == 1 else MemberBatches(members)


def per_member(function: Callable[..., Any], network: nn.Module) -> Callable[..., Any]:
    """``function`` of what one network returns, for what ``network`` returns: :func:`each` of it for members."""
    return each(function) if isinstance(network, Members) else function


def as_several(network: nn.Module) -> list[nn.Module]:
    """The networks that :func:`as_one` made ``network`` of; those of :class:`Members` are copies."""
    return network.unstacked() if isinstance(network, Members) else [network]


def write_back(network: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Give ``modules`` the state that ``network``, which :func:`as_one` made of them, has since come to.

    Raises:
        ValueError: They are not as many as the members.
    """
    if isinstance(network, Members):
        for module, member in zip(modules, network.unstacked(), strict=True):
            module.load_state_dict(member.state_dict())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copy_with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` that has other parameters and buffers; what was tied stays tied."""
    memo: dict[int, Any] = {id(old): tensors[name] for name, old in module.named_buffers()}
    for name, old in module.named_parameters():
        memo[id(old)] = nn.Parameter(tensors[name], old.requires_grad)
    return copy.deepcopy(module, memo)


def _check_alike(modules: Sequence[nn.Module]) -> None:
    if not modules:
        raise ValueError("modules: expected at least one, got none")
    first = _described(modules[0])
    for number, module in enumerate(modules):
        other = _described(module)
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                there, here = first.get(name, "absent"), other.get(name, "absent")
                raise ValueError(f"modules[{number}]: {name!r} is {here}, but {there} in modules[0]")


def _described(module: nn.Module) -> dict[str, str]:
    """Everything that members must have in common."""
    parts = {
        name or "itself": f"{type(part).__qualname__}({part.extra_repr()}), training={part.training}"
        for name, part in module.named_modules()
    }
    for name, tensor in _tensors(module).items():
        kind = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        parts[name] = f"{kind}, requires_grad={tensor.requires_grad}"
    return parts


def _last_size(batches: Batches) -> int:
    return min(batches.batch_size, batches.num_samples - (len(batches) - 1) * batches.batch_size)


def _stacked(name: str, values: Sequence[Any]) -> Any:
    """One value a member as one value; ``None``, tuples and dictionaries member by member."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise ValueError(f"members: {name} is in the batches of some and not of others")
    if isinstance(first, Tensor):
        return torch.stack(list(values))
    if isinstance(first, tuple):
        return tuple(_stacked(name, parts) for parts in zip(*values, strict=True))
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _stacked(key, [value.get(key) for value in values]) for key in keys}
    return None
