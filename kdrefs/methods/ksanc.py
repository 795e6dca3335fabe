r"""Knowledge squeezed adversarial network compression, KSANC (Shu et al., arXiv:1904.05100; AAAI 2020).

A student learns the teacher's logits, fools a discriminator that sees logits only, and matches *squeezed* feature
maps: vectors that attention over the positions makes of each layer (:class:`AttentionEstimator`). The published
form is called "Hierarchical Knowledge Squeezed Adversarial Network Compression".

Read were the formulas and figures that the literature note shows. Weights of the terms, the discriminator's widths
and how the teacher's estimators are trained could not be read; where the formulas and the figure contradict each
other, the arguments of :class:`AttentionEstimator` name both.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_class_indices,
    check_floating,
    check_matrix,
    check_same_batch,
    check_weight_dtype,
)
from kdrefs._maps import check_maps
from kdrefs._typing import Float, Integer
from kdrefs.nets import Output
from kdrefs.nets.output import check_counts


class AttentionEstimator(nn.Module):
    r"""Squeezes a feature map into a vector: attention over its positions, then the weighted sum.

    .. math:: \hat L_p = L_p + W_c g, \qquad M = \mathrm{softmax}_p(w^\top \hat L_p), \qquad
              \tilde g = \sum_p M_p \hat L_p

    with the map's columns :math:`L_p` and the network's global descriptor :math:`g`, the vector that its classifier
    sees. The term with :math:`g` is the same at every position, so that the softmax ignores it: the global descriptor
    is *added* to the result and guides no attention.

    Args:
        channels: Of the result, the teacher's number of channels.
        descriptor: Width of the global descriptor.
        in_channels: Of the maps where they differ, as a student's do: a 1x1 convolution lifts them first.
        values: What is averaged: ``"lifted"``, :math:`\hat L` as the formula has it; ``"maps"``, :math:`L` as in the
            figure. With ``pooling="sum"`` the first is the second plus :math:`W_c g`, and the second needs no
            :math:`W_c`, since nothing depends on it.
        pooling: ``"sum"``, since the weights add up to 1; ``"mean"``: the average pooling that is printed, which
            divides by the number of positions once more: ours divided by HW.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        descriptor: int,
        *,
        in_channels: int | None = None,
        values: str = "lifted",
        pooling: str = "sum",
    ) -> None:
        super().__init__()
        check_counts(channels=channels, descriptor=descriptor, in_channels=in_channels or channels)
        check_choice("values", values, ("lifted", "maps"))
        check_choice("pooling", pooling, ("sum", "mean"))
        self.shape = (in_channels or channels, descriptor)
        self.values, self.pooling = values, pooling
        # A 1x1 convolution is a linear map of each column. None has a bias: on the scores it would change nothing.
        lifts = self.shape[0] != channels
        self.lift = nn.Linear(self.shape[0], channels, bias=False) if lifts else nn.Identity()
        self.projection = nn.Linear(descriptor, channels, bias=False) if values == "lifted" else None
        self.score = nn.Linear(channels, 1, bias=False)

    def forward(
        self, maps: Float[Tensor, "batch channels h w"], descriptor: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch squeezed"]:
        """Squeeze ``maps`` ``(batch, channels, height, width)`` to ``(batch, squeezed)``, at least in float32.

        Args:
            maps: Of a layer.
            descriptor: The same network's global descriptor ``(batch, width)`` of the same samples.

        Raises:
            ValueError: A shape or dtype is not what the estimator was made for.
        """
        weights = self.attention(maps, descriptor).flatten(1)
        # The lift is linear: that of the weighted sum is the weighted sum of the lifted columns.
        columns = at_least_float32(maps).flatten(2)
        squeezed = at_least_float32(self.lift((columns * weights[:, None]).sum(2)))
        if self.projection is not None:
            squeezed = squeezed + at_least_float32(self.projection(descriptor))
        return squeezed / weights.shape[1] if self.pooling == "mean" else squeezed

    def attention(
        self, maps: Float[Tensor, "batch channels h w"], descriptor: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch h w"]:
        """The weights ``(batch, height, width)`` of the positions, which add up to 1. Arguments as for the result."""
        self._check(maps, descriptor)
        # The projected descriptor would add one number to all scores of a sample, which the softmax takes off again.
        direction = self.score.weight[0]
        if isinstance(self.lift, nn.Linear):
            direction = direction @ self.lift.weight
        scores = at_least_float32(torch.einsum("c,bcp->bp", direction, maps.flatten(2)))
        return scores.softmax(1).view(len(maps), *maps.shape[2:])

    def _check(self, maps: Tensor, descriptor: Tensor) -> None:
        check_maps("maps", maps)
        check_matrix("descriptor", descriptor)
        check_same_batch("descriptor", descriptor, "maps", maps)
        for name, found, expected in (
            ("maps", maps.shape[1], self.shape[0]),
            ("descriptor", descriptor.shape[1], self.shape[1]),
        ):
            if found != expected:
                raise ValueError(f"{name}: expected {expected} channels, got {found}")
        check_weight_dtype("maps", maps, self.score.weight)
        if self.projection is not None:
            check_weight_dtype("descriptor", descriptor, self.projection.weight)


class TaskDrivenEstimators(nn.Module):
    """Estimators of several layers of a network, and a linear classifier that reads all squeezed vectors at once.

    Trained with the labels while the network stands still, and frozen before any student is: an estimator that moves
    with the student's loss may squeeze every map to nothing and make that loss 0. The paper calls its attention
    task-driven and does not say which classifier it drives; this one is that of Jetley et al., "Learn to Pay
    Attention" (ICLR 2018), whose estimator it uses.

    Args:
        estimators: One a layer.
        classes: Number of classes.

    Raises:
        ValueError: There is no estimator or no class.
    """

    def __init__(self, estimators: Sequence[AttentionEstimator], classes: int) -> None:
        super().__init__()
        check_counts(estimators=len(estimators), classes=classes)
        self.estimators = nn.ModuleList(estimators)
        self.classifier = nn.Linear(sum(one.score.in_features for one in estimators), classes)

    def forward(
        self, descriptor: Float[Tensor, "batch width"], *maps: Float[Tensor, "batch _channels _h _w"]
    ) -> Output:
        """Logits, and as feature ``squeezed`` the vectors of all layers one after the other.

        Args:
            descriptor: The network's global descriptor.
            maps: One a layer, in the order of the estimators.

        Raises:
            ValueError: There are not as many maps as estimators, or one is not what its estimator was made for.
        """
        if len(maps) != len(self.estimators):
            raise ValueError(f"maps: expected {len(self.estimators)} layers, got {len(maps)}")
        found = [one(layer, descriptor) for one, layer in zip(self.estimators, maps, strict=True)]
        squeezed = torch.cat(found, 1)
        return Output(self.classifier(squeezed), {"squeezed": squeezed})


class LogitDiscriminator(nn.Module):
    r"""Tells a teacher's logits from a student's, and says which class they are of.

    Batch normalisation, linear, batch normalisation, ReLU, linear, batch normalisation, ReLU, linear, to
    :math:`1 + C` numbers: the first is the log-odds that the logits are the teacher's, the others are the
    scores of the classes.

    In training mode normalisation makes an answer depend on what else is in the batch, and one that sees each network's
    logits alone could not tell a network from the same one with logits ten times as large: both are judged
    in one batch.

    Args:
        classes: :math:`C`.
        hidden: Width of both hidden layers; the paper's could not be read.

    Raises:
        ValueError: A size is out of range.
    """

    def __init__(self, classes: int, *, hidden: int = 64) -> None:
        super().__init__()
        check_counts(classes=classes, hidden=hidden)
        self.layers = nn.Sequential(
            nn.BatchNorm1d(classes),
            nn.Linear(classes, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1 + classes),
        )

    def forward(
        self, teacher: Float[Tensor, "batch classes"], student: Float[Tensor, "batch classes"]
    ) -> tuple[Float[Tensor, "batch answers"], Float[Tensor, "batch answers"]]:
        """The answers ``(batch, 1 + classes)`` on the teacher's and on the student's logits.

        Raises:
            ValueError: A shape or dtype does not fit.
        """
        _check_like("student", student, "teacher", teacher)
        classes = self.layers[1].in_features
        if student.shape[1] != classes:
            raise ValueError(f"student: expected {classes} classes, got {student.shape[1]}")
        check_weight_dtype("student", student, next(self.layers.parameters()))
        first, second = self.layers(torch.cat([teacher.to(student.dtype), student])).chunk(2)
        return first, second


def logit_discriminator_loss(
    teacher: Float[Tensor, "batch answers"],
    student: Float[Tensor, "batch answers"],
    labels: Integer[Tensor, "batch"],
    *,
    mu: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, ""]:
    r"""What the discriminator minimises, but for the penalty on its weights (:func:`weight_penalty`).

    .. math:: -\mathbb{E}\log D(l_t) - \mathbb{E}\log(1 - D(l_s))
              - \mathbb{E}\log D^C_y(l_t) - \mathbb{E}\log D^C_y(l_s) - \mu \, \mathbb{E}\log D(l_s)

    with :math:`D` the sigmoid of the first answer and :math:`D^C` the softmax of the others. The last term, one of
    three regularisers (Belagiannis et al., "Adversarial Network Compression", 2018), calls some students teachers, so
    that the discriminator does not win at once. The class terms are those of an auxiliary classifier (Odena et al.,
    ICML 2017): discriminator and student both maximise them; the paper prints them as a game that the student would
    win by being of no class.

    Args:
        teacher: Answers ``(batch, 1 + classes)`` on the teacher's logits.
        student: Answers on the student's, which must be detached: this loss trains the discriminator only.
        labels: Class indices ``(batch,)``.
        mu: Weight of the regularisers, a number or a scalar tensor.

    Returns:
        Scalar in nats, mean over samples.

    Raises:
        ValueError: A shape or dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_answers("teacher", teacher, labels)
    _check_like("student", student, "teacher", teacher)
    ours, theirs = at_least_float32(student), at_least_float32(teacher)
    game = F.softplus(-theirs[:, 0]).mean() + F.softplus(ours[:, 0]).mean()
    classes = F.cross_entropy(theirs[:, 1:], labels.long()) + F.cross_entropy(ours[:, 1:], labels.long())
    return game + classes + mu * F.softplus(-ours[:, 0]).mean()


def logit_adversarial_loss(
    student: Float[Tensor, "batch answers"], labels: Integer[Tensor, "batch"]
) -> Float[Tensor, ""]:
    r"""What the student minimises of the game with the discriminator.

    .. math:: L_{adv} = \mathbb{E}\log(1 - D(l_s)) - \mathbb{E}\log D^C_y(l_s)

    Arguments and terms as in :func:`logit_discriminator_loss`, without its regularisers, which are the
    discriminator's alone: the third would have the student give itself away. No gradient must be applied to the
    discriminator's weights.

    Returns:
        Scalar in nats, mean over samples; negative where the student fools and is of the right class.

    Raises:
        ValueError: A shape or dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    _check_answers("student", student, labels)
    answers = at_least_float32(student)
    return F.cross_entropy(answers[:, 1:], labels.long()) - F.softplus(answers[:, 0]).mean()


def weight_penalty(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    r"""The other two regularisers of the discriminator: :math:`\lVert w\rVert_1 + \lVert w\rVert_2^2`.

    Belagiannis et al. try the three one at a time; KSANC adds them up. Over stacked parameters of
    :class:`kdrefs.training.Members` it is the sum of the members'.

    Raises:
        ValueError: There is no parameter, or one is not floating.
    """
    every = list(parameters)
    if not every:
        raise ValueError("parameters: expected at least one tensor, got none")
    for one in every:
        check_floating("parameters", one)
    return torch.stack([one.abs().sum() + one.square().sum() for one in every]).sum()


def ksanc_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    answers: Float[Tensor, "batch answers"] | None = None,
    labels: Integer[Tensor, "batch"] | None = None,
    squeezed: Float[Tensor, "batch features"] | None = None,
    target: Float[Tensor, "batch features"] | None = None,
    *,
    backbone: float = 1.0,
    adversarial: float = 1.0,
    intermediate: float = 1.0,
) -> Float[Tensor, ""]:
    r"""The student's loss; no term but the adversarial one looks at labels.

    .. math:: L = \lambda_1 \lVert z - v\rVert^2 + \lambda_2 L_{adv}
              + \lambda_3 \sum_i \lVert \tilde g_s^i - \tilde g_t^i\rVert^2

    The formulas of the note, as means over the samples of sums over classes and channels. The first term is twice
    the logit regression of Ba and Caruana. The weights could not be read.

    Args:
        student: Logits :math:`z` ``(batch, classes)``.
        teacher: Logits :math:`v`, same shape; no gradient flows into them.
        answers: The discriminator's answers on ``student`` for :func:`logit_adversarial_loss`; None leaves the
            adversarial term out.
        labels: Class indices ``(batch,)``; needed with ``answers``.
        squeezed: The student's squeezed vectors of all layers one after the other; None leaves the term out.
        target: The teacher's, same shape; needed with ``squeezed``; no gradient flows into them.
        backbone: :math:`\lambda_1`.
        adversarial: :math:`\lambda_2`.
        intermediate: :math:`\lambda_3`.

    Returns:
        Scalar, mean over samples.

    Raises:
        ValueError: A shape or dtype does not fit, or one of two that belong together is missing.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's; the
    discriminator's normalisation sees each worker's batch alone unless it is synchronised.
    """
    check_matrix("student", student)
    loss = backbone * _squared_distance("teacher", teacher, "student", student)
    if answers is not None:
        if labels is None:
            raise ValueError("labels: expected class indices with answers, got None")
        check_matrix("answers", answers)
        check_same_batch("answers", answers, "student", student)
        loss = loss + adversarial * logit_adversarial_loss(answers, labels)
    if (squeezed is None) != (target is None):
        name = "squeezed" if squeezed is None else "target"
        raise ValueError(f"{name}: expected a tensor beside the other network's, got None")
    if squeezed is not None and target is not None:
        check_matrix("squeezed", squeezed)
        check_same_batch("squeezed", squeezed, "student", student)
        loss = loss + intermediate * _squared_distance("target", target, "squeezed", squeezed)
    return loss


def _squared_distance(name: str, fixed: Tensor, other_name: str, moving: Tensor) -> Tensor:
    _check_like(name, fixed, other_name, moving)
    return (at_least_float32(moving) - at_least_float32(fixed.detach())).square().sum(1).mean()


def _check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    check_matrix(name, value)
    check_matrix(other_name, other)
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name} {tuple(other.shape)}, got {tuple(value.shape)}"
        )


def _check_answers(name: str, answers: Tensor, labels: Tensor) -> None:
    check_matrix(name, answers)
    if answers.shape[1] < 2:
        raise ValueError(f"{name}: expected (batch, 1 + classes), got {tuple(answers.shape)}")
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, name, answers)
