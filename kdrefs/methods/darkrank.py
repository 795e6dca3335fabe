r"""DarkRank (Chen, Wang and Zhang, AAAI 2018, arXiv:1707.01220).

Each sample of a batch is a query that ranks the others by distance. Scores :math:`S_j = -\alpha \lVert q - x_j
\rVert^\beta` make the ranking random: the Plackett-Luce model draws a permutation candidate by candidate, each time in
proportion to :math:`e^{S}` among those that are left. The student learns to have the teacher's distribution of
permutations (soft), or to make the teacher's own order likely (hard). Only distances are compared: widths may differ.

No permutation is enumerated. What is drawn next depends on the *set* that is left alone, so the divergence over
:math:`n!` permutations is a sum over the :math:`2^n` sets, and the likelihood of one order a sum over its suffixes.
"""

import math

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_choice, check_matrix, check_positive, check_same_batch
from kdrefs._typing import Float
from kdrefs.kernels import pairwise_squared_distances, unit_rows

_LONGEST = 12  # candidates of the soft loss: 4,096 sets
_FLOOR = math.log(1e-12)  # what the authors add to a probability before they take its logarithm
_RKD_LENGTH = 4  # default of lenscloth/RKD


def soft_darkrank_loss(
    student: Float[Tensor, "batch student_width"],
    teacher: Float[Tensor, "batch teacher_width"],
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    list_length: int = 4,
    normalize: bool = True,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Divergence between the teacher's and the student's distribution over permutations of each query's neighbours.

    .. math:: L = \frac1N \sum_q \sum_{\pi} P_t(\pi) \log \frac{P_t(\pi)}{P_s(\pi)}, \qquad
              P(\pi) = \prod_{i=1}^{n} \frac{e^{S_{\pi(i)}}}{\sum_{k \ge i} e^{S_{\pi(k)}}}

    over the permutations of the n samples that the teacher finds nearest to the query, which is not among them.

    Args:
        student: Embeddings ``(batch, student_width)``.
        teacher: Embeddings ``(batch, teacher_width)`` of the same samples; no gradient flows into them.
        alpha: Factor of the score, above 0, for both networks.
        beta: Exponent of the Euclidean distance in the score, above 0.
        list_length: n, from 1 to 12; all others where the batch has fewer. One candidate leaves nothing to rank.
        normalize: Whether rows are first divided by their Euclidean norm; a zero row stays zero.
        variant: ``"official"``: the authors' ``ListNetLoss`` (TuSimple/DarkRank@5e6a74f). Queries are the first half
            of the batch alone, no gradient flows through them, and the value is a cross-entropy, larger by the
            teacher's entropy. Their score is :math:`-(c\,d^2)^p` of the *squared* distance: ``scale`` c and ``power``
            p are :math:`\alpha = c^p` and :math:`\beta = 2p` here. Both are means over the queries, so a loss weight
            of theirs is the same here.

    Returns:
        Scalar in nats: sum over permutations, mean over queries.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or there are fewer than two samples.

    Data-parallel training: candidates come from the whole batch, so gather the embeddings of all workers first
    (:func:`kdrefs.training.gather_rows`).
    """
    check_choice("variant", variant, (None, "official"))
    _check_length(list_length, _LONGEST)
    s, t = _ranked_scores(student, teacher, alpha, beta, list_length, normalize, variant)
    sets = torch.arange(1, 2 ** s.shape[1], device=s.device).unsqueeze(1)
    bits = 2 ** torch.arange(s.shape[1], device=s.device)
    left = (sets & bits) != 0
    log_s, log_t = (_choices(scores, left) for scores in (s, t))
    p = log_t.exp().masked_fill(~left, 0.0)
    gap = -log_s if variant == "official" else log_t - log_s
    return (_reached(p, sets, bits, left).unsqueeze(2) * p * gap).sum() / s.shape[0]


def hard_darkrank_loss(
    student: Float[Tensor, "batch student_width"],
    teacher: Float[Tensor, "batch teacher_width"],
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    list_length: int | None = None,
    normalize: bool = True,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Negative log-likelihood, under the student, of the order in which the teacher ranks each query's neighbours.

    .. math:: L = -\frac1N \sum_q \sum_{i=1}^{n} \Big[ S^s_{\pi(i)} - \log \sum_{k \ge i} e^{S^s_{\pi(k)}} \Big]

    with :math:`\pi` the teacher's order from near to far. The sums over suffixes are taken in log space.

    Args:
        student: As in :func:`soft_darkrank_loss`.
        teacher: As there. Of equally distant candidates the first in the batch comes first.
        alpha: As there, of the student's score; the teacher's order does not depend on it.
        beta: As there.
        list_length: n, the candidates nearest to the query by the teacher, from 1 on; None: all others.
        normalize: As there.
        variant: ``"official"``: the authors' operator, with queries, gradient and exponents as for
            :func:`soft_darkrank_loss`. Their value is :math:`-\log(P + 10^{-12})`, so that it stops at 27.63 a query
            where the gradient goes on; both are so here. ``"rkd"``: ``HardDarkRank`` of lenscloth/RKD@0a6c3c0, ours
            on rows as they come, whatever ``normalize`` is (their networks normalise), and ``list_length`` 4 by
            default; but where the teacher has duplicates theirs may take the query for its own neighbour.

    Returns:
        Scalar in nats: sum over the list, mean over queries.

    Raises:
        ValueError: As for :func:`soft_darkrank_loss`.

    Data-parallel training: as for :func:`soft_darkrank_loss`.
    """
    check_choice("variant", variant, (None, "official", "rkd"))
    if list_length is not None:
        _check_length(list_length)
    if variant == "rkd":
        normalize = False
        list_length = _RKD_LENGTH if list_length is None else list_length
    s, _ = _ranked_scores(student, teacher, alpha, beta, list_length, normalize, variant)
    losses = (s.flip(1).logcumsumexp(1).flip(1) - s).sum(1)
    if variant == "official":
        floor = torch.full_like(losses, _FLOOR)
        losses = losses + (-torch.logaddexp(-losses, floor) - losses).detach()
    return losses.mean()


def _ranked_scores(
    student: Tensor,
    teacher: Tensor,
    alpha: float,
    beta: float,
    list_length: int | None,
    normalize: bool,
    variant: str | None,
) -> tuple[Tensor, Tensor]:
    """Scores ``(queries, candidates)`` of student and teacher, in the teacher's order from near to far."""
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)
    check_positive("alpha", alpha)
    check_positive("beta", beta)
    samples = student.shape[0]
    if samples < 2:
        raise ValueError(f"student: expected at least 2 samples, a query and a candidate, got {samples}")
    official = variant == "official"
    queries = samples // 2 if official else samples
    own = torch.eye(samples, dtype=torch.bool, device=student.device)[:queries]
    with torch.no_grad():
        distances = _squared_distances(teacher, queries, own, normalize, False)
        # A query is not its own neighbour, though a duplicate of it may be as near.
        order = distances.masked_fill(own, torch.inf).sort(dim=1, stable=True).indices
        order = order[:, : min(list_length or samples, samples - 1)]
        t = _scores(distances.gather(1, order), alpha, beta)
    squares = _squared_distances(student, queries, own, normalize, official)
    return _scores(squares.gather(1, order), alpha, beta), t


