r"""Feature-map-level online adversarial distillation, AFD (Chung, Park, Kim and Kwak, ICML 2020, arXiv:2002.01775).

Networks are trained at once and learn from each other twice: from each other's softened predictions, and, through
one discriminator a network, from the distribution of each other's last feature map. Network :math:`k` of K learns
from network :math:`k - 1`, modulo K; for two networks that is both ways.

Read were the three equations and the two figures of the paper. They leave open the discriminator's layers, the
temperature, the optimisers and how transfer layers are trained; what stands here for them are our choices.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_class_indices,
    check_matrix,
    check_positive,
    check_same_batch,
    check_same_shape,
    check_tensor,
    check_weight_dtype,
)
from kdrefs._maps import check_maps
from kdrefs._typing import Float, Integer
from kdrefs.divergences import softened_kl
from kdrefs.training import History, average_gradients, fit, per_member

if TYPE_CHECKING:
    from kdrefs.training import EpochBatches
else:
    EpochBatches = Any  # a protocol that cannot be checked at run time

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


class FeatureDiscriminator(nn.Module):
    r"""One number in (0, 1) a sample: how sure it is that a feature map is the peer's.

    3x3 convolution with stride 2, batch normalisation, leaky ReLU, a convolution over all that is left, sigmoid.

    In training mode batch normalisation makes the answers depend on what else is in the batch. Give it the maps of
    both networks in one batch, as :class:`Discriminators` does: given one after the other, two distributions that
    differ by a factor are normalised to the same one, and no discriminator can tell them apart.

    Args:
        shape: ``(channels, height, width)`` of the maps.
        hidden: Channels between the convolutions.
        slope: Of the leaky ReLU below zero, from 0 to 1.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, shape: tuple[int, int, int], *, hidden: int = 32, slope: float = 0.2) -> None:
        super().__init__()
        _check_shape("shape", shape)
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden: expected an integer of at least 1, got {hidden!r}")
        if isinstance(slope, bool) or not isinstance(slope, int | float) or not 0 <= slope <= 1:
            raise ValueError(f"slope: expected a number from 0 to 1, got {slope!r}")
        self.shape = tuple(shape)
        channels, height, width = shape
        self.first = nn.Conv2d(channels, hidden, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.last = nn.Conv2d(hidden, 1, (math.ceil(height / 2), math.ceil(width / 2)))
        self.slope = slope

    def forward(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch"]:
        """Judge ``maps`` ``(batch, channels, height, width)``: 1 for the peer's, 0 for the network's own.

        Raises:
            ValueError: ``maps`` do not have the shape that the discriminator was made for, or, in training mode,
                there is a single value a channel to normalise: one sample of at most two by two positions.
        """
        check_maps("maps", maps)
        if tuple(maps.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"maps: expected the shape (batch, {expected}), got {tuple(maps.shape)}")
        check_weight_dtype("maps", maps, self.first.weight)
        hidden = F.leaky_relu(self.bn(self.first(maps)), self.slope)
        return torch.sigmoid(at_least_float32(self.last(hidden).flatten()))


def discriminator_loss(peer: Float[Tensor, "batch"], own: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    r"""Least-squares loss of a discriminator, to which the peer's map is real and the network's own is fake.

    .. math:: L_{D_k} = \mathbb{E}[(1 - D_k(G_{k-1}(x)))^2] + \mathbb{E}[D_k(G_k(x))^2]

    Equation 2 of the paper. For given distributions the best discriminator is :math:`D^* = p / (p + q)` with the
    densities :math:`p` of the peer's and :math:`q` of the network's own maps; where they are equal the loss is 1/2.
    The maps that the answers belong to must be detached: this loss trains nothing but the discriminator.

    Args:
        peer: The discriminator's answers ``(batch,)`` on the peer's maps, from 0 to 1.
        own: Its answers on the network's own maps.

    Returns:
        Scalar, a pure number from 0 to 2.

    Raises:
        ValueError: A shape or dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_answers("peer", peer)
    _check_answers("own", own)
    check_same_batch("own", own, "peer", peer)
    return (1 - at_least_float32(peer)).square().mean() + at_least_float32(own).square().mean()


def adversarial_loss(own: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    r"""Least-squares loss of a feature extractor that wants its maps to be taken for the peer's.

    .. math:: L_{G_k} = \mathbb{E}[(1 - D_k(G_k(x)))^2]

    Equation 2 of the paper; 1/4 where the best discriminator sees equal distributions. It trains the feature
    extractor only: neither the discriminator nor the classifier.

    Args:
        own: The discriminator's answers ``(batch,)`` on the network's own maps, from 0 to 1.

    Returns:
        Scalar, a pure number from 0 to 1.

    Raises:
        ValueError: The shape or dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_answers("own", own)
    return (1 - at_least_float32(own)).square().mean()


def mutual_logit_loss(
    student: Float[Tensor, "batch classes"],
    peer: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, "batch"],
    *,
    temperature: float = 3.0,
    weight: float | Float[Tensor, ""] = 1.0,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the labels plus the softened divergence from the peer.

    .. math:: L_{logit}^k = CE(y, \mathrm{softmax}(z_k))
              + w T^2 \, KL(\mathrm{softmax}(z_{k-1} / T) \,\|\, \mathrm{softmax}(z_k / T))

    Equation 1 of the paper, where :math:`w` is 1. With :math:`T = 1` it is deep mutual learning of two networks
    (Zhang et al., CVPR 2018).

    Args:
        student: Logits ``(batch, classes)`` of network :math:`k`.
        peer: Logits of the network that it learns from, same shape; no gradient flows into them.
        labels: Class indices ``(batch,)``.
        temperature: T, above 0. The paper's could not be read.
        weight: :math:`w`, a number or a scalar tensor, so that it may change within a recorded step.

    Returns:
        Scalar in nats: sum over classes, mean over samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_matrix("student", student)
    check_matrix("peer", peer)
    check_same_shape("peer", peer, "student", student)
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "student", student)
    cross_entropy = F.cross_entropy(at_least_float32(student), labels.long())
    return cross_entropy + weight * softened_kl(student, peer, temperature)


def peers(count: int, scheme: str = "cycle") -> tuple[tuple[int, ...], ...]:
    """From whom each of ``count`` networks learns, numbered from 0.

    Args:
        count: Number of networks, at least 2.
        scheme: ``"cycle"``: network k from k - 1 alone, the first from the last, which needs one discriminator a
            network. ``"pairwise"``: each from all others, which needs ``count - 1`` times as many. For two networks
            they are the same.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"count: expected at least 2 networks, got {count!r}")
    check_choice("scheme", scheme, ("cycle", "pairwise"))
    reach = 1 if scheme == "cycle" else count - 1
    return tuple(tuple((k - j) % count for j in range(1, reach + 1)) for k in range(count))


class TransferLayers(nn.Module):
    """Brings the maps of several networks to one shape: their fewest channels and their fewest positions.

    A 1x1 convolution changes the number of channels, average pooling the number of positions; a map that has the
    common shape is left as it is. The layers belong to the feature extractors and are trained with them. Trained with
    the discriminators, a bias in them would tell the networks apart whatever their maps are.

    Args:
        shapes: ``(channels, height, width)`` of each network's maps.

    Raises:
        ValueError: A shape is out of range.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            _check_shape(f"shapes[{number}]", shape)
        channels, height, width = (min(sizes) for sizes in zip(*shapes, strict=True))
        self.shape = (channels, height, width)
        self.shapes = tuple(map(tuple, shapes))
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d((height, width)) if shape[1:] != self.shape[1:] else nn.Identity(),
                nn.Conv2d(shape[0], channels, 1, bias=False) if shape[0] != channels else nn.Identity(),
            )
            for shape in map(tuple, shapes)
        )

    def forward(self, *maps: Float[Tensor, "batch _channels _h _w"]) -> tuple[Tensor, ...]:
        """Bring each network's ``maps`` to ``(batch, *shape)``.

        Raises:
            ValueError: There are not as many maps as networks, or one is not of its network's shape, or outside
                autocast of the dtype of its layer.
        """
        _check_maps(maps, self.shapes)
        for number, (one, layer) in enumerate(zip(maps, self.layers, strict=True)):
            for weight in layer.parameters():
                check_weight_dtype(f"maps[{number}]", one, weight)
        return tuple(layer(one) for layer, one in zip(self.layers, maps, strict=True))


