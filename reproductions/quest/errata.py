r"""What the notes and the authors' code of QUEST got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, valeoai/QuEST at the commit named, as read.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.divergences import softened_kl
from kdrefs.methods.quest import fit_vocabulary, mean_largest_assignment, quest_loss, soft_assignment
from reproductions.harness.errata import Erratum, Evidence, draw

LINK = "ecva.net/papers/eccv_2020/papers_ECCV/papers/123660171.pdf"  # README of valeoai/QuEST@02a23d2
RATES = ((150, 0.05), (180, 0.005), (210, 0.0005), (240, 0.00005))  # until epoch, rate: RN56_RN20.py there
OPTION_RATE = 0.1


def _check_venue() -> Evidence:
    return Evidence(
        holds="eccv_2020" in LINK and "cvpr" not in LINK.lower(),
        summary=f"The authors' README links the paper in the archive of the conference: `{LINK}`.",
    )


def _check_what_is_distilled() -> Evidence:
    maps, words, classifier = draw(4, 8, 4, 4, seed=1), draw(6, 8, seed=2), draw(10, 8, seed=3)
    moved = maps.flatten(2).flip(2).view_as(maps)  # every position's feature elsewhere in the image

    def logits(features: Tensor) -> Tensor:
        return features.mean((2, 3)) @ classifier.T

    kd = abs(softened_kl(logits(moved), logits(maps), 4.0).item())
    quest = quest_loss(soft_assignment(moved, words, 0.2).log(), maps, words, 0.2).item()
    renamed = softened_kl(logits(maps).roll(1, dims=1), logits(maps), 4.0).item()
    return Evidence(
        holds=kd < 1e-12 and quest > 0.1 and renamed > 0.1,
        summary=(
            f"Features moved to other positions: class probabilities do not notice ({kd:.0e} nats), QUEST does "
            f"({quest:.2f}). Classes of the teacher renamed: class probabilities notice ({renamed:.2f}), QUEST, which "
            "never asks for them, does not."
        ),
        values={"KD, moved": kd, "QUEST, moved": quest, "KD, renamed": renamed},
    )


def _check_learned() -> Evidence:
    def error(features: Tensor, words: Tensor) -> float:
        return torch.cdist(features, words).amin(1).square().mean().item()

    centres = 3 * draw(8, 16, seed=4)
    features = [(centre.repeat(40, 1) + 0.3 * draw(320, 16, seed=5)).relu() for centre in (centres, -centres)]
    words = [fit_vocabulary(x, 8, torch.Generator().manual_seed(0), method="lloyd") for x in features]
    own, other = error(features[0], words[0]), error(features[0], words[1])
    return Evidence(
        holds=own < other / 3,
        summary=(
            f"Mean squared distance of one teacher's features to the nearest of 8 words: {own:.1f} with the words "
            f"learned from them, {other:.1f} with those of another teacher."
        ),
        values={"own words": own, "another teacher's": other},
    )


def _check_option_multiplies() -> Evidence:
    features, words = 0.4 * draw(400, 16, seed=6).relu(), 0.4 * draw(64, 16, seed=7).relu()
    read = {
        "5 times the distance": mean_largest_assignment(features, words, beta=5.0),
        "distance over 5": mean_largest_assignment(features, words, tau=5.0),
        "5 times, features x 10": mean_largest_assignment(10 * features, 10 * words, beta=5.0),
    }
    first, second, scaled = read.values()
    return Evidence(
        holds=second < first < scaled and scaled > 0.95 and second < 2 / 64,
        summary=(
            f"Mean largest probability among 64 words with the option at 5: {first:.2f}. Read as a temperature that "
            f"divides it would be {second:.3f}, all but uniform (1/64 = {1 / 64:.3f}). With features ten times as "
            f"large the same 5 gives {scaled:.2f}."
        ),
        values=read,
    )


def _check_missing_parts() -> Evidence:
    orthogonal = math.exp(3) / (math.exp(3) + 4095)
    opposite = math.exp(3) / (math.exp(3) + 4095 * math.exp(-3))
    scores, teacher, words = draw(4, 6, 8, 8, seed=8), draw(4, 8, 8, 8, seed=9), draw(6, 8, seed=10)
    loss = quest_loss(scores, teacher, words, 0.2).item()
    target = soft_assignment(teacher, words, 0.2)
    undivided = F.kl_div(scores.log_softmax(1), target, reduction="batchmean").item()
    reverse = (scores.softmax(1) * (scores.log_softmax(1) - target.log())).sum(1).mean().item()
    return Evidence(
        holds=abs(undivided / loss - 64) < 1e-9 and abs(reverse - loss) > 0.01 and opposite < 0.1,
        summary=(
            f"Without a learned scale, at 3 and with 4096 words, a word that is met exactly gets "
            f"{100 * orthogonal:.1f} % (others orthogonal) to {100 * opposite:.0f} % (others opposite). "
            f"The KL of one batch is {loss:.2f} nats the right way round and {reverse:.2f} the other way; summed over "
            f"8 x 8 positions instead of averaged it is {undivided / loss:.0f} times as large."
        ),
        values={"largest probability": orthogonal, "KL": loss, "reversed": reverse, "summed": undivided},
    )


def _check_code() -> Evidence:
    features, words = draw(64, 4, seed=11), draw(6, 4, seed=12).requires_grad_()
    scores = draw(64, 6, seed=13)
    # As the code has it: the codebook is a parameter, and its assignment is not computed under no_grad.
    target = (-5 * torch.cdist(features, words).square()).softmax(1)
    (gradient,) = torch.autograd.grad(
        F.kl_div(scores.log_softmax(1), target, reduction="batchmean"), words, retain_graph=True
    )
    first = next(rate for until, rate in RATES if until > 0)
    outside = sum(abs(offset - 4) for offset in range(9)) / 9 / 32  # crops of 32 from 40 pixels, one axis
    padded = 1 - (1 - outside) ** 2
    return Evidence(
        holds=gradient.abs().max().item() > 1e-6 and first != OPTION_RATE and 0.1 < padded < 0.2,
        summary=(
            f"The codebook gets a gradient (largest entry {gradient.abs().max().item():.2f} in a small example) that "
            f"no optimiser uses, at the cost of a graph over all assignments. The option's rate {OPTION_RATE:g} is "
            f"{first:g} from the first epoch on. {100 * padded:.0f} % of the pixels of a crop come from the padding, "
            "reflected there and 0 in the table's code."
        ),
        values={"largest gradient": gradient.abs().max().item(), "rate": first, "padded share": padded},
    )


def small_noise(sigma: float) -> tuple[float, float]:
    """Relative change of the hint and of the hard assignment, in %, for the example of U7.

    One feature, uniform between -1 and 1, two words at -1/2 and 1/2, normal noise of standard deviation ``sigma``.
    """
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    flips = torch.special.ndtr(-x.abs() / sigma).mean().item()  # the noise carries x across 0
    # Two independent features differ by 2/3 in mean square; two assignments by 2 with probability one half.
    return 100 * sigma**2 / (2 / 3), 100 * 2 * flips


def _check_small_noise() -> Evidence:
    sigmas = (0.2, 0.1, 0.05)
    found = {sigma: small_noise(sigma) for sigma in sigmas}
    hint, hard = ([found[sigma][k] for sigma in sigmas] for k in range(2))
    return Evidence(
        holds=all(abs(a / b - 4) < 1e-9 for a, b in pairwise(hint))
        and all(abs(a / b - 2) < 0.01 for a, b in pairwise(hard))
        and all(soft > raw for raw, soft in found.values()),
        summary=(
            "One feature, uniform on [-1, 1], two words. Relative change of the feature and of its nearest word: "
            + ", ".join(f"{a:.1f} % and {b:.1f} % (σ = {s:g})" for s, (a, b) in found.items())
            + ". Half the noise moves the feature a quarter as far, and the assignment half as far."
        ),
        values={
            f"{name}, σ = {s:g}": v
            for s in sigmas
            for name, v in zip(("hint", "word"), found[s], strict=True)
        },
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="U1",
        kind="note",
        where="note, 从类概率蒸馏, 1: heading",
        printed="QUEST … (CVPR 2020).",
        right="European Conference on Computer Vision (ECCV) 2020.",
        check=_check_venue,
    ),
    Erratum(
        id="U2",
        kind="note",
        where="note, 从类概率蒸馏 (distilling class probabilities), 1",
        printed="QUEST stands among the methods that distil class probabilities.",
        right="It distils which words the features at each position are near to; no class and no logit is asked for.",
        check=_check_what_is_distilled,
    ),
    Erratum(
        id="U3",
        kind="note",
        where="note, QUEST, first paragraph after the figure",
        printed="A pre-defined vocabulary (预定义的词汇表).",
        right=(
            "Learned by k-means from the teacher's features on the training images without augmentation, then "
            "frozen. (The last paragraph of the note says 'computed beforehand', which is right.)"
        ),
        check=_check_learned,
    ),
    Erratum(
        id="U4",
        kind="note",
        where="note, QUEST, soft assignment; valeoai/QuEST@02a23d2: vector_quantization.py, option temperature",
        printed=r"$\tau$ is a temperature that controls the softness.",
        right=(
            r"In the code the option *multiplies* the squared distance, $\beta = 1/\tau$: larger is harder. And 5, its "
            r"value in all configurations for CIFAR-100 and ImageNet, has a meaning for features of one scale only."
        ),
        check=_check_option_multiplies,
    ),
    Erratum(
        id="U5",
        kind="note",
        where="note, QUEST, predictor and loss",
        printed="A convolution of cosine similarities with parameters W, and the KL divergence of the two vectors.",
        right=(
            r"Missing: the learnable scale $\gamma$ (3 at the beginning) in front of the cosine, without which the "
            r"softmax stays flat; the direction $\mathrm{KL}(p_T \,\|\, p_S)$; the mean over positions, each of which "
            r"is compared with the teacher's at the *same* place; and the objective, cross-entropy plus $\alpha$ "
            r"times the KL, $\alpha = 1$ but for some pairs (2 for VGG-13 to VGG-8)."
        ),
        check=_check_missing_parts,
    ),
    Erratum(
        id="U6",
        kind="code",
        where="valeoai/QuEST@02a23d2: Config_CIFAR100, algorithms/classification, README",
        printed=(
            "A learning rate of 0.1 in the options; a frozen codebook; accuracies to be set beside those of the table "
            "of Tian et al."
        ),
        right=(
            "The rate is overwritten by the table's 0.05 before the first epoch. The codebook is a parameter whose "
            "assignment is computed outside of no_grad, so that a gradient is computed for it and never used. And the "
            "protocol is another one: reflected padding, Nesterov's momentum, the last incomplete batch dropped, and "
            "the checkpoint with the best *test* accuracy evaluated."
        ),
        check=_check_code,
    ),
    Erratum(
        id="U7",
        kind="note",
        where="note, QUEST, last paragraph (对教师特征的扰动不敏感)",
        printed="The assignment is insensitive to perturbations of the teacher's features.",
        right=(
            r"Not in general. A feature near the border between two words changes its word however small the noise: "
            r"for small $\sigma$ the hard assignment moves by $\mathcal O(\sigma)$ in mean square, the feature itself "
            r"by $\mathcal O(\sigma^2)$. What large noise does is a question of measurement."
        ),
        check=_check_small_noise,
    ),
)
