"""How the authors' code selects, blends and is compared: checks of :mod:`reproductions.kcd.errata`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from kdrefs.divergences import softened_kl
from kdrefs.methods.kcd import (
    KnowledgeValue,
    augment,
    condensed_size,
    partition,
    prediction_entropy,
    ranks,
)
from reproductions.harness.errata import Evidence, draw
from reproductions.kcd import derivation

# Poster in the authors' repository, CIFAR-100 top-1, in the order of _PAIRS.
_PAIRS = ("W40-2/W16-2", "W40-2/W40-1", "R56/R20", "R32x4/R8x4", "V13/V8", "V13/MN2", "R50/MN2", "R50/V8", "R32x4/SN1",
         "R32x4/SN2", "W40-2/SN1")  # fmt: skip
POSTER = {
    "student": (73.26, 73.26, 69.06, 72.50, 70.36, 64.60, 64.60, 70.36, 70.50, 71.82, 70.50),
    "KD": (74.92, 73.54, 70.66, 73.33, 72.98, 67.37, 67.35, 73.81, 74.07, 74.45, 74.83),
    "KC-KD": (75.70, 73.84, 70.75, 74.05, 73.44, 68.61, 67.94, 74.41, 74.33, 75.19, 75.60),
    "CRD": (75.64, 74.38, 71.63, 75.46, 74.29, 69.94, 69.54, 74.58, 75.12, 76.05, 76.27),
}
SSKD_V13_V8 = {"SSKD": 74.93, "difference": -0.21, "without": 75.12}
# HobbitLong/RepDistiller@b84f547, README.
README_W40_1, README_CRD = (
    71.98,
    (75.48, 74.14, 71.16, 75.51, 73.94, 69.73, 69.11, 74.30, 75.11, 75.65, 76.05),
)


def check_last_stage() -> Evidence:
    """Which sets are trained on."""
    sizes = [condensed_size(stage, 50_000, variant="official") for stage in range(7)]
    trained, last = sizes[:6], sizes[6]
    mean = sum(trained) / 6 / 50_000
    return Evidence(
        holds=last not in trained and mean == 0.875 and min(trained) / 50_000 == 0.75,
        summary=(
            f"Sets of {', '.join(f'{size:,}' for size in trained)} images are trained on, {100 * mean:.1f} % on "
            f"average and {100 * min(trained) / 50_000:.0f} % at least; the one of {last:,} is computed at the "
            "end of epoch 240 and written to a file."
        ),
        values={"mean": mean, "smallest": min(trained), "never used": last},
    )


def check_argsort() -> Evidence:
    """Sorting permutation and ranks; what the frequency does."""
    score = draw(10, seed=6)
    order, rank = score.argsort(descending=True, stable=True), ranks(score)
    bonus = {ratio: ratio**0.03 for ratio in (2, 3, 4, 5)}
    value = KnowledgeValue(2)
    for points in ([0, 1], [0]):
        value.record_entropies(torch.tensor(points), torch.ones(len(points)))
    often, seldom = value.score().tolist()
    return Evidence(
        holds=not torch.equal(order, rank)
        and torch.equal(order.argsort(), rank)
        and often > seldom
        and derivation.constants_cancel() == 0,
        summary=(
            f"Ten random scores: sorting gives {order.tolist()}, ranks are {rank.tolist()}, its inverse. "
            f"Trained on twice instead of once, a point scores {bonus[2]:.3f} times as much at equal entropy, "
            f"and {bonus[5]:.3f} times for five instead of once: a bonus for what has cost more. A constant "
            "under F cancels."
        ),
        values={f"F ratio {ratio}": factor for ratio, factor in bonus.items()},
    )


def falling_entropies(alpha: float, samples: int = 600, epochs: int = 4) -> tuple[int, int, int]:
    """Six stages in which the entropy of what is trained on falls fast.

    Returns:
        How many points were dropped at some time, how many of them were trained on again, and how many points of all K0
        were not in the set that the stage had trained on.
    """
    value, hardness = KnowledgeValue(samples), draw(samples, seed=7).exp()
    now = torch.arange(samples)
    trained = torch.zeros(samples, dtype=torch.int64)
    was_out, came_back = torch.zeros(2, samples, dtype=torch.bool)
    strangers = 0
    noise = torch.Generator().manual_seed(8)
    for stage in range(6):
        for _ in range(epochs):
            trained[now] += 1
            wobble = torch.rand(len(now), generator=noise, dtype=torch.float64)
            value.record_entropies(now, hardness[now] * 0.8 ** trained[now].double() * (0.5 + wobble))
        keep = condensed_size(stage + 1, samples, variant="official")
        parts = partition(value.score(alpha), keep, len(now) - keep)
        inside = torch.zeros(samples, dtype=torch.bool)
        inside[parts.kept] = True
        if stage < 5:
            came_back |= was_out & inside
        was_out |= ~inside
        strangers += int((~torch.isin(parts.dropped, now)).sum())
        now = parts.kept
    return int(was_out.sum()), int(came_back.sum()), strangers


def check_readmission() -> Evidence:
    """Dropped points that come back."""
    plain, aware = falling_entropies(0.0), falling_entropies(0.03)
    return Evidence(
        holds=min(plain[1], aware[1]) > 0 and plain[2] > 0 and aware[1] <= plain[1],
        summary=(
            f"600 points whose entropy falls by a fifth each time they are trained on: of {plain[0]} that were "
            f"dropped {plain[1]} came back ({aware[1]} of {aware[0]} with the frequency in the score), and "
            f"{plain[2]} points of the six K0 had not been in the set that was condensed."
        ),
        values={
            "dropped": plain[0],
            "came back": plain[1],
            "with frequency": aware[1],
            "strangers in K0": plain[2],
        },
    )


def check_blending() -> Evidence:
    """Adding, blending, and blending again."""
    clean = torch.tensor([[10], [200], [100]], dtype=torch.uint8)
    low, other = clean[:2], clean[[2, 2]]
    added = low.float() + 0.3 * torch.tensor([[200.0], [200.0]])
    stored = clean.clone()
    history = []
    for _ in range(3):
        stored[:2] = augment(stored[:2], stored[[2, 2]], variant="official")
        history.append(int(stored[1]))
    fresh = int(augment(low, other, variant="official")[1])
    return Evidence(
        holds=added.max().item() > 255 and history[0] == fresh and history[0] > history[1] > history[2],
        summary=(
            f"A pixel of 200 and three tenths of one of 200: added, {added.max().item():.0f} of 255. The code's "
            f"convex blend of 200 with 100 gives {fresh}; written back and blended again {history[1]}, then "
            f"{history[2]}. The clean pixel is gone, also for a point that is later far above the border."
        ),
        values={"added": added.max().item(), "blended once": fresh, "three times": history[2]},
    )


def check_nan() -> Evidence:
    """One underflow in a record."""
    logits = torch.tensor([[0.0, -200.0], [0.0, 1.0], [2.0, 0.0]])
    p = logits.softmax(1)
    record = (-(p * p.log()).sum(1)).numpy()
    clipped = np.clip(record, a_min=0, a_max=record.max())
    value = KnowledgeValue(3)
    value.record(torch.arange(3), logits)
    return Evidence(
        holds=bool(
            np.isnan(record).sum() == 1 and np.isnan(clipped).all() and value.score().isfinite().all()
        ),
        summary=(
            f"Three predictions, one with a logit 200 below the other: {int(np.isnan(record).sum())} entropy of "
            f"three is NaN, and after clipping at the record's maximum all {int(np.isnan(clipped).sum())} are. "
            f"From logarithms: {', '.join(f'{x:.3f}' for x in value.score().tolist())}."
        ),
        values={"NaN": int(np.isnan(record).sum()), "after clipping": int(np.isnan(clipped).sum())},
    )


def check_floor() -> Evidence:
    """The last 0 elements of a list."""
    samples = 50_000
    sizes = [condensed_size(stage, samples, variant="official") for stage in (6, 7)]
    kept = list(range(sizes[1]))
    count = sizes[0] - sizes[1]
    sliced = kept[-count:] if count else kept[-0:]
    empty = partition(draw(samples, seed=9), sizes[1], 0)
    return Evidence(
        holds=count == 0 and len(sliced) == len(kept) and len(empty.low) == len(empty.dropped) == 0,
        summary=(
            f"At the seventh E-step the set stays at {sizes[1]:,}, so that K0 is empty and the last {count} of "
            f"the list, `list[-0:]`, are all {len(sliced):,} of it: 35,000 points to blend with none."
        ),
        values={"points to blend with": count, "points to blend": len(sliced)},
    )


def check_table() -> Evidence:
    """The poster's numbers beside those of the table they are compared with."""
    differs = [abs(x - y) for x, y in zip(POSTER["CRD"], README_CRD, strict=True)]
    gain = sum(x - y for x, y in zip(POSTER["KC-KD"], POSTER["KD"], strict=True)) / len(_PAIRS)
    difference = round(SSKD_V13_V8["SSKD"] - SSKD_V13_V8["without"], 2)
    students = POSTER["student"]
    return Evidence(
        holds=students[0] == students[1] != README_W40_1
        and sum(d > 0.005 for d in differs) == len(_PAIRS)
        and difference != SSKD_V13_V8["difference"],
        summary=(
            f"The student WRN-40-1 has {students[1]:.2f}, the value of WRN-16-2; the table it is compared with "
            f"has {README_W40_1:.2f}. All {len(_PAIRS)} values of the row CRD differ from that table's, by up "
            f"to {max(differs):.2f}. For VGG-13 to VGG-8 with SSKD the difference is {difference:.2f}, printed "
            f"{SSKD_V13_V8['difference']:.2f}. Mean gain of KC-KD over KD: {gain:.2f} points, one run each."
        ),
        values={"largest difference of CRD": max(differs), "mean gain over KD": gain},
    )


