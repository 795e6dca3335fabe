r"""What the note and the formulas of KSANC got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges; *paper*, the formulas and figures as that note shows
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.ksanc import (
    AttentionEstimator,
    LogitDiscriminator,
    ksanc_loss,
    logit_adversarial_loss,
    logit_discriminator_loss,
)
from reproductions.harness.errata import Erratum, Evidence, draw

TITLES = (  # of the preprint and of the published form
    "Knowledge Squeezed Adversarial Network Compression",
    "Hierarchical Knowledge Squeezed Adversarial Network Compression",
)


def _estimator(channels: int, descriptor: int, *, seed: int, **options: object) -> AttentionEstimator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttentionEstimator(channels, descriptor, **options).double()  # type: ignore[arg-type]


def _check_guidance() -> Evidence:
    module = _estimator(6, 5, seed=1)
    assert module.projection is not None
    maps, descriptor = draw(4, 6, 3, 3, seed=1), draw(4, 5, seed=2)

    def printed(
        descriptor: Tensor, concave: bool = False
    ) -> Tensor:  # the attention, written out as it is printed
        assert module.projection is not None
        lifted = maps.flatten(2) + module.projection(descriptor)[:, :, None]
        scores = module.score((lifted.tanh() if concave else lifted).mT)
        return scores.squeeze(2).softmax(1)

    other = 10 * draw(4, 5, seed=3)
    moved = float((printed(other) - printed(descriptor)).abs().max().detach())
    ours = float((module.attention(maps, other).flatten(1) - printed(descriptor)).abs().max().detach())
    bent = float((printed(other, concave=True) - printed(descriptor, concave=True)).abs().max().detach())
    (gradient,) = torch.autograd.grad(printed(descriptor)[:, 0].sum(), module.projection.weight)
    size = float(gradient.abs().max())
    return Evidence(
        holds=moved < 1e-12 and ours < 1e-12 and size < 1e-12 and bent > 0.01,
        summary=(
            f"Another descriptor, ten times as large: no weight moves by more than {moved:.0e}, and the projection's "
            f"gradient is {size:.0e}. With a tanh before the score weights would move by {bent:.2f}."
        ),
        values={"weights moved": moved, "gradient of the projection": size, "with a tanh": bent},
    )


def _check_double_average() -> Evidence:
    ratios, losses = [], []
    target = draw(8, 4, seed=4)
    for side in (4, 8, 16):
        maps, descriptor = draw(8, 4, side, side, seed=side), draw(8, 5, seed=5)
        whole, printed = (_estimator(4, 5, seed=2, pooling=pooling) for pooling in ("sum", "mean"))
        one, other = whole(maps, descriptor), printed(maps, descriptor)
        ratios.append(float((one / other).detach().mean()) / side**2)
        distance = [ksanc_loss(x, y, backbone=1.0) for x, y in ((one, target), (other, target / side**2))]
        losses.append(float((distance[0] / distance[1]).detach()))
    exact = [4.0**4, 8.0**4, 16.0**4]
    return Evidence(
        holds=all(abs(ratio - 1) < 1e-9 for ratio in ratios)
        and all(abs(found / wanted - 1) < 1e-9 for found, wanted in zip(losses, exact, strict=True)),
        summary=(
            "The printed vector is the weighted sum divided by the number of positions, the term of the loss that of "
            f"the sums divided by its square: by {losses[0]:.0f} on maps of 4 pixels, {losses[1]:.0f} of 8, "
            f"{losses[2]:.0f} of 16. The layers' terms, which have one weight, differ by such factors."
        ),
        values={"4 pixels": losses[0], "8 pixels": losses[1], "16 pixels": losses[2]},
    )


def _check_readings() -> Evidence:
    lifted, figure = _estimator(6, 5, seed=3), _estimator(6, 5, seed=3, values="maps")
    figure.score.load_state_dict(lifted.score.state_dict())
    assert lifted.projection is not None
    maps, descriptor = draw(32, 6, 4, 4, seed=6), draw(32, 5, seed=7)
    gap = lifted(maps, descriptor) - figure(maps, descriptor)
    left = float((gap - lifted.projection(descriptor)).abs().max().detach())
    noise = draw(32, 6, 4, 4, seed=8)  # maps of other images
    kept = float((lifted(maps, descriptor) - lifted(maps, -descriptor)).detach().norm())
    dropped = float((figure(maps, descriptor) - figure(maps, -descriptor)).detach().norm())
    changed = float((figure(maps, descriptor) - figure(noise, descriptor)).detach().norm())
    return Evidence(
        holds=left < 1e-12 and kept > 1 and dropped == 0 and changed > 1,
        summary=(
            f"Formula minus figure is the projected descriptor, to {left:.0e}. Another descriptor moves the formula's "
            f"vectors by {kept:.1f} and the figure's by {dropped:.0f}; other maps move these by {changed:.1f}."
        ),
        values={"rest": left, "formula moved": kept, "figure moved": dropped},
    )


def _check_collapse() -> Evidence:
    maps, student_maps = draw(64, 6, 3, 3, seed=9), draw(64, 3, 3, 3, seed=10)
    descriptor, other = maps.mean((2, 3)), draw(64, 4, seed=11)

    def start() -> tuple[AttentionEstimator, AttentionEstimator]:
        return _estimator(6, 6, seed=4), _estimator(6, 4, seed=5, in_channels=3)

    def fitted(joint: bool) -> tuple[float, float]:
        guide, own = start()
        before = guide(maps, descriptor).detach().norm()
        trained = [*own.parameters(), *(guide.parameters() if joint else ())]
        optimizer = torch.optim.Adam(trained, lr=0.02)
        for _ in range(300):
            target, squeezed = guide(maps, descriptor), own(student_maps, other)
            loss = (squeezed - target).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = guide(maps, descriptor).detach().norm()
        return float(loss.detach()), float(after / before)

    guide, own = start()
    with torch.no_grad():  # the exact minimum: uniform attention, what is added takes away what is averaged
        for module in (guide, own):
            assert module.projection is not None
            module.score.weight.zero_()
            module.projection.weight.zero_()
        assert isinstance(own.lift, nn.Linear)
        assert guide.projection is not None
        own.lift.weight.zero_()
        guide.projection.weight.copy_(-torch.eye(6, dtype=torch.float64))
        nothing = guide(maps, descriptor)
        least = float((own(student_maps, other) - nothing).square().sum())
        empty = float(nothing.abs().max())
    (joint, left), (frozen, _) = fitted(True), fitted(False)
    return Evidence(
        holds=least < 1e-24 and empty < 1e-12 and left < 0.5 and joint < 0.5 * frozen,
        summary=(
            f"Where the descriptor is the average of the map, the projection −1, uniform attention and a student of "
            f"zeros make the loss {least:.0e}, and every vector of the teacher {empty:.0e}. From a random start, with "
            f"unrelated maps of a student: the teacher's estimator frozen, the loss ends at {frozen:.2f}; trained "
            f"along, at {joint:.1e}, and {100 * left:.1f} % of the length of the teacher's vectors are left."
        ),
        values={"least": least, "frozen": frozen, "trained along": joint, "length left": left},
    )


def _check_class_game() -> Evidence:
    labels = torch.arange(60) % 3
    teacher, student = draw(60, 3, seed=12), draw(60, 3, seed=13).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = LogitDiscriminator(3, hidden=16).double()
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.01)
    teacher = teacher + 3 * F.one_hot(labels, 3)
    for _ in range(200):  # a discriminator that knows the classes
        optimizer.zero_grad()
        theirs, ours = judge(teacher, student.detach())
        logit_discriminator_loss(theirs, ours, labels).backward()
        optimizer.step()
    judge.eval()

    def likelihood(logits: Tensor) -> Tensor:
        return -F.cross_entropy(judge(teacher, logits)[1][:, 1:], labels)

    before = likelihood(student)
    (gradient,) = torch.autograd.grad(before, student)
    found = {}
    for name, sign in (("printed", -1.0), ("AC-GAN", 1.0)):
        moved = student.detach() + sign * gradient  # a step that the student takes
        found[name] = float(likelihood(moved).detach().exp())
    start = float(before.detach().exp())
    _, answers = judge(teacher, student)
    (fooling,) = torch.autograd.grad(logit_adversarial_loss(answers, labels), answers)
    raised = bool((fooling[torch.arange(60), 1 + labels] < 0).all())
    return Evidence(
        holds=found["printed"] < start < found["AC-GAN"] and raised,
        summary=(
            f"The discriminator gives the student's true classes a probability of {start:.2f} (geometric mean). A step "
            f"of the student as printed lowers it to {found['printed']:.2f}, one of an auxiliary classifier raises it "
            f"to {found['AC-GAN']:.2f}."
        ),
        values={"before": start, **found},
    )


def _check_regulariser() -> Evidence:
    score = draw(50, seed=14).requires_grad_()
    (fooling,) = torch.autograd.grad(
        -F.softplus(score).mean(), score
    )  # of log(1 - D), which the student minimises
    (third,) = torch.autograd.grad(
        F.logsigmoid(score).mean(), score
    )  # of + log D, as it stands inside min max
    against = float((fooling * third < 0).double().mean())
    net = {mu: float((fooling + mu * third).sum()) for mu in (0.0, 0.5, 2.0)}
    weights = draw(20, seed=15).requires_grad_()
    (penalty,) = torch.autograd.grad(-(weights.abs().sum() + weights.square().sum()), weights)
    with torch.no_grad():
        sizes = {
            sign: float((weights + sign * 0.01 * penalty).norm() / weights.norm()) for sign in (1.0, -1.0)
        }
    return Evidence(
        holds=against == 1 and net[0.0] < 0 < net[2.0] and sizes[1.0] < 1 < sizes[-1.0],
        summary=(
            f"Minimised by the student too, the third regulariser pulls each of 50 answers against the game "
            f"({100 * against:.0f} %): the summed gradient is {net[0.0]:+.2f} without it, {net[0.5]:+.2f} with μ = 0.5 "
            f"and {net[2.0]:+.2f} with 2, where the student gives itself away. Maximised, the printed sign shrinks the "
            f"discriminator's weights (a step leaves {100 * sizes[1.0]:.1f} %), minimised it lets them grow "
            f"({100 * sizes[-1.0]:.1f} %)."
        ),
        values={"against the game": against, "gradient": net[0.0], "gradient, μ = 2": net[2.0]},
    )


def _check_title() -> Evidence:
    preprint, published = TITLES
    return Evidence(
        holds=published != preprint and published.endswith(preprint),
        summary=f"The proceedings of AAAI 2020 have *{published}*; the preprint arXiv:1904.05100 has *{preprint}*.",
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="S1",
        kind="note",
        where="second file, 从中间层蒸馏, 2, heading",
        printed="Knowledge Squeezed Adversarial Network Compression (AAAI 2020).",
        right=(
            "That is the preprint's title (2019). The published form is called *Hierarchical* Knowledge Squeezed "
            "Adversarial Network Compression."
        ),
        check=_check_title,
    ),
    Erratum(
        id="S2",
        kind="paper",
        where="attention estimator: the formula of the scores (the note's image 19)",
        printed=(
            r"$M = \mathrm{softmax}(w * \hat L)$ with $\hat L = L + W_c g$: the global descriptor guides the attention."
        ),
        right=(
            r"$w^\top(L_p + W_c g) = w^\top L_p + w^\top W_c g$, and the second term is the same at every position: "
            r"the softmax takes it off. The attention does not depend on $g$, and $W_c$ learns nothing from it. A "
            r"non-linearity before the score would change that."
        ),
        check=_check_guidance,
    ),
    Erratum(
        id="S3",
        kind="paper",
        where="attention estimator: the pooling (the note's images 18 and 19)",
        printed="The map is weighted by a softmax over its positions and then average-pooled.",
        right=(
            r"The weights add up to 1 already: the average divides by $HW$ once more. A weighted sum is meant, or $HW$ "
            r"belongs into the weight of the term, one for each size of map, and squared."
        ),
        check=_check_double_average,
    ),
    Erratum(
        id="S4",
        kind="paper",
        where="attention estimator: formula against figure (the note's images 18 and 19)",
        printed=r"The formula weights $\hat L$, the figure the original map $L$.",
        right=(
            r"They differ by $W_c g$ exactly. In the formula's reading the network's last vector is part of what every "
            r"layer hands over; in the figure's it has no influence at all, since it does not steer the attention "
            r"either."
        ),
        check=_check_readings,
    ),
    Erratum(
        id="S5",
        kind="paper",
        where="intermediate term (the note's image 26), both networks' estimators being trained",
        printed=r"$\min \sum_i \lVert \tilde g_s^i - \tilde g_t^i \rVert^2$ over the estimators of both networks.",
        right=(
            "The minimum is 0 with vectors that say nothing of the image. The teacher's estimators must be trained by "
            "its task and stand still while the student learns."
        ),
        check=_check_collapse,
    ),
    Erratum(
        id="S6",
        kind="paper",
        where=r"class-level term $L_{adv}^C$ (the note's image 25)",
        printed=r"$\min_S \max_D$ of the log-likelihoods of the class, for the teacher's and for the student's logits.",
        right=(
            "Taken literally the student lowers the likelihood of its own classes. As in an auxiliary classifier GAN, "
            "both have to maximise it."
        ),
        check=_check_class_game,
    ),
    Erratum(
        id="S7",
        kind="paper",
        where=r"regularisers $L_{reg}$ (the note's image 24)",
        printed=(
            r"$-\mu(\lVert w_D\rVert_1 + \lVert w_D\rVert_2^2 - \mathbb{E}\log D(l_s))$ inside $\min_S \max_D$."
        ),
        right=(
            r"The sign is right for the discriminator, which maximises. The third term depends on the student too and "
            r"would have it lower $D(l_s)$, against the game: the regularisers are the discriminator's alone, as in "
            r"Belagiannis et al., where they are three alternatives."
        ),
        check=_check_regulariser,
    ),
)
