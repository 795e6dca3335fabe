"""Losses and metrics beside their straightforward forms, and sums over all pairs beside the products in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from book.benchmarks import Goal
from kdrefs.kernels import unit_rows
from kdrefs.methods.at import at_loss
from kdrefs.methods.darkrank import soft_darkrank_loss
from kdrefs.methods.fitnets import hint_loss
from kdrefs.methods.kd import kd_loss
from kdrefs.methods.nst import nst_loss
from kdrefs.methods.pkt import pkt_loss
from kdrefs.methods.quest import quest_loss
from kdrefs.metrics import retrieval_map
from kdrefs.pair_sums import class_pair_sums
from tests.benchmarks import references
from tests.benchmarks.case import Case, Contest, assert_agree, at_least, at_most

Shape = tuple[int, ...]
NOT_SLOWER = at_least(1 / 1.1)
LEANER_THAN_A_GIB = at_most(1023.0, "peak MiB")
CLASSES = 10


def normal(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def loss_contest(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    shapes: tuple[Shape, Shape],
    labelled: bool,
    device: torch.device,
) -> Contest:
    """Value and gradient of a loss of student, teacher and, if ``labelled``, labels."""
    student = normal(shapes[0], device).requires_grad_()
    teacher = normal(shapes[1], device, seed=1)
    labels = [torch.arange(len(student), device=device) % shapes[0][1]] if labelled else []

    def side(loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(student, teacher, *labels)
            return value.detach(), torch.autograd.grad(value, student)[0]

        return call

    one, other = side(ours), side(theirs)
    # The published PKT adds 1e-7 to probabilities near 1 / B, which is 4e-4 of them at B = 4096.
    return Contest(one, other, lambda: assert_agree(one(), other(), tolerance=5e-3))


def loss_cases(
    name: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    sizes: dict[str, tuple[Shape, Shape]],
    goals: dict[str, tuple[Goal, ...]] | None = None,
    *,
    labelled: bool = False,
) -> list[Case]:
    """One case a size; without goals of its own a size must not be slower than the plain form by a tenth."""
    return [
        Case(
            "Losses",
            name,
            size,
            partial(loss_contest, ours, theirs, shapes, labelled),
            (goals or {}).get(size, (NOT_SLOWER,)),
        )
        for size, shapes in sizes.items()
    ]


def maps(batch: int, students: int, teachers: int, side: int) -> tuple[Shape, Shape]:
    """Shapes of the feature maps of student and teacher."""
    return (batch, students, side, side), (batch, teachers, side, side)


def twice(*shape: int) -> tuple[Shape, Shape]:
    """One shape for both."""
    return shape, shape


def retrieval_contest(device: torch.device) -> Contest:
    """Rank 50,000 rows (CIFAR-10's training set) for 250 queries."""
    labels = (torch.arange(50_250) % CLASSES).to(device)
    features = normal((CLASSES, 64), device, seed=2)[labels] + 2 * normal((50_250, 64), device)
    arguments = features[:250], features[250:], labels[:250], labels[250:]
    one, other = partial(retrieval_map, *arguments), partial(references.retrieval_map, *arguments)
    return Contest(one, other, lambda: assert_agree([torch.tensor(one())], [torch.tensor(other())], 1e-5))


def pkt_pairs_contest(rows: int, device: torch.device) -> Contest:
    """PKT with its gradient beside its four products."""
    student, teacher = (normal((rows, 64), device, seed) for seed in (0, 1))
    features = student.clone().requires_grad_()
    units = unit_rows(student), unit_rows(teacher)

    def ours() -> Tensor:
        return torch.autograd.grad(pkt_loss(features, teacher), features)[0]

    return Contest(ours, partial(references.pair_products, *units))


def class_pairs_contest(rows: int, device: torch.device) -> Contest:
    """Gaussian sums by class with a gradient beside their three products."""
    points = normal((rows, 64), device)
    features = points.clone().requires_grad_()
    labels = (torch.arange(rows) % CLASSES).to(device)
    weights = normal((CLASSES, CLASSES), device, seed=1)

    def ours() -> Tensor:
        sums = class_pair_sums(features, labels, CLASSES, bandwidth=64.0)
        return torch.autograd.grad((sums * weights).sum(), features)[0]

    return Contest(ours, partial(references.pair_products, points, None))


def pair_cases(name: str, build: Callable[..., Contest], bound: float) -> list[Case]:
    """Sums over pairs of 4,096 to 50,000 rows; the goal is for the largest."""
    goals = {50_000: (at_most(bound), LEANER_THAN_A_GIB)}
    return [
        Case("Pair sums", name, f"{rows:,} x 64", partial(build, rows), goals.get(rows, ()), "cost")
        for rows in (4096, 16_384, 50_000)
    ]


@cache
def vocabulary(words: int, device: torch.device) -> Tensor:
    """Words among vectors of 128 channels."""
    return normal((words, 128), device, seed=2)


def with_words(loss: Callable[..., Tensor], scores: Tensor, maps: Tensor) -> Tensor:
    """A loss of scores and maps with the vocabulary that the scores are for."""
    return loss(scores, maps, vocabulary(scores.shape[1], maps.device), 0.05)


def _kernel(name: str) -> dict[str, Any]:
    return {"ours": partial(nst_loss, kernel=name), "theirs": partial(references.nst, kernel=name)}


LOSSES = [
    *loss_cases(
        "KD",
        kd_loss,
        references.kd,
        {f"B {b}, {k} classes": twice(b, k) for b, k in ((64, 100), (256, 100), (1024, 1000), (4096, 100))},
        labelled=True,
    ),
    *loss_cases(
        "FitNets' hint",
        partial(hint_loss, variant="mean"),
        references.hint,
        {f"B {b}, C 64, 8 x 8": twice(b, 64, 8, 8) for b in (64, 1024, 4096)},
    ),
    *loss_cases(
        "AT",
        partial(at_loss, variant="official"),
        references.attention,
        {
            "B 64, C 64 and 256, 8 x 8": maps(64, 64, 256, 8),
            "B 256, C 16 and 64, 32 x 32": maps(256, 16, 64, 32),
            "B 4096, C 16 and 64, 8 x 8": maps(4096, 16, 64, 8),
        },
    ),
    *loss_cases(
        "NST, polynomial",
        **_kernel("polynomial"),
        sizes={
            f"B {b}, C {s} and {t}, 8 x 8": maps(b, s, t, 8)
            for b, s, t in ((64, 16, 64), (1024, 16, 64), (64, 16, 256), (64, 64, 256))
        },
        goals={
            "B 64, C 16 and 64, 8 x 8": (at_least(15.0), at_least(8.0, "memory")),
            "B 64, C 16 and 256, 8 x 8": (at_least(100.0),),
        },
    ),
    *loss_cases("NST, linear", **_kernel("linear"), sizes={"B 64, C 16 and 64, 8 x 8": maps(64, 16, 64, 8)}),
    *loss_cases(
        "NST, Gaussian", **_kernel("gaussian"), sizes={"B 64, C 16 and 64, 8 x 8": maps(64, 16, 64, 8)}
    ),
    *loss_cases(
        "QUEST",
        partial(with_words, quest_loss),
        partial(with_words, references.quest),
        {f"B 64, K {k}, C 128, 8 x 8": maps(64, k, 128, 8) for k in (64, 1024, 4096)},
    ),
    *loss_cases(
        "PKT",
        pkt_loss,
        references.pkt,
        {f"B {b}, 512 wide": twice(b, 512) for b in (64, 256, 1024, 4096)},
        {"B 4096, 512 wide": (at_least(1.0), at_least(4.0, "memory"))},
    ),
    *loss_cases(
        "DarkRank, soft, 4 candidates",
        soft_darkrank_loss,
        references.darkrank,
        {f"B {b}, 128 wide": twice(b, 128) for b in (64, 256)},
    ),
    *loss_cases(
        "DarkRank, soft, 7 candidates",
        partial(soft_darkrank_loss, list_length=7),
        partial(references.darkrank, list_length=7),
        {"B 64, 128 wide": twice(64, 128)},
        {"B 64, 128 wide": (at_least(10.0), at_least(3.0, "memory"))},
    ),
]
METRICS = [Case("Metrics", "retrieval, mAP", "250 x 50,000 x 64", retrieval_contest)]
PAIR_SUMS = [
    *pair_cases("PKT with gradient", pkt_pairs_contest, bound=2.0),
    *pair_cases("Gaussian class sums with gradient", class_pairs_contest, bound=3.0),
]