def check_value() -> Evidence:
    """What the value does not see."""
    student = draw(6, 3, seed=10)
    teachers = draw(2, 6, 3, seed=11)
    values = [prediction_entropy(student) for _ in teachers]
    losses = [softened_kl(student, teacher, 4.0).item() for teacher in teachers]
    certain = torch.tensor([[6.0, 0.0, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64)
    entropy = prediction_entropy(certain)
    wrong = F.cross_entropy(certain, torch.tensor([1, 1]), reduction="none")
    return Evidence(
        holds=torch.equal(*values)
        and abs(losses[0] - losses[1]) > 0.01
        and bool(entropy[0] < entropy[1])
        and bool(wrong[0] > wrong[1]),
        summary=(
            f"Two teachers, {losses[0]:.2f} and {losses[1]:.2f} nats away from the student, give every point "
            f"the same value. A point that the student gets confidently wrong (loss {wrong[0]:.2f}) has value "
            f"{entropy[0]:.3f}; one that it cannot decide (loss {wrong[1]:.2f}) has {entropy[1]:.3f}."
        ),
        values={
            "first teacher": losses[0],
            "second teacher": losses[1],
            "confidently wrong": entropy[0].item(),
        },
    )


def check_steps() -> Evidence:
    """How many steps the condensed training has."""
    sizes = [condensed_size(stage, 50_000, variant="official") for stage in range(6)]
    steps, full = sum(40 * math.ceil(size / 64) for size in sizes), 240 * math.ceil(50_000 / 64)
    return Evidence(
        holds=0.87 * full < steps < 0.88 * full,
        summary=(
            f"{steps:,} steps instead of {full:,}, {100 * (1 - steps / full):.1f} % fewer. The same numbers of "
            "images chosen at random, and all images with as many steps, are what shows whether the choice "
            "matters."
        ),
        values={"steps": steps, "on all images": full},
    )
