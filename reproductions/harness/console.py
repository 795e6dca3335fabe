"""What the commands share: output, options as text, and errors as exit codes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from reproductions.harness.profiles import HarnessError, duration
from reproductions.harness.store import Result


class Commands(TyperGroup):
    """Turns what the user cannot have into a message and exit code 2, Ctrl-C into 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            notice("interrupted; the same command goes on from here")
            raise SystemExit(1) from None
        except RuntimeError as error:
            if not isinstance(error, HarnessError) and not _is_data_error(error):
                raise
            notice(f"reproduce: {error}")
            raise SystemExit(2) from None


def _is_data_error(error: RuntimeError) -> bool:
    from kdrefs.data.cache import DataError  # brings torch, which not every command needs

    return isinstance(error, DataError)


def notice(text: str) -> None:
    """Print a line for the person at the terminal, on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def say(text: str) -> None:
    """Print a line of output."""
    print(text)


def show(as_json: bool, data: Any, otherwise: Table | Iterable[tuple[str, str]]) -> None:
    """Print `data` as JSON, or else a table or lines of (name, text)."""
    if as_json:
        print(json.dumps(data, indent=1, ensure_ascii=False))
        return
    if not isinstance(otherwise, Table):
        lines, otherwise = otherwise, Table(show_header=False, box=None, pad_edge=False)
        for name, text in lines:
            otherwise.add_row(f"[bold]{escape(name)}[/]", escape(text))
    # A pipe has no width: give it room instead of folding every cell.
    Console(width=None if sys.stdout.isatty() else 160).print(otherwise, highlight=False)


def integers(text: str) -> tuple[int, ...]:
    """Return the numbers of `0,1,2` or `0-4`, each once, in order.

    Raises:
        HarnessError: If the text is neither.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()):
            raise HarnessError(f"seeds: got {text!r}, expected something like 0,1,2 or 0-4")
        numbers.update(range(int(low), int(high or low) + 1))
    return tuple(sorted(numbers))


def device_of(name: str | None, here: bool = True) -> str | None:
    """Return the kind of device, after looking whether it is there unless it need not be `here`.

    Raises:
        HarnessError: If it is neither `cpu` nor a `cuda` that this machine has.
    """
    if name in (None, "cpu"):
        return name
    if name != "cuda":
        raise HarnessError(f"device: got {name!r}, expected cpu or cuda")
    if not here:
        return name
    import torch

    if not torch.cuda.is_available():
        raise HarnessError("device: torch finds no CUDA device on this machine")
    return name


def progress(total: int) -> Callable[[Result], None]:
    """Return a function that prints a line for each finished run, with the time that is left."""
    start, finished = time.monotonic(), 0

    def report(result: Result) -> None:
        nonlocal finished
        finished += 1
        name, value = next(iter(result.metrics.items()), ("", 0.0))
        left = (time.monotonic() - start) / finished * max(0, total - finished)
        notice(f"[{finished}/{total}] {result.run.key} · {name} {value:.4g} · {duration(left)} left")

    return report
