r"""What the notes on concept quantification, the paper and its released code got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *paper*, as far as the note quotes it; *code*,
Jenniferlyx/Explaining-Knowledge-Distillation-by-Quantifying-the-Knowledge@0269422. The paper's tables were not read.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.cells import central_cells
from kdrefs.methods.concept_quantification import (
    concept_counts,
    concept_metrics,
    entropy_map,
    weight_distance,
)
from reproductions.concept_quantification.derivation import least_mean_entropy
from reproductions.harness.errata import Erratum, Evidence, draw

REPOSITORY = "Jenniferlyx/Explaining-Knowledge-Distillation-by-Quantifying-the-Knowledge@0269422"
IMAGES, CHECKPOINTS, GRID = 40, 8, 8


def random_maps(
    images: int = IMAGES, checkpoints: int = CHECKPOINTS, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies without any relation to the object, a central box, and weight distances."""
    maps = draw(images, checkpoints, GRID, GRID, seed=seed)
    return (
        maps,
        torch.from_numpy(central_cells(GRID)),
        torch.arange(1.0, checkpoints + 1, dtype=torch.float64),
    )


def _check_union() -> Evidence:
    maps, inside, distance = random_maps()
    concepts = torch.stack([concept_counts(m, inside, 1.0).concepts & inside for m in maps.unbind(1)], dim=1)
    last, union = concepts[:, -1].sum((1, 2)).double(), concepts.any(1).sum((1, 2))
    # The union over j of S_M does not depend on j: it is S_M.
    printed = (last / torch.stack([concepts[:, -1]] * CHECKPOINTS, 1).any(1).sum((1, 2))).nanmean().item()
    right = (last / union).mean().item()
    found = concept_metrics(maps, inside, distance, 1.0).rho
    return Evidence(
        holds=printed == 1 and abs(found - right) < 1e-12 and right < 0.9,
        summary=f"On random maps ρ is {printed:g} with the union as printed and {right:.3f} with that of all S_j.",
        values={"as printed": printed, "right": right},
    )


def _check_std() -> Evidence:
    maps, inside, distance = random_maps()
    one, ten = (concept_metrics(maps, inside, scale * distance, 1.0) for scale in (1.0, 10.0))
    return Evidence(
        holds=abs(one.d_variance - one.d_std**2) < 1e-12
        and abs(ten.d_variance / one.d_variance - 100) < 1e-9
        and abs(ten.d_std / one.d_std - 10) < 1e-9,
        summary=(
            f"Variance {one.d_variance:.3f}, standard deviation {one.d_std:.3f}; with distances ten times as large "
            f"{ten.d_variance:.1f} and {ten.d_std:.2f}: only the second has the unit of D_mean, {ten.d_mean:.1f}."
        ),
        values={"variance": one.d_variance, "standard deviation": one.d_std},
    )


def _check_peak() -> Evidence:
    maps, inside, distance = random_maps()
    on = torch.stack([concept_counts(m, inside, 1.0).foreground for m in maps.unbind(1)], dim=1)
    common = distance[on.sum(0).argmax()].expand(IMAGES)
    own = distance[on.argmax(1)]
    found = concept_metrics(maps, inside, distance, 1.0)
    return Evidence(
        holds=common.std(correction=0).item() == 0
        and abs(own.std(correction=0).item() - found.d_std) < 1e-12,
        summary=(
            f"One epoch for all images makes the spread 0; each image's own epoch makes it {found.d_std:.3f}. Of equal "
            "counts the first is taken."
        ),
        values={"one epoch": 0.0, "own epochs": found.d_std},
    )


def _check_baseline() -> Evidence:
    maps, inside, _ = random_maps(checkpoints=1)
    shifted = maps[:, 0] + 2 * draw(IMAGES, 1, 1, seed=1)  # images differ as a whole
    own, whole = (concept_counts(shifted, inside, 1.0, baseline=b) for b in ("image", "set"))
    plain = concept_counts(maps[:, 0], inside, 1.0)
    counts = [c.foreground.double().mean().item() for c in (own, whole)]
    return Evidence(
        holds=torch.equal(own.concepts, plain.concepts) and not torch.equal(whole.concepts, plain.concepts),
        summary=(
            f"Of the same images {counts[0]:.2f} concepts lie on the object with each image's own baseline and "
            f"{counts[1]:.2f} with the mean of all; only the first stays when an image's entropies are all shifted."
        ),
        values={"own baseline": counts[0], "mean baseline": counts[1]},
    )


