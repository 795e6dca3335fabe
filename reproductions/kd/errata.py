r"""What the notes and public code got wrong about knowledge distillation, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, the repositories as read at the commits named.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.kd import kd_loss
from reproductions.harness.errata import Erratum, Evidence


def draw(rows: int, classes: int, seed: int) -> Tensor:
    """Logits with the spread that trained networks have, float64."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes, sample by sample."""
    return logits - logits.mean(dim=1, keepdim=True)


def squared_gap(student: Tensor, teacher: Tensor) -> float:
    r""":math:`\frac{1}{2K} \lVert s - t \rVert^2`, mean over samples: the limit if logits have mean zero."""
    return ((student - teacher).square().sum(dim=1).mean() / (2 * student.shape[1])).item()


def _gradient(student: Tensor, teacher: Tensor, temperature: float, *, scale: bool = True) -> Tensor:
    student = student.clone().requires_grad_()
    kd_loss(student, teacher, temperature=temperature, scale=scale).backward()
    assert student.grad is not None
    return student.grad


def _check_limit() -> Evidence:
    teacher = draw(64, 10, 1)
    student = draw(64, 10, 2) + 2 * torch.arange(64, dtype=torch.float64)[:, None] / 64
    hot = kd_loss(student, teacher, temperature=1e4).item()
    limit, raw = squared_gap(centred(student), centred(teacher)), squared_gap(student, teacher)
    shifted = teacher + 5
    blind, regression = kd_loss(shifted, teacher, temperature=1e4).item(), squared_gap(shifted, teacher)
    at_four, at_thousand = (
        float((_gradient(student, teacher, t) * 640 - gap).norm() / gap.norm())
        for gap in [centred(student) - centred(teacher)]
        for t in (4, 1000)
    )
    return Evidence(
        holds=abs(hot - limit) < 1e-3 * limit
        and raw > 1.05 * limit
        and blind < 1e-9 < regression
        and at_four > 0.1 > 0.01 > at_thousand,
        summary=(
            f"64 samples, 10 classes, T = 10,000: T² KL is {hot:.4f}; half the squared gap over K is {limit:.4f} with "
            f"centred logits and {raw:.4f} without. A student whose logits are the teacher's plus 5 has KD loss "
            f"{abs(blind):.0e} and regression loss {regression:.1f}. At T = 4 the gradient is still "
            f"{100 * at_four:.0f} % away from the limit's, at T = 1000 {100 * at_thousand:.2f} %."
        ),
        values={"T² KL": hot, "centred": limit, "raw": raw, "gradient off at T = 4": at_four},
    )


def _check_missing_factor() -> Evidence:
    student, teacher = draw(64, 10, 3), draw(64, 10, 4)
    temperature = 4.0
    softened = F.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    ).item()  # what their module returns without targets
    labelled = kd_loss(student, teacher, temperature=temperature).item()
    variant = kd_loss(student, teacher, temperature=temperature, variant="torchdistill").item()
    return Evidence(
        holds=abs(labelled / softened - temperature**2) < 1e-9 and abs(variant - softened) < 1e-12,
        summary=(
            f"The same logits at T = 4: the soft term counts {labelled:.3f} beside labels and {softened:.3f} without, "
            f"{labelled / softened:.0f} times less."
        ),
        values={"with labels": labelled, "without labels": softened},
    )


