r"""What the paper's implementations of attention transfer got wrong or left unsaid, each with its proof.

Sources: *code*, the repositories at the commits named, as read. The literature note's paragraph on AT is right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.at import at_loss, attention_map
from reproductions.harness.errata import Erratum, Evidence, draw


def _check_square() -> Evidence:
    teacher, other = draw(16, 8, 4, 4, seed=1), draw(16, 8, 4, 4, seed=2)
    ratios, slopes, values = [], [], {}
    for step in (1.0, 0.1, 0.01):
        student = (teacher + step * other).requires_grad_()
        paper, code = at_loss(student, teacher), at_loss(student, teacher, variant="official")
        ratios.append(float(paper.detach() / code.detach()))
        (pull,) = torch.autograd.grad(paper, student, retain_graph=True)
        (square_pull,) = torch.autograd.grad(code, student)
        slopes.append((float(pull.norm()), float(square_pull.norm())))
        values[f"paper / code at distance {step}"] = ratios[-1]
    one = at_loss(teacher[:1] + other[:1], teacher[:1])
    one_code = at_loss(teacher[:1] + other[:1], teacher[:1], variant="official")
    off = abs(float(16 * one_code / one.square() - 1))
    return Evidence(
        holds=ratios[2] > 20 * ratios[0]
        and slopes[2][1] < 0.1 * slopes[0][1]
        and slopes[2][0] > 0.5 * slopes[0][0]
        and off < 1e-9,
        summary=(
            "A student at three distances from its teacher (steps 1, 0.1 and 0.01 along one direction): the norm of "
            f"Eq. 2 is {', '.join(f'{ratio:.0f}' for ratio in ratios)} times the code's value. From the farthest to "
            f"the nearest the code's gradient falls to {100 * slopes[2][1] / slopes[0][1]:.0f} % of its length, that "
            f"of the norm goes to {100 * slopes[2][0] / slopes[0][0]:.0f} %."
        ),
        values=values,
    )


def _check_odd_power() -> Evidence:
    features = draw(1, 1, 4, 4, seed=3)
    opposed = torch.cat([features, -features], 1)  # two channels that fire alike, with opposite signs
    printed = F.normalize(opposed.pow(3).mean(1).flatten(1))
    ours = attention_map(opposed, power=3)
    rectified = draw(4, 8, 4, 4, seed=4).relu()
    same = float(
        (F.normalize(rectified.pow(3).mean(1).flatten(1)) - attention_map(rectified, power=3)).abs().max()
    )
    return Evidence(
        holds=float(printed.abs().max()) == 0 and abs(float(ours.norm()) - 1) < 1e-12 and same < 1e-12,
        summary=(
            "Two channels of opposite sign, p = 3: without the magnitude they cancel and the map is zero, with it the "
            f"map has norm {float(ours.norm()):.0f}. After a ReLU the two agree to {same:.0e}."
        ),
        values={"norm without the magnitude": float(printed.norm()), "norm with it": float(ours.norm())},
    )


def _check_channels_kept() -> Evidence:
    def printed(features: Tensor) -> Tensor:
        return F.normalize(features.pow(2).flatten(1))

    student = draw(4, 6, 4, 4, seed=5)
    shuffled = student[:, [1, 2, 3, 4, 5, 0]]
    theirs = float((printed(student) - printed(shuffled)).square().sum(1).mean())
    ours = float(at_loss(student, shuffled))
    widths = printed(student).shape[1], printed(draw(4, 12, 4, 4, seed=6)).shape[1]
    return Evidence(
        holds=theirs > 0.1 and ours < 1e-12 and widths[0] != widths[1],
        summary=(
            f"A copy of the student with its channels in another order: attention transfer {ours:.0e}, theirs "
            f"{theirs:.2f}. With 6 and 12 channels theirs compares vectors of {widths[0]} and {widths[1]} numbers, "
            "which is an error."
        ),
        values={"attention transfer": ours, "without the reduction": theirs},
    )


def _check_epsilon() -> Evidence:
    def printed(features: Tensor) -> Tensor:
        energy = features.abs().square().sum(1).flatten(1)
        return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)

    student, teacher = draw(8, 4, 4, 4, seed=7), draw(8, 4, 4, 4, seed=8)
    values = {}
    for scale in (1.0, 1e-3, 1e-4):
        gap = printed(scale * student) - printed(scale * teacher)
        values[f"theirs at {scale}"] = float(gap.square().mean())
        values[f"ours at {scale}"] = float(at_loss(scale * student, scale * teacher, variant="official"))
    theirs = [value for name, value in values.items() if name.startswith("theirs")]
    ours = [value for name, value in values.items() if name.startswith("ours")]
    return Evidence(
        holds=max(ours) - min(ours) < 1e-9
        and theirs[2] < 0.1 * theirs[0]
        and abs(theirs[0] / ours[0] - 1) < 1e-6,
        summary=(
            "Features at scale 1, 0.001 and 0.0001: the loss of unit maps stays at "
            f"{ours[0]:.4f}, theirs is {', '.join(f'{value:.4f}' for value in theirs)}."
        ),
        values=values,
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="A1",
        kind="code",
        where=(
            "szagoruyko/attention-transfer@893df54: utils.py, at_loss, against Eq. 2 of the paper; the same in "
            "RepDistiller@b84f547: distiller_zoo/AT.py"
        ),
        printed=(
            r"The mean over samples *and positions* of the *squared* difference of the maps, with $\beta = 1000$; the "
            r"paper has $\frac{\beta}{2}$ times the norm, not squared."
        ),
        right=(
            r"They are different losses, and no factor leads from one to the other: for one sample the code is the "
            r"square of the norm divided by $HW$. The pull of the square dies out as the maps agree, that of the norm "
            "keeps its length. Our default is Eq. 2; the runs use the code's loss."
        ),
        check=_check_square,
    ),
    Erratum(
        id="A2",
        kind="code",
        where="RepDistiller@b84f547: distiller_zoo/AT.py; mdistiller@a08d46f: mdistiller/distillers/AT.py",
        printed=r"The power of the features, $A^p$, with p as an argument.",
        right=(
            r"$|A|^p$. Without the magnitude an odd p lets channels of opposite sign cancel; only after a ReLU it does "
            "not matter."
        ),
        check=_check_odd_power,
    ),
    Erratum(
        id="A3",
        kind="code",
        where="KD_Lib@a94d236: KD_Lib/KD/vision/attention/loss_metric.py",
        printed="Attention transfer of powers of all features; the channels are never summed over.",
        right=(
            "An attention map has one number per position. Unreduced features are tied to the order and the number "
            "of the channels, which is what attention maps are there to avoid."
        ),
        check=_check_channels_kept,
    ),
    Erratum(
        id="A4",
        kind="code",
        where="Knowledge-Distillation-Zoo@65470c8: kd_losses/at.py",
        printed=r"$10^{-6}$ is added to the norm of the map.",
        right=(
            r"That norm is a power of the features' scale: with p = 2 features of size $10^{-3}$ are already "
            r"damped, and the loss fades with the scale that normalisation should remove."
        ),
        check=_check_epsilon,
    ),
)