class Discriminators(nn.Module):
    """A discriminator for each network and each of those it learns from, see :func:`peers`.

    Args:
        shape: ``(channels, height, width)`` of the maps, the same for all networks.
        count: Number of networks.
        scheme: Of :func:`peers`.
        hidden: Channels in each :class:`FeatureDiscriminator`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, shape: tuple[int, int, int], count: int, *, scheme: str = "cycle", hidden: int = 32
    ) -> None:
        super().__init__()
        self.pairs = tuple((k, peer) for k, found in enumerate(peers(count, scheme)) for peer in found)
        self.shape, self.count = tuple(shape), count
        self.each = nn.ModuleList(FeatureDiscriminator(shape, hidden=hidden) for _ in self.pairs)

    def forward(
        self, *maps: Float[Tensor, "batch channels h w"]
    ) -> tuple[tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]], ...]:
        """The answers on the peer's and on the own maps of each of ``pairs``; no gradient reaches a peer.

        Args:
            maps: One batch a network.

        Raises:
            ValueError: There are not as many maps as networks, or a shape or dtype does not fit.
        """
        _check_maps(maps, (self.shape,) * self.count)
        found = []
        for discriminator, (own, peer) in zip(self.each, self.pairs, strict=True):
            first, second = discriminator(torch.cat([maps[peer].detach(), maps[own]])).chunk(2)
            found.append((first, second))
        return tuple(found)


def train_afd(
    networks: Sequence[nn.Module],
    batches: EpochBatches,
    *,
    features: Sequence[str],
    epochs: int,
    optimizer: MakeOptimizer,
    adversarial_optimizer: MakeOptimizer,
    discriminator_optimizer: MakeOptimizer,
    transfers: nn.Module | None = None,
    discriminators: nn.Module | None = None,
    scheme: str = "cycle",
    matching: Literal["adversarial", "l1"] | None = "adversarial",
    update: Literal["alternating", "simultaneous"] = "alternating",
    mutual: float = 1.0,
    ramp: float = 0.0,
    temperature: float = 3.0,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> History:
    r"""Train networks together, each learning from its peers' predictions and the distribution of their maps.

    Equation 3 of the paper, :math:`L_k = L_{logit}^k + L_{G_k}`, whose terms are not minimised as a sum. A step

    1. takes one step of all networks down :math:`\sum_k L_{logit}^k`, peers as constants;
    2. runs the networks again and takes one step of the discriminators down :math:`\sum_k L_{D_k}`, maps as
       constants;
    3. takes one step of the feature extractors and transfer layers down :math:`\sum_k L_{G_k}`, discriminators and
       peers' maps as constants.

    Losses of different networks share no parameter, so one optimiser for all is one for each as long as it treats
    every element alone (SGD, Adam). With several peers, terms are averaged over them. Batch normalisation in the
    networks sees every batch twice.

    Many runs may share a training: give :class:`kdrefs.training.Members` of networks, transfer layers and
    discriminators, and :class:`kdrefs.training.MemberBatches`.

    Args:
        networks: At least two, returning :class:`kdrefs.nets.Output`; trained in place.
        batches: The training set, batches with ``images`` and ``labels``.
        features: For each network the name of its last feature map.
        epochs: Epochs in all.
        optimizer: Makes the optimiser of step 1 from parameters, such as ``partial(torch.optim.SGD, lr=0.1)``.
        adversarial_optimizer: Makes that of step 3.
        discriminator_optimizer: Makes that of step 2.
        transfers: :class:`TransferLayers` for the networks' maps; None where all have one shape.
        discriminators: :class:`Discriminators` for ``transfers.shape`` and this ``scheme``; None to do without, where
            ``matching`` allows it.
        scheme: Who learns from whom, see :func:`peers`.
        matching: What step 3 minimises: ``"adversarial"``, or ``"l1"``, the mean absolute difference to the peer's
            map of the same image, a control. None: nothing; networks are not run again, and discriminators and
            transfer layers are trained on their maps to watch only.
        update: ``"alternating"``, as above. ``"simultaneous"``: gradients of steps 1 and 3 come from one forward
            pass and are applied afterwards, which saves the second; the two differ by a term of the order of
            the learning rate.
        mutual: Weight of the divergence between predictions, 0 to leave it out.
        ramp: Share of the training, from 0 to 1, in which that weight grows from 0 in a straight line.
        temperature: T of :func:`mutual_logit_loss`.
        schedule: Makes the schedule of each of the three optimisers; stepped once a step.
        options: Further arguments of :func:`kdrefs.training.fit`. ``evaluate`` finds network k as
            ``state["network<k>"]``, and ``state["transfers"]``.

    Returns:
        What :func:`kdrefs.training.fit` returns. Scalars are ``logit<k>``, ``discriminator<k>`` (1/2 where fooled)
        and ``adversarial<k>`` (1/4), both of the discriminator before its step; with members, ``logit<k>[<member>]``.

    Raises:
        ValueError: An argument is out of range.
        FloatingPointError: Something is not finite.
    """
    found = peers(len(networks), scheme)
    if len(features) != len(networks):
        raise ValueError(f"features: expected {len(networks)} names, one a network, got {len(features)}")
    check_choice("matching", matching, ("adversarial", "l1", None))
    check_choice("update", update, ("alternating", "simultaneous"))
    check_positive("temperature", temperature)
    for name, value in (("mutual", mutual), ("ramp", ramp)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    if ramp > 1:
        raise ValueError(f"ramp: expected a share from 0 to 1, got {ramp!r}")
    if discriminators is None and matching == "adversarial":
        raise ValueError("discriminators: expected Discriminators for adversarial matching, got None")

    mapped = partial(per_member, network=networks[0])
    cross_entropy, logit_loss = mapped(_cross_entropy), mapped(mutual_logit_loss)
    judge, fool, distance = mapped(discriminator_loss), mapped(adversarial_loss), mapped(_distance)
    ramp_steps = ramp * epochs * len(batches)

    def logit_losses(logits: Sequence[Tensor], labels: Tensor, done: Tensor) -> list[Tensor]:
        if mutual == 0:
            return [cross_entropy(one, labels) for one in logits]
        weight: Any = mutual
        if ramp_steps:
            weight = mutual * (done / ramp_steps).clamp(max=1)
        return [
            _mean(
                logit_loss(one, logits[j], labels, temperature=temperature, weight=weight) for j in found[k]
            )
            for k, one in enumerate(logits)
        ]

    def matching_loss(maps: Sequence[Tensor], state: dict[str, Any]) -> Tensor:
        if matching == "l1":
            terms = [_mean(distance(maps[k], maps[j].detach()) for j in found[k]) for k in range(len(maps))]
        else:
            answers = iter(state["discriminators"](*maps))
            terms = [_mean(fool(next(answers)[1]) for _ in found[k]) for k in range(len(maps))]
        return torch.stack(terms).sum()

    def step(state: dict[str, Any], batch: Any) -> dict[str, Tensor]:
        nets = [state[f"network{k}"] for k in range(len(found))]
        outputs = [net(batch.images) for net in nets]
        losses = logit_losses([output.logits for output in outputs], batch.labels, state["done"])
        simultaneous = matching is not None and update == "simultaneous"
        gradients = _gradients(state["optimizer"], torch.stack(losses).sum(), keep=simultaneous)
        if not simultaneous:
            _apply(state["optimizer"], gradients)
            if matching is not None:
                # The graph of the first pass belongs to weights that are no more.
                outputs = [net(batch.images) for net in nets]
        maps = [output.features[name] for output, name in zip(outputs, features, strict=True)]
        if matching is None:
            maps = [one.detach() for one in maps]
        if transfers is not None:
            maps = list(state["transfers"](*maps))
        named = {"logit": losses}
        if discriminators is not None:
            answers = iter(state["discriminators"](*[one.detach() for one in maps]))
            scores = [[next(answers) for _ in one] for one in found]
            named["discriminator"] = [_mean(judge(*score) for score in one) for one in scores]
            named["adversarial"] = [_mean(fool(own.detach()) for _, own in one) for one in scores]
            loss = torch.stack(named["discriminator"]).sum()
            _apply(state["discriminator_optimizer"], _gradients(state["discriminator_optimizer"], loss))
        if "adversarial_optimizer" in state:
            second = _gradients(state["adversarial_optimizer"], matching_loss(maps, state))
            if simultaneous:
                _apply(state["optimizer"], gradients)
            _apply(state["adversarial_optimizer"], second)
        for one in schedules:
            state[one].step()
        state["done"].add_(1)
        return {
            key: value
            for name, values in named.items()
            for k, one in enumerate(values)
            for key, value in _scalars(f"{name}{k}", one.detach()).items()
        }

    state: dict[str, Any] = {f"network{k}": network for k, network in enumerate(networks)}
    trained = [parameter for network in networks for parameter in network.parameters()]
    state["optimizer"] = optimizer(trained)
    extra: list[nn.Parameter] = []
    if transfers is not None:
        state["transfers"] = transfers
        extra = list(transfers.parameters())
    if discriminators is not None:
        state["discriminators"] = discriminators
        state["discriminator_optimizer"] = discriminator_optimizer(discriminators.parameters())
    if matching is not None or (extra and discriminators is not None):
        state["adversarial_optimizer"] = adversarial_optimizer([*trained, *extra])
    optimizers = [name for name, value in state.items() if isinstance(value, Optimizer)]
    schedules = [f"{name}_schedule" for name in optimizers] if schedule is not None else []
    if schedule is not None:
        state |= {f"{name}_schedule": schedule(state[name]) for name in optimizers}
    state["done"] = torch.zeros((), device=trained[0].device)
    return fit(step, state, batches, epochs=epochs, **options)


def _gradients(optimizer: Optimizer, loss: Tensor, *, keep: bool = False) -> tuple[Tensor | None, ...]:
    """The gradient of ``loss`` for each parameter of ``optimizer``, None where it has none; nothing else gets any."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)


