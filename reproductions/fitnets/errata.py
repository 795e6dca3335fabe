r"""What the notes and public code got wrong about FitNets, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories as read at the commits named.
"""

from __future__ import annotations

import torch

from kdrefs.methods.fitnets import hint_loss, teacher_weight
from reproductions.harness.errata import Erratum, Evidence, draw


def _check_alignment() -> Evidence:
    hint = draw(2, 3, 4, 4, seed=1)
    rises = []
    for position in range(hint[0].numel()):
        moved = hint.clone()
        moved[0].view(-1)[position] += 1
        rises.append(float(hint_loss(moved, hint)))
    swapped = hint.flip(1)
    rolled = hint.roll(1, dims=-1)
    zero, channels, places = (float(hint_loss(student, hint)) for student in (hint, swapped, rolled))
    return Evidence(
        holds=zero == 0 and max(abs(rise - 0.25) for rise in rises) < 1e-12 and min(channels, places) > 1,
        summary=(
            f"Maps of 3 x 4 x 4 for two samples: each of the {len(rises)} values that leaves the hint's by 1 costs "
            f"{rises[0]:.2f}, whichever it is; the hint's own map costs {zero:.0f}, with its channels in another order "
            f"{channels:.1f}, moved by one column {places:.1f}."
        ),
        values={"one value off by 1": rises[0], "channels reversed": channels, "one column further": places},
    )


def _check_axis() -> Evidence:
    student, hint = draw(8, 80, 8, 8, seed=2), draw(8, 80, 8, 8, seed=3)
    paper = float(hint_loss(student, hint))
    s, t = (x.permute(1, 2, 3, 0).numpy() for x in (student, hint))  # their axes: ('c', 0, 1, 'b')
    theirs = float((0.5 * (t - s) ** 2).sum(axis=1).mean())
    variant = float(hint_loss(student, hint, variant="official"))
    narrow = [float((0.5 * (t[:c] - s[:c]) ** 2).sum(axis=1).mean()) for c in (10, 80)]
    whole = [float(hint_loss(student[:, :c], hint[:, :c])) for c in (10, 80)]
    return Evidence(
        holds=abs(paper / theirs / (80 * 8) - 1) < 1e-9
        and abs(variant - theirs) < 1e-9
        and 0.8 < narrow[1] / narrow[0] < 1.25
        and 6 < whole[1] / whole[0] < 10,
        summary=(
            f"80 channels of 8 x 8: equation 3 gives {paper:.0f}, their sum over axis 1 "
            f"{theirs:.2f}, {paper / theirs:.0f} times less. From 10 to 80 channels equation 3 grows by "
            f"{whole[1] / whole[0]:.1f}, theirs by {narrow[1] / narrow[0]:.2f}."
        ),
        values={"equation 3": paper, "official": theirs},
    )


def _check_mean() -> Evidence:
    shapes = {"ResNet-56": (32, 16, 16), "WRN-40-2": (64, 16, 16)}
    ratios, values = [], {}
    for name, shape in shapes.items():
        student, hint = draw(4, *shape, seed=4), draw(4, *shape, seed=5)
        ratio = float(hint_loss(student, hint, variant="mean") / hint_loss(student, hint))
        ratios.append(ratio * hint[0].numel() / 2)
        values[name] = 100 * ratio
    return Evidence(
        holds=max(abs(ratio - 1) for ratio in ratios) < 1e-9,
        summary=(
            "RepDistiller's weight 100 is, in units of equation 3, "
            + " and ".join(f"{value:.4f} for a hint of {name}" for name, value in values.items())
            + " (32 and 64 channels of 16 x 16)."
        ),
        values=values,
    )


def _check_regressor() -> Evidence:
    teacher = draw(64, 8, 2, 2, seed=6)
    mixing = torch.linalg.qr(draw(8, 8, seed=7)).Q
    # All that the teacher knows, in other coordinates.
    student = torch.einsum("oc,nchw->nohw", mixing, teacher)
    plain = float(hint_loss(student, teacher))
    rows, wanted = (x.permute(0, 2, 3, 1).reshape(-1, 8) for x in (student, teacher))
    weight = torch.linalg.lstsq(rows, wanted).solution
    regressed = torch.einsum("co,nchw->nohw", weight, student)
    fitted = float(hint_loss(regressed, teacher))
    return Evidence(
        holds=plain > 1 and fitted < 1e-12,
        summary=(
            f"A student whose eight channels are the teacher's, rotated: loss {plain:.1f} without a regressor, "
            f"{fitted:.0e} with the best 1 x 1 convolution."
        ),
        values={"without a regressor": plain, "with": fitted},
    )


