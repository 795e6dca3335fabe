"""What the commands share: output, options as text, and errors as exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup
from typer.exceptions import TyperException

from reproductions.harness.profiles import HarnessError, duration
from reproductions.harness.store import Result

FOLDERS = ("KDREFS_DATA", "KDREFS_RUNS")  # variables that name where data and results lie
MOST_SEEDS = 10_000
_SEEDS = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")


class Commands(TyperGroup):
    """Turns what the user cannot have into one line and exit code 2, Ctrl-C and a training that diverged into 1.

    A bug keeps its traceback.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is printed as an escape
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*arguments, **options | {"standalone_mode": False})
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            _end_output()
            code = 1
        except (TyperException, OSError, RuntimeError) as error:
            text = _mistake(error)
            if text is None:
                raise
            _end_output()
            if text:  # empty where help was printed instead
                notice(f"reproduce: {text}")
            code = 2
        except FloatingPointError as error:
            _end_output()
            notice(f"reproduce: {one_line(str(error) + _notes(error))}")
            code = 1
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            notice("interrupted; the same command goes on from here")
            raise typer.Exit(1) from None


def _mistake(error: Exception) -> str | None:
    """Return what the user is told of an error, or `None` if it is a mistake of the program."""
    if isinstance(error, TyperException):
        return one_line(error.format_message())
    text = str(error)
    if isinstance(error, OSError):
        if error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        for name in FOLDERS:
            if (value := os.environ.get(name)) and str(error.filename).startswith(value):
                text += f"; {name} is {value}"
    elif not isinstance(error, HarnessError) and not _is_library_error(error):
        text = _no_home()
        if not text:
            return None
    return one_line(text + _notes(error))


def _notes(error: Exception) -> str:
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _is_library_error(error: Exception) -> bool:
    from kdrefs.data import DataError  # brings torch, which not every command needs
    from kdrefs.training import CheckpointError

    return isinstance(error, (DataError, CheckpointError))


def _no_home() -> str:
    """Return which environment variable names a home folder that there is not, if one does."""
    for name in FOLDERS:
        value = os.environ.get(name, "")
        try:
            Path(value).expanduser()
        except RuntimeError:
            return f"{name}: got {value!r}, a home folder that does not exist"
    return ""


def _end_output() -> None:
    """Write what standard output still holds; where that fails let it go nowhere, so that it does not fail at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: str) -> str:
    """Return `text` without line breaks, and with escapes for what a terminal would obey instead of show."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def notice(text: str) -> None:
    """Print a line for the person at the terminal, on standard error; of several processes only the first does."""
    if os.environ.get("RANK", "0") != "0":  # set by torchrun
        return
    Console(stderr=True, soft_wrap=True, emoji=False).print(text, markup=False, highlight=False)


def say(text: str) -> None:
    """Print a line of output."""
    print(text)


def show(as_json: bool, data: Any, otherwise: Table | Iterable[tuple[str, str]]) -> None:
    """Print `data` as JSON, or else a table or lines of (name, text)."""
    if as_json:
        unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
        print(json.dumps(data, indent=1, ensure_ascii=not unicode))
        return
    if not isinstance(otherwise, Table):
        lines, otherwise = otherwise, Table(show_header=False, box=None, pad_edge=False)
        for name, text in lines:
            otherwise.add_row(f"[bold]{escape(name)}[/]", escape(text))
    # A pipe has no width: give it room instead of folding every cell.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if terminal else 160, emoji=False).print(otherwise, highlight=False)


def integers(text: str) -> tuple[int, ...]:
    """Return the seeds of `0,1,2` or `0-4`, each once, in order.

    Raises:
        HarnessError: If the text is neither, a range is empty, or there are more than `MOST_SEEDS`.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = _SEEDS.fullmatch(part.strip())
        if found is None:
            raise HarnessError(f"seeds: got {text!r}, expected something like 0,1,2 or 0-4")
        low, high = int(found[1]), int(found[2] or found[1])
        if high < low:
            raise HarnessError(f"seeds: got {part.strip()!r}, expected the smaller number first")
        if high - low >= MOST_SEEDS or len(numbers := numbers | set(range(low, high + 1))) > MOST_SEEDS:
            raise HarnessError(f"seeds: got more than {MOST_SEEDS}, expected fewer")
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
