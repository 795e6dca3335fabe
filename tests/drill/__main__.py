"""Kill the project's programs at random moments and count what is lost.

    python -m tests.drill [--kills 100] [--seed 7] [--only training,book]

Each kill is a SIGKILL to a process and all it started, at a moment drawn uniformly from the time that an unbroken run
takes. After each a reader looks at what is on the disk: nothing may be half-written, nothing gone that was done. The
program is started again until it ends; the end must have the bits, and the files, of the unbroken run.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.drill.drill import Moment, drill
from tests.drill.places import PLACES

# How many of 100 kills strike each place; a build of the book takes the longest.
SHARES = {"training": 25, "checkpoint": 25, "ledger": 20, "download": 22, "book": 8}


def shares(kills: int, names: list[str]) -> dict[str, int]:
    """Distribute kills over places in proportion to :data:`SHARES`, at least one each."""
    ends = np.cumsum([SHARES[name] for name in names])
    borders = [0, *np.rint(kills * ends / ends[-1]).astype(int).tolist()]
    return {name: borders[k + 1] - borders[k] for k, name in enumerate(names)}


def uniform(generator: np.random.Generator) -> Iterator[Moment]:
    """Moments of an unbroken run, each as likely as any other."""
    while True:
        yield float(generator.random())


def main(arguments: list[str] | None = None) -> int:
    """Run the drill; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=100, help="how many, over all places (default: 100)")
    parser.add_argument("--seed", type=int, help="of the moments (default: another one each time)")
    parser.add_argument("--only", default=",".join(SHARES), help="places, separated by commas")
    options = parser.parse_args(arguments)
    names = [name for name in SHARES if name in options.only.split(",")]
    if unknown := set(options.only.split(",")) - set(SHARES):
        parser.error(f"--only: no place {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    if options.kills < len(names):
        parser.error(f"--kills: got {options.kills}, expected at least one for each of {len(names)} places")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    scratch = Path(tempfile.mkdtemp(prefix="kdrefs-drill-"))
    print(f"seed {seed}, in {scratch}", flush=True)
    print(f"{'place':<12}{'kills':>6}{'resumed':>9}{'unharmed':>10}{'lost':>6}{'seconds':>9}", flush=True)
    kills = lost = 0
    for place in PLACES:
        if place.name not in names:
            continue
        generator = np.random.default_rng([seed, list(SHARES).index(place.name)])
        count = shares(options.kills, names)[place.name]
        tally = drill(place, count, uniform(generator), scratch / place.name)
        kills, lost = kills + tally.kills, lost + tally.lost
        print(
            f"{tally.place:<12}{tally.kills:>6}{tally.resumed:>9}{tally.unharmed:>10}{tally.lost:>6}"
            f"{tally.seconds:>9.1f}",
            flush=True,
        )
        for report in tally.reports:
            print(report, file=sys.stderr, flush=True)
    print(f"drill: {kills} kills, {lost} lost")
    if lost:
        return 1
    for folder in scratch.iterdir():
        folder.rmdir()
    scratch.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