def _apply(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """One step of ``optimizer``; a parameter without a gradient, such as a classifier's, is left alone."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    average_gradients(optimizer)
    with torch.autocast(parameters[0].device.type, enabled=False):
        optimizer.step()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), labels)


def _distance(maps: Tensor, peer: Tensor) -> Tensor:
    return F.l1_loss(at_least_float32(maps), at_least_float32(peer))


def _mean(values: Iterable[Tensor]) -> Tensor:
    every = list(values)
    return every[0] if len(every) == 1 else torch.stack(every).mean(0)


def _scalars(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value} if value.ndim == 0 else {f"{name}[{m}]": one for m, one in enumerate(value)}


def _check_maps(maps: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless there is a map of its shape for each network, all of one batch."""
    if len(maps) != len(shapes):
        raise ValueError(f"maps: expected those of {len(shapes)} networks, got {len(maps)}")
    for number, (one, shape) in enumerate(zip(maps, shapes, strict=True)):
        check_maps(f"maps[{number}]", one)
        if tuple(one.shape[1:]) != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(
                f"maps[{number}]: expected the shape (batch, {expected}), got {tuple(one.shape)}"
            )
        check_same_batch(f"maps[{number}]", one, "maps[0]", maps[0])


def _check_answers(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.ndim != 1 or value.shape[0] < 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch,) of at least 1, got {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )


def _check_shape(name: str, shape: tuple[int, int, int]) -> None:
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"{name}: expected (channels, height, width), each at least 1, got {tuple(shape)}")
