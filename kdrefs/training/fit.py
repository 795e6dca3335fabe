"""The training loop: epochs, precision, metrics, checkpoints and resumption; the step is the caller's.

Killed at any moment and called again with the same arguments, :func:`fit` ends with the bits of an unbroken run.
How to train fast on a GPU: :mod:`kdrefs.training.graphs`; on several: :mod:`kdrefs.training.parallel`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kdrefs.training.checkpoint import describe, load_checkpoint, save_checkpoint
from kdrefs.training.graphs import RecordedStep
from kdrefs.training.history import History, Progress
from kdrefs.training.modes import (
    autocast,
    compile_calls,
    compiled_calls,
    device_type,
    evaluation_mode,
    flushed_denormals,
)
from kdrefs.training.parallel import (
    agreed,
    average_gradients,
    averaged,
    check_equal,
    leads,
    processes,
    shared,
    whole_statistics,
)
from kdrefs.training.progress import progress_bar
from kdrefs.training.seeds import Members

__all__ = ["EpochBatches", "History", "evaluation_mode", "fit", "update"]

State = MutableMapping[str, Any]
Step = Callable[[Any, Any], Mapping[str, Tensor | float]]
Evaluate = Callable[[Any, int], Mapping[str, float]]


class EpochBatches(Sized, Protocol):
    """What :func:`fit` needs of a training set; :class:`kdrefs.data.batches.Batches` is one."""

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Any]:
        """Yield the batches ``start``, ``start + 1``, … of an epoch; the same ones whenever it is asked."""
        ...


def fit(
    step: Step,
    state: State,
    batches: EpochBatches,
    *,
    epochs: int,
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    monitor: str | None = None,
    mode: Literal["max", "min"] = "max",
    precision: Literal["float32", "bf16"] = "float32",
    compile: bool = False,
    graph: bool = False,
    progress: bool | None = None,
    max_steps: int | None = None,
) -> History:
    """Call ``step(state, batch)`` for every batch of every epoch.

    ``step`` does its own forward pass, backward pass and optimiser step (:func:`update`) and steps its schedulers;
    nothing is moved to a device and no training flag is changed for it. The scalars it returns stay on their device
    and are read once an epoch. The state of torch's global generators (dropout) is checkpointed with ``state``;
    other sources of randomness must be generators in ``state``. Denormal numbers are flushed to zero while training
    on a CPU.

    Args:
        step: Takes ``state`` and a batch, returns named scalars.
        state: Modules, optimisers, schedulers, generators, tensors and numbers by name: everything that changes.
            Restored in place on resumption (numbers by assignment to the mapping). Tensors keep their shape.
        batches: The training set; ``len(batches)`` is the number of steps an epoch.
        epochs: Epochs in all.
        checkpoint: A safetensors file, written after each epoch and every ``checkpoint_every`` seconds; if it
            exists, training goes on from there, and a finished one returns at once.
        checkpoint_every: Seconds between checkpoints within an epoch.
        evaluate: Takes ``state`` and the epoch (from 0), returns named numbers; called without autocast.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        monitor: Name of the evaluated number that decides the best epoch.
        mode: Whether the monitored number should be large (``"max"``) or small (``"min"``).
        precision: ``"bf16"`` runs ``step`` under autocast; backward passes belong outside of it, as
            :func:`update` does.
        compile: Compile the forward pass of the modules in ``state``, for ``step`` only.
        graph: Record ``step`` as a CUDA graph and replay it, see :mod:`kdrefs.training.graphs` for what it may then
            do. Optimisers must be fused.
        progress: ``True`` shows a progress bar, ``False`` does not, ``None`` does on a terminal.
        max_steps: Stop after so many steps, in the middle of an epoch if need be; that epoch's means are over
            the steps it had.

    Returns:
        The training means and evaluations.

    Raises:
        FloatingPointError: If a scalar or a parameter is not finite, naming the step, its scalars and the last
            checkpoint. It is looked for at the end of each epoch and before each checkpoint, so that the checkpoint
            on the disk is sound.
        ValueError: If an argument is out of range, the checkpoint belongs to another training (it is left
            untouched), or ``graph`` is asked for where there is no CUDA device. In a shared training: if it has a
            ``graph`` or ``Members``, which need one process.
        RuntimeError: If the networks of the processes of a shared training drift apart.
        CheckpointError: If the checkpoint cannot be read and none precedes it.
        TypeError: If something in ``state`` cannot be checkpointed.
    """
    settings = {
        "epochs": epochs,
        "steps_per_epoch": len(batches),
        "max_steps": max_steps,
        "evaluate_every": evaluate_every,
        "monitor": monitor,
        "mode": mode,
        "precision": precision,
    }
    _check_arguments(settings, evaluate)
    _check_processes(state, graph)
    total = min(epochs * len(batches), max_steps or epochs * len(batches))
    device = device_type(state)
    parts = describe(state)
    run = _resumed(checkpoint, state, settings)
    history = run.history
    if run.finished:
        return history

    sound = history.steps  # steps that the checkpoint on the disk has

    def save() -> None:
        nonlocal sound
        if checkpoint is None:
            return
        _check_finite(state, run, checkpoint, sound)
        if describe(state) != parts:
            raise ValueError("state must keep its keys, classes and shapes during training")
        save_checkpoint(checkpoint, state, {**asdict(run), "random": _random_states(device)}, settings)
        sound = history.steps

    calls = compile_calls(state) if compile else {}
    if graph:
        step = RecordedStep(step, state)
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(flushed_denormals())
        stack.enter_context(whole_statistics(state))
        bar = stack.enter_context(progress_bar(total, history.steps, progress if leads() else False))
        saved = time.monotonic()
        while not run.finished:
            epoch = run.epoch
            bar.describe(epoch, epochs, _newest(history))
            for batch in _remaining(batches, epoch, run.step, total - history.steps):
                with shared(batch) as part:
                    with compiled_calls(calls), autocast(device, precision):
                        scalars = step(state, part)
                    run.count(averaged(scalars))
                bar.advance()
                if time.monotonic() - saved >= checkpoint_every:
                    save()
                    saved = time.monotonic()
            _check_finite(state, run, checkpoint, sound)
            check_equal(state)
            history.epochs.append(run.means())
            run.next_epoch()
            run.finished = history.steps >= total
            if evaluate is not None and (run.finished or run.epoch % evaluate_every == 0):
                history.evaluations.append(_evaluated(agreed(evaluate(state, epoch)), epoch))
                history.best_epoch = _best_epoch(history, monitor, mode)
            save()
            saved = time.monotonic()
    return history


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one optimiser step down the gradient of ``loss``, in full precision even under autocast.

    In a shared training (:mod:`kdrefs.training.parallel`) the gradient is that of the whole batch.

    Args:
        optimizer: Whose parameters are changed.
        loss: Scalar.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
        average_gradients(optimizer)
        optimizer.step()


def _resumed(path: Path | None, state: State, settings: Mapping[str, object]) -> Progress:
    record = None
    for turn in (True, False):  # the process that leads first: it may set a damaged file aside
        if path is not None and leads() is turn:
            record = load_checkpoint(path, state, settings)
        agreed(None)
    if record is None:
        return Progress()
    random = record.pop("random")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return Progress(**{**record, "history": History(**record["history"])})


def _random_states(device: str) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if device == "cuda" else states


def _remaining(batches: EpochBatches, epoch: int, start: int, limit: int) -> Iterator[Any]:
    """At most ``limit`` of the batches that the epoch has left."""
    count = min(len(batches) - start, limit)
    if count <= 0:
        return
    came = 0
    for batch in batches.epoch(epoch, start):
        yield batch
        came += 1
        if came == count:
            return
    raise ValueError(f"batches.epoch({epoch}, {start}) yielded {came} batches, len(batches) promised {count}")


def _check_finite(state: Mapping[str, Any], run: Progress, checkpoint: Path | None, sound: int) -> None:
    if (step := run.first_unsound()) is not None:
        values = run.at(step)
        names = [name for name, value in values.items() if not math.isfinite(value)]
        verb = "is" if len(names) == 1 else "are"
        raise FloatingPointError(
            f"{' and '.join(names)} {verb} not finite in epoch {run.epoch}, step {step} (both from 0): "
            f"{_listed(values)}; {_last_checkpoint(checkpoint, sound)}"
        )
    for key, value in state.items():
        for name, parameter in value.named_parameters() if isinstance(value, nn.Module) else ():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"{key}.{name} is not finite in epoch {run.epoch} (from 0), after {run.step} steps, the last with "
                    f"{_listed(run.at(run.step - 1))}; {_last_checkpoint(checkpoint, sound)}"
                )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in values.items()) or "no scalars"


def _last_checkpoint(checkpoint: Path | None, sound: int) -> str:
    if checkpoint is None or not sound:
        return "there is no checkpoint before it"
    return f"the last sound checkpoint is {checkpoint}, after {sound} steps in all"


def _check_processes(state: Mapping[str, Any], graph: bool) -> None:
    if processes() == 1:
        return
    members = [key for key, value in state.items() if isinstance(value, Members)]
    if graph or members:
        what = "graph=True" if graph else f"state[{members[0]!r}], of several members,"
        raise ValueError(f"{what} needs a training in one process, this one has {processes()}")


def _evaluated(values: Mapping[str, float], epoch: int) -> dict[str, float]:
    if "epoch" in values:
        raise ValueError("evaluate must not return 'epoch': fit adds it")
    return {"epoch": epoch, **{name: float(value) for name, value in values.items()}}


def _best_epoch(history: History, monitor: str | None, mode: str) -> int | None:
    if monitor is None:
        return None
    if monitor not in history.last:
        names = ", ".join(name for name in history.last if name != "epoch")
        raise ValueError(f"monitor must be one of the evaluated numbers ({names}), got {monitor!r}")
    numbers = [values for values in history.evaluations if not math.isnan(values[monitor])]
    if not numbers:
        return None
    best = (max if mode == "max" else min)(numbers, key=lambda values: values[monitor])
    return int(best["epoch"])


def _newest(history: History) -> dict[str, float]:
    newest = history.epochs[-1:] + history.evaluations[-1:]
    return {name: value for values in newest for name, value in values.items()}


def _check_arguments(settings: Mapping[str, Any], evaluate: Evaluate | None) -> None:
    for name in ("epochs", "steps_per_epoch", "evaluate_every", "max_steps"):
        value = settings[name]
        if value is not None and value < 1:
            shown = "len(batches)" if name == "steps_per_epoch" else name
            raise ValueError(f"{shown} must be at least 1, got {value}")
    if settings["monitor"] is not None and evaluate is None:
        raise ValueError(f"monitor must be None without evaluate, got {settings['monitor']!r}")
    for name, choices in {"mode": ("max", "min"), "precision": ("float32", "bf16")}.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {settings[name]!r}")
