r"""What the notes leave out and the code gets wrong about cross quality distillation, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the authors' repository at the commit named.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdrefs.methods.cqd import cqd_loss
from reproductions.cqd.degradations import Degradation, distorted, edges, load, low_resolution
from reproductions.harness.errata import Erratum, Evidence, draw


def _gradient(student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    student = student.clone().requires_grad_()
    cqd_loss(student, teacher, labels, **options).backward()
    assert student.grad is not None
    return student.grad


def _check_labels() -> Evidence:
    student, teacher = draw(64, 10, seed=1), 3 * draw(64, 10, seed=2)
    labels = torch.arange(64) % 10
    shares = {}
    for name, weight in (("birds", 200.0), ("cars", 50.0)):
        soft = _gradient(student, teacher, None, weight=weight)
        hard = _gradient(student, teacher, labels, weight=weight) - soft
        shares[name] = float(hard.norm() / (hard.norm() + soft.norm()))
    relative = 200.0 / 10.0**2, 50.0 / 10.0**2
    return Evidence(
        holds=all(share > 0.1 for share in shares.values()) and relative == (2.0, 0.5),
        summary=(
            "Random logits, the authors' temperature and weights: the labels' part of the two gradients' norms is "
            + " and ".join(f"{100 * share:.0f} % ({name})" for name, share in shares.items())
            + ". In units of the loss with the factor T² the teacher weighs 2 on birds and 0.5 on cars, the labels 1."
        ),
        values=shares,
    )


def _check_start() -> Evidence:
    generator = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(5, 20, generator=generator, dtype=torch.float64)
    labels = torch.arange(500) % 5
    clean = centres[labels] + torch.randn(500, 20, generator=generator, dtype=torch.float64)
    degraded = (clean + clean.roll(1, 1)) / 2  # neighbours averaged

    def descend(start: Tensor, steps: int, teacher: Tensor | None) -> tuple[Tensor, float]:
        weights, loss = start.clone().requires_grad_(), torch.zeros(())
        for _ in range(steps):
            if teacher is None:
                loss = torch.nn.functional.cross_entropy(clean @ weights, labels)
            else:
                loss = cqd_loss(degraded @ weights, teacher, labels)
            (gradient,) = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                weights -= 0.02 * gradient
        return weights.detach(), float(loss.detach())

    zero = torch.zeros(20, 5, dtype=torch.float64)
    network, _ = descend(zero, 300, None)
    answers = clean @ network
    losses = {name: descend(start, 5, answers)[1] for name, start in (("scratch", zero), ("A", network))}
    best = descend(network, 3000, answers)[1]
    left = (losses["A"] - best) / (losses["scratch"] - best)
    return Evidence(
        holds=0 <= left < 0.5,
        summary=(
            "Linear classifiers, averaged inputs as degraded ones, five steps: what is left "
            "of the loss above its minimum when "
            f"starting from the clean network is {100 * left:.0f} % of what is left from scratch."
        ),
        values={**losses, "minimum": best},
    )


def _check_degradations() -> Evidence:
    train, _, _ = load("digits-lowres", probe=(64, 1))
    pixels = torch.from_numpy(train.clean).permute(0, 3, 1, 2).float() / 255
    kinds: dict[str, Degradation] = {
        "resolution": partial(low_resolution, size=3),
        "edges": edges,
        "distortion": partial(distorted, knots=4, strength=0.15),
    }
    changes = {name: float((degrade(pixels, 0) - pixels).abs().mean()) for name, degrade in kinds.items()}
    localised, _, _ = load("composites-localised", probe=(64, 1))
    ink = {
        "cut out": float((localised.clean > 128).mean()),
        "in the picture": float((localised.degraded > 128).mean()),
    }
    return Evidence(
        holds=min(changes.values()) > 0.02 and ink["cut out"] > 3 * ink["in the picture"],
        summary=(
            "Mean change of a pixel of the digits, in grey levels of 255: "
            + ", ".join(f"{255 * value:.0f} ({name})" for name, value in changes.items())
            + f". Localisation: bright pixels are {100 * ink['cut out']:.0f} % of the cut-out object and "
            f"{100 * ink['in the picture']:.0f} % of the picture."
        ),
        values=changes | ink,
    )


def _check_backward() -> Evidence:
    student, teacher = draw(8, 10, seed=4), draw(8, 10, seed=5)
    gaps = {}
    for first, second in ((10.0, 10.0), (10.0, 2.0)):
        true = _gradient(student, teacher, None, weight=1.0, temperature=second, teacher_temperature=first)
        theirs = ((student / second).softmax(1) / second - (teacher / first).softmax(1) / first) / len(
            student
        )
        gaps[second] = float((theirs - true).norm() / true.norm())
    sums = float(((student / 2).softmax(1) / 2 - (teacher / 10).softmax(1) / 10).sum(1).mean())
    return Evidence(
        holds=gaps[10.0] < 1e-12 and gaps[2.0] > 0.5 and abs(sums - 0.4) < 1e-12,
        summary=(
            f"T₁ = T₂ = 10: equal to {gaps[10.0]:.0e}. T₁ = 10, T₂ = 2: theirs is {100 * gaps[2.0]:.0f} % of "
            f"the gradient's norm away from it. It sums to {sums:.1f} over the classes, a derivative by logits to 0."
        ),
        values={"off, equal temperatures": gaps[10.0], "off, 10 and 2": gaps[2.0]},
    )


_NOTE = "note of 2024-03-22, Adapting Models to Signal Degradation using Distillation"

ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="D1",
        kind="note",
        where=f"{_NOTE}: 'the student imitates the teacher by distillation'",
        printed="The student is trained on degraded images to imitate the teacher.",
        right=(
            "Two losses act: the labels' cross-entropy on the degraded image stands beside "
            "the teacher's, with weight 1 against "
            r"$\lambda/T^2$."
        ),
        check=_check_labels,
    ),
    Erratum(
        id="D2",
        kind="note",
        where=f"{_NOTE}: 'train a student network'",
        printed="A teacher is trained on clean images, then a student on degraded ones.",
        right=(
            "Both have one architecture, and among the authors' seven rows one student of the answers starts from the "
            "teacher's weights. From where it starts is half of the method; the control is fine-tuning from there."
        ),
        check=_check_start,
    ),
    Erratum(
        id="D3",
        kind="note",
        where=f"{_NOTE}: 'images of high resolution … of very low quality'",
        printed="The degradation is a loss of resolution.",
        right=(
            "The authors' runs also remove colours and surfaces (edges), distort, and take "
            "away the localisation: the teacher sees "
            "the object cut out, the student the whole picture."
        ),
        check=_check_degradations,
    ),
    Erratum(
        id="D4",
        kind="code",
        where="cross_quality_distillation@cb8149f: vl_nndistillloss.m, the backward pass",
        printed=r"$p_s / T_2 - p_t / T_1$ as the gradient of the softened cross-entropy.",
        right=(
            r"$(p_s - p_t)/T_2$: the teacher's temperature softens its answers and divides nothing. Equal where "
            r"$T_1 = T_2$, as in the authors' runs."
        ),
        check=_check_backward,
    ),
)
