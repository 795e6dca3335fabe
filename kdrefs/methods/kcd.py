r"""Knowledge condensation distillation (Li et al., ECCV 2022): train on fewer and fewer points, chosen by their value.

A *knowledge point* is a training image with the teacher's prediction on it. Its value is the entropy of the student's
own prediction, averaged over the times it was trained on. At the end of a stage all points are ranked by their value;
the next stage trains on the upper part, and blends the lowest that are kept with the highest that are not. The loss is
that of the distillation method which is condensed: :func:`kdrefs.methods.kd.kd_loss` with T = 4 and weight 0.9 in the
paper's first experiment.

Definitions follow the authors' code, dzy3/KCD@8974b6c, where it and the printed equations disagree. What the code does
otherwise than here is ``variant="official"``: the sizes of the sets, the blending, and entropies of exactly 0. The loop
of a training::

    value = KnowledgeValue(50_000)
    for stage in range(6):
        ...                                     # an epoch or more: value.record(indices, logits) in every step
        keep, now = condensed_size(stage + 1, 50_000), condensed_size(stage, 50_000)
        parts = partition(value.score(), keep, now - keep)
        images = clean.clone()                  # blended anew from the clean images at every stage
        images[parts.low] = augment(clean[parts.low], clean[parts.dropped])
        indices = parts.kept                    # what the next stage trains on
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice, check_floating, check_tensor
from kdrefs._typing import Float, Integer, Shaped


def prediction_entropy(logits: Float[Tensor, "*samples classes"]) -> Float[Tensor, "*samples"]:
    r"""Entropy of a prediction at temperature 1.

    .. math:: V(x) = -\sum_c p_S(c | x) \log p_S(c | x)

    Equation 7 of the paper, computed from logarithms: a probability too small for its type counts 0, where the
    authors' product of a probability and its logarithm gives NaN.

    Args:
        logits: The student's ``(..., classes)``; no gradient flows into them.

    Returns:
        ``(...)`` in nats, from 0 to the logarithm of the number of classes.

    Raises:
        ValueError: The logits are not floating, or have no classes.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if logits.ndim < 1 or logits.shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected a floating tensor (..., classes), got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    log_p = at_least_float32(logits.detach()).log_softmax(dim=-1)
    # 0 log 0 is 0, of a logit of -inf too.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)


