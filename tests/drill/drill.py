"""The drill: start a program, kill it, look what is on the disk, start it again, and compare the end."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from tests.training.toy import arm

STUCK = 300.0  # seconds after which a program that should have ended is given up
ENOUGH = 5  # losses after which a place is not drilled any further
SLOW = 0.004  # seconds that writing to the disk takes in addition
LOG = "log"  # what the program prints, in its folder

# Every program is forked from a process that has imported all it needs, so that kills strike work and not imports.
processes = get_context("forkserver")
processes.set_forkserver_preload(["tests.drill.preload"])

Moment = (
    float | str
)  # a part of the time that an unbroken run takes, or a place, see :func:`tests.training.toy.arm`


class Violation(Exception):
    """Something half-written, lost or different; the message says what."""


@dataclass(frozen=True)
class Place:
    """A program that writes, in a folder of its own.

    Attributes:
        name: What is drilled.
        setup: Fills a folder with what every run of the program begins with; a program, too.
        work: The program; called again after a kill, it goes on.
        look: What a reader finds, as a number that grows as work is done, 0 for nothing; takes the folder
            and the outcome of an unbroken run, raises an exception for anything half-written.
        outcome: What must be equal in the end.
    """

    name: str
    setup: Callable[[Path], None]
    work: Callable[[Path], None]
    look: Callable[[Path, Any], int]
    outcome: Callable[[Path], Any]


@dataclass
class Tally:
    """What became of the kills of one place.

    Attributes:
        place: Its name.
        kills: Processes that were killed before their end.
        resumed: Kills after which there was something to go on from.
        lost: Kills after which something was half-written, missing or different.
        seconds: How long the drill took.
        unbroken: Seconds of the fastest unbroken run so far.
        reports: For each loss, the folder and what was found there.
    """

    place: str
    kills: int = 0
    resumed: int = 0
    lost: int = 0
    seconds: float = 0.0
    unbroken: float = math.inf
    reports: list[str] = field(default_factory=list)

    @property
    def unharmed(self) -> int:
        """Kills after which everything was whole, and the same in the end."""
        return max(0, self.kills - self.lost)


def drill(place: Place, kills: int, moments: Iterator[Moment], scratch: Path) -> Tally:
    """Kill a place's program ``kills`` times, start it again each time until it ends, and look for what was lost.

    Args:
        place: What to drill.
        kills: How many kills; one that would come after the end of the program does not count.
        moments: When to kill, as many as are asked for.
        scratch: A new folder; what remains in it are the trials in which something was lost.
    """
    tally, began = Tally(place.name), time.monotonic()
    template, whole = scratch / "template", scratch / "unbroken"
    template.mkdir(parents=True)
    _strike(place.setup, template, None)
    shutil.copytree(template, whole)
    tally.unbroken = _strike(place.work, whole, None) or math.inf
    expected = _end(place, whole)
    for number in count():
        if tally.kills >= kills or tally.lost >= ENOUGH:
            break
        folder = scratch / f"trial{number}"
        shutil.copytree(template, folder)
        try:
            _trial(place, folder, kills, moments, expected, tally)
        except Exception as error:
            tally.lost += 1
            problem = str(error) if isinstance(error, Violation) else traceback.format_exc()
            tally.reports.append(f"{folder}: {problem}")
        else:
            shutil.rmtree(folder)
    shutil.rmtree(template)
    shutil.rmtree(whole)
    tally.seconds = time.monotonic() - began
    return tally


def _trial(
    place: Place,
    folder: Path,
    kills: int,
    moments: Iterator[Moment],
    expected: tuple[Any, list[str]],
    tally: Tally,
) -> None:
    """Kill and restart the program until it ends by itself."""
    done = 0
    for attempt in count():
        moment = next(moments) if tally.kills < kills else None
        ended = _strike(place.work, folder, moment * tally.unbroken if isinstance(moment, float) else moment)
        if ended is None:
            tally.kills += 1
        elif attempt == 0:
            tally.unbroken = min(tally.unbroken, ended)
        found = place.look(folder, expected[0])
        if found < done:
            raise Violation(f"of {done} that were done {found} are left")
        if ended is not None:
            break
        tally.resumed += found > 0
        done = found
    if (end := _end(place, folder)) != expected:
        raise Violation(f"the end is not that of the unbroken run:\n{end}\ninstead of\n{expected}")


def _strike(program: Callable[[Path], None], folder: Path, moment: Moment | None) -> float | None:
    """Run a program once and kill it after ``moment`` seconds, or at that place.

    Returns:
        The seconds it worked, or nothing where it was killed before its end.

    Raises:
        Violation: If it failed, or did not end.
    """
    receiver, sender = processes.Pipe(duplex=False)
    chosen = moment if isinstance(moment, str) else None
    process = processes.Process(target=_program, args=(program, folder, chosen, sender))
    process.start()
    sender.close()
    with receiver, contextlib.suppress(EOFError):
        receiver.recv()
    began = time.monotonic()
    process.join(moment if isinstance(moment, float) else STUCK)
    ended, running = time.monotonic() - began, process.is_alive()
    if running:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    code = process.exitcode
    process.close()
    if code == 0:
        return ended
    if code != -signal.SIGKILL or (running and not isinstance(moment, float)):
        printed = (folder / LOG).read_text(errors="replace")[-4000:]
        raise Violation(f"the program {'hung' if running else f'ended with {code}'}:\n{printed}")
    return None


def _program(
    work: Callable[[Path], None], folder: Path, moment: str | None, sender: connection.Connection
) -> None:
    """What the process runs, in a group of its own, so that what it starts dies with it."""
    os.setsid()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.fsync = slowly(os.fsync)
    if moment is not None:
        arm(moment)
    sender.send("begun")
    work(folder)


def slowly(synchronise: Callable[[int], None]) -> Callable[[int], None]:
    """A disk that takes its time, so that more of the kills strike between the writing of a file and its renaming."""

    def fsync(descriptor: int) -> None:
        time.sleep(SLOW)
        synchronise(descriptor)

    return fsync


def _end(place: Place, folder: Path) -> tuple[Any, list[str]]:
    """What must be equal in the end: the content, and which files there are, so that none pile up."""
    return place.outcome(folder), sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
