"""What a benchmark is: two callables, how they must agree, and what is expected of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from book.benchmarks import Goal, Row
from tests.benchmarks.measure import Call, compare


@dataclass(frozen=True)
class Contest:
    """The two sides of a case, ready to be called.

    Attributes:
        ours: A call of this library.
        theirs: What it is compared with.
        check: Raises where the two do not compute the same; None where they are not meant to.
        images: Images that a call works through.
    """

    ours: Call
    theirs: Call
    check: Callable[[], None] | None = None
    images: int | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table; ``group``, ``name`` and ``size`` are what it says in its first columns."""

    group: str
    name: str
    size: str
    build: Callable[[torch.device], Contest]
    goals: tuple[Goal, ...] = ()
    comparison: Literal["rival", "cost"] = "rival"
    weight: float = 1.0  # of its share of the time
    cuda: bool = True  # whether it says something on a GPU too


def at_least(bound: float, quantity: Literal["time", "memory"] = "time") -> Goal:
    """A ratio that is to be reached."""
    return Goal(quantity=quantity, sense="at least", bound=bound)


def at_most(bound: float, quantity: Literal["time", "memory", "peak MiB"] = "time") -> Goal:
    """A ratio or a peak that is not to be exceeded."""
    return Goal(quantity=quantity, sense="at most", bound=bound)


def settle() -> None:
    """Make a process ready for a case: one thread, and the allocator as any training has it after its first step.

    After a block of this size has been returned, glibc keeps what is freed instead of handing it back to the system and
    paying for fresh pages in the next call.
    """
    torch.set_num_threads(1)
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def run(case: Case, device: torch.device, seconds: float) -> Row:
    """Check that both sides of a case agree, and measure them.

    Raises:
        AssertionError: They do not agree.
    """
    contest = case.build(device)
    if contest.check is not None:
        contest.check()
    cost = case.comparison == "cost"
    result = compare(contest.ours, contest.theirs, device, cost=cost, seconds=seconds * case.weight)
    return Row(
        group=case.group,
        name=case.name,
        size=case.size,
        device=device.type,
        threads=torch.get_num_threads(),
        comparison=case.comparison,
        ours=result.ours,
        theirs=result.theirs,
        ratio=result.ratio,
        rounds=result.rounds,
        images=contest.images,
        goals=case.goals,
    )


def assert_agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-3) -> None:
    """Raise unless each tensor differs from its counterpart by less than that part of its norm."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.shape == other.shape, f"tensor {number}: {tuple(one.shape)} and {tuple(other.shape)}"
        gap = torch.linalg.vector_norm(one.double() - other.double())
        size = torch.linalg.vector_norm(other.double())
        assert gap <= tolerance * size, f"tensor {number}: {gap / size:.1e} apart, tolerance {tolerance:.0e}"