def _squared_distances(x: Tensor, queries: int, own: Tensor, normalize: bool, detach: bool) -> Tensor:
    x = unit_rows(x) if normalize else at_least_float32(x)
    asked = x[:queries].detach() if detach else x[:queries]
    return pairwise_squared_distances(asked, x, same=own)


def _scores(squares: Tensor, alpha: float, beta: float) -> Tensor:
    """The power of a distance, with the gradient 0 at 0, where that of a power below 2 is unbounded."""
    apart = squares > 0
    power = torch.where(apart, squares, 1.0) ** (beta / 2)
    return -alpha * torch.where(apart, power, 0.0)


def _choices(scores: Tensor, left: Tensor) -> Tensor:
    """Log-probabilities ``(queries, sets, candidates)`` of the next one of a set; 0 for candidates outside it."""
    inside = scores.unsqueeze(1).masked_fill(~left, -torch.inf)
    return inside.log_softmax(2).masked_fill(~left, 0.0)


def _reached(p: Tensor, sets: Tensor, bits: Tensor, left: Tensor) -> Tensor:
    """Probability ``(queries, sets)`` that a set is what is left at some time, from those of each choice.

    It is what flows in from all sets with one candidate more, larger sets first.
    """
    count = p.shape[1]
    larger = ((sets | bits) - 1).expand(p.shape)
    everything = torch.arange(count, device=p.device) == count - 1
    reached = everything.to(p.dtype).expand(p.shape[:2])
    for _ in range(1, p.shape[2]):
        flow = (reached.unsqueeze(2) * p).gather(1, larger).masked_fill(left, 0.0)
        reached = everything + flow.sum(2)
    return reached


def _check_length(value: int, longest: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (longest is not None and value > longest):
        expected = "from 1 on" if longest is None else f"from 1 to {longest}"
        raise ValueError(f"list_length: expected an integer {expected}, got {value!r}")
