r"""What the notes, the paper and the authors' code of PKT got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *code*, passalis/probabilistic_kt@a58fd1b and
passalis/pkth@5766e63, as read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.kernels import gaussian_kernel
from kdrefs.methods.pkt import conditional_probabilities, pkt_loss
from kdrefs.metrics import retrieval
from kdrefs.nets import PreActResNet18
from reproductions.harness.claims import paired
from reproductions.harness.errata import Erratum, Evidence, draw
from reproductions.harness.ledger import column_ledger
from reproductions.harness.statistics import Sample


def equiangular(samples: int, cosine: float) -> Tensor:
    """``(samples, samples)`` unit vectors whose pairwise cosines are all ``cosine`` (from 0 to below 1), float64."""
    gram = torch.full((samples, samples), cosine, dtype=torch.float64)
    return torch.linalg.cholesky(gram.fill_diagonal_(1.0))


def _check_diagonal() -> Evidence:
    cosines = (0.0, 0.5, 0.9, 0.999)
    teacher = equiangular(8, 0.0)
    without = [float(pkt_loss(equiangular(8, rho), teacher, diagonal=False)) for rho in cosines]
    included = [float(pkt_loss(equiangular(8, rho), teacher)) for rho in cosines]
    return Evidence(
        holds=max(map(abs, without)) < 1e-12 and min(included[1:]) > 0.01 and included == sorted(included),
        summary=(
            "Eight samples of a student, every pairwise cosine 0, 0.5, 0.9 or 0.999, against an orthonormal teacher: "
            f"loss at most {max(map(abs, without)):.0e} nat without the diagonal, "
            f"{', '.join(f'{value:.3f}' for value in included)} nat with it."
        ),
        values={f"included at {rho}": value for rho, value in zip(cosines, included, strict=True)},
    )


def _check_reduction() -> Evidence:
    ratios, values = [], {}
    for rows in (16, 64, 128):
        student, teacher = draw(rows, 16, seed=1), draw(rows, 32, seed=2)
        ratio = float(pkt_loss(student, teacher) / pkt_loss(student, teacher, variant="official"))
        ratios.append(ratio / rows)
        values[f"ours / official, N = {rows}"] = ratio
    off = max(abs(ratio - 1) for ratio in ratios)
    return Evidence(
        holds=off < 1e-3,
        summary=(
            f"The authors' value times N equals the mean KL to {off:.0e} (their epsilon) for N = 16, 64 and 128. "
            f"RepDistiller's weight 30,000 therefore means {30000 / 64:.2f} per row at N = 64 and {30000 / 16:.0f} "
            "on a last batch of 16."
        ),
        values=values,
    )


def _check_bandwidth() -> Evidence:
    teacher = draw(12, 4, seed=3)
    student = 5 * teacher  # the same geometry at another scale
    own = float(pkt_loss(student, teacher, kernel="gaussian", bandwidth=50.0, teacher_bandwidth=2.0))
    printed = float(pkt_loss(student, teacher, kernel="gaussian", bandwidth=2.0))
    return Evidence(
        holds=own < 1e-12 and printed > 0.1,
        summary=(
            "A student with the teacher's geometry at five times its scale: loss "
            f"{own:.0e} nat with its own bandwidth, {printed:.2f} nat with the teacher's, as printed."
        ),
        values={"own bandwidth": own, "teacher's bandwidth": printed},
    )


def _check_joint() -> Evidence:
    features = draw(12, 4, seed=4)
    kernel = gaussian_kernel(features, bandwidth=8.0)
    total = float(kernel.sum() / 12)
    column = conditional_probabilities(features, kernel="gaussian", bandwidth=8.0, diagonal=False).exp()
    # p_ij = p_{i|j} p_j with p_j = 1/N and the note's own conditional, against the printed K / N.
    disagreement = float((column.T / 12 - kernel / 12).abs().max())
    rows = float((column.sum(1) - 1).abs().max())
    return Evidence(
        holds=abs(total - 1) > 0.1 and disagreement > 0.01 and rows < 1e-12,
        summary=(
            f"Twelve points: the printed joint K/N adds up to {total:.2f}, not 1, and differs by up to "
            f"{disagreement:.2f} from p(i|j)/N with the note's own conditional, whose rows do add up to 1."
        ),
        values={"sum of the printed joint": total, "largest disagreement": disagreement},
    )


def _check_neighbours() -> Evidence:
    # Three directions: the teacher's sample 0 is a little nearer to 1 than to 2.
    def at(*degrees: float) -> Tensor:
        angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
        return torch.stack([angle.cos(), angle.sin()], 1)

    teacher = at(0, 40, -41)
    swapped, stretched = at(0, 41, -40), at(0, 80, -82)

    def nearest(x: Tensor) -> list[int]:
        return (F.normalize(x) @ F.normalize(x).T).fill_diagonal_(-2).argmax(1).tolist()

    small, large = float(pkt_loss(swapped, teacher)), float(pkt_loss(stretched, teacher))
    return Evidence(
        holds=0 < small < large
        and nearest(swapped) != nearest(teacher)
        and nearest(stretched) == nearest(teacher),
        summary=(
            f"A student with loss {small:.1e} nat changes a nearest neighbour, another with loss {large:.1e} nat "
            "keeps them all: only zero loss guarantees the neighbours."
        ),
        values={"loss, neighbour changed": small, "loss, neighbours kept": large},
    )


def _check_evaluator() -> Evidence:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    labels, wanted = torch.arange(240) % 4, torch.arange(40) % 4
    database = centres[labels] + 1.2 * torch.randn(240, 8, generator=generator, dtype=torch.float64)
    queries = centres[wanted] + 1.2 * torch.randn(40, 8, generator=generator, dtype=torch.float64)

    def official(batch: int) -> tuple[float, float]:
        found = retrieval(queries, database, wanted, labels, at=(10,), variant="official", batch=batch)
        return 100 * found.mean_average_precision, 100 * found.precision[10]

    one, seven, forty = official(1), official(7), official(40)
    plain = retrieval(queries, database, wanted, labels, at=(10,))
    return Evidence(
        holds=one[0] < seven[0] < forty[0] and forty[1] > 100 * plain.precision[10] + 0.5,
        summary=(
            "One representation, three evaluation batch sizes (1, 7, 40): "
            f"mAP {one[0]:.2f}, {seven[0]:.2f}, {forty[0]:.2f}; "
            f"the printed top-10 precision is {forty[1]:.1f} where the plain one is {100 * plain.precision[10]:.1f}."
        ),
        values={
            "mAP, batch 1": one[0],
            "mAP, batch 7": seven[0],
            "mAP, batch 40": forty[0],
            "plain P@10": 100 * plain.precision[10],
        },
    )


def _authors_formula(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """The loss as published, square root and all, to show its gradient at a zero row."""

    def probabilities(x: Tensor) -> Tensor:
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + eps)
        kernel = (unit @ unit.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    p, q = probabilities(teacher), probabilities(student)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def _check_zero_row() -> Evidence:
    teacher = draw(6, 5, seed=6)
    gradients = []
    for loss in (_authors_formula, lambda s, t: pkt_loss(s, t, variant="official"), pkt_loss):
        student = draw(6, 3, seed=7)
        student[2] = 0
        student.requires_grad_(True)
        loss(student, teacher).backward()
        assert student.grad is not None
        gradients.append(student.grad)
    return Evidence(
        holds=bool(gradients[0].isnan().any()) and bool(torch.stack(gradients[1:]).isfinite().all()),
        summary=(
            f"A zero feature row (a dead ReLU layer gives one): {int(gradients[0].isnan().sum())} of "
            f"{gradients[0].numel()} entries of the published formula's gradient are NaN, none of ours."
        ),
        values={"NaN entries, published": int(gradients[0].isnan().sum())},
    )


def _check_laplacian() -> Evidence:
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    distances = torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [2.0], [2.5]], dtype=torch.float64)
    there = torch.tensor([[0.0, 2, 2.5], [2, 0, 0.5], [2.5, 0.5, 0]], dtype=torch.float64)
    value = float(pkt_loss(x, teacher, variant="pkth", kernel="rbf", divergence="squared"))

    def by_hand(power: int) -> float:
        p, q = ((-(d**power)).exp() / (-(d**power)).exp().sum(1, keepdim=True) for d in (there, distances))
        return float((p - q).square().mean())

    laplace, gauss = by_hand(1), by_hand(2)
    return Evidence(
        holds=abs(value - laplace) < 1e-3 and abs(value - gauss) > 1e-3,
        summary=(
            f"Three points on a line: the kernel called rbf gives {value:.4f}, exp(-d) by hand {laplace:.4f}, "
            f"exp(-d²) {gauss:.4f}."
        ),
        values={"rbf": value, "Laplacian": laplace, "Gaussian": gauss},
    )


def _check_start() -> Evidence:
    ledger = column_ledger("pkt")
    untrained = ledger.number("pkt/standard/cifar10-hog/map/random")
    student, scratch, pkt = (
        ledger.number(f"pkt/standard/cifar10/map/{arm}") for arm in ("student", "pkt_scratch", "pkt")
    )
    head_start = Sample.of(list(paired(student, untrained).values()))
    return Evidence(
        holds=head_start.interval(0.95)[0] > 0,
        summary=(
            f"CIFAR-10, standard profile, mAP: the untrained network {untrained.text()}, after its training with "
            f"labels and before any transfer {student.text()}, after PKT {pkt.text()}. PKT from random weights, "
            f"which saw no label, ends at {scratch.text()}."
        ),
        values={
            "untrained": untrained.mean,
            "before transfer": student.mean,
            "PKT": pkt.mean,
            "PKT from scratch": scratch.mean,
        },
    )


def _check_shortcut() -> Evidence:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        networks = [PreActResNet18(shortcut="activated").eval(), PreActResNet18(shortcut="identity").eval()]
    networks[1].load_state_dict(networks[0].state_dict())
    with torch.no_grad():
        authors, printed = (network(images).features["pool"] for network in networks)
    gap = float((authors - printed).norm() / printed.norm())
    return Evidence(
        holds=gap > 0.01,
        summary=f"With the same weights the two networks' pooled features differ by {100 * gap:.0f} % of their norm.",
        values={"relative difference": gap},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="P1",
        kind="note",
        where="note, conditional probabilities and loss; probabilistic_kt@a58fd1b: nn/pkt.py includes the diagonal",
        printed=r"Sums over $k \ne j$ and $i \ne j$; the code sums over all. The two are taken for the same loss.",
        right=(
            r"They are different losses. Without the diagonal, zero loss only forces $K^t_{ij} = c_i K^s_{ij}$ for "
            r"$i \ne j$. With it, $K_{ii} = 1$ gives $1/\sum_k K^t_{ik} = 1/\sum_k K^s_{ik}$, so $p = q$ forces "
            r"$K^t = K^s$: only the code's loss matches kernels. Ours includes the diagonal."
        ),
        check=_check_diagonal,
    ),
    Erratum(
        id="P2",
        kind="code",
        where="probabilistic_kt@a58fd1b: nn/pkt.py (RepDistiller's copy is the same)",
        printed=r"The loss is the mean over all $N^2$ pairs, with $10^{-7}$ added to norms and inside the logarithm.",
        right=(
            r"The mean over samples of a sum over neighbours does not depend on the batch size; theirs is that "
            r"divided by $N$, which is why public weights for it are so large and why a short last batch counts more."
        ),
        check=_check_reduction,
    ),
    Erratum(
        id="P3a",
        kind="note",
        where="note, conditional probability of the student",
        printed=r"$q_{i|j}$ with the teacher's bandwidth $\sigma_t$.",
        right=r"The student has its own $\sigma_s$. (The cosine kernel has none, so the runs are not touched.)",
        check=_check_bandwidth,
    ),
    Erratum(
        id="P3b",
        kind="note",
        where="note, joint density; its normalisation sums also start at i = 0",
        printed=r"$p_{ij} = p_{i|j}\,p_j = \frac1N K(x_i, x_j)$, and $\sum_{i=0, i \ne j}^N p_{i|j} = 1$.",
        right=(
            r"$K/N$ is not normalised: divide by $\sum_{ij} K_{ij}$. It also disagrees with the conditional printed "
            r"below it times $p_j = 1/N$. The sums run from $i = 1$."
        ),
        check=_check_joint,
    ),
    Erratum(
        id="P3c",
        kind="note",
        where="note, after the joint density",
        printed="Minimising the divergence makes sure that each sample has the same neighbours in both spaces.",
        right="Only at zero loss. A small loss may swap neighbours, a large one may keep them all.",
        check=_check_neighbours,
    ),
    Erratum(
        id="P4",
        kind="code",
        where="probabilistic_kt@a58fd1b: nn/retrieval_evaluation.py",
        printed=(
            "Interpolated precision, and 'precision at k' printed from the same array. The loop that interpolates "
            "runs over the number of queries in the evaluation batch."
        ),
        right=(
            "It must run over the database. As it is, only the first ranks are interpolated, the score depends on "
            "the evaluation batch size, and the printed top-10 and top-50 are not precisions. The order of the "
            "methods by mAP is unchanged."
        ),
        check=_check_evaluator,
    ),
    Erratum(
        id="P5",
        kind="code",
        where="probabilistic_kt@a58fd1b: exp_cifar; note, 'no labels are needed'",
        printed="Transfer needs no labels; the CIFAR-10 table is read as unsupervised transfer.",
        right=(
            "Every method of the table starts from a student that was trained with all labels for 100 epochs, and "
            "what is evaluated is its feature after the ReLU: the numbers contain labels. What PKT does without them "
            "needs a run from random weights beside it."
        ),
        check=_check_start,
    ),
    Erratum(
        id="P6a",
        kind="code",
        where="probabilistic_kt@a58fd1b: nn/pkt.py",
        printed="A feature row of zeros is handled by setting NaN entries to 0.",
        right="That mends the value only; the gradient of the norm at 0 is still NaN and ends the training.",
        check=_check_zero_row,
    ),
    Erratum(
        id="P6b",
        kind="code",
        where="pkth@5766e63: nn/pkt_transfer.py",
        printed="The kernel named rbf.",
        right=r"Its distance is not squared: $e^{-d/\sigma}$ is the Laplacian kernel.",
        check=_check_laplacian,
    ),
    Erratum(
        id="P7",
        kind="code",
        where="probabilistic_kt@a58fd1b: models/resnet.py, the pre-activation blocks",
        printed="The teacher is the pre-activation ResNet-18 of He et al. (2016).",
        right=(
            "Where the shape does not change, its blocks carry relu(bn(x)) past the convolutions, not x: there is no "
            'identity path. Ours computes the authors\' by default and the printed one with `shortcut="identity"`.'
        ),
        check=_check_shortcut,
    ),
)