def _check_undefined() -> Evidence:
    maps, inside, distance = random_maps()
    ours, theirs = (concept_metrics(maps, inside, distance, 2.7, variant=v) for v in ("default", "official"))
    empty = ours.undefined[-1].item()
    return Evidence(
        holds=0 < empty < 1 and theirs.ratio[-1].item() < ours.ratio[-1].item(),
        summary=(
            f"At a high threshold {100 * empty:.0f} % of the images have no concept: λ is {theirs.ratio[-1]:.3f} "
            f"with 0/0 as 0 and {ours.ratio[-1]:.3f} without these images."
        ),
        values={"0/0 is 0": theirs.ratio[-1].item(), "left out": ours.ratio[-1].item()},
    )


def _check_path() -> Evidence:
    ratios = []
    for noise in (0.1, 1.0, 10.0):
        steps = (0.1 + noise * draw(400, 30, seed=2)).cumsum(0)
        steps = torch.cat([10 * torch.ones(1, 30), steps])
        ratios.append((weight_distance(list(steps))[-1] / weight_distance(list(steps[::40]))[-1]).item())
    return Evidence(
        holds=ratios[0] >= 1 and ratios[0] < ratios[1] <= ratios[2] * 1.05 and ratios[2] > 3,
        summary=(
            "Ten epochs of forty steps: the path by steps is "
            + ", ".join(f"{r:.2f}" for r in ratios)
            + " times that by epochs, for noise of 1, 10 and 100 times the drift."
        ),
        values={f"noise {k}": r for k, r in enumerate(ratios)},
    )


def _check_units() -> Evidence:
    net = LinearLayer(draw(30, 16, seed=3))
    images = draw(2, 1, 4, 4, seed=4)
    one = entropy_map(net, images, "out", 4, sigma=0.01).entropy
    other = entropy_map(LinearLayer(net.weight.detach() / 10), 10 * images, "out", 4, sigma=0.1).entropy
    moved = (other - one - math.log(10)).abs().max().item()
    half = 0.5 * math.log(2 * math.pi * math.e)
    narrow = math.log(0.01) + half
    # The entropy of independent Gaussians is the sum of theirs, from the determinant of the covariance.
    cell = torch.distributions.MultivariateNormal(torch.zeros(588), 1e-4 * torch.eye(588)).entropy().item()
    return Evidence(
        holds=moved < 1e-9 and narrow < 0 and abs(cell / (588 * narrow) - 1) < 1e-4,
        summary=(
            f"σ = 0.01 has {narrow:.3f} nats, below 0; a unit ten times as small adds log 10; a cell of 14 x 14 "
            f"pixels and three channels has {cell:.0f} nats, 588 times that of a number."
        ),
        values={"of a number": narrow, "of a cell": cell},
    )


def _check_rejection() -> Evidence:
    maps, inside, distance = random_maps(images=400)
    on = (maps * inside).sum((2, 3)) / inside.sum()
    off = (maps * ~inside).sum((2, 3)) / (~inside).sum()
    kept = (on <= off)[:, -2:].all(1)
    before, after = (concept_metrics(m, inside, distance, 1.0).ratio[-1].item() for m in (maps, maps[kept]))
    chance = inside.double().mean().item()
    return Evidence(
        holds=after > before + 0.01 and abs(before - chance) < 0.02,
        summary=(
            f"Maps without any relation to the object: λ = {before:.3f} on all images, chance is {chance:.3f}; on the "
            f"{100 * kept.double().mean():.0f} % that two late checkpoints let pass {after:.3f}."
        ),
        values={"all": before, "kept": after, "chance": chance},
    )


