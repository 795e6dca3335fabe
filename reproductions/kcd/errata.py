r"""What the note, the paper and the authors' code of KCD got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code* and *poster*, dzy3/KCD at the commit named, as
read.
"""

from __future__ import annotations

from reproductions.harness.errata import Erratum
from reproductions.kcd import equations, selection

CODE = "dzy3/KCD@8974b6c"

ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="K1",
        kind="note",
        where="note, equations 1 to 4, 6, 9 and 11",
        printed=r"An inner sum over $x \in \mathcal C$, or none at all (equation 1), called the cross-entropy.",
        right=(
            r"$\sum_{x \in \mathcal X} \sum_{c \in \mathcal C}$, as on the authors' poster. It is the "
            r"divergence up to the teacher's entropy, which is a constant."
        ),
        check=equations.check_classes,
    ),
    Erratum(
        id="K2",
        kind="note",
        where="note, equations 3 to 6",
        printed=r"$\sum_{y \in \mathcal Y} p_S(x, c, y)$ with $\mathcal Y \in \{0, 1\}^{|K|}$.",
        right=(
            r"Every point has a bit of its own: $\sum_{y \in \{0, 1\}} p_S(x, c, y)$. The vector Y collects the "
            r"bits."
        ),
        check=equations.check_bit,
    ),
    Erratum(
        id="K3",
        kind="paper",
        where="note, equations 4 and 5",
        printed=(
            r"Jensen's inequality is an equality if $p(x, c, y) / Q(y)$ is constant, so $Q(y) = p(y; x, c, "
            r"\theta)$."
        ),
        right=(
            r"Constant *in y, for every x and c separately*: $Q_{x,c}(y) = p(y \,|\, x, c; \theta)$, a "
            r"distribution for each pair. With one Q, or one a point, the inequality is strict unless all "
            r"posteriors agree."
        ),
        check=equations.check_common_distribution,
    ),
    Erratum(
        id="K4",
        kind="paper",
        where="note, equation 6",
        printed=r"The constant $-\sum_y Q \log Q$ is left out, and $Q = p(y; x, c, \theta)$ is put in.",
        right=(
            r"It is a constant only while Q is frozen at the old parameters, as in the M-step; written with the "
            r"same $\theta$ it is not. Without it the gradient is right and the value is no tight bound any "
            r"more."
        ),
        check=equations.check_constant,
    ),
    Erratum(
        id="K5",
        kind="paper",
        where="note, equations 9 to 11",
        printed=(
            r"$\sum_y \mathbb I(p_{\mathcal R} \ge \tau) \log p(x, c, y)$, then $p(x, c; y) = p(x, c)$ and the "
            r"training on the points with Y = 1."
        ),
        right=(
            r"The indicator does not depend on y, so both terms count; a one-hot Q has $Y \log p(x, c, 1) + (1 "
            r"- Y) \log p(x, c, 0)$. Equation 11 leaves out the second term, and with it the bound. It also "
            r"assumes $p(x, c \,|\, y=1) = p(x, c)$; the factor 1/2 adds $|K_1| \log \tfrac12$, no constant in "
            r"$\tau$; and ';' in equation 10 stands for '|'."
        ),
        check=equations.check_indicator,
    ),
    Erratum(
        id="K6",
        kind="paper",
        where="note, Knowledge Condensation Distillation, E-step",
        printed="An expectation-maximisation framework.",
        right=(
            "EM's guarantee does not carry over: Q comes from ranks of entropies and not from the posterior, "
            "and a step on the kept points may lower the objective on all. It is an alternation of selection "
            "and training that EM inspired."
        ),
        check=equations.check_no_em,
    ),
    Erratum(
        id="K7",
        kind="paper",
        where="note, equation 8 and the threshold; README of " + CODE,
        printed=(
            r"Ranks $\{0, \dots, N\}$, $p = 1 - \mathcal R / N$, Y = 1 if $p \ge \tau$; $\tau = 0.7$ in the "
            r"code."
        ),
        right=(
            r"Ranks 0 to N - 1, 0 the highest entropy. $p \ge \tau$ keeps $1 - \tau$ of the points (and one "
            r"more); the code keeps $\tau$ of them, so the rule is $p > 1 - \tau$."
        ),
        check=equations.check_threshold,
    ),
    Erratum(
        id="K8",
        kind="code",
        where=CODE + ": train_student.py, README; poster, workflow",
        printed="A threshold of 0.7: in the end, 70 % of the knowledge is distilled.",
        right=(
            "E-steps stand at the ends of epochs 40, 80, …, 240, and the last one has nothing left to train. "
            "The smallest set that is trained on has 75 %, in the stage that the workflow numbers one too "
            "high."
        ),
        check=selection.check_last_stage,
    ),
    Erratum(
        id="K9",
        kind="note",
        where="note, equation 13 and the sentence before it",
        printed=r"$\mathcal R_V(x) = \arg\mathrm{sort}\, V F^\alpha$, 'cost-aware'.",
        right=(
            r"The rank is the *inverse* of the sorting permutation, in descending order. $F^\alpha$ with "
            r"$\alpha > 0$ is no price but a bonus for points that were trained on often; between points that "
            r"were never dropped it says nothing."
        ),
        check=selection.check_argsort,
    ),
    Erratum(
        id="K10",
        kind="note",
        where="note, Knowledge Partition; dataset/cifar100.py of " + CODE,
        printed="K0 is without value and discarded.",
        right=(
            "All N points are ranked at every E-step. The mean of a dropped point stays what it was when "
            "entropies were high, so that points come back; and K0, the next ranks below the border, has "
            "points that were dropped long ago."
        ),
        check=selection.check_readmission,
    ),
    Erratum(
        id="K11",
        kind="note",
        where="note, equations 14 and 15",
        printed=(
            r"$S = \{|K_1|, |K_1| - 1, \dots, |K_{1L}|\}$ beside points in descending order; $\varepsilon$ from "
            r"0 to $\varepsilon_m$."
        ),
        right=(
            r"S runs *upwards* over the ranks of K1L, $|K_{1H}| + 1, \dots, |K_1|$ (or one less): the highest "
            r"point of K1L is changed least. In the code $\varepsilon_j = 0.3\, j / L$, which stops short of "
            r"$\varepsilon_m$."
        ),
        check=equations.check_ends,
    ),
    Erratum(
        id="K12",
        kind="note",
        where="note, equation 14; dataset/cifar100.py of " + CODE,
        printed=r"$K_{1L} \oplus K_0 \otimes \varepsilon$, $\oplus$ the element-wise addition.",
        right=(
            r"The code computes $(1 - \varepsilon) K_{1L} + \varepsilon K_0$ of the images, not of the labels, "
            r"cuts it off to whole grey values and writes it over the stored image, where it is blended again "
            r"at the next E-step."
        ),
        check=selection.check_blending,
    ),
    Erratum(
        id="K13",
        kind="code",
        where=CODE + ": helper/loops.py, dataset/cifar100.py",
        printed="Entropy as the sum of $-p \\log p$, clipped at the record's maximum; the record is never cleared.",
        right=(
            "A probability that underflows gives NaN, its maximum is NaN, and from then on every score is. "
            "Entropies are to be computed from logarithms."
        ),
        check=selection.check_nan,
    ),
    Erratum(
        id="K14",
        kind="code",
        where=CODE + ": dataset/cifar100.py, option purification",
        printed="An E-step every `purification` epochs (10 by default), with steps of a sixth.",
        right=(
            "The six is written into the code for 240 / 40. An E-step after the floor is reached finds an "
            "empty K0, takes the whole set for its last 0 elements, and stops with an IndexError."
        ),
        check=selection.check_floor,
    ),
    Erratum(
        id="K15",
        kind="paper",
        where=f"poster in {CODE}, table of CIFAR-100",
        printed="Students, KD and CRD beside their condensed forms.",
        right=(
            "Single runs; KD and the students are taken from the table of Tian et al., one of them from the "
            "wrong column; the row CRD is not that table's; one printed difference is not that of its two "
            "numbers."
        ),
        check=selection.check_table,
    ),
    Erratum(
        id="K16",
        kind="note",
        where="note, E-step, before equation 7",
        printed=(
            "Prediction entropy measures what a knowledge point is worth, the point being an image with the "
            "teacher's prediction."
        ),
        right=(
            "The value does not ask the teacher. High entropy says that the student, as it is, cannot decide; "
            "that may be a hard image or a wrong label, and what it gets wrong with confidence has a low "
            "value."
        ),
        check=selection.check_value,
    ),
    Erratum(
        id="K17",
        kind="paper",
        where="poster, comparisons",
        printed="Distillation on the condensed set is compared with distillation on all images over as many epochs.",
        right=(
            "The condensed training has fewer steps, and no comparison says what the *choice* is good for: "
            "sets of the same sizes at random, and all images over as many steps, belong beside it."
        ),
        check=selection.check_steps,
    ),
)
