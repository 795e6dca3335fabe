r"""What the notes got wrong about regression of logits, each with its proof.

Sources: *note*, the literature note that this book arranges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrefs.divergences import softened_kl
from kdrefs.methods.logit_regression import FactorizedLinear, logit_regression_loss
from reproductions.harness.errata import Erratum, Evidence, draw
from reproductions.logit_regression.students import ShallowNet


def centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes, sample by sample."""
    return logits - logits.mean(1, keepdim=True)


def _check_attribution() -> Evidence:
    teacher = 3 * draw(64, 10, seed=1)
    student = teacher + draw(64, 10, seed=2)
    temperatures = (1.0, 4.0, 20.0)
    regression = [float(t**2 * logit_regression_loss(student / t, teacher / t)) for t in temperatures]
    soft = [float(softened_kl(student, teacher, t)) for t in temperatures]
    largest = [float((teacher / t).softmax(1).amax(1).mean()) for t in temperatures]
    unchanged = max(abs(value / regression[0] - 1) for value in regression)
    return Evidence(
        holds=unchanged < 1e-12 and soft[2] > 1.5 * soft[0] and largest[0] > 2 * largest[2],
        summary=(
            "At T = 1, 4 and 20 the largest softened probability is "
            + ", ".join(f"{value:.2f}" for value in largest)
            + " on average, and T² KL is "
            + ", ".join(f"{value:.2f}" for value in soft)
            + f". The regression of the divided logits, times T², is {regression[0]:.2f} at all three (equal to "
            f"{unchanged:.0e}): in a loss on logits there is nothing that a temperature could soften."
        ),
        values={f"T² KL, T = {t:g}": value for t, value in zip(temperatures, soft, strict=True)}
        | {"regression": regression[0]},
    )


def check_limit() -> Evidence:
    """K times T² KL against the regression of centred logits and of the logits as they are."""
    teacher, student = draw(64, 10, seed=3), draw(64, 10, seed=4) + draw(64, 1, seed=5)
    limit = float(logit_regression_loss(centred(student), centred(teacher)))
    raw = float(logit_regression_loss(student, teacher))
    errors = {t: abs(10 * float(softened_kl(student, teacher, t)) / limit - 1) for t in (4.0, 100.0, 1000.0)}
    offset = (student.mean(1) - teacher.mean(1)).square().mean().item() * 10 / 2
    return Evidence(
        holds=errors[1000.0] < 1e-3
        and 8 < errors[100.0] / errors[1000.0] < 12
        and abs(raw - limit - offset) < 1e-9
        and offset > 0.1 * limit,
        summary=(
            f"64 samples, 10 classes: the regression of the centred logits is {limit:.3f}, K T² KL is "
            + ", ".join(f"{100 * error:.2g} %" for error in errors.values())
            + f" away from it at T = 4, 100 and 1000. The regression of the logits is {raw:.3f}: K/2 times the squared "
            f"difference of the means, {offset:.3f}, comes on top, and distillation is blind to it."
        ),
        values={"centred": limit, "raw": raw, **{f"off, T = {t:g}": e for t, e in errors.items()}},
    )


def _check_factorisation() -> Evidence:
    inputs, units, rank = 40, 60, 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        layer = FactorizedLinear(inputs, units, rank, bias=False).double()
    x, target = draw(200, inputs, seed=7), draw(200, units, seed=8)
    before = layer.weight.detach()
    u, v = layer.expand.weight.detach().clone(), layer.reduce.weight.detach().clone()
    (target - layer(x)).square().sum().div(400).backward()
    rate = 1e-3
    torch.optim.SGD(layer.parameters(), lr=rate).step()
    moved = layer.weight.detach() - before
    gradient = -(target - x @ before.T).T @ x / 200
    predicted = -rate * (u @ u.T @ gradient + gradient @ v.T @ v)
    gap = float((moved - predicted).norm() / predicted.norm())
    least_squares = torch.linalg.lstsq(x, target).solution.T
    left, values, right = torch.linalg.svd(least_squares, full_matrices=False)
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    angle = float((before * truncated).sum() / before.norm() / truncated.norm())
    even = inputs * units / (inputs + units)
    ranks = int(torch.linalg.matrix_rank(layer.weight.detach()))
    return Evidence(
        holds=gap < 0.02
        and ranks == rank
        and abs(angle) < 0.3
        and layer.weight_count == rank * (inputs + units) < inputs * units
        and rank < even,
        summary=(
            f"{inputs} inputs, {units} units, {rank} linear units between: {layer.weight_count} weights instead of "
            f"{inputs * units} (fewer below {even:.0f} linear units). A step on the factors moves the product by "
            rf"$-\eta(UU^\top G + GV^\top V)$ (to {100 * gap:.1g} %), where the full matrix would move by $-\eta G$: "
            "another path, from random factors (cosine "
            f"{angle:.2f} with the truncated decomposition of the solution), to matrices of rank {ranks}."
        ),
        values={"weights": layer.weight_count, "of the matrix": inputs * units, "second-order rest": gap},
    )