class LinearLayer(nn.Module):
    """Linear in images of one channel, so that first order is exact."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.out = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Flatten and multiply."""
        result: Tensor = self.out(images.flatten(1) @ self.weight.mT)
        return result


def _check_stop() -> Evidence:
    # Columns of very different lengths; every number positive, so that the ReLU of the authors' code does nothing.
    weight = draw(40, 64, seed=5).abs() * torch.exp(0.8 * draw(64, seed=6))
    net, images = LinearLayer(weight), 1 + draw(4, 1, 8, 8, seed=7).abs()
    inside = torch.from_numpy(central_cells(8))
    counts, optimum = {}, {}
    for trade_off in (3.0, 6.0, 7.0, 20.0):
        stopped = entropy_map(
            net,
            images,
            "out",
            8,
            method="optimise",
            variant="official",
            draws=16,
            trade_off=trade_off,
            chunk=128,
        )
        counts[trade_off] = concept_counts(stopped.entropy, inside, 0.2).concepts.double().sum().item() / 4
        exact = entropy_map(net, images, "out", 8, trade_off=trade_off)
        optimum[trade_off] = concept_counts(exact.entropy, inside, 0.2).concepts.double().sum().item() / 4
    bound = least_mean_entropy(6.0)
    return Evidence(
        holds=len(set(optimum.values())) == 1
        and counts[3.0] > counts[7.0] > counts[20.0]
        and counts[3.0] <= optimum[3.0]
        and bound > -2.8,
        summary=(
            "Concepts an image with the official stop, λ = 3, 6, 7 and 20: "
            + ", ".join(f"{value:.1f}" for value in counts.values())
            + f"; at the optimum {optimum[7.0]:.1f} for every λ. The optimum's mean entropy is at least {bound:.2f} "
            "for λ = 6, above -2.8: the stop always takes a map on the way."
        ),
        values={f"λ = {key:g}": value for key, value in counts.items()} | {"optimum": optimum[7.0]},
    )


def _check_soft() -> Evidence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk, head = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()
    images, target = draw(10, 6, seed=8), draw(10, 4, seed=9)
    feature = trunk(images)
    by_features = torch.autograd.grad(
        F.mse_loss(feature, target), head.weight, allow_unused=True, retain_graph=True
    )[0]
    soft = head(target).div(4).softmax(1).detach()
    by_predictions = torch.autograd.grad(-(soft * (head(feature) / 4).log_softmax(1)).sum(), head.weight)[0]
    size = by_predictions.abs().sum().item()
    return Evidence(
        holds=by_features is None and size > 0,
        summary=(
            "The squared error of a feature has no gradient at the classifier and no temperature; softened predictions "
            f"have (absolute values add up to {size:.2f})."
        ),
        values={"features": 0.0, "predictions": size},
    )


def _check_teacher() -> Evidence:
    """A perfect student has its teacher's map, so that student less baseline is teacher less baseline."""
    images = draw(6, 1, 8, 8, seed=10)
    near = torch.from_numpy(central_cells(8)).double().flatten()
    gaps = []
    for seed in (11, 12):
        base = draw(40, 64, seed=seed)
        teacher = LinearLayer(base * (1 + near))  # another that looks at the object more closely
        student = LinearLayer(teacher.weight.detach().clone())
        maps = [entropy_map(net, images, "out", 8).entropy for net in (LinearLayer(base), teacher, student)]
        ratios = [
            concept_counts(m, near.bool().view(8, 8), 0.2).foreground.double().mean().item() for m in maps
        ]
        gaps.append((ratios[2] - ratios[0], ratios[1] - ratios[0]))
    return Evidence(
        holds=all(a == c and a > 0 for a, c in gaps),
        summary=(
            "With a perfect student, student less baseline is teacher less baseline: "
            + " and ".join(f"{a:.1f} concepts" for a, _ in gaps)
            + ". What a teacher knows from elsewhere shows as an effect of distillation."
        ),
        values={f"teacher {k}": c for k, (_, c) in enumerate(gaps)},
    )


