r"""What the notes and the implementations of DarkRank got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories at the commits named, as read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.darkrank import hard_darkrank_loss, soft_darkrank_loss
from kdrefs.methods.nst import nst_loss
from reproductions.harness.errata import Erratum, Evidence, draw


def _unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(draw(*shape, seed=seed))


def _check_exponent() -> Evidence:
    scale, power = 3.5, 2.0  # of the authors' README
    query, others = _unit(1, 8, seed=1), _unit(5, 8, seed=2)
    squares = (query - others).square().sum(1)
    theirs = -((scale * squares) ** power)
    distance = squares.sqrt()
    off = float((theirs + scale**power * distance ** (2 * power)).abs().max())
    naive = float((theirs + scale * distance**power).abs().max())
    needed = 3 ** (2 / 3)
    paper = float((-((needed * squares) ** 1.5) + 3 * distance**3).abs().max())
    return Evidence(
        holds=off < 1e-10 and paper < 1e-12 and naive > 1,
        summary=(
            f"Power 2 and scale 3.5 are α = {scale**power:g} and β = {2 * power:g}, to {off:.0e}; read as β = 2 and "
            f"α = 3.5 the scores are off by up to {naive:.0f}. α = β = 3 takes power 1.5 and scale {needed:.3f}."
        ),
        values={"α": scale**power, "β": 2 * power, "scale for α = β = 3": needed},
    )


def _check_saturation() -> Evidence:
    teacher = _unit(8, 6, seed=3)
    student = F.normalize(-teacher + 0.3 * draw(8, 6, seed=4)).requires_grad_()
    alpha = 3.5**2
    value = hard_darkrank_loss(student, teacher, alpha=alpha, beta=4.0, variant="official")
    (gradient,) = torch.autograd.grad(value, student)
    value = value.detach()
    distances = torch.cdist(student.detach(), student.detach())
    order = torch.cdist(teacher, teacher).argsort(1)
    probabilities = []
    for query in range(4):
        ranked = [-alpha * float(distances[query, j]) ** 4 for j in order[query].tolist() if j != query]
        product = 1.0
        for i, score in enumerate(ranked):
            product *= math.exp(score) / sum(math.exp(other) for other in ranked[i:])
        probabilities.append(product)
    printed = sum(-math.log(p + 1e-12) for p in probabilities) / 4
    true = sum(-math.log(p) for p in probabilities) / 4
    through = torch.tensor(probabilities, dtype=torch.float64)
    kept = float((through / (through + 1e-12)).max())
    return Evidence(
        holds=abs(float(value) - printed) < 1e-6
        and printed < 27.632
        and true > printed + 5
        and kept < 0.01
        and float(gradient.norm()) > 0.1,
        summary=(
            f"A student that ranks backwards: the value is {printed:.3f} nat a query, at most "
            f"{-math.log(1e-12):.3f}; the negative log-likelihood is {true:.1f}. Differentiated as printed, a query "
            f"would keep at most {kept:.0e} of its gradient; the hand-written gradient keeps all of it."
        ),
        values={"reported": printed, "negative log-likelihood": true, "share of the gradient": kept},
    )


def _check_detached_query() -> Evidence:
    student, teacher = _unit(8, 6, seed=5).requires_grad_(), _unit(8, 6, seed=6)
    scores = {}
    for name, detached in (("whole", False), ("theirs", True)):
        queries = student[:4].detach() if detached else student[:4]
        squares = (queries.unsqueeze(1) - student).square().sum(2)
        order = torch.cdist(teacher, teacher)[:4].argsort(1)[:, 1:5]
        one = [
            -3 * squares.gather(1, order) ** 1.5,
            -3 * torch.cdist(teacher, teacher)[:4].gather(1, order) ** 3,
        ]
        total = torch.zeros((), dtype=torch.float64)
        for permutation in torch.cartesian_prod(*[torch.arange(4)] * 4):
            if len(set(permutation.tolist())) < 4:
                continue
            s, t = (x[:, permutation] for x in one)
            log_q, log_p = ((x - x.flip(1).logcumsumexp(1).flip(1)).sum(1) for x in (s, t))
            total = total - (log_p.exp() * log_q).mean()
        (scores[name],) = torch.autograd.grad(total, student, retain_graph=True)
    value = soft_darkrank_loss(student, teacher, normalize=False, variant="official")
    (ours,) = torch.autograd.grad(value, student)
    off = float((ours - scores["theirs"]).abs().max())
    gap = float((scores["whole"] - scores["theirs"]).norm() / scores["whole"].norm())
    return Evidence(
        holds=off < 1e-10 and gap > 0.2,
        summary=(
            f"Eight samples: the authors' gradient is that with the query as a constant, to {off:.0e}; it differs from "
            f"the derivative of the value by {100 * gap:.0f} % of its norm."
        ),
        values={"difference from the derivative": gap},
    )


def _check_half_the_queries() -> Evidence:
    student, teacher = _unit(8, 6, seed=7), _unit(8, 6, seed=8)
    swapped = torch.cat([torch.arange(4, 8), torch.arange(4)])

    def value(order: Tensor, variant: str | None) -> float:
        return float(hard_darkrank_loss(student[order], teacher[order], list_length=4, variant=variant))

    plain = torch.arange(8)
    official = value(plain, "official"), value(swapped, "official")
    ours = value(plain, None), value(swapped, None)
    return Evidence(
        holds=abs(official[0] - official[1]) > 0.1 and abs(ours[0] - ours[1]) < 1e-10,
        summary=(
            f"The same eight samples, their halves exchanged: {official[0]:.2f} and {official[1]:.2f} nat with the "
            f"first half as queries, {ours[0]:.2f} both times with all."
        ),
        values={"one half": official[0], "the other": official[1], "all": ours[0]},
    )


def _check_own_neighbour() -> Evidence:
    teacher = _unit(6, 5, seed=9)
    teacher[0] = teacher[4]
    student = _unit(6, 5, seed=10)
    ranked = (
        torch.cdist(teacher, teacher, compute_mode="donot_use_mm_for_euclid_dist")
        .sort(dim=1, stable=True)
        .indices
    )
    taken = ranked[4, 1:5].tolist()
    squares = (student.unsqueeze(1) - student).square().sum(2)
    scores = (-3 * squares**1.5).gather(1, ranked[:, 1:5])
    printed = float((scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean())
    right = float(hard_darkrank_loss(student, teacher, variant="rkd"))
    return Evidence(
        holds=4 in taken and 0 not in taken and abs(printed - right) > 0.01,
        summary=(
            f"Samples 0 and 4 of the teacher coincide: dropping the first of the ranking leaves {taken} as the "
            f"neighbours of sample 4, itself among them and its duplicate not. The loss is {printed:.3f}, {right:.3f} "
            "with the diagonal masked."
        ),
        values={"first dropped": printed, "diagonal masked": right},
    )


def _check_architecture() -> Evidence:
    maps, others = draw(6, 4, 3, 3, seed=11), draw(6, 5, 3, 3, seed=12)
    vectors, guides = maps.mean((2, 3)), others.mean((2, 3))
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    within = float(nst_loss(maps, others)), float(nst_loss(maps, others[:, :, :, [2, 1, 0]]))
    pooled = float(soft_darkrank_loss(vectors, guides))
    moved = float(soft_darkrank_loss(vectors, others[:, :, :, [2, 1, 0]].mean((2, 3))))
    alone = float(nst_loss(maps[:1], others[:1]))
    average = sum(float(nst_loss(maps[i : i + 1], others[i : i + 1])) for i in range(6)) / 6
    across = float(soft_darkrank_loss(vectors, guides[order]))
    return Evidence(
        holds=abs(within[0] - average) < 1e-12
        and abs(within[0] - within[1]) > 1e-3
        and abs(pooled - moved) < 1e-9
        and abs(pooled - across) > 0.01
        and alone > 0,
        summary=(
            f"NST is a mean over samples ({within[0]:.4f} for six together and one by one) of relations between "
            f"positions: turning the teacher's maps round makes it {within[1]:.4f}. DarkRank does not see that "
            f"({pooled:.3f} both times) and is not defined for one sample."
        ),
        values={"NST": within[0], "NST, maps turned": within[1], "DarkRank": pooled},
    )


def _check_log_space() -> Evidence:
    teacher = _unit(12, 8, seed=13).float()
    student = F.normalize(-teacher + 0.1 * draw(12, 8, seed=14).float()).requires_grad_()
    alpha = 60.0
    loss = hard_darkrank_loss(student, teacher, alpha=alpha)
    (gradient,) = torch.autograd.grad(loss, student)
    distances = torch.cdist(student.detach(), student.detach()).double().float()
    likelihood = torch.ones(())
    order = torch.cdist(teacher, teacher).argsort(1)[0]
    scores = -alpha * distances[0, order[order != 0]] ** 3
    for i in range(len(scores)):
        likelihood = likelihood * scores[i].exp() / scores[i:].exp().sum()
    return Evidence(
        holds=not bool(torch.isfinite(likelihood.log()))
        and bool(torch.isfinite(loss))
        and bool(gradient.isfinite().all()),
        summary=(
            f"Single precision, α = 60: the product of probabilities is {float(likelihood):g} and its logarithm not "
            f"finite; by sums in log space the loss is {float(loss.detach()):.0f} nat with a finite gradient."
        ),
        values={
            "product": float(likelihood) if bool(torch.isfinite(likelihood)) else "NaN",
            "loss": float(loss.detach()),
        },
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="D1",
        kind="code",
        where="TuSimple/DarkRank@5e6a74f: PYOP/listnet_loss.py, and the settings in the README",
        printed=r"A `power` and a `scale`, easily read as $\beta$ and $\alpha$ of $-\alpha\lVert q - x\rVert^\beta$.",
        right=(
            r"The score is $-(c\,d^2)^p$ of the *squared* distance: $\alpha = c^p$ and $\beta = 2p$. The README's run "
            r"has $\beta = 4$ and $\alpha = 12.25$."
        ),
        check=_check_exponent,
    ),
    Erratum(
        id="D2",
        kind="code",
        where="TuSimple/DarkRank@5e6a74f: the operator of hard transfer, forward",
        printed=r"The value is $-\log(P + 10^{-12})$ of a product of probabilities.",
        right=(
            r"It stops at 27.63 nat, while the hand-written gradient is that of $-\log P$: the reported loss is flat "
            r"where the training is not."
        ),
        check=_check_saturation,
    ),
    Erratum(
        id="D3",
        kind="code",
        where="TuSimple/DarkRank@5e6a74f: PYOP/listnet_loss.py and the operator of hard transfer, backward",
        printed="The gradient of the loss with respect to the embeddings.",
        right=(
            "The query's own embedding is taken for a constant: what comes back is not the derivative of the value, "
            "and not what other implementations train with."
        ),
        check=_check_detached_query,
    ),
    Erratum(
        id="D4",
        kind="code",
        where="TuSimple/DarkRank@5e6a74f: PYOP/listnet_loss.py; lenscloth/RKD@0a6c3c0: metric/loss.py",
        printed="Two pieces of code for the loss of a batch under one name.",
        right=(
            "The authors' queries are the first half of the batch alone, which their iterator fills with one image of "
            "each pair; on other batches half of the rankings are lost. RKD's port takes every row for a query."
        ),
        check=_check_half_the_queries,
    ),
    Erratum(
        id="D5",
        kind="code",
        where="lenscloth/RKD@0a6c3c0: metric/loss.py, HardDarkRank",
        printed="The neighbours of a sample are its ranking without the first.",
        right=(
            "Only if the sample itself is the first. With a duplicate it may not be; the diagonal has to be masked by "
            "its position."
        ),
        check=_check_own_neighbour,
    ),
    Erratum(
        id="D6",
        kind="note",
        where="note, remark under DarkRank",
        printed="DarkRank and NST have exactly the same architecture.",
        right=(
            "The same group drew the same sketch: a loss between two networks beside the task's. Networks, tasks and "
            "what is compared differ: NST relates positions within a sample, DarkRank samples within a batch."
        ),
        check=_check_architecture,
    ),
    Erratum(
        id="D7",
        kind="code",
        where="TuSimple/DarkRank@5e6a74f: the operator of hard transfer, forward",
        printed="The likelihood of an order is computed as a product, its logarithm taken at the end.",
        right="The product underflows for long lists and sharp scores; sums over suffixes in log space do not.",
        check=_check_log_space,
    ),
)