def _check_elements() -> Evidence:
    ratios: dict[int, float] = {}
    for classes in (10, 100, 1000):
        student, teacher = draw(32, classes, 5), draw(32, classes, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says itself that its default is not the divergence
            default = nn.KLDivLoss()((student / 4).log_softmax(1), (teacher / 4).softmax(1))
        ratios[classes] = float(kd_loss(student, teacher) / (16 * default))
    return Evidence(
        holds=all(abs(ratio / classes - 1) < 1e-9 for classes, ratio in ratios.items()),
        summary=(
            "KL over KLDivLoss() is "
            + ", ".join(f"{ratio:.0f} for {classes} classes" for classes, ratio in ratios.items())
            + ": a weight tuned on CIFAR-10 is ten times too small on CIFAR-100."
        ),
        values={f"ratio, {classes} classes": ratio for classes, ratio in ratios.items()},
    )


def _check_squared_probabilities() -> Evidence:
    shares: dict[int, float] = {}
    for classes in (10, 100):
        student, teacher = draw(32, classes, 7), draw(32, classes, 8)
        s = student.clone().requires_grad_()
        (400 * F.mse_loss((teacher / 20).softmax(1), (s / 20).softmax(1))).backward()
        assert s.grad is not None
        shares[classes] = float(s.grad.norm() / _gradient(student, teacher, 20).norm())
    # For T to infinity T² MSE tends to |gap|² / K³, T² KL to |gap|² / 2K.
    expected = {classes: 2 / classes**2 for classes in shares}
    return Evidence(
        holds=all(abs(shares[k] / expected[k] - 1) < 0.1 for k in shares),
        summary=(
            "At T = 20 the gradient of their soft term is "
            + " and ".join(f"{share:.5f} of KD's with {classes} classes" for classes, share in shares.items())
            + "; the limit for large T is 2/K²."
        ),
        values={f"gradient, {classes} classes": share for classes, share in shares.items()},
    )


def _check_no_factor() -> Evidence:
    student, teacher = draw(64, 10, 9), draw(64, 10, 10)
    sizes = {
        (scale, t): float(_gradient(student, teacher, t, scale=scale).norm())
        for scale in (True, False)
        for t in (5, 10, 20)
    }
    kept, lost = (sizes[scale, 20] / sizes[scale, 5] for scale in (True, False))
    weights = {"FitNets": (3, 4.0), "AB": (3, 1.0), "CQD": (10, 200.0)}
    ours = {name: weight / t**2 for name, (t, weight) in weights.items()}
    return Evidence(
        holds=0.6 < kept < 1.6 and abs(lost / kept - 1 / 16) < 1e-9,
        summary=(
            f"From T = 5 to T = 20 the gradient changes by {kept:.2f} with the factor and by {lost:.3f} without. "
            "In units of the loss with the factor their weights are "
            + ", ".join(f"{weight:.2g} ({name})" for name, weight in ours.items())
            + "."
        ),
        values={"with the factor": kept, "without": lost, **ours},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="K1",
        kind="note",
        where="note of 2024-03-22, remark on the two papers of 2014",
        printed=(
            "The two ideas are in fact the same: small probabilities count for too little, one uses a temperature "
            "against that, the other goes round the softmax."
        ),
        right=(
            r"For $T \to \infty$, $T^2 KL \to \frac{1}{2K}\lVert (s - \bar s) - (t - \bar t)\rVert^2$, the mean of "
            r"each sample's logits taken off. That is logit regression only for logits of mean zero, as section 2.1 "
            r"of the paper assumes. Otherwise regression also matches an offset that no prediction depends on, and "
            r"at the temperatures in use the two differ anyway."
        ),
        check=_check_limit,
    ),
    Erratum(
        id="K2",
        kind="code",
        where="torchdistill@3e4373c: torchdistill/losses/mid_level.py, KDLoss",
        printed=r"The factor $T^2$ stands beside a label term only; without targets the plain divergence is returned.",
        right=r"$T^2$ belongs to the soft term, so that its gradient keeps its size whatever stands beside it.",
        check=_check_missing_factor,
    ),
    Erratum(
        id="K3",
        kind="code",
        where="KD_Lib@a94d236: KD_Lib/KD/vision/noisy/soft_random.py; the default of torch.nn.KLDivLoss",
        printed="`nn.KLDivLoss()` as the divergence.",
        right=(
            r"Its default averages over samples *and* classes: the divergence divided by $K$. "
            r'`reduction="batchmean"` is the divergence.'
        ),
        check=_check_elements,
    ),
    Erratum(
        id="K4",
        kind="code",
        where="KD_Lib@a94d236: KD_Lib/KD/vision/vanilla/vanilla_kd.py",
        printed=r"Hinton's loss as $T^2$ times the mean squared difference of the softened probabilities.",
        right=(
            r"The paper's soft term is a cross-entropy. The squared difference has $2/K^2$ of its gradient at high "
            r"temperature: with the default weight of one half the teacher hardly takes part."
        ),
        check=_check_squared_probabilities,
    ),
    Erratum(
        id="K5",
        kind="code",
        where=(
            "FitNets@0f633b1: costs/KDCost.py; AB_distillation@a7701d3: cifar10_AB_distillation.py; "
            "cross_quality_distillation@cb8149f"
        ),
        printed=r"The soft term without the factor $T^2$ of section 2 of Hinton et al.",
        right=(
            r"Without it the gradient falls as $1/T^2$, and a weight holds for its temperature only. A weight $w$ of "
            r"theirs is $w/T^2$ here (`scale=False` computes theirs)."
        ),
        check=_check_no_factor,
    ),
)
