r"""What the notes and the implementations of neuron selectivity transfer got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories at the commits named, as read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.at import at_loss
from kdrefs.methods.nst import nst_loss
from reproductions.harness.errata import Erratum, Evidence, draw


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.flatten(2), dim=2)


def _check_dropped_term() -> Evidence:
    teacher = draw(4, 12, 4, 4, seed=1)
    student = (teacher[:, :8] + 0.3 * draw(4, 8, 4, 4, seed=2)).requires_grad_()
    whole, official = nst_loss(student, teacher), nst_loss(student, teacher, variant="official")
    (gradient,) = torch.autograd.grad(whole, student)
    (other,) = torch.autograd.grad(official, student)
    least = float(nst_loss(teacher, teacher, variant="official"))
    off = float((gradient - other).abs().max() / gradient.abs().max())
    whole, official = whole.detach(), official.detach()
    return Evidence(
        holds=float(official) < 0 < float(whole)
        and off < 1e-9
        and abs(float(whole - official) + least) < 1e-12,
        summary=(
            f"A student near its teacher: the discrepancy is {float(whole):.3f}, the code reports "
            f"{float(official):.3f}, and {least:.3f} for a perfect copy. The gradients differ by {off:.0e} of the "
            "largest."
        ),
        values={"MMD²": float(whole), "reported": float(official), "reported for a copy": least},
    )


def _check_linear() -> Evidence:
    student, teacher = draw(4, 3, 3, 3, seed=3).abs(), draw(4, 5, 3, 3, seed=4).abs()

    def attention(s: Tensor, t: Tensor) -> float:
        return 9 * float(
            at_loss(s, t, power=1, variant="official")
        )  # times HW: the squared distance of the maps

    def linear(s: Tensor, t: Tensor) -> float:
        return float(nst_loss(s, t, kernel="linear"))

    general = linear(student, teacher), attention(student, teacher)
    s, t = (_unit(x).view_as(x) for x in (student, teacher))
    averaged = linear(s.mean(1, keepdim=True), t.mean(1, keepdim=True)), attention(s, t)
    single = linear(student[:, :1], teacher[:, :1]), attention(student[:, :1], teacher[:, :1])
    opposed = torch.cat([student[:, :1], -student[:, :1]], 1)
    signed = linear(opposed, opposed[:, :1]), attention(opposed, opposed[:, :1])
    return Evidence(
        holds=abs(general[0] - general[1]) > 0.01
        and abs(linear(s, t) - averaged[1]) > 0.01
        and abs(averaged[0] - averaged[1]) < 1e-12
        and abs(single[0] - single[1]) < 1e-12
        and signed[0] > 0.5
        and signed[1] < 1e-12,
        summary=(
            f"Non-negative maps: linear NST {general[0]:.3f}, AT (p = 1, squared distance) {general[1]:.3f}. With "
            f"channels of one norm and the mean map normalised again both are {averaged[1]:.3f}, with one channel "
            f"{single[1]:.3f}. Channels of opposite sign: {signed[0]:.2f} and {signed[1]:.0e}."
        ),
        values={"linear NST": general[0], "AT": general[1], "both, normalised afterwards": averaged[1]},
    )


def _check_channel_gram() -> Evidence:
    student, teacher = draw(4, 6, 4, 4, seed=5), draw(4, 6, 4, 4, seed=6)

    def printed(s: Tensor, t: Tensor) -> float:
        s, t = _unit(s), _unit(t)
        return float((s @ s.mT - t @ t.mT).square().mean())

    shuffled = teacher[:, [1, 2, 3, 4, 5, 0]]
    moved = teacher.flatten(2)[:, :, torch.arange(15, -1, -1)].view_as(teacher)
    values = {
        "NST": float(nst_loss(student, teacher)),
        "theirs": printed(student, teacher),
        "NST, channels reordered": float(nst_loss(shuffled, teacher)),
        "theirs, channels reordered": printed(shuffled, teacher),
        "NST, positions moved": float(nst_loss(moved, teacher)),
        "theirs, positions moved": printed(moved, teacher),
    }
    return Evidence(
        holds=values["NST"] > 2 * values["theirs"]
        and values["NST, channels reordered"] < 1e-12 < 0.01 < values["theirs, channels reordered"]
        and values["theirs, positions moved"] < 1e-12 < 0.01 < values["NST, positions moved"],
        summary=(
            f"The same maps: NST {values['NST']:.3f}, theirs {values['theirs']:.3f}. The teacher's channels in another "
            f"order: {values['NST, channels reordered']:.0e} and {values['theirs, channels reordered']:.3f}. Its "
            f"positions turned round: {values['NST, positions moved']:.3f} and "
            f"{values['theirs, positions moved']:.0e}."
        ),
        values=values,
    )


def _check_token_gram() -> Evidence:
    student, teacher = draw(4, 6, 4, 4, seed=7), draw(4, 6, 4, 4, seed=8)

    def printed(s: Tensor, t: Tensor) -> float:  # sequences (batch, length, width): positions by channels
        s, t = s.flatten(2).mT, t.flatten(2).mT
        return float((s @ s.mT / s.shape[2] - t @ t.mT / t.shape[2]).square().mean())

    louder = printed(2 * student, 2 * teacher) / printed(student, teacher)
    unit = printed(_unit(student).view_as(student), _unit(teacher).view_as(teacher))
    ratio = float(nst_loss(student, teacher)) / unit
    return Evidence(
        holds=abs(louder - 16) < 1e-9
        and abs(ratio - 16**2) < 1e-6
        and abs(float(nst_loss(2 * student, 2 * teacher) / nst_loss(student, teacher)) - 1) < 1e-9,
        summary=(
            f"Features twice as large: theirs grows {louder:.0f} times, NST not at all. On channels of unit norm NST "
            f"is {ratio:.0f} times theirs: the squared number of positions, a sum instead of a mean."
        ),
        values={"growth at twice the scale": louder, "NST / theirs on unit channels": ratio},
    )


def _check_weak_responses() -> Evidence:
    teacher = draw(8, 6, 4, 4, seed=9).relu()
    faint = teacher.clone()
    faint[:, 0] *= 1e-3  # a channel that fires a thousand times weaker than the others
    across = float(nst_loss(faint, teacher))
    silent = teacher.clone()
    silent[:, 0] = 0
    without = float(nst_loss(silent, teacher))
    peak = teacher.amax((2, 3), keepdim=True)
    weak, strong = ((0.1 * peak, 0.3 * peak), (0.8 * peak, peak))

    def dropped(band: tuple[Tensor, Tensor]) -> float:
        chosen = (teacher > band[0]) & (teacher <= band[1])
        changed = float(nst_loss(teacher.masked_fill(chosen, 0), teacher))
        return changed / float(chosen.double().mean())

    inside = dropped(weak), dropped(strong)
    return Evidence(
        holds=across < 1e-12 and without > 1e-3 and inside[1] > 5 * inside[0],
        summary=(
            f"A channel a thousand times weaker than the others costs {across:.0e}, the same channel silenced "
            f"{without:.3f}: across channels weak responses count in full. Inside a channel, silencing responses of "
            f"80 to 100 % of its maximum costs {inside[1] / inside[0]:.0f} times as much, a response, as those of 10 "
            "to 30 %."
        ),
        values={
            "channel weakened": across,
            "channel silenced": without,
            "weak": inside[0],
            "strong": inside[1],
        },
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="N1",
        kind="code",
        where="TuSimple/neuron-selectivity-transfer@50dee40: symbol/transfer.py, mmd_poly",
        printed=r"The student's own term minus twice the cross term is reported as the MMD loss.",
        right=(
            r"The teacher's own term is missing: the gradient is that of MMD$^2$, the value is not. It may be "
            r"negative, and its minimum is minus the teacher's term, not 0."
        ),
        check=_check_dropped_term,
    ),
    Erratum(
        id="N2",
        kind="paper",
        where="the relation to attention transfer, as it is commonly drawn for the linear kernel",
        printed="With the linear kernel NST equals spatial attention transfer.",
        right=(
            r"Not in general. AT with p = 1 normalises the *average* of the channels, NST averages *normalised* "
            r"channels. They agree where the maps are not negative, all channels of a network have the same norm and "
            r"the mean maps are normalised once more; and for C = 1. (Authors' AT divides by HW besides.)"
        ),
        check=_check_linear,
    ),
    Erratum(
        id="N3",
        kind="code",
        where="Knowledge-Distillation-Zoo@65470c8: kd_losses/nst.py, the commented first version",
        printed=r"NST 'can be treated as matching the Gram matrix', taken over channels, $C \times C$.",
        right=(
            r"The Gram matrix that NST matches is over positions, $HW \times HW$. The one over channels ignores where "
            r"anything fires, depends on the channels' order and needs equal channel numbers."
        ),
        check=_check_channel_gram,
    ),
    Erratum(
        id="N4",
        kind="code",
        where="TextBrewer@2c105fa: losses.py, mmd_loss",
        printed="The mean squared difference of the matrices of inner products between tokens, called MMD.",
        right=(
            r"Right matrix, but the channels are not normalised, so the loss grows with the fourth power of the "
            r"features' scale, and the mean over token pairs divides by the squared length."
        ),
        check=_check_token_gram,
    ),
    Erratum(
        id="N5",
        kind="note",
        where="note, remark on Activation Boundaries (笔记：前者…对弱响应不敏感)",
        printed="NST is insensitive to weak responses.",
        right=(
            "Inside a channel, yes: its map is dominated by its largest responses. Across channels, no: each is "
            "divided by its norm, so a channel that always fires weakly counts as much as any other."
        ),
        check=_check_weak_responses,
    ),
)