def _check_chance() -> Evidence:
    inside = torch.from_numpy(central_cells(16))
    maps = draw(200, 16, 16, seed=13)
    counts = concept_counts(maps, inside, 1.0)
    share = (counts.foreground / (counts.foreground + counts.background)).mean().item()
    chance = counts.chance[0].item()
    return Evidence(
        holds=chance == 144 / 256 and abs(share - chance) < 0.02,
        summary=f"The central box has {chance:.4f} of the cells; λ of maps without any relation to it is {share:.3f}.",
        values={"chance": chance, "random maps": share},
    )


def _check_checkpoints() -> Evidence:
    maps, inside, _ = random_maps(checkpoints=22)
    found = [
        concept_metrics(maps[:, -count:], inside, torch.ones(count), 1.0).rho for count in (5, 10, 15, 22)
    ]
    return Evidence(
        holds=all(a > c for a, c in pairwise(found)),
        summary="ρ of the same last checkpoint with 5, 10, 15 and 22 checkpoints: "
        + ", ".join(f"{value:.3f}" for value in found)
        + ".",
        values={f"{count} checkpoints": value for count, value in zip((5, 10, 15, 22), found, strict=True)},
    )


def path_length(rate: float, steps: int = 60) -> float:
    """Weight distance of gradient descent with noise on a quadratic of many curvatures."""
    curvature, weight = torch.linspace(0.1, 1, 30, dtype=torch.float64), draw(30, seed=14)
    weights = [weight]
    for step in range(steps):
        slope = curvature * (weights[-1] - 1) + draw(30, seed=100 + step)
        weights.append(weights[-1] - rate * slope)
    return weight_distance(weights)[-1].item()


