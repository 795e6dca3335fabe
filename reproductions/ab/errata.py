r"""What the note and public code got wrong about activation boundaries, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories as read at the commits named.
That toolboxes scale the same sum in three ways stands among the toolboxes' own mistakes (T2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdrefs.methods.ab import ab_loss
from kdrefs.methods.at import at_loss
from kdrefs.methods.fitnets import hint_loss
from kdrefs.methods.nst import nst_loss
from reproductions.harness.errata import Erratum, Evidence, draw

Loss = Callable[[Tensor, Tensor], Tensor]


def _pull(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher), student)[0]


def _turned(teacher: Tensor, place: int) -> Tensor:
    """The teacher with one response of the other sign."""
    turned = teacher.clone()
    turned.view(-1)[place] *= -1
    return turned


def _check_weak_responses() -> Evidence:
    teacher = draw(4, 6, 4, 4, seed=1)
    student = 0.5 * draw(4, 6, 4, 4, seed=2).tanh()  # no neuron is past the margin
    places = {"weakest": int(teacher.abs().argmin()), "strongest": int(teacher.abs().argmax())}
    losses: dict[str, Loss] = {"AB": ab_loss, "hint": hint_loss, "NST": nst_loss, "AT": at_loss}
    moved = {
        name: [
            float((_pull(loss, student, _turned(teacher, place)) - _pull(loss, student, teacher)).norm())
            for place in places.values()
        ]
        for name, loss in losses.items()
    }
    faint = teacher.clone()
    faint[:, 0] *= 1e-3  # a whole channel that fires a thousand times weaker
    across = float(nst_loss(student, faint) - nst_loss(student, teacher))
    mirrored = float(nst_loss(-teacher, teacher)), float(ab_loss(-teacher, teacher))
    return Evidence(
        holds=abs(moved["AB"][0] - moved["AB"][1]) < 1e-12 < 0.1 < moved["AB"][0]
        and all(100 * moved[name][0] < moved[name][1] for name in ("hint", "NST"))
        and max(moved["AT"]) < 1e-12
        and abs(across) < 1e-12
        and mirrored[0] < 1e-12 < 100 < mirrored[1],
        summary=(
            f"Turning the sign of the teacher's weakest of {teacher.numel()} responses, and of its strongest, moves "
            "the student's gradient by "
            + "; ".join(
                f"{weak:.0e} and {strong:.0e} ({name})"
                if name != "AB"
                else f"{weak:.2f} and {strong:.2f} (AB)"
                for name, (weak, strong) in moved.items()
            )
            + f". A channel a thousand times weaker changes NST by {abs(across):.0e}. Every sign turned: NST "
            f"{mirrored[0]:.0e}, AB {mirrored[1]:.0f}."
        ),
        values={
            f"{name}, {which}": v
            for name, pair in moved.items()
            for which, v in zip(places, pair, strict=True)
        },
    )


def _check_labels_are_signs() -> Evidence:
    student, teacher = draw(4, 6, 4, 4, seed=3), draw(4, 6, 4, 4, seed=4)
    scales = draw(4, 6, 4, 4, seed=5).exp() ** 4
    losses: dict[str, Loss] = {"AB": ab_loss, "hint": hint_loss}
    ratios = {
        name: float(loss(student, scales * teacher) / loss(student, teacher)) for name, loss in losses.items()
    }
    tiny = float(ab_loss(student, 1e-6 * teacher) / ab_loss(student, teacher))
    return Evidence(
        holds=abs(ratios["AB"] - 1) < 1e-12 and abs(tiny - 1) < 1e-12 and ratios["hint"] > 10,
        summary=(
            f"Every response times a factor of its own ({float(scales.min()):.0e} to {float(scales.max()):.0e}): AB "
            f"becomes {ratios['AB']:.0f} times what it was, a hint {ratios['hint']:.0e} times. All of them times "
            f"1e-6: AB {tiny:.0f} times."
        ),
        values=ratios | {"AB, all times 1e-6": tiny},
    )


def _check_teacher_in_training_mode() -> Evidence:
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    layer = nn.Sequential(conv, norm).double().requires_grad_(False)
    conv.weight.copy_(draw(8, 3, 3, 3, seed=6))
    images = draw(512, 3, 6, 6, seed=7) + 1.5 * draw(512, 3, 1, 1, seed=8)
    for _ in range(50):
        layer(images)  # running statistics of the whole set
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    layer.eval()
    calm = layer(images) > 0
    layer.train()
    batches = {}
    for size in (8, 32, 128):
        found = torch.cat([layer(part) > 0 for part in images.split(size)])
        batches[size] = 100 * float((found != calm).double().mean())
    drift = float((norm.running_mean - before).norm() / before.norm())
    return Evidence(
        holds=batches[8] > batches[32] > batches[128] > 0.1 and drift > 0,
        summary=(
            "One convolution with batch normalisation as the teacher: in training mode "
            + ", ".join(f"{share:.1f} % (batches of {size})" for size, share in batches.items())
            + " of its signs are not those of the trained network. Meanwhile its running means moved by "
            f"{100 * drift:.0f} % of their length."
        ),
        values={f"batches of {size}, %": share for size, share in batches.items()},
    )  # fmt: skip


def _check_margin() -> Evidence:
    teacher = draw(16, 8, 4, 4, seed=9)
    right = torch.where(teacher > 0, 1.5, -1.5).to(teacher)
    values = [float(ab_loss(right, teacher, margin=margin, variant="mean")) for margin in (1.0, 2.0)]
    unit = draw(16, 64, 8, 8, seed=10)  # what a connector's normalisation gives out
    pulled = [100 * float((unit.abs() < margin).double().mean()) for margin in (1.0, 2.0)]
    return Evidence(
        holds=values[0] == 0 and abs(values[1] - 0.25) < 1e-12 and pulled[1] > 90 > 75 > pulled[0],
        summary=(
            f"Neurons on the right side by 1.5 cost {values[0]:.0f} with margin 1 and {values[1]:.2f} each with "
            f"margin 2. Of values of unit variance {pulled[0]:.0f} % are within 1 of the boundary and "
            f"{pulled[1]:.0f} % within 2: nearly every neuron is pulled, on whichever side it is."
        ),
        values={"margin 1": values[0], "margin 2": values[1]},
    )


def _check_layers() -> Evidence:
    # Groups of a wide residual network of width 4 on CIFAR-10, a teacher and a student that know nothing of each other.
    shapes = ((64, 32, 32), (128, 16, 16), (256, 8, 8))
    sums = [
        float(ab_loss(draw(2, *shape, seed=11 + k), draw(2, *shape, seed=21 + k)))
        for k, shape in enumerate(shapes)
    ]
    even = [value / sum(sums) for value in sums]
    halved = [weight * value for weight, value in zip((0.25, 0.5, 1.0), sums, strict=True)]
    shares = [value / sum(halved) for value in halved]
    return Evidence(
        holds=max(abs(share - 1 / 3) for share in shares) < 0.02 and abs(even[0] / even[2] - 4) < 0.2,
        summary=(
            "Three groups of a wide residual network: the layers' shares of the loss are "
            + ", ".join(f"{100 * share:.0f}" for share in even)
            + " % as sums, and "
            + ", ".join(f"{100 * share:.0f}" for share in shares)
            + " % with the authors' weights of 1/4, 1/2 and 1."
        ),
        values={"lowest layer, sums": even[0], "lowest layer, weighed": shares[0]},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="B1",
        kind="note",
        where="note of 2024-03-22, remark under Activation Boundaries",
        printed=(
            "NST and AB both look at the teacher's activations; the boundary that NST learns is insensitive to weak "
            "responses, AB strengthens them and so learns a whole boundary."
        ),
        right=(
            "Of AB it is true that weak and strong responses count alike. NST learns no boundary at all: it does not "
            "change when every sign is turned, nor does attention transfer with its squares. Its indifference to weak "
            "responses holds inside a channel, not between channels. What AB pays: it is blind to every magnitude."
        ),
        check=_check_weak_responses,
    ),
    Erratum(
        id="B2",
        kind="note",
        where="note of 2024-03-22, paragraph on Activation Boundaries, last sentence but one",
        printed="The teacher's activation values are taken as the labels of a binary classification.",
        right="Their signs are. No value enters the loss, in its discrete form or in the one that is trained with.",
        check=_check_labels_are_signs,
    ),
    Erratum(
        id="B3",
        kind="code",
        where="AB_distillation@a7701d3: cifar10_AB_distillation.py, first stage",
        printed="The teacher stays in training mode while its boundaries are transferred.",
        right=(
            "In evaluation mode. Batch normalisation in training mode centres each channel anew in every batch, and "
            "with it the boundary; besides, the teacher's running statistics change."
        ),
        check=_check_teacher_in_training_mode,
    ),
    Erratum(
        id="B4",
        kind="code",
        where="Knowledge-Distillation-Zoo@65470c8: kd_losses/ab.py, margin 2",
        printed="Activation boundaries with a margin of 2.",
        right=(
            "The paper's margin is 1. Behind the connector's batch normalisation values have unit variance, so that a "
            "margin of 2 asks nearly every neuron to move away from its boundary instead of to the right side of it."
        ),
        check=_check_margin,
    ),
    Erratum(
        id="B5",
        kind="code",
        where="torchdistill@3e4373c: torchdistill/losses/mid_level.py, AltActTransferLoss",
        printed="The layers' sums, added up; each has weight 1 unless the user names another.",
        right=(
            r"The authors halve the weight from layer to layer downwards, which makes up for maps that have twice as "
            r"many values. Without it the lowest layer has more of the loss than the others together."
        ),
        check=_check_layers,
    ),
)
