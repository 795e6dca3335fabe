r"""What the note and a public toolbox have wrong about internal representations, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repository at the commit named, as read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.internal_representations import (
    InternalDistillation,
    attention_kl,
    cls_cosine_loss,
    phases,
)
from reproductions.harness.errata import Erratum, Evidence, draw

PRINTED = "1>1+2>1+2+3>1+2+3>4"


def _check_schedule() -> Evidence:
    printed = [frozenset(map(int, stage.split("+"))) for stage in PRINTED.split(">")]

    def losses(schedule: str) -> list[frozenset[int]]:
        # The losses of each phase by their number: layers from 1, the classification after them.
        return [
            frozenset(k + 1 for k in phase.layers) | (frozenset({4}) if phase.classify else frozenset())
            for phase in phases(schedule, 3)
        ]

    dropped, kept = losses("stacked"), losses("stacked_kept")
    once = [stage for k, stage in enumerate(printed) if k == 0 or stage != printed[k - 1]]
    attention, state = draw(2, 1, 4, 4, seed=1), draw(2, 4, 6, seed=2)
    sides = [(attention, state)] * 3, [(attention.flip(0), state.flip(0))] * 3
    rest = []
    for schedule in ("stacked", "stacked_kept"):
        distillation = InternalDistillation(schedule, 3, max_steps=1)
        for _ in range(3):
            distillation.advance()
        rest.append(float(distillation.internal_loss(*sides, scores=True)))
    return Evidence(
        holds=len(printed) == len(dropped) + 1
        and once == dropped
        and kept[-1] == frozenset({1, 2, 3, 4})
        and rest[0] == 0 < rest[1],
        summary=(
            f"{len(printed)} stages are printed, of which the fourth repeats the third; without it they are those of "
            f"three layers and a classification. While classifying, the internal losses of one example add up to "
            f"{rest[0]:.0f} if they are dropped and {rest[1]:.2f} if they are kept."
        ),
        values={"stages printed": len(printed), "stages": len(dropped)},
    )


def _check_what_is_matched() -> Evidence:
    scores, guides = draw(3, 2, 5, 5, seed=3), draw(3, 2, 5, 5, seed=4)
    states, hidden = draw(3, 5, 8, seed=5), draw(3, 5, 8, seed=6)
    moved = states.clone()
    moved[:, 1:] = draw(3, 4, 8, seed=7)
    token = abs(float(cls_cosine_loss(moved, hidden) - cls_cosine_loss(states, hidden)))
    scaled = abs(float(cls_cosine_loss(5 * states, hidden) - cls_cosine_loss(states, hidden)))
    attention = float(attention_kl(scores, guides, scores=True))
    rows = float(attention_kl(scores + draw(3, 2, 5, 1, seed=8), guides, scores=True))
    whole = 1 - float(F.cosine_similarity(states.flatten(0, 1), hidden.flatten(0, 1)).mean())
    return Evidence(
        holds=token < 1e-12
        and scaled < 1e-9
        and abs(attention - rows) < 1e-9
        and abs(whole - float(cls_cosine_loss(states, hidden))) > 0.01,
        summary=(
            f"Other hidden states at all tokens but the first change the cosine loss by {token:.0e}, five times larger "
            f"ones by {scaled:.0e}. The divergence is of rows of attention: a constant added to a row of scores "
            f"changes it by {abs(attention - rows):.0e}."
        ),
        values={"cosine on the token": float(cls_cosine_loss(states, hidden)), "on all tokens": whole},
    )


def _textbrewer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> float:
    return float(attention_kl(student, teacher, mask, scores=True, variant="textbrewer"))


def _check_guard() -> Evidence:
    student, teacher = draw(2, 2, 4, 4, seed=9), draw(2, 2, 4, 4, seed=10)
    p = teacher.softmax(3)
    formula = -(torch.where(teacher <= -1e-3, 0.0, p) * student.log_softmax(3)).sum(3).mean()
    plain, negative = _textbrewer(student, teacher), _textbrewer(student, teacher - 100)
    positive = _textbrewer(student, teacher + 100)
    lost = float((p * (teacher <= -1e-3)).sum(3).mean())
    return Evidence(
        holds=abs(plain - float(formula)) < 1e-12
        and negative == 0
        and positive > plain + 0.1
        and lost > 0.05,
        summary=(
            f"The same attention from scores shifted by a constant: {plain:.3f}, {positive:.3f} and "
            f"{abs(negative):.0f}. In the first, {100 * lost:.0f} % of the teacher's attention is left out."
        ),
        values={"scores as drawn": plain, "plus 100": positive, "minus 100": negative},
    )


def _check_padding() -> Evidence:
    student, teacher = draw(2, 2, 5, 5, seed=11), draw(2, 2, 5, 5, seed=12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    louder = student.clone()
    louder[0, :, :, 3:] += 5  # what the student's scores at the padding are
    theirs = _textbrewer(student, teacher, mask), _textbrewer(louder, teacher, mask)
    ours = [float(attention_kl(x, teacher, mask, scores=True)) for x in (student, louder)]
    copy = _textbrewer(teacher, teacher, mask)
    return Evidence(
        holds=theirs[1] > theirs[0] + 0.1
        and abs(ours[0] - ours[1]) < 1e-12
        and copy > 0.1
        and float(attention_kl(teacher, teacher, mask, scores=True)) == 0,
        summary=(
            f"Other scores at the padding alone: {theirs[0]:.3f} becomes {theirs[1]:.3f}, where rows over the tokens "
            f"give {ours[0]:.3f} both times. A perfect copy of the teacher has {copy:.3f}."
        ),
        values={"before": theirs[0], "after": theirs[1], "perfect copy": copy},
    )


def _check_factor() -> Evidence:
    states, hidden = draw(4, 1, 8, seed=13), draw(4, 1, 8, seed=14)
    unit, aim = F.normalize(states[:, 0]), F.normalize(hidden[:, 0])
    squared = float((unit - aim).square().sum(1).mean())
    cosine = float(1 - F.cosine_similarity(states[:, 0], hidden[:, 0]).mean())
    longer, others = draw(4, 6, 8, seed=15), draw(4, 6, 8, seed=16)
    everywhere = 1 - float(F.cosine_similarity(longer.flatten(0, 1), others.flatten(0, 1)).mean())
    token = float(cls_cosine_loss(longer, others))
    return Evidence(
        holds=abs(squared - 2 * cosine) < 1e-12
        and abs(float(cls_cosine_loss(states, hidden, variant="pkd")) - squared) < 1e-12
        and abs(everywhere - token) > 0.01,
        summary=(
            f"One token: {cosine:.4f} and {squared:.4f}, a factor of 2. Six tokens: the mean over all is "
            f"{everywhere:.4f}, the first alone has {token:.4f}."
        ),
        values={"1 - cos": cosine, "squared distance": squared},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="I1",
        kind="note",
        where="note, stacked internal distillation",
        printed=f"`{PRINTED}`",
        right=(
            "`1>1+2>1+2+3>4`: the repeated stage is a slip. At the top there is classification alone, as the note's "
            "own sentence says; keeping the internal losses there, `1+2+3+4`, is another method, which we name "
            "`stacked_kept`."
        ),
        check=_check_schedule,
    ),
    Erratum(
        id="I2",
        kind="note",
        where="note, the losses",
        printed="Beside the KL divergence a cosine loss transfers the dark knowledge of intermediate layers.",
        right=(
            "Both losses are about intermediate layers, and neither about all of them: the divergence compares what "
            "each token *attends to*, the cosine the direction of one token's state, the classification token's."
        ),
        check=_check_what_is_matched,
    ),
    Erratum(
        id="I3",
        kind="code",
        where="airaria/TextBrewer@3496f3e: src/textbrewer/losses.py, att_ce_loss without a mask",
        printed="Teacher's probabilities are set to 0 where the score is at most -0.001.",
        right=(
            "Meant for scores that a mask made very negative, it drops every negative score. A softmax does not know a "
            "constant, this loss does; where all scores of a row are negative the row counts nothing."
        ),
        check=_check_guard,
    ),
    Erratum(
        id="I4",
        kind="code",
        where="airaria/TextBrewer@3496f3e: src/textbrewer/losses.py, att_ce_loss with a mask",
        printed="'Masks the positions where the mask is 0.'",
        right=(
            "Rows and terms of padding are left out, but padding takes part in the softmax of both networks, so that "
            "its scores change the loss. The value is a cross-entropy: it has the teacher's entropy in it, and is not "
            "0 for a perfect copy."
        ),
        check=_check_padding,
    ),
    Erratum(
        id="I5",
        kind="code",
        where="airaria/TextBrewer@3496f3e: src/textbrewer/losses.py, cos_loss and pkd_loss",
        printed="Two losses between hidden states, to be weighted alike.",
        right=(
            r"`pkd_loss` is $\lVert \hat h^t - \hat h^s \rVert^2 = 2(1 - \cos)$, twice the cosine loss, and takes the "
            r"first token; `cos_loss` is a mean over all tokens."
        ),
        check=_check_factor,
    ),
)
