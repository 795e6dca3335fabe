r"""Knowledge distillation from internal representations (Aguilar et al., AAAI 2020, arXiv:1910.03723).

A shallower transformer learns, layer by matched layer, what the teacher's layers attend to and what they make of the
classification token, before or beside the soft labels. In which order the layers come is the schedule: all at once,
one after the other, or one on top of the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice, check_positive, check_same_shape
from kdrefs._typing import Float, Shaped
from kdrefs.kernels import unit_rows

SCHEDULES = ("all", "progressive", "stacked", "stacked_kept")


def attention_kl(
    student: Float[Tensor, "batch heads length length"],
    teacher: Float[Tensor, "batch heads length length"],
    mask: Shaped[Tensor, "batch length"] | None = None,
    *,
    scores: bool = False,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between what the rows of teacher and student attend to.

    .. math:: L = \frac1L \sum_{i=1}^{L} \sum_j A^t_{ij} \log \frac{A^t_{ij}}{A^s_{ij}}

    with L the number of tokens, averaged over heads and batch.

    Args:
        student: Attention ``(batch, heads, length, length)``: row i is the distribution of token i over all tokens.
        teacher: That of the matched layer; no gradient flows into it.
        mask: ``(batch, length)``, true or 1 at tokens, false or 0 at padding; None: no padding. Padding neither counts
            as a row nor as something to attend to: rows are normalised over the tokens. A sample of padding alone
            counts 0.
        scores: Whether the arguments are attention scores before the softmax (and before a mask), which keeps
            logarithms exact however small a probability is.
        variant: ``"textbrewer"``: ``att_ce_loss`` of airaria/TextBrewer@3496f3e, for scores: cross-entropy instead of
            divergence, larger by the teacher's entropy. With a mask, padding takes part in the softmax, and the mean is
            over the tokens of the whole batch, so that long samples count more. Without one, a guard against masked
            scores leaves out every entry whose teacher's score is at most -1e-3. Where no sample is padded and no
            score negative, the gradient is ours and so is a loss weight.

    Returns:
        Scalar in nats: sum over what is attended to, mean over tokens, then over heads and samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples.
    """
    check_choice("variant", variant, (None, "textbrewer"))
    student, teacher = _pair(student, teacher, "(batch, heads, length, length)", 4)
    if student.shape[2] != student.shape[3]:
        raise ValueError(f"student: expected as many rows as columns, got {tuple(student.shape)}")
    tokens = _tokens(mask, student)
    if variant == "textbrewer":
        if not scores:
            raise ValueError("scores: 'textbrewer' takes scores, expected True, got False")
        return _textbrewer(student, teacher, tokens)
    log_q, log_p = (_log_rows(x, tokens, scores) for x in (student, teacher))
    p = log_p.exp()
    rows = (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(3)
    if tokens is None:
        return rows.mean()
    kept = tokens.unsqueeze(1).to(rows.dtype)
    return ((rows * kept).sum(2) / kept.sum(2).clamp(min=1)).mean()


def cls_cosine_loss(
    student: Float[Tensor, "batch *length width"],
    teacher: Float[Tensor, "batch *length width"],
    *,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""One minus the cosine between the classification tokens of student and teacher, :math:`1 - \cos(h^t, h^s)`.

    Args:
        student: Hidden states ``(batch, width)`` of the token, or ``(batch, length, width)`` of all, the first of which
            it is.
        teacher: Those of the matched layer, of the same shape; no gradient flows into them.
        variant: ``"pkd"``: ``pkd_loss`` of airaria/TextBrewer@3496f3e, the squared distance of the normalised vectors,
            which is twice ours: a loss weight of theirs is twice as large here. Their ``cos_loss`` is ours on one
            token, and a mean over all tokens on several.

    Returns:
        Scalar, from 0 to 2: mean over samples. A zero vector has cosine 0 with everything and gets no gradient.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples.
    """
    check_choice("variant", variant, (None, "pkd"))
    dimensions = 3 if isinstance(student, Tensor) and student.ndim == 3 else 2
    student, teacher = _pair(student, teacher, "(batch, width) or (batch, length, width)", dimensions)
    if dimensions == 3:
        student, teacher = student[:, 0], teacher[:, 0]
    gap = 1 - (unit_rows(student) * unit_rows(teacher)).sum(1).mean()
    return 2 * gap if variant == "pkd" else gap


class Phase(NamedTuple):
    """What is trained on for a while: matched layers by their number from the bottom, and whether to classify."""

    layers: tuple[int, ...]
    classify: bool


def phases(schedule: str, layers: int) -> tuple[Phase, ...]:
    """The phases of a schedule.

    Args:
        schedule: ``"all"``: every layer and the classification at once. ``"progressive"`` (PID): one layer after the
            other from the bottom, then classification alone. ``"stacked"`` (SID): each layer joins those below it,
            then classification alone, as the paper has it. ``"stacked_kept"``: as before, but the internal losses stay
            beside the classification.
        layers: Number of matched layers, from 1 on.

    Raises:
        ValueError: An argument does not fit.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers: expected an integer from 1 on, got {layers!r}")
    everything = tuple(range(layers))
    if schedule == "all":
        return (Phase(everything, True),)
    first = 0 if schedule.startswith("stacked") else None
    lower = [Phase(everything[k if first is None else first : k + 1], False) for k in everything]
    return (*lower, Phase(everything if schedule == "stacked_kept" else (), True))


class InternalDistillation:
    """Which losses count in each step of a training, and when the next phase begins.

    A phase that does not classify ends after its steps, or when its loss has come down to a limit; the paper leaves
    both open. The last phase does not end. Call :meth:`advance` after each step; with no ``limit`` it never looks at a
    tensor. The object has ``state_dict`` and ``load_state_dict``: :func:`kdrefs.training.fit.fit` checkpoints it.

    Args:
        schedule: As for :func:`phases`.
        layers: Number of matched layers.
        max_steps: Steps of each phase before the last; a number, or one for each.
        limit: Internal loss at which a phase ends early, above 0; None: never.
        attention_weight: Factor of the attention's divergence in :meth:`internal_loss`.
        cosine_weight: Factor of the cosine loss.

    Attributes:
        phases: See :func:`phases`.
        log: One ``(phase, steps, reason)`` for each phase that has ended; the reason is ``"steps"`` or ``"limit"``.

    Raises:
        ValueError: An argument does not fit.

    Example:
        >>> schedule = InternalDistillation("stacked", layers=2, max_steps=100)
        >>> schedule.phase
        Phase(layers=(0,), classify=False)
    """

    def __init__(
        self,
        schedule: str,
        layers: int,
        *,
        max_steps: int | Sequence[int] = 1000,
        limit: float | None = None,
        attention_weight: float = 1.0,
        cosine_weight: float = 1.0,
    ) -> None:
        self.phases = phases(schedule, layers)
        count = len(self.phases) - 1
        steps = (max_steps,) * count if isinstance(max_steps, int) else tuple(max_steps)
        if len(steps) != count or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in steps):
            raise ValueError(f"max_steps: expected {count} integers from 1 on, got {max_steps!r}")
        if limit is not None:
            check_positive("limit", limit)
        check_positive("attention_weight", attention_weight)
        check_positive("cosine_weight", cosine_weight)
        self.layers, self.limit = layers, limit
        self.attention_weight, self.cosine_weight = attention_weight, cosine_weight
        self.log: list[tuple[int, int, str]] = []
        self._max_steps, self._number, self._done = steps, 0, 0

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.phases[self._number]

    def internal_loss(
        self,
        student: Sequence[tuple[Tensor, Tensor]],
        teacher: Sequence[tuple[Tensor, Tensor]],
        mask: Tensor | None = None,
        *,
        scores: bool = False,
    ) -> Tensor | float:
        """Sum over the phase's layers of :func:`attention_kl` and :func:`cls_cosine_loss`; 0.0 if there are none.

        Args:
            student: For each matched layer its attention and its hidden states, from the bottom.
            teacher: Those of the teacher's layers.
            mask: As for :func:`attention_kl`.
            scores: As there.

        Raises:
            ValueError: There are not as many as matched layers, or something of one does not fit.
        """
        for name, value in (("student", student), ("teacher", teacher)):
            if len(value) != self.layers:
                raise ValueError(f"{name}: expected {self.layers} matched layers, got {len(value)}")
        total: Tensor | float = 0.0
        for k in self.phase.layers:
            (attention, hidden), (guide, state) = student[k], teacher[k]
            total = total + self.attention_weight * attention_kl(attention, guide, mask, scores=scores)
            total = total + self.cosine_weight * cls_cosine_loss(hidden, state)
        return total

    def advance(self, loss: Tensor | float | None = None) -> bool:
        """Count a step, and go on to the next phase where it is time; returns whether it was.

        Args:
            loss: The step's internal loss; needed with ``limit``, and then read from its device.
        """
        self._done += 1
        if self._number == len(self.phases) - 1:
            return False
        reason = "steps" if self._done >= self._max_steps[self._number] else None
        if self.limit is not None:
            if loss is None:
                raise ValueError("loss: expected the step's internal loss, since there is a limit; got None")
            if float(loss) <= self.limit:
                reason = "limit"
        if reason is None:
            return False
        self.log.append((self._number, self._done, reason))
        self._number, self._done = self._number + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return {"phase": self._number, "done": self._done, "log": [list(entry) for entry in self.log]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state_dict` was taken."""
        self._number, self._done = int(state["phase"]), int(state["done"])
        self.log = [(int(phase), int(steps), str(reason)) for phase, steps, reason in state["log"]]


def _log_rows(attention: Tensor, tokens: Tensor | None, scores: bool) -> Tensor:
    """Logarithm of each row's distribution over the tokens; 0 at padding, on both sides alike."""
    logs = attention if scores else attention.clamp(min=torch.finfo(attention.dtype).tiny).log()
    if tokens is None:
        return logs.log_softmax(3)
    outside = ~tokens[:, None, None, :]
    # A sample of padding alone has finite rows too, which do not count.
    least = torch.finfo(logs.dtype).min / 2
    return logs.masked_fill(outside, least).log_softmax(3).masked_fill(outside, least)


def _textbrewer(student: Tensor, teacher: Tensor, tokens: Tensor | None) -> Tensor:
    p, log_q = teacher.softmax(3), student.log_softmax(3)
    if tokens is None:
        return -(p.masked_fill(teacher <= -1e-3, 0.0) * log_q).sum(3).mean()
    kept = tokens.to(p.dtype)
    terms = (p * log_q * kept[:, None, None, :]).sum(3) * kept[:, None, :]
    return -terms.sum() / (kept.sum() * student.shape[1])


def _tokens(mask: Tensor | None, attention: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    expected = (attention.shape[0], attention.shape[2])
    if tuple(mask.shape) != expected or mask.is_complex():
        raise ValueError(f"mask: expected (batch, length) {expected}, got {mask.dtype} {tuple(mask.shape)}")
    return mask != 0


def _pair(student: Tensor, teacher: Tensor, form: str, dimensions: int) -> tuple[Tensor, Tensor]:
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.ndim != dimensions or 0 in value.shape or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a floating tensor {form}, none of them 0, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    check_same_shape("teacher", teacher, "student", student)
    return at_least_float32(student), at_least_float32(teacher.detach())
