r"""What the note and public code got wrong about factor transfer, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories as read at the commits named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrefs.methods.at import attention_map
from kdrefs.methods.fitnets import HintRegressor, hint_loss
from kdrefs.methods.ft import Paraphraser, factor_channels, factor_loss, paraphraser_loss
from reproductions.harness.errata import Erratum, Evidence, draw


def _check_first_auxiliary_network() -> Evidence:
    regressor = HintRegressor((4, 6, 6), (8, 6, 6)).double()
    guided, hint = draw(2, 4, 6, 6, seed=1).requires_grad_(), draw(2, 8, 6, 6, seed=2).relu()
    hint_loss(regressor(guided), hint).backward()
    learned = [p for p in regressor.parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
    weights = sum(p.numel() for p in learned)
    paraphraser = Paraphraser(8, 4).double()
    paraphraser_loss(paraphraser(hint), hint).backward()  # no student and no label anywhere
    teachers = sum(p.numel() for p in paraphraser.parameters() if p.grad is not None)
    return Evidence(
        holds=len(learned) == len(list(regressor.parameters())) == 2
        and weights == 8 * 4 + 8
        and guided.grad is not None
        and teachers == sum(p.numel() for p in paraphraser.parameters()),
        summary=(
            f"FitNets' regressor (2015) has {weights} weights of its own for 4 and 8 channels; all learn from the "
            f"hint, and they are no part of the student. What is new in 2018: the {teachers} weights of a paraphraser "
            "learn from the teacher alone."
        ),
        values={"weights of the regressor": weights, "weights of the paraphraser": teachers},
    )


def _check_repdistiller() -> Evidence:
    teacher = draw(16, 32, 8, 8, seed=3)
    rotation = torch.linalg.qr(draw(32, 32, seed=4)).Q
    energy = teacher.square().sum(1, keepdim=True)
    other = draw(16, 32, 8, 8, seed=5)
    strangers = {
        "all signs turned": -teacher,
        "channels in another order": teacher.flip(1),
        "channels rotated": torch.einsum("oc,nchw->nohw", rotation, teacher),
        "another map of the same energy at each position": other
        * (energy / other.square().sum(1, keepdim=True)).sqrt(),
    }
    theirs = {name: float(factor_loss(x, teacher, variant="repdistiller")) for name, x in strangers.items()}
    paper = {name: float(factor_loss(x, teacher)) for name, x in strangers.items()}
    unrelated = float(factor_loss(other, teacher)), float(factor_loss(other, teacher, variant="repdistiller"))
    maps = (attention_map(other) - attention_map(teacher)).abs().mean()
    return Evidence(
        holds=max(theirs.values()) < 1e-12
        and min(paper.values()) > 0.9 * unrelated[0]
        and abs(float(maps) - unrelated[1]) < 1e-12,
        summary=(
            "The paper's loss and RepDistiller's of a factor that is the teacher's with "
            + "; ".join(f"{name}: {paper[name]:.0f} and {theirs[name]:.0e}" for name in strangers)
            + f". An unrelated factor costs {unrelated[0]:.0f} by the paper. Theirs is the L1 distance of "
            f"attention maps to {abs(float(maps) - unrelated[1]):.0e}."
        ),
        values={f"paper, {name}": value for name, value in paper.items()}
        | {f"theirs, {name}": value for name, value in theirs.items()},
    )


def _check_mean() -> Evidence:
    values: dict[str, float] = {}
    ratios = []
    for rate in (0.5, 0.75, 1.0):
        shape = factor_channels(64, rate), 8, 8
        student, teacher = draw(8, *shape, seed=6), draw(8, *shape, seed=7)
        paper, code = factor_loss(student, teacher), factor_loss(student, teacher, variant="official")
        values[f"500 in the paper's units, k = {rate:g}"] = 500 * float(code / paper)
        ratios.append(float(code / paper) * math.prod(shape))
        values[f"unrelated factors, k = {rate:g}"] = 500 * float(code)
    weights = [values[f"500 in the paper's units, k = {rate:g}"] for rate in (0.5, 0.75, 1.0)]
    terms = [values[f"unrelated factors, k = {rate:g}"] for rate in (0.5, 0.75, 1.0)]
    return Evidence(
        holds=max(abs(ratio - 1) for ratio in ratios) < 1e-9
        and abs(weights[0] / weights[2] - 2) < 1e-9
        and 1.3 < terms[0] / terms[2] < 1.5,
        summary=(
            "A map of 64 x 8 x 8 and k = 0.5, 0.75 and 1: the weight 500 of the mean is "
            + ", ".join(f"{weight:.3f}" for weight in weights)
            + " for the norm that is printed; unrelated factors cost "
            + ", ".join(f"{term:.2f}" for term in terms)
            + " beside the cross-entropy. Comparing widths at one weight compares strengths as well."
        ),
        values=values,
    )


def _check_epochs() -> Evidence:
    asked = {"train_Paraphraser.py": 5, "train_student.py": 163}
    done = {name: len(range(count + 1)) for name, count in asked.items()}
    reached = [milestone for milestone in (150, 225) if milestone < done["train_Paraphraser.py"]]
    return Evidence(
        holds=all(done[name] == count + 1 for name, count in asked.items()) and not reached,
        summary=(
            "; ".join(f"{name}: {asked[name]} asked for, {count} done" for name, count in done.items())
            + f". Of the paraphraser's milestones 150 and 225, {len(reached)} are reached: its rate stays 0.1."
        ),
        values={name: float(count) for name, count in done.items()},
    )


def _check_zero_factor() -> Evidence:
    teacher = draw(2, 4, 3, 3, seed=8)
    values: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name in ("theirs", "ours"):
        student = draw(2, 4, 3, 3, seed=9)
        student[0] = 0
        student.requires_grad_()
        if name == "ours":
            value = factor_loss(student, teacher, variant="official")
        else:
            flat = [x.flatten(1) for x in (student, teacher)]
            ours, guide = (x / x.norm(dim=1).unsqueeze(1) for x in flat)
            value = (ours - guide).abs().mean()
        value.backward()
        assert student.grad is not None
        values[name], gradients[name] = value.detach(), student.grad
    lost = int(gradients["theirs"].isnan().flatten(1).any(1).sum())
    return Evidence(
        holds=bool(values["theirs"].isnan()) and lost >= 1 and bool(gradients["ours"].isfinite().all())
        and bool(values["ours"].isfinite()),
        summary=(
            f"One factor of two is zero everywhere: their loss is {float(values['theirs'])}, and {lost} of two samples "
            f"get no usable gradient; guarded, it is {float(values['ours']):.3f} with a finite gradient."
        ),
        values={"guarded": float(values["ours"])},
    )  # fmt: skip


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="G1",
        kind="note",
        where="note of 2024-03-22, remark under Paraphrasing Complex Network",
        printed="Auxiliary networks that help teacher and student have never been seen in the literature before.",
        right=(
            "FitNets' regressor is one, three years earlier: a module with weights of its own between student and "
            "teacher, thrown away after training. New in factor transfer is a module on the *teacher's* side, trained "
            "without labels and before there is a student."
        ),
        check=_check_first_auxiliary_network,
    ),
    Erratum(
        id="G2",
        kind="code",
        where="RepDistiller@b84f547: distiller_zoo/FT.py, FactorTransfer",
        printed="Factor transfer: squares averaged over the channels, normalised, compared as magnitudes.",
        right=(
            r"The paper compares the normalised factors, $C \times H \times W$ values each. What is computed is "
            r"attention transfer on factors: blind to signs, to the channels' order and to every rotation of them. "
            r"The rows *FT* of benchmarks made with it are of this loss."
        ),
        check=_check_repdistiller,
    ),
    Erratum(
        id="G3",
        kind="code",
        where="Factor-Transfer-pytorch@e8d6ac6: train_student.py, nn.L1Loss()",
        printed=r"Weight $\beta = 500$ for a mean over all values of the factor, whatever its width.",
        right=(
            r"The loss that is printed is a norm, a sum over the factor. The weight is then $500 / (kmHW)$, halved "
            r"from $k = 0.5$ to $k = 1$."
        ),
        check=_check_mean,
    ),
    Erratum(
        id="G4",
        kind="code",
        where="Factor-Transfer-pytorch@e8d6ac6: train_Paraphraser.py and train_student.py, loops over epochs",
        printed="5 epochs of the paraphraser and 163 of the student, by the scripts' defaults.",
        right="One more of each; and the paraphraser's milestones for a smaller rate lie far beyond its last epoch.",
        check=_check_epochs,
    ),
    Erratum(
        id="G5",
        kind="code",
        where="torchdistill@3e4373c: torchdistill/losses/mid_level.py, FTLoss",
        printed="Each flat factor divided by its norm.",
        right=(
            "A factor that is zero everywhere has no direction. The division makes it a NaN, which the mean hands to "
            "the whole batch; the authors' normalisation has a smallest norm."
        ),
        check=_check_zero_factor,
    ),
)
