"""Make the committed teacher weights again: ``python -m reproductions.protocols.teachers [PAIR ...]``.

Trains the teacher of each named pair (default: every pair with committed weights) with seed 0 and writes it to
``reproductions/protocols/weights``. The ResNet-20 for CIFAR-10 takes about half an hour on two CPU cores and
resumes when interrupted.
"""

from __future__ import annotations

import argparse
import sys

import torch

from kdrefs.metrics import accuracy
from reproductions.harness.runs import Context
from reproductions.protocols.pairs import (
    PAIRS,
    WEIGHTS,
    load_pair_data,
    make_batches,
    representations,
    save_weights,
    supervised,
)


def main(arguments: list[str] | None = None) -> int:
    """Train and write the named teachers; prints each one's test accuracy."""
    committed = [name for name, pair in PAIRS.items() if pair.teacher_weights]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", choices=committed, default=committed[0])
    names = parser.parse_args(arguments).pairs
    names = [names] if isinstance(names, str) else names
    context = Context()
    for name in names:
        pair = PAIRS[name]
        module = supervised(context, pair, "teacher", seed=0)
        _, test, _ = load_pair_data(pair)
        logits = representations(module, make_batches(pair, test, device=context.device, training=False))[
            "logits"
        ]
        WEIGHTS.mkdir(exist_ok=True)
        save_weights(module, WEIGHTS / str(pair.teacher_weights))
        labels = torch.from_numpy(test.labels).long().to(logits.device)
        print(f"{pair.teacher_weights}: test accuracy {100 * accuracy(logits, labels):.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