def _check_half_cross_entropy() -> Evidence:
    hint = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)[:, None]
    theirs = -grid.log() * hint
    whole = theirs - (1 - grid).log() * (1 - hint)
    best_theirs, best = (grid[loss.argmin(0), 0] for loss in (theirs, whole))
    below = torch.tensor(-0.5).log()
    return Evidence(
        holds=bool((best_theirs == grid[-1]).all())
        and float((best - hint).abs().max()) < 1e-9
        and bool(below.isnan()),
        summary=(
            "Hints of 0.1 to 0.9 after a sigmoid: their cost is smallest at an output of "
            f"{best_theirs.min():.3f}, the end of the grid, for every one of them; the whole cross-entropy at the hint "
            f"itself. A regressor that ends in tanh gives negative outputs, whose logarithm is {below.item()}."
        ),
        values={"best output, theirs": best_theirs.min().item()},
    )


def _check_weight() -> Evidence:
    start, end = teacher_weight(0.0), teacher_weight(1.0)
    temperature = 3
    return Evidence(
        holds=(start, end) == (4.0, 1.0) and start / temperature**2 < 0.5,
        summary=(
            f"λ from {start:.0f} to {end:.0f} at T = {temperature} without the factor is "
            f"{start / temperature**2:.2f} to {end / temperature**2:.2f} with it, beside a cross-entropy of weight 1; "
            f"T = 4 and α = 0.9 give the teacher {0.9 / 0.1:.0f} times the weight of the labels."
        ),
        values={"at the start": start / temperature**2, "at the end": end / temperature**2},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="F1",
        kind="note",
        where="note of 2024-03-22, FitNets, first sentence and remark",
        printed="FitNets does not directly align the feature maps of teacher and student, and is the first not to.",
        right=(
            "Its first stage is exactly that: the squared distance of every value of one map to the same value of the "
            "other, through a regressor. What is new is that an intermediate layer is used at all."
        ),
        check=_check_alignment,
    ),
    Erratum(
        id="F2",
        kind="code",
        where="FitNets@0f633b1: costs/HintCost.py with axes ('c', 0, 1, 'b') of the released YAML files",
        printed=r"`T.sum(cost, axis=1)`, then the mean: meant as equation 3.",
        right=(
            r"With these axes, axis 1 runs over the rows of the maps. What is computed is equation 3 divided by "
            r"$CW$: it no longer grows with the number of channels."
        ),
        check=_check_axis,
    ),
    Erratum(
        id="F3",
        kind="code",
        where="RepDistiller@b84f547: distiller_zoo/FitNet.py",
        printed="The mean of the squares over everything, weight 100 for all pairs of networks.",
        right=(
            r"Equation 3 sums over the map: theirs is $2/(CHW)$ of it. The same weight means another strength for "
            r"each pair of networks."
        ),
        check=_check_mean,
    ),
    Erratum(
        id="F4",
        kind="code",
        where="Knowledge-Distillation-Zoo@65470c8: kd_losses/fitnet.py",
        printed="The squared distance of the two maps without a regressor, as FitNets.",
        right=(
            "The regressor is part of the method: without it student and teacher need equal widths, and a student that "
            "knows the same in other coordinates is punished."
        ),
        check=_check_regressor,
    ),
    Erratum(
        id="F5",
        kind="code",
        where="FitNets@0f633b1: costs/HintCost.py, hint layers with sigmoid or tanh",
        printed=r"$-h \log r$ as the cross-entropy of regressor output $r$ and hint $h$.",
        right=(
            r"$-h \log r - (1-h) \log(1-r)$. The half that is there is smallest at $r = 1$ whatever the hint; for "
            r"tanh only the hint is moved to $[0, 1]$, not the output."
        ),
        check=_check_half_cross_entropy,
    ),
    Erratum(
        id="F6",
        kind="code",
        where="FitNets@0f633b1: costs/KDCost.py, yaml/cifar10_fitnet19_valid.yaml",
        printed=r"Second stage with $\lambda$ falling from 4 to 1 beside labels of weight 1.",
        right=(
            r"There is no factor $T^2$: at $T = 3$ the weight in the usual convention is $\lambda/9$, so the teacher "
            r"counts for less than the labels from the start."
        ),
        check=_check_weight,
    ),
)
