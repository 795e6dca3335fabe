"""Mistakes in the note, the paper and the authors' code of structured distillation, each with its proof."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.structured_kd import (
    HolisticDiscriminator,
    discriminator_objective,
    holistic_loss,
    pairwise_loss,
    pixelwise_loss,
)
from reproductions.harness.errata import Erratum, Evidence, draw

_CODE = "irfanICMLL/structure_knowledge_distillation@ce208e1"


def _gradient(loss: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, student)
    return found.flatten()


def _cosine(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x, y, dim=0))


def _check_direction() -> Evidence:
    student, teacher = draw(2, 5, 4, 4, seed=0).requires_grad_(), 3 * draw(2, 5, 4, 4, seed=1)
    code, ours, printed = (
        _gradient(pixelwise_loss(student, teacher, variant=variant), student)
        for variant in ("official", None, "printed")
    )
    same, other = _cosine(code, ours), _cosine(code, printed)
    # A student that is sure of one of two classes which the teacher both allows.
    allowed = torch.tensor([0.0, 0.0, -20.0], dtype=torch.float64).view(1, 3, 1, 1)
    sure = torch.tensor([20.0, 0.0, -20.0], dtype=torch.float64).view(1, 3, 1, 1)
    values = {v or "code": float(pixelwise_loss(sure, allowed, variant=v)) for v in (None, "printed")}
    return Evidence(
        holds=abs(same - 1) < 1e-12 and other < 0.95 and values["code"] > 5 * values["printed"],
        summary=(
            f"The code's gradient has cosine {same:.3f} with that of $KL(q^t \\| q^s)$ and {other:.3f} with that "
            f"of the printed one. A student that drops one of two classes which its teacher holds equal pays "
            f"{values['code']:.2f} nats in the code, {values['printed']:.2f} as printed."
        ),
        values={"cosine, teacher as target": same, "cosine, printed": other, **values},
    )


def _check_prefactor() -> Evidence:
    rows, beta, alpha = 12, 4, 9
    student, teacher = draw(1, 3, rows, rows, seed=2), draw(1, 4, rows, rows, seed=3)
    s, t = (F.avg_pool2d(x, 2)[0] for x in (student, teacher))
    total, inner = 0.0, 0
    side = rows // 2
    for i in itertools.product(range(1, side - 1), repeat=2):  # nodes that have all their neighbours
        for j in itertools.product((-1, 0, 1), repeat=2):
            other = i[0] + j[0], i[1] + j[1]
            a, b = (
                float(F.cosine_similarity(x[:, i[0], i[1]], x[:, other[0], other[1]], dim=0)) for x in (s, t)
            )
            total, inner = total + (a - b) ** 2, inner + 1
    pixels = (side - 2) ** 2 * beta
    right, printed = beta / (pixels * alpha), pixels * alpha / beta
    mean = total / inner
    whole = float(pairwise_loss(student, teacher, alpha=alpha, beta=beta))
    return Evidence(
        holds=abs(right * total - mean) < 1e-12 and 0 < whole < 4 < printed * total,
        summary=(
            f"{pixels} pixels have {pixels // beta} nodes of {beta} and {inner} edges: $\\beta / (W'H'\\alpha)$ gives "
            f"the mean over the edges, {right * total:.3f}, of a number that is at most 4. The printed factor gives "
            f"{printed * total:.0f}."
        ),
        values={"mean over edges": mean, "right": right * total, "printed": printed * total},
    )


def _check_norms() -> Evidence:
    student, teacher = draw(2, 6, 8, 8, seed=4).requires_grad_(), draw(2, 8, 8, 8, seed=5)
    patch = (4, 4)
    code = _gradient(pairwise_loss(student, teacher, variant="official"), student)
    true = _gradient(pairwise_loss(student, teacher, beta=patch, variant="cirkd"), student)
    cosine, ratio = _cosine(code, true), float(code.norm() / true.norm())
    along = [_along(student, gradient) for gradient in (code, true)]
    return Evidence(
        holds=cosine < 0.9 and ratio > 1.1 and along[0] > 0.3 and along[1] < 1e-12,
        summary=(
            f"Same value, but a gradient of cosine {cosine:.2f} with the true one and {ratio:.2f} times its norm. The "
            "true gradient of a node is orthogonal to its feature, since only directions matter; the code's has "
            f"{100 * along[0]:.0f} % of its norm along the features, to no effect on the affinities."
        ),
        values={"cosine": cosine, "norm, code / true": ratio, "share along the features": along[0]},
    )


def _along(student: Tensor, gradient: Tensor) -> float:
    """How much of a gradient's norm lies along the nodes' features, gathered where max-pooling took each channel."""
    pooled, places = F.max_pool2d(student.detach(), 4, return_indices=True)
    taken = gradient.view_as(student).flatten(2).gather(2, places.flatten(2))
    unit = F.normalize(pooled.flatten(2), dim=1)
    return float((taken * unit).sum(1).norm() / taken.norm())


def _check_conditional() -> Evidence:
    images = draw(24, 1, 16, 16, seed=6)
    right = torch.cat([images, -images], 1)  # maps that say where their image is bright
    wrong = right.roll(1, 0)  # the same maps, each beside another image
    gaps = {}
    for name, channels in (("with the image", 1), ("without", None)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            judge: nn.Module = HolisticDiscriminator(2, image_channels=channels, width=6, blocks=2).double()
        optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
        shown = images if channels else None
        generator = torch.Generator().manual_seed(0)
        for _ in range(25):
            shares = torch.rand(len(images), generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            discriminator_objective(judge, wrong, right, shown, shares).backward()
            optimizer.step()
        judge.eval()
        with torch.no_grad():
            gaps[name] = float(holistic_loss(judge(wrong, shown), judge(right, shown)))
    return Evidence(
        holds=abs(gaps["without"]) < 1e-10 and gaps["with the image"] < -0.5,
        summary=(
            "Maps that all belong to another image of the batch: a discriminator that sees the image learns to tell "
            f"them ($L_{{ho}} = {gaps['with the image']:.2f}$ after 25 steps); to one that does not, they are the same "
            f"maps (${gaps['without']:.0e}$)."
        ),
        values=gaps,
    )


def _check_batch() -> Evidence:
    ratios = {}
    for batch in (2, 8):
        student, teacher = draw(batch, 5, 4, 4, seed=7).requires_grad_(), draw(batch, 5, 4, 4, seed=8)
        code, mean = (
            _gradient(pixelwise_loss(student, teacher, variant=variant), student)
            for variant in ("official", None)
        )
        ratios[f"batch of {batch}"] = float(code.norm() / mean.norm())
    return Evidence(
        holds=all(abs(ratios[f"batch of {batch}"] - batch) < 1e-9 for batch in (2, 8)),
        summary=(
            f"Its gradient is {ratios['batch of 2']:.0f} times that of the mean in a batch of 2 and "
            f"{ratios['batch of 8']:.0f} times in the authors' batches of 8: the weight 10 is 80 in the unit of the "
            "cross-entropy beside it, which is a mean."
        ),
        values=ratios,
    )


def _check_nodes() -> Evidence:
    nodes = {}
    for side in (64, 65):
        kernel = int(0.5 * side)
        nodes[f"{side} pixels"] = float(math.ceil((side - kernel) / kernel + 1) ** 2)
        assert (
            F.max_pool2d(torch.zeros(1, 1, side, side), kernel, ceil_mode=True).numel()
            == nodes[f"{side} pixels"]
        )
    student, teacher = draw(1, 3, 64, 64, seed=9), draw(1, 3, 64, 64, seed=10)
    s, t = (F.max_pool2d(x, 32).flatten(2)[0] for x in (student, teacher))
    s, t = (x / x.norm(dim=0) for x in (s, t))
    by_hand = float((s.T @ s - t.T @ t).square().sum() / 16)
    value = float(pairwise_loss(student, teacher, variant="official"))
    return Evidence(
        holds=nodes == {"64 pixels": 4.0, "65 pixels": 9.0} and abs(by_hand - value) < 1e-6,
        summary=(
            f"With the default scale a map of 64 pixels has {nodes['64 pixels']:.0f} nodes and one of 65 has "
            f"{nodes['65 pixels']:.0f}, all connected: {nodes['64 pixels'] ** 2:.0f} and {nodes['65 pixels'] ** 2:.0f} "
            "affinities in all. There is no connection range, and neighbours are a third or half of the image apart."
        ),
        values=nodes,
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="S1",
        kind="paper",
        where="the pixel-wise loss, as the note copies it (image31)",
        printed=r"$\ell_{pi} = \frac{1}{W'H'} \sum_i KL(q^s_i \,\|\, q^t_i)$",
        right=(
            r"The code minimises the cross-entropy with the teacher as target, whose gradient is that of "
            r"$KL(q^t \| q^s)$: the student is to cover what the teacher allows, not to choose from it."
        ),
        check=_check_direction,
    ),
    Erratum(
        id="S2",
        kind="note",
        where="the pair-wise loss, as the note copies it (image33)",
        printed=r"The sum over edges has the factor $\frac{W' \times H' \times \alpha}{\beta}$.",
        right=r"Its inverse, $\beta / (W'H'\alpha)$: there are $W'H'\alpha/\beta$ edges, and the loss is their mean.",
        check=_check_prefactor,
    ),
    Erratum(
        id="S3",
        kind="code",
        where=f"{_CODE}: utils/utils.py, similarity",
        printed="Features are divided by their norms, which are detached.",
        right=(
            "The norm depends on the feature. Without its derivative the gradient is another one, with a part along "
            "the feature that no affinity depends on."
        ),
        check=_check_norms,
    ),
    Erratum(
        id="S4",
        kind="code",
        where=f"{_CODE}: networks/sagan_models.py, Discriminator",
        printed="The discriminator takes the 19 channels of the segmentation map.",
        right=(
            "The paper and its equation condition it on the image, $D(Q \\,|\\, I)$. Without the image it compares "
            "sets of maps: a student whose maps all belong to other images would be perfect."
        ),
        check=_check_conditional,
    ),
    Erratum(
        id="S5",
        kind="code",
        where=f"{_CODE}: utils/criterion.py, CriterionPixelWise",
        printed="The sum over the batch, the pixels and the classes is divided by the pixels of one image.",
        right="A mean over the batch, as the cross-entropy beside it; else the weight grows with the batch.",
        check=_check_batch,
    ),
    Erratum(
        id="S6",
        kind="code",
        where=f"{_CODE}: utils/criterion.py, CriterionPairWiseforWholeFeatAfterPool",
        printed=(
            "Patches are half the map high and wide, taken by their maximum, and all are connected: no connection "
            r"range $\alpha$, and a granularity $\beta$ of a quarter of the map."
        ),
        right=(
            r"The paper aggregates $\beta$ pixels and connects each node to the $\alpha$ nearest. Here both are "
            'arguments, with average pooling; the code\'s graph is `variant="official"`.'
        ),
        check=_check_nodes,
    ),
)
