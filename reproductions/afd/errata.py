r"""What the notes on adversarial feature-map distillation and the paper's presentation got wrong, each with its proof.

Sources: *note*, the literature note that this book arranges (section 二.1); *paper*, its equations and figures, of
which images were read, not the text.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

from kdrefs.methods.afd import (
    Discriminators,
    FeatureDiscriminator,
    adversarial_loss,
    discriminator_loss,
    mutual_logit_loss,
    peers,
)
from reproductions.harness.errata import Erratum, Evidence, draw


def _check_roles() -> Evidence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminators = Discriminators((3, 4, 4), 2).double()
    first, second = draw(8, 3, 4, 4, seed=1).requires_grad_(), draw(8, 3, 4, 4, seed=2).requires_grad_()
    (_, own), _ = discriminators(first, second)
    gradients = torch.autograd.grad(adversarial_loss(own), (first, second), allow_unused=True)
    alone = [type(module).__name__ for module in discriminators.each]
    reach = float(gradients[0].abs().sum())
    return Evidence(
        holds=reach > 0 and gradients[1] is None and alone == ["FeatureDiscriminator"] * 2,
        summary=(
            f"The loss that fools D1 reaches the maps of network 1 (gradient {reach:.2g}) and not those of network 2; "
            "what it trains is a feature extractor, and a discriminator has no map that could be real or fake."
        ),
        values={"gradient to network 1": reach, "gradient to network 2": 0.0},
    )


class _Chain(nn.Module):
    """Layers of one weight each, without nonlinearity: z = w_n ... w_1 x."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.tensor(2.0, dtype=torch.float64) for _ in range(layers))

    def forward(self, values: Tensor) -> Tensor:
        for weight in self.weights:
            values = weight * values
        return values


