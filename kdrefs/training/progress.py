"""A progress bar with remaining time for :func:`kdrefs.training.fit`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Bar:
    """Progress of one training; silent without a display.

    Args:
        display: A started ``rich.progress.Progress``, or ``None``.
        total: Steps in all.
        done: Steps already taken.
    """

    def __init__(self, display: Any, total: int, done: int) -> None:
        self._display = display
        self._task = None if display is None else display.add_task("", total=total, completed=done)

    def advance(self) -> None:
        """Count one step."""
        if self._display is not None:
            self._display.advance(self._task)

    def describe(self, epoch: int, epochs: int, values: Mapping[str, float]) -> None:
        """Show the running epoch (counted from 0) and the newest values."""
        if self._display is not None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "epoch")
            self._display.update(self._task, description=f"epoch {min(epoch + 1, epochs)}/{epochs}  {shown}")


@contextmanager
def progress_bar(total: int, done: int, show: bool | None) -> Iterator[Bar]:
    """Show a bar on the standard error stream.

    Args:
        total: Steps in all.
        done: Steps already taken by an earlier process.
        show: ``True`` shows it, ``False`` does not, ``None`` shows it on a terminal if rich is installed.

    Raises:
        ImportError: If ``show`` is ``True`` and rich is not installed.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield Bar(None, total, done)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        if show:
            raise ImportError("the progress bar needs rich: pip install rich") from error
        yield Bar(None, total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display, total, done)
