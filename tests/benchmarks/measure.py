"""Two callables against each other on a machine that other work shares: interleaved calls, ratios within a round."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from book.benchmarks import Ratio, Side

Call = Callable[[], Any]
Sample = Callable[[Call, int], float]  # (function, number of calls) -> seconds a call

SAMPLE = 0.02  # seconds for which a call is repeated, as long as it takes with the profiler looking on
LEAST, MOST = 4, 500  # rounds
LONGEST = 30.0  # seconds for one call of each beyond which there is a single round


@dataclass(frozen=True)
class Result:
    """What was measured of a pair of callables."""

    ours: Side
    theirs: Side
    ratio: Ratio
    rounds: int


def compare(ours: Call, theirs: Call, device: torch.device, *, cost: bool, seconds: float) -> Result:
    """Measure time and memory of two callables.

    Args:
        ours: What is looked at.
        theirs: What it is compared with.
        device: Where they compute.
        cost: Whether the ratio is ours / theirs instead of theirs / ours.
        seconds: For the rounds; the memory of each call is measured before them.
    """
    peaks, first = zip(*(peak_memory(function, device) for function in (ours, theirs)), strict=True)
    pairs = [(first[0], first[1])]
    if sum(first) <= LONGEST:
        with _no_garbage_collection():
            calls = [math.ceil(SAMPLE / one) for one in first]
            pairs = rounds((ours, theirs), calls, seconds=seconds, sample=sample_on(device))
    times = np.array(pairs)
    ratios = times[:, 0] / times[:, 1] if cost else times[:, 1] / times[:, 0]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    middle = np.median(times, axis=0).tolist()
    sides = [Side(seconds=s, peak_mib=p) for s, p in zip(middle, peaks, strict=True)]
    return Result(*sides, Ratio(low=low, median=median, high=high), len(pairs))


def rounds(
    sides: tuple[Call, Call],
    calls: Sequence[int],
    *,
    seconds: float,
    sample: Sample,
    now: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Times of ours, theirs, theirs, ours, ours, theirs … until ``seconds`` have passed.

    Whatever slows the machine down for longer than a round slows down both, and their ratio in that round keeps its
    meaning; what grows worse in a straight line favours each side every other time.

    Args:
        sides: Ours and theirs.
        calls: Of each in a round.
        seconds: After which no other round begins.
        sample: How time is taken.
        now: The clock that ``seconds`` are read from.

    Returns:
        Seconds a call of both, round by round.
    """
    pairs: list[tuple[float, float]] = []
    end = now() + seconds
    while len(pairs) < LEAST or (len(pairs) < MOST and now() < end):
        order = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        times = {side: sample(sides[side], calls[side]) for side in order}
        pairs.append((times[0], times[1]))
    return pairs


def sample_on(device: torch.device) -> Sample:
    """How time is taken on a device."""
    return _sample_cuda if device.type == "cuda" else _sample_cpu


def _sample_cpu(function: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _sample_cuda(function: Call, calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000 / calls


def peak_memory(function: Call, device: torch.device) -> tuple[float, float]:
    """Largest tensor memory (MiB) during a call beyond what was there before, result included; and its seconds.

    Every allocation of torch's allocator is counted, so that the figure repeats to the byte. What libraries allocate
    without torch (scratch space of matrix products, NumPy, Pillow) is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = _sample_cuda(function, 1)
        return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds = _sample_cpu(function, 1)
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, *np.cumsum([0, *changes]).tolist()) / 2**20, seconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