def _check_rate() -> Evidence:
    small, large = path_length(1e-3), path_length(1e-2)
    return Evidence(
        holds=large > 5 * small,
        summary=(
            f"The same descent in as many steps goes {large:.2f} with a rate of 0.01 and {small:.3f} with a tenth, "
            "in units of the first weights' norm."
        ),
        values={"rate": large, "a tenth": small},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="C1",
        kind="note",
        where="note, definition of ρ",
        printed=r"$\rho = \lVert S_M(I) \rVert / \lVert \bigcup_{j=1}^M S_M(I) \rVert$",
        right=(
            r"The union of all $S_j(I)$, as the code has it: with that of $S_M$ the number is always 1. $|S|$ counts "
            r"elements; the double bar belongs to the norm in the weight distance."
        ),
        check=_check_union,
    ),
    Erratum(
        id="C2",
        kind="code",
        where=f"{REPOSITORY}: sigma/find_knowledge_new.py; note, definition of D_std",
        printed=r"$D_{std} = \operatorname{Var}_I[\dots]$; the script prints `np.var`.",
        right=r"$D_{std} = \sqrt{\operatorname{Var}}$. A variance has another unit than $D_{mean}$.",
        check=_check_std,
    ),
    Erratum(
        id="C3",
        kind="note",
        where="note, definition of m̂ and of the expectations in D_mean and D_std",
        printed=r"$\hat m = \arg\max_k N_k^{fg}(I)$, $\mathbb E_{i \in I}$",
        right=(
            r"$\hat m(I)$ belongs to an image, the expectation runs over the images $I$ of a set. With one $\hat m$ "
            "for all there is no spread."
        ),
        check=_check_peak,
    ),
    Erratum(
        id="C4",
        kind="note",
        where=f"note, definitions of the counts; {REPOSITORY}: sigma/find_knowledge_new.py",
        printed=r"$N = \sum_i (\bar H - H_i > b)$, the image's background; the code averages $\bar H$ over all images.",
        right=(
            r"$\sum_i \mathbf 1[\bar H - H_i > b]$, $\bar H = \mathbb E_{i \in bg} H_i$ of the image. The two "
            "baselines count different cells."
        ),
        check=_check_baseline,
    ),
    Erratum(
        id="C5",
        kind="code",
        where=f"{REPOSITORY}: sigma/find_knowledge_new.py",
        printed=r"$\lambda = 0$ for an image without a concept.",
        right=(
            r"0/0 is no share. Counted as 0 it pulls $\lambda$ down where concepts are few; the page leaves such "
            "images out and says how many they are. Counts compare at equal grids and equal b only."
        ),
        check=_check_undefined,
    ),
    Erratum(
        id="C6",
        kind="code",
        where=f"{REPOSITORY}: the weight differences are summed over mini-batches; note: over epochs",
        printed=r"$\sum_k \lVert w_k - w_{k-1} \rVert / \lVert w_0 \rVert$ after each epoch k",
        right=(
            "Two definitions: by the triangle inequality the path by mini-batches is never shorter, and the factor "
            "grows with the noise of the gradient."
        ),
        check=_check_path,
    ),
    Erratum(
        id="C7",
        kind="note",
        where="note, entropy of a pixel and of an image region",
        printed="The entropy of a region, shown as that of each of its pixels.",
        right=(
            r"$\log \sigma_i + \frac12 \log 2 \pi e$ is a differential entropy in nats of one number: it may be "
            "negative, depends on the unit of the pixels, and a cell has as many times that as pixels and channels."
        ),
        check=_check_units,
    ),
    Erratum(
        id="C8",
        kind="code",
        where=f"{REPOSITORY}: images are sampled until 50 are 'effective'",
        printed="Images whose mean entropy on the object exceeds the background's at a late checkpoint are left out.",
        right=(
            r"That selects by the outcome and raises $\lambda$, for maps without any meaning too. The note does not "
            "say it. The headline here has no such selection."
        ),
        check=_check_rejection,
    ),
    Erratum(
        id="C9",
        kind="code",
        where=f"{REPOSITORY}: the map is taken where the mean entropy is closest to -2.8",
        printed=r"The trade-off $\lambda$ is 7 for VGG and AlexNet, 6 for ResNets.",
        right=(
            r"At the optimum concepts do not depend on $\lambda$, but its mean entropy lies above -2.8, so the stop "
            r"takes a map on the way, and how far that has come depends on $\lambda$. Counts of the two families do "
            "not compare."
        ),
        check=_check_stop,
    ),
    Erratum(
        id="C10",
        kind="note",
        where="note, introduction ('Bulica 2006'; soft targets)",
        printed="Distillation by Bulica, 2006, and Hinton's temperature introduce the experiments.",
        right=(
            "The author is Bucilă. The experiments have neither soft targets nor a temperature: the student learns a "
            "layer's output by squared error, and its classifier afterwards, behind frozen features."
        ),
        check=_check_soft,
    ),
    Erratum(
        id="C11",
        kind="paper",
        where="paper's comparison of student and baseline, as the note describes it",
        printed="Teacher, student and baseline have the same architecture, for a fair comparison.",
        right=(
            "The teacher is pretrained on ImageNet, the baseline is not: the difference is that of pretraining as much "
            "as that of distillation. The fair control is a teacher from scratch, as here."
        ),
        check=_check_teacher,
    ),
    Erratum(
        id="C12",
        kind="code",
        where=f"{REPOSITORY}: foreground of ILSVRC",
        printed="The central 12 x 12 of 16 x 16 cells are the object.",
        right=r"Then $\lambda = 0.5625$ by chance. Every page on $\lambda$ has to print it.",
        check=_check_chance,
    ),
    Erratum(
        id="C13",
        kind="paper",
        where=f"definition of ρ; {REPOSITORY}: 15 checkpoints, 22 for long trainings",
        printed=r"A larger $\rho$ means fewer detours.",
        right=(
            r"The union grows with each checkpoint, so $\rho$ falls with their number: it compares for equal lists of "
            "checkpoints only."
        ),
        check=_check_checkpoints,
    ),
    Erratum(
        id="C14",
        kind="code",
        where=f"{REPOSITORY}: learning rates of VGG, 1e-2 to 1e-3 for the baseline, 1e-3 to 1e-4 for the student",
        printed=r"$D_{mean}$ of the student is smaller: it learns faster.",
        right=(
            "A path of the weights is as long as the learning rate makes it. With a tenth of the rate the student's is "
            "shorter whatever it learns. Here the arms have equal rates."
        ),
        check=_check_rate,
    ),
)