class KnowledgeValue:
    r"""The global value of every point, kept up while the student trains (the paper's online global value estimation).

    .. math:: V^F(x) = \frac{F - 1}{F} V^{F-1}(x) + \frac1F V(x), \qquad score(x) = V^F(x) \, F(x)^\alpha

    Equations 12 and 13: the mean of the entropies recorded so far, and how often the point was trained on. Nothing is
    forgotten: the value of a point that is no longer trained on stays what it was. Recording is a few operations on the
    device of the student and does not wait for it. An entropy that is not finite is not recorded.

    Args:
        samples: Number N of points in the full set.
        members: Number of students with values of their own, which :class:`kdrefs.training.seeds.Members` train
            together; None for one.
        variant: ``"official"``: an entropy of exactly 0 is not recorded either (it stands for "not trained" there).
        device: Where the students are.

    Attributes:
        total: float64 ``(N,)`` or ``(members, N)``, sum of the recorded entropies in nats.
        frequency: int64 of the same shape, how many there were.

    Raises:
        ValueError: A number or a name is out of range.
    """

    def __init__(
        self,
        samples: int,
        *,
        members: int | None = None,
        variant: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_count("samples", samples, 1)
        if members is not None:
            _check_count("members", members, 1)
        if variant is not None:
            check_choice("variant", variant, ("official",))
        shape = (samples,) if members is None else (members, samples)
        self.variant = variant
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.frequency = torch.zeros(shape, dtype=torch.int64, device=device)

    def record(
        self, indices: Integer[Tensor, "*members batch"], logits: Float[Tensor, "*members batch classes"]
    ) -> None:
        """Record the entropies of a batch of predictions, made before the student is updated.

        Args:
            indices: Numbers of the points in the full set, ``(batch,)`` or ``(members, batch)``.
            logits: The student's, one row more a class: ``(..., batch, classes)``.

        Raises:
            ValueError: Shapes do not fit each other or the number of members.
        """
        self.record_entropies(indices, prediction_entropy(logits))

    def record_entropies(
        self, indices: Integer[Tensor, "*members batch"], entropies: Float[Tensor, "*members batch"]
    ) -> None:
        """Record entropies in nats, both ``(batch,)`` or ``(members, batch)``.

        Raises:
            ValueError: Shapes do not fit each other or the number of members.
        """
        check_floating("entropies", entropies, "(..., batch)")
        check_tensor("indices", indices)
        if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
            raise ValueError(f"indices: expected numbers of points, got {indices.dtype}")
        if indices.shape != entropies.shape or indices.shape[:-1] != self.total.shape[:-1]:
            expected = ("members", "batch") if self.total.ndim == 2 else ("batch",)
            raise ValueError(
                f"indices: expected ({', '.join(expected)}) with one row of logits each, got "
                f"{tuple(indices.shape)} and {tuple(entropies.shape)} for values of shape {tuple(self.total.shape)}"
            )
        entropies = entropies.detach().double()
        counted = entropies.isfinite()
        if self.variant == "official":
            counted = counted & (entropies > 0)
        indices = indices.long()
        self.total.scatter_add_(-1, indices, torch.where(counted, entropies, 0.0))
        self.frequency.scatter_add_(-1, indices, counted.long())

    @property
    def mean(self) -> Float[Tensor, "*members samples"]:
        """Mean of the recorded entropies, float64 in nats; NaN where there are none."""
        return self.total / self.frequency

    def score(self, alpha: float = 0.03) -> Float[Tensor, "*members samples"]:
        r"""What points are ranked by: :math:`V^F F^\alpha`, infinite for a point that was never recorded.

        A positive :math:`\alpha` raises what was trained on more often (the name "cost-aware" notwithstanding). All
        points of a set that was never condensed have the same F, so it speaks between those that were dropped and those
        that were not. The authors divide F by the number of epochs a stage has, which ranks alike.

        Args:
            alpha: Exponent, 0.03 in the authors' code; 0 for the mean entropy alone.

        Returns:
            float64 ``(N,)`` or ``(members, N)``.

        Raises:
            ValueError: ``alpha`` is not a finite number.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha!r}")
        score = self.mean * self.frequency.double() ** alpha
        return torch.where(self.frequency > 0, score, torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """The two tensors by name, for a checkpoint."""
        return {"total": self.total, "frequency": self.frequency}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over, in place, what :meth:`state_dict` returned.

        Raises:
            ValueError: A tensor is missing, or belongs to another number of points.
        """
        for name, own in self.state_dict().items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != own.shape:
                got = (
                    tuple(value.shape) if isinstance(value, Tensor) else "nothing" if value is None else value
                )
                raise ValueError(f"state: expected {name!r} of shape {tuple(own.shape)}, got {got}")
            if not torch.can_cast(value.dtype, own.dtype):
                raise ValueError(f"state: expected {name!r} of {own.dtype}, got {value.dtype}")
        for name, own in self.state_dict().items():
            own.copy_(state[name])


class Partition(NamedTuple):
    """The points after a ranking; each part in decreasing order of score, numbers in the full set, int64.

    Attributes:
        high: K1H, trained on as they are.
        low: K1L, the lowest that are kept: trained on after :func:`augment`.
        dropped: K0, as many as K1L: the highest that are not kept.
    """

    high: Tensor
    low: Tensor
    dropped: Tensor

    @property
    def kept(self) -> Tensor:
        """All that are trained on, in decreasing order of score."""
        return torch.cat([self.high, self.low])


def ranks(score: Float[Tensor, "samples"]) -> Integer[Tensor, "samples"]:
    r"""The rank :math:`R(x) \in \{0, \dots, N - 1\}` of every point, 0 for the highest score.

    The inverse permutation of the one that sorts. Of equal scores the one with the lower number comes first.

    Raises:
        ValueError: The score is not a floating vector, or has a NaN.
    """
    order = _order(score)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def condense(score: Float[Tensor, "samples"], keep: int) -> Integer[Tensor, "keep"]:
    r"""The E-step: the points of the highest scores among *all* N, those that had been dropped included.

    In the paper's terms, with :math:`p(x) = 1 - R(x)/N` (equation 8) and :math:`\tau` the fraction that is kept, these
    are the points with :math:`p(x) > 1 - \tau`; the printed rule :math:`p(x) \ge \tau` keeps another number of them.

    Args:
        score: ``(N,)``, of which higher is better.
        keep: How many, from 1 to N; see :func:`condensed_size`.

    Returns:
        ``(keep,)`` int64, in decreasing order of score; of equal ones the lower number first.

    Raises:
        ValueError: The score is not a floating vector or has a NaN, or ``keep`` is out of range.
    """
    order = _order(score)
    _check_count("keep", keep, 1, len(order))
    return order[:keep]


def partition(score: Float[Tensor, "samples"], keep: int, removed: int) -> Partition:
    """Divide the points into those kept as they are, those kept and blended, and those they are blended with.

    Args:
        score: ``(N,)``, of which higher is better.
        keep: Number of points that are trained on, see :func:`condense`.
        removed: By how many the set becomes smaller: the number of points in K1L and in K0. With 0 both are empty and
            nothing is blended.

    Returns:
        K1H, K1L and K0. K0 is what stands next in the ranking over all points, as in the authors' code, whether or not
        it was trained on before.

    Raises:
        ValueError: The score is not a floating vector or has a NaN, or the numbers do not fit each other.
    """
    kept = condense(score, keep)
    samples = len(score)
    _check_count("removed", removed, 0, min(keep, samples - keep))
    dropped = _order(score)[keep : keep + removed]
    return Partition(kept[: keep - removed], kept[keep - removed :], dropped)


def condensed_size(
    stage: int, samples: int, *, tau: float = 0.7, stages: int = 6, variant: str | None = None
) -> int:
    r"""How many points a stage trains on: all N in stage 0, then fewer in equal steps, never less than :math:`\tau N`.

    By default the last of ``stages`` stages has :math:`\lceil \tau N \rceil` points. In the authors' code the step is
    1/``stages`` of what is to be removed, rounded down, and the set of :math:`\tau N` points comes after the last
    stage: with 6 stages and :math:`\tau = 0.7` their smallest set has 75 % of the points and the mean is 87.5 %.

    Args:
        stage: From 0; larger numbers than the last stage's are the floor.
        samples: N.
        tau: Fraction that is kept in the end, above 0 and at most 1.
        stages: Number of stages. (The authors' code divides by 6 whatever the number of stages.)
        variant: ``"official"`` for the authors' sizes.

    Raises:
        ValueError: A number or a name is out of range.
    """
    _check_count("stage", stage, 0)
    _check_count("samples", samples, 1)
    _check_count("stages", stages, 1)
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau <= 1:
        raise ValueError(f"tau: expected a number above 0 and at most 1, got {tau!r}")
    if variant is not None:
        check_choice("variant", variant, ("official",))
        # Their arithmetic to the letter: int() of a product of floats.
        return max(samples - stage * int(samples * (1 - tau) / stages), int(tau * samples), 1)
    floor = math.ceil(round(tau * samples, 6))  # 0.7 * 10 is 7.000…01 in binary
    done = min(stage, stages - 1) / max(stages - 1, 1)
    return samples - round(done * (samples - floor))


def strengths(
    count: int, maximum: float = 0.3, *, variant: str | None = None, device: torch.device | str = "cpu"
) -> Float[Tensor, "count"]:
    r"""How much of its partner each point of K1L gets: from 0 for the highest to :math:`\varepsilon_m` for the lowest.

    .. math:: \varepsilon_j = \varepsilon_m \frac{j}{L - 1}, \qquad j = 0, \dots, L - 1

    Equation 15 with both ends as the text has them. The official :math:`\varepsilon_m j / L` never reaches
    :math:`\varepsilon_m`.

    Args:
        count: L; a single point gets 0.
        maximum: :math:`\varepsilon_m`, from 0 to 1.
        variant: ``"official"`` for j/L.
        device: Of the result.

    Returns:
        ``(L,)`` float32.

    Raises:
        ValueError: A number or a name is out of range.
    """
    _check_count("count", count, 0)
    if isinstance(maximum, bool) or not isinstance(maximum, int | float) or not 0 <= maximum <= 1:
        raise ValueError(f"maximum: expected a number from 0 to 1, got {maximum!r}")
    if variant is not None:
        check_choice("variant", variant, ("official",))
    last = count if variant == "official" else count - 1
    return maximum * torch.arange(count, dtype=torch.float32, device=device) / max(last, 1)


def augment(
    low: Shaped[Tensor, "count ..."],
    dropped: Shaped[Tensor, "count ..."],
    *,
    maximum: float = 0.3,
    variant: str | None = None,
) -> Shaped[Tensor, "count ..."]:
    r"""Blend the images of K1L with those of K0, the j-th of one with the j-th of the other.

    .. math:: x'_j = (1 - \varepsilon_j) x_j + \varepsilon_j x^0_j

    Equation 14 read as the convex combination that the authors' code computes; see :func:`strengths` for
    :math:`\varepsilon_j`. Labels stay those of K1L, and the teacher is asked anew on the blended images.

    A pure function: give it the clean images at every stage. The authors write its result over the stored image, so
    that a point near the border is blended again and again and its clean image is lost; for that, assign the result to
    ``images[parts.low]`` and give it ``images`` the next time.

    Args:
        low: ``(L, ...)`` images of K1L in decreasing order of score, floating or uint8.
        dropped: Those of K0, same shape and type.
        maximum: :math:`\varepsilon_m`, from 0 to 1.
        variant: ``"official"``: :math:`\varepsilon_m j / L`, and uint8 pixels cut off instead of rounded.

    Returns:
        ``(L, ...)`` of the same type; nothing is changed in place. Empty for empty K1L and K0.

    Raises:
        ValueError: Shapes or types do not fit, or a number or a name is out of range.
    """
    check_tensor("low", low)
    check_tensor("dropped", dropped)
    if low.shape != dropped.shape or low.dtype != dropped.dtype:
        raise ValueError(
            f"dropped: expected {low.dtype} {tuple(low.shape)} like low, got {dropped.dtype} {tuple(dropped.shape)}"
        )
    if low.ndim < 1 or not (low.is_floating_point() or low.dtype == torch.uint8):
        raise ValueError(
            f"low: expected floating or uint8 images (count, ...), got {low.dtype} of shape {tuple(low.shape)}"
        )
    share = strengths(len(low), maximum, variant=variant, device=low.device)
    share = share.view(-1, *[1] * (low.ndim - 1))
    if low.is_floating_point():
        return torch.lerp(low, dropped, share.to(low.dtype))
    kept = 1 - share  # rounded, and its complement taken: the authors' pixels to the bit
    mixed = kept * low + (1 - kept) * dropped
    return (mixed if variant == "official" else mixed.round()).to(torch.uint8)


def _order(score: Tensor) -> Tensor:
    """Numbers of the points in decreasing order of score; of equal ones the lower number first."""
    if not isinstance(score, Tensor):
        raise TypeError(f"score: expected a tensor, got {type(score).__name__}")
    if score.ndim != 1 or len(score) < 1 or not score.is_floating_point():
        raise ValueError(
            f"score: expected a floating vector (samples,), got {score.dtype} of shape {tuple(score.shape)}"
        )
    if bool(score.isnan().any()):
        raise ValueError(f"score: {int(score.isnan().sum())} of {len(score)} values are NaN")
    return score.argsort(descending=True, stable=True)


def _check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
