"""Training fast on CUDA, and a training step that is recorded once and replayed as a CUDA graph.

A small network at batch 64 spends its time waiting for the host to launch kernels, one after the other. What helps,
in the order in which it is worth trying:

1. The data set lies on the device: ``Batches(..., device="cuda")`` makes every batch there, channels last.
2. The network is channels last too, ``net.to("cuda", memory_format=torch.channels_last)``, and trained with
   ``fit(..., precision="bf16")``.
3. The optimiser takes its step in one kernel: ``torch.optim.SGD(..., **fused("cuda"))``, see
   :func:`kdrefs.training.optimizers.fused`.
4. A teacher that is run on every batch loses its batch normalisation, :func:`kdrefs.nets.fold.fold_batchnorm`; one
   whose outputs are known beforehand need not be run at all (``view_extras`` of
   :class:`kdrefs.data.batches.Batches`).
5. ``fit(..., graph=True)``: the whole step, from the forward pass to the update of the weights, is launched at once.
   With ``compile=True`` the recorded kernels are those that the compiler fused.

What a recorded step can do. Everything that happens on the device happens again at each replay; what happens on the
host happened once, when the step was recorded. Hence

- all that changes is a parameter, buffer or tensor in ``state`` and is changed in place; numbers in ``state`` and
  the settings of optimisers stay as they are (no ``cycle_momentum``), and so do training flags;
- no value is read (``.item()``, ``if loss > 0``), and no tensor is moved to the device;
- the scalars that the step returns are tensors;
- learning rates may change: the schedules in ``state`` are stepped after each replay, wherever ``step`` calls them;
- dropout and the generators in ``state`` that lie on the device go on drawing new numbers;
- batches lie on the device and have one shape: the first that has come three times is recorded, others (the last,
  smaller batch of an epoch) run as usual.

Checkpoints are those of a training without a graph, so that either can go on with the other's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdrefs.training.modes import device_type

State = MutableMapping[str, Any]
Result = tuple[Mapping[str, Tensor], Sequence[Callable[[], None]]]  # scalars, what is left to do on the host

# Steps after which all that is made at first use (moments, library handles, compiled code) is there.
WARM_UP = 3


class Recorder:
    """Records what a function does on a CUDA device; the only part that needs one.

    Args:
        generators: Sources of random numbers that the function draws from.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._stream = torch.cuda.Stream()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on the stream of the recording, where the state of libraries and autograd is kept."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Record ``function``, which takes effect only when what is returned is called."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                result = function()
        except RuntimeError as error:
            error.add_note(
                "step could not be recorded; kdrefs.training.graphs says what a recorded step can do"
            )
            raise

        def replay() -> Result:
            graph.replay()
            return result

        return replay