def second_gradient(layers: int, *, again: bool) -> float:
    """The gradient of a second loss after a step down the first; both are z² / 2 with the output z of a chain.

    Args:
        layers: In the chain.
        again: Whether the chain is run again before the second gradient.

    Raises:
        RuntimeError: What the graph needs is no more: of one forward pass and several layers.
    """
    net = _Chain(layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs = torch.ones(1, 1, dtype=torch.float64)
    output = net(inputs)
    # The two losses share the forward pass, as the logits and the map of one image do.
    (output.square().sum() / 2).backward(retain_graph=True)
    optimizer.step()
    if again:
        output = net(inputs)
    (gradient,) = torch.autograd.grad(output.square().sum() / 2, net.weights[0])
    return float(gradient)


def _check_stale() -> Evidence:
    try:
        second_gradient(2, again=False)
        message = ""
    except RuntimeError as error:
        message = str(error)
    stale, fresh = second_gradient(1, again=False), second_gradient(1, again=True)
    return Evidence(
        holds="modified by an inplace operation" in message
        and abs(stale - 2) < 1e-12
        and abs(fresh - 1.8) < 1e-12,
        summary=(
            "Two layers: PyTorch refuses, 'modified by an inplace operation'. One layer: it does not, and the second "
            f"gradient is {stale:.2f}, that of the weight before the first step; of the present one it is {fresh:.2f}."
        ),
        values={"gradient of one forward pass": stale, "gradient after a second": fresh},
    )


def _check_adam() -> Evidence:
    moved = {}
    for weight in (1.0, 1e-3):
        steps = []
        for make, rate in ((torch.optim.Adam, 2e-5), (torch.optim.SGD, 0.1)):
            parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
            optimizer = make([parameter], lr=rate)
            (weight * parameter.square().sum()).backward()
            optimizer.step()
            steps.append(1 - parameter.item())
        moved[weight] = steps
    (adam, sgd), (adam_small, sgd_small) = moved.values()
    return Evidence(
        holds=abs(adam_small / adam - 1) < 1e-4 and abs(sgd_small / sgd - 1e-3) < 1e-9,
        summary=(
            f"A first step of Adam moves by {adam:.3g}, with the loss a thousand times smaller by {adam_small:.3g}; "
            f"one of SGD by {sgd:.3g} and {sgd_small:.3g}. A weight of the adversarial loss would do nothing."
        ),
        values={"Adam": adam, "Adam, loss / 1000": adam_small, "SGD": sgd, "SGD, loss / 1000": sgd_small},
    )


def expected_losses(peer: Tensor, own: Tensor, answers: Tensor) -> tuple[float, float]:
    """L_D and L_G of a discriminator that gives ``answers`` to each of finitely many maps of two distributions."""
    loss = (peer * (1 - answers).square() + own * answers.square()).sum()
    return float(loss), float((own * (1 - answers).square()).sum())


def _check_optimum() -> Evidence:
    peer, own = (draw(12, seed=seed).softmax(0) for seed in (3, 4))
    best = peer / (peer + own)
    least, fooling = expected_losses(peer, own, best)
    worse = min(
        expected_losses(peer, own, (best + 0.05 * draw(12, seed=seed)).clamp(0, 1))[0]
        for seed in range(5, 25)
    )
    half = torch.full((6,), 0.5, dtype=torch.float64)
    equal = float(discriminator_loss(half, half)), float(adversarial_loss(half))
    # Pearson's chi-squared of LSGAN's theorem, between the sum of the densities and twice the generator's.
    pearson = float(((peer + own - 2 * own).square() / (peer + own)).sum())
    return Evidence(
        holds=worse > least and equal == (0.5, 0.25) and abs(fooling - pearson) > 0.01,
        summary=(
            f"On twelve maps the least L_D is {least:.4f}, at p/(p+q); the best of twenty perturbed answers has "
            f"{worse:.4f}. L_G there is {fooling:.4f}, Pearson's divergence {pearson:.4f}. Equal distributions: "
            f"{equal[0]:g} and {equal[1]:g}."
        ),
        values={"L_D": least, "L_G": fooling, "Pearson": pearson},
    )


def _check_saturation() -> Evidence:
    gradients = {}
    for logit in (0.0, -10.0):
        for name, link in (("sigmoid", torch.sigmoid), ("identity", torch.nn.Identity())):
            score = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(adversarial_loss(link(score)), score)
            gradients[name, logit] = abs(float(gradient))
    caught = gradients["sigmoid", -10.0]
    return Evidence(
        holds=caught < 1e-3 < gradients["sigmoid", 0.0] and gradients["identity", -10.0] > 1,
        summary=(
            "Gradient of L_G for a map that the discriminator is sure to be fake (score −10): "
            f"{caught:.0e} with the sigmoid, {gradients['identity', -10.0]:.0f} without; undecided (0): "
            f"{gradients['sigmoid', 0.0]:.2f} with it."
        ),
        values={"sigmoid, caught": caught, "no sigmoid, caught": gradients["identity", -10.0]},
    )


def _check_cycle() -> Evidence:
    counts = {k: (sum(map(len, peers(k))), sum(map(len, peers(k, "pairwise")))) for k in (2, 3, 4, 5)}
    logits, labels = [draw(4, 5, seed=seed).requires_grad_() for seed in (7, 8, 9)], torch.arange(4)
    reach = {}
    for k, (peer,) in enumerate(peers(3)):
        loss = mutual_logit_loss(logits[k], logits[peer], labels)
        reach[k] = [g is not None for g in torch.autograd.grad(loss, logits, allow_unused=True)]
    one_way = all(reach[k] == [k == other for other in range(3)] for k in range(3))
    edges = {(peer, k) for k, found in enumerate(peers(3)) for peer in found}
    return Evidence(
        holds=all(pair == (k, k * (k - 1)) for k, pair in counts.items())
        and one_way
        and edges == {(2, 0), (0, 1), (1, 2)}
        and peers(2) == peers(2, "pairwise"),
        summary=(
            "Discriminators for K = 3: " + f"{counts[3][0]} in a cycle, {counts[3][1]} for all pairs; K = 5: "
            f"{counts[5][0]} and {counts[5][1]}. The divergences of the cycle are one-way too: 3→1, 1→2, 2→3."
        ),
        values={f"K = {k}": f"{a} and {b}" for k, (a, b) in counts.items()},
    )


def _check_marginal() -> Evidence:
    maps = draw(12, 3, 4, 4, seed=10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = FeatureDiscriminator((3, 4, 4)).double().eval()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    swapped = maps[order]
    before, after = (
        float(discriminator_loss(discriminator(maps), discriminator(own)).detach()) for own in (maps, swapped)
    )
    apart = float((swapped - maps).square().mean() / maps.square().mean())
    # Four maps, each network in its own order: all 24 assignments are the same to every discriminator.
    few = discriminator(maps[:4]).detach()
    spread = {round(float(adversarial_loss(few[list(way)])), 12) for way in permutations(range(4))}
    return Evidence(
        holds=abs(before - after) < 1e-12 and apart > 0.5 and len(spread) == 1,
        summary=(
            "A network that gives each image the map of another image of the batch: the losses stay the same (to "
            f"{abs(before - after):.0e}), while the maps of an image are {apart:.1f} times their mean square apart."
        ),
        values={"difference of L_D": abs(before - after), "distance of the maps": apart},
    )


def _check_separate() -> Evidence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = FeatureDiscriminator((3, 4, 4)).double()
    peer = draw(64, 3, 4, 4, seed=11)
    own = 10 * peer
    separate = float((discriminator(peer) - discriminator(own)).abs().max().detach())
    first, second = discriminator(torch.cat([peer, own])).chunk(2)
    joint = float((first - second).abs().max().detach())
    return Evidence(
        holds=separate < 1e-3 < 0.02 < joint,
        summary=(
            "Maps ten times as large as the peer's: in two batches the answers differ by at most "
            f"{separate:.0e}, in one batch by {joint:.2f}."
        ),
        values={"two batches": separate, "one batch": joint},
    )


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        id="A1",
        kind="note",
        where="note, heading (笔记：ICLR 2020) and paragraphs 3 and 4",
        printed=(
            "ICLR 2020; 'when D1 is trained the feature map of D2 is real and that of D1 fake'; 'D1 and D2 are trained "
            "to fool their discriminators'; D1's answer 1 is '实' (实数: a real *number*)."
        ),
        right=(
            r"ICML 2020, arXiv:2002.01775. The maps are those of the feature extractors $G_2$ and $G_1$, and it is the "
            r"networks that fool the discriminators; 'real' (真) is the label 1."
        ),
        check=_check_roles,
    ),
    Erratum(
        id="A2",
        kind="note",
        where="note, paragraph on Eq. 3 (笔记：将一幅图像推导出一个模型，然后计算一个logit和一个特征图)",
        printed="An image is passed once; then the parameters are updated with one loss and again with the other.",
        right=(
            "After the first update the graph of that pass belongs to weights that are no more. Either the networks "
            "are run again, or both gradients are taken before either is applied; the two differ by a term of the "
            "order of the learning rate."
        ),
        check=_check_stale,
    ),
    Erratum(
        id="A3",
        kind="paper",
        where="paper, Eq. 3, and the note's reason for two optimisers (different learning rates)",
        printed=r"$L_k = L_{logit}^k + L_{G_k}$",
        right=(
            "Not a sum that is minimised: each term has its own optimiser. With Adam on the second its weight has no "
            "effect, so a small learning rate is no weight in disguise, and one SGD on the sum is another algorithm."
        ),
        check=_check_adam,
    ),
    Erratum(
        id="A4",
        kind="paper",
        where="paper, Eq. 2, read as a least-squares GAN",
        printed="A least-squares adversarial loss, which in LSGAN minimises Pearson's divergence.",
        right=(
            r"The best discriminator is $p/(p+q)$, with $L_D = \frac12$ and $L_G = \frac14$ for equal distributions. "
            r"The labels 0, 1, 1 do not meet LSGAN's condition: $L_G$ there is not Pearson's divergence."
        ),
        check=_check_optimum,
    ),
    Erratum(
        id="A5",
        kind="paper",
        where="paper, Eq. 2 and the discriminator's output in (0, 1)",
        printed="A squared loss of a sigmoid's output.",
        right=(
            "The sigmoid saturates where the discriminator is sure, which is what LSGAN's linear output was to avoid: "
            "the network that most needs it gets almost no gradient."
        ),
        check=_check_saturation,
    ),
    Erratum(
        id="A6",
        kind="note",
        where="note, cyclic learning of more than two networks",
        printed="'Twice every pair' of discriminators without a cycle; nothing on the predictions.",
        right=(
            r"$2\binom K2 = K(K-1)$ against K. In the cycle the divergence of the predictions is one-way too: network "
            r"$k$ from $k-1$ alone."
        ),
        check=_check_cycle,
    ),
    Erratum(
        id="A7",
        kind="note",
        where="note, abstract (笔记：它可以学习另一个网络的特征图分布), and 'learns the other network's feature map'",
        printed="The network learns the other's feature map.",
        right=(
            "The distribution of its maps. No discriminator sees which map belongs to which image, so any exchange "
            "among the images is as good; agreement on an image comes from the predictions alone."
        ),
        check=_check_marginal,
    ),
    Erratum(
        id="A8",
        kind="note",
        where="note, description of the discriminators: layers, detached sides and how maps are batched are left out",
        printed="The discriminator tells the maps of the two networks apart.",
        right=(
            "One with batch normalisation does so only if both networks' maps are in one batch: normalised one after "
            "the other, distributions that differ by a factor become the same."
        ),
        check=_check_separate,
    ),
)