def _check_plain_student() -> Evidence:
    images, order = (
        draw(16, 1, 8, 8, seed=9).float(),
        torch.randperm(64, generator=torch.Generator().manual_seed(10)),
    )
    shuffled = images.flatten(1)[:, order].view_as(images)
    gaps = {}
    for name, conv in (("plain", None), ("convolution", 8)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            net = ShallowNet(1, 8, 10, 32, conv=conv)
            twin = ShallowNet(1, 8, 10, 32, conv=conv)
        twin.load_state_dict(net.state_dict())
        if conv is None:
            with torch.no_grad():
                twin.hidden.get_parameter("weight").copy_(net.hidden.get_parameter("weight")[:, order])
        trained = []
        for one, seen in ((net, images), (twin, shuffled)):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            for _ in range(20):
                optimizer.zero_grad()
                logit_regression_loss(one(seen).logits, images.flatten(1)[:, :10]).backward()
                optimizer.step()
            trained.append(one(seen).logits.detach())
        gaps[name] = float((trained[0] - trained[1]).norm() / trained[0].norm())
    return Evidence(
        holds=gaps["plain"] < 1e-4 < 0.1 < gaps["convolution"],
        summary=(
            "All images with their pixels in another order, 20 steps: the outputs of a student with one hidden layer "
            f"on pixels, its weights in that order too, change by {gaps['plain']:.0e}; those "
            f"of one with a convolution by "
            f"{100 * gaps['convolution']:.0f} %. Which pixels are neighbours is unknown to the former."
        ),
        values=gaps,
    )


_NOTE = "note of 2024-03-22, the two papers of 2014"

ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="L1",
        kind="note",
        where=f"{_NOTE}: the paragraph, and 前者/后者 in the remark",
        printed=(
            "The headings name *Do Deep Nets Really Need to be Deep?* first and *Distilling the Knowledge in a Neural "
            "Network* second; then 'the first' is said to have soft labels with a "
            "temperature, 'the second' to imitate logits "
            "and to factorise a matrix."
        ),
        right=(
            "The other way round. Ba and Caruana regress logits and factorise; the "
            "temperature is Hinton et al.'s. In a "
            "regression of logits a temperature would be a constant factor."
        ),
        check=_check_attribution,
    ),
    Erratum(
        id="L2",
        kind="note",
        where=f"{_NOTE}: remark, 'the two ideas are in fact the same'",
        printed="Both train the network with soft labels; one uses a temperature, the other goes round the softmax.",
        right=(
            r"They meet for $T \to \infty$ and logits centred sample by sample only: "
            r"$K\,T^2\,KL \to \frac12\lVert (s - \bar s) - (t - \bar t)\rVert^2$. Regression of the logits adds "
            r"$\frac K2(\bar s - \bar t)^2$."
        ),
        check=check_limit,
    ),
    Erratum(
        id="L3",
        kind="note",
        where=f"{_NOTE}: 'a matrix factorisation in the learning of the hidden layer, to speed it up'",
        printed="A matrix factorisation is brought into the learning of the hidden layer.",
        right=(
            "The matrix is the one between input and hidden layer, and nothing is "
            "factorised: two factors take its place from "
            "the start and are trained, with no non-linearity in between. They make a step "
            "cheaper and change its path; what "
            "that does at equal steps is measured in the run."
        ),
        check=_check_factorisation,
    ),
    Erratum(
        id="L4",
        kind="note",
        where=f"{_NOTE}: 'simple networks reach an accuracy like that of deep ones'",
        printed="A simple network that imitates logits reaches an accuracy similar to the deep network's.",
        right=(
            "So the paper finds for speech (TIMIT). On images a student with one hidden layer on pixels cannot know "
            "which of them are neighbours; that students of CIFAR-10 need several "
            "convolutional layers is shown by Urban et "
            "al. (arXiv:1603.05691, abstract)."
        ),
        check=_check_plain_student,
    ),
)