class RecordedStep:
    """Stands for ``step`` in one training, see the head of this module.

    Args:
        step: As for :func:`kdrefs.training.fit`.
        state: What it will be called with, on a CUDA device; restored from a checkpoint before, not after.

    Raises:
        ValueError: If the state is not on a CUDA device, or an optimiser in it is not fused.
    """

    def __init__(self, step: Callable[[Any, Any], Mapping[str, Any]], state: State) -> None:
        self._device = device_type(state)
        _check_device(self._device)
        self._step = step
        self._groups = _groups(state)
        for name, group in self._groups.items():
            if not group.get("fused"):
                raise ValueError(f"graph needs optimisers with fused=True, {name} has {group.get('fused')}")
        # Kernels read the learning rate where it lies when they run; a number would be recorded for good.
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in self._groups.values()]
        self._schedules = [value for value in state.values() if isinstance(value, LRScheduler)]
        self._constants = _constants(state)
        generators = [value for value in state.values() if isinstance(value, torch.Generator)]
        self._recorder = Recorder([one for one in generators if one.device.type == self._device])
        self._seen: Counter[Hashable] = Counter()
        self._shape: Hashable = None
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Result] | None = None

    def __call__(self, state: State, batch: Any) -> dict[str, Tensor]:
        """Take one step; the scalars are new tensors.

        Raises:
            ValueError: If something changed that a recording does not follow.
        """
        self._check_constants(state)
        for rate, group in zip(self._rates, self._groups.values(), strict=True):
            rate.fill_(group["lr"])
        tensors: list[Tensor] = []
        shape = _shape(batch, tensors)
        if self._replay is None and self._seen[shape] == WARM_UP:
            self._shape, self._replay = shape, self._recorded(state, batch, tensors)
        self._seen[shape] += 1
        if self._replay is not None and shape == self._shape:
            with torch.no_grad():  # a step may have asked for gradients of its inputs
                for static, tensor in zip(self._inputs, tensors, strict=True):
                    static.copy_(tensor)
            scalars, after = self._replay()
        else:
            scalars, after = self._recorder.run(partial(self._run, state, batch))
        for call in after:
            call()
        # The recording writes to the same memory again.
        return {name: value.clone() for name, value in scalars.items()}

    def _recorded(self, state: State, batch: Any, tensors: list[Tensor]) -> Callable[[], Result]:
        for tensor in tensors:
            if tensor.device.type != self._device:
                raise ValueError(f"graph needs batches on {self._device}, got a tensor on {tensor.device}")
        self._inputs = [tensor.detach().clone() for tensor in tensors]
        # To copying, tensors with an entry here have been copied already.
        copies: dict[int, Any] = {
            id(tensor): static for tensor, static in zip(tensors, self._inputs, strict=True)
        }
        return self._recorder.record(partial(self._run, state, copy.deepcopy(batch, copies)))

    def _run(self, state: State, batch: Any) -> Result:
        with _deferred(self._schedules) as after, _learning_rates(self._groups.values(), self._rates):
            scalars = self._step(state, batch)
        for name, value in scalars.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"step must return tensors with graph=True, got {value!r} for {name!r}")
        return {name: value.detach() for name, value in scalars.items()}, after

    def _check_constants(self, state: State) -> None:
        now = _constants(state)
        for name in {**self._constants, **now}:
            before, after = self._constants.get(name), now.get(name)
            if before is not after and not (isinstance(before, int | float | tuple) and before == after):
                raise ValueError(
                    f"{name} has changed, which a recorded step does not follow: keep it in a tensor that is "
                    "changed in place, or train without graph"
                )


def _check_device(device: str) -> None:
    if device != "cuda":
        raise ValueError(f"graph needs a state on a CUDA device, got one on {device}")


def _groups(state: State) -> dict[str, dict[str, Any]]:
    """The parameter groups of all optimisers, by where they are found."""
    return {
        f"state[{key!r}].param_groups[{number}]": group
        for key, value in state.items()
        if isinstance(value, Optimizer)
        for number, group in enumerate(value.param_groups)
    }


def _constants(state: State) -> dict[str, Any]:
    """What a recording takes for granted: which object is which, numbers, the settings of optimisers."""
    constants = {f"state[{key!r}]": value for key, value in state.items()}
    for place, group in _groups(state).items():
        settings = {name: value for name, value in group.items() if name not in ("params", "lr")}
        constants |= {f"{place}[{name!r}]": value for name, value in settings.items()}
    return constants


def _shape(value: Any, tensors: list[Tensor]) -> Hashable:
    """What batches must have in common to be served by one recording; appends their tensors, each once."""
    if isinstance(value, Tensor):
        for number, tensor in enumerate(tensors):
            if tensor is value:
                return "same as", number
        tensors.append(value)
        return value.shape, value.dtype
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return tuple((name, _shape(item, tensors)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shape(item, tensors) for item in value)
    return value


@contextmanager
def _deferred(schedules: Iterable[LRScheduler]) -> Iterator[list[Callable[[], None]]]:
    """Collect the steps of schedules instead of taking them."""
    calls: list[Callable[[], None]] = []
    for schedule in schedules:
        # What an instance has comes before what its class has.
        vars(schedule)["step"] = partial(_defer, calls, schedule.step)
    try:
        yield calls
    finally:
        for schedule in schedules:
            del vars(schedule)["step"]


def _defer(calls: list[Callable[[], None]], call: Callable[..., None], *arguments: Any) -> None:
    calls.append(partial(call, *arguments))


@contextmanager
def _learning_rates(groups: Iterable[dict[str, Any]], rates: Iterable[Tensor]) -> Iterator[None]:
    """Let optimisers read their learning rates from tensors."""
    before = [dict(group) for group in groups]
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if recording:  # the fused kernels can be recorded, yet Adam wants to be told
            group["capturable"] = True
    try:
        yield
    finally:
        for group, settings in zip(groups, before, strict=True):
            group.clear()
            group.update(settings)
