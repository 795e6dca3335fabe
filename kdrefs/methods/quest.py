r"""QUEST: quantised feature spaces (Jain, Gidaris, Komodakis, Pérez and Cord, ECCV 2020, arXiv:1912.01540).

The teacher's feature vectors, one a position of its map, are clustered once into a vocabulary of *visual words*. The
student is asked which words its teacher sees where, and not for the features themselves. For one training step:

>>> words = fit_vocabulary(features_of_the_training_set, 4096, generator)              # doctest: +SKIP
>>> beta = propose_beta(some_features, words)                                          # doctest: +SKIP
>>> predictor = AssignmentPredictor(channels=32, words=4096)                           # doctest: +SKIP
>>> loss = task + quest_loss(predictor(student_maps), teacher_maps, words, beta)       # doctest: +SKIP

The predictor is trained with the student and thrown away. The definition followed here is the authors' code
(valeoai/QuEST@02a23d2).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs._checks import at_least_float32, check_choice, check_positive, check_same_batch
from kdrefs._maps import check_maps
from kdrefs._typing import Float, Int
from kdrefs.divergences import kl_divergence
from kdrefs.kernels import unit_rows
from kdrefs.methods._vocabulary import fit_words
from kdrefs.pair_sums import _Gradient, _Tiled

# Numbers of one row block of assignments: a few such blocks stay in a core's cache.
_BLOCK = 2**17


def fit_vocabulary(
    features: Float[Tensor, "batch channels *positions"],
    words: int,
    generator: torch.Generator,
    *,
    method: str | None = None,
    iterations: int = 20,
) -> Float[Tensor, "words channels"]:
    r"""Visual words: the centres that k-means finds among the teacher's feature vectors.

    .. math:: \min_V \sum_i \min_k \lVert f_i - v_k \rVert^2

    over the features as they are: the authors neither normalise nor whiten them. A word that no vector is nearest to
    is moved to one of the vectors farthest from their own words, until every word has a vector or every distinct
    vector is a word; what is left then stays where it is. Equal arguments on one machine with one number of threads
    give equal bits. :func:`kdrefs.training.save_tensors` keeps a vocabulary with its digest.

    Args:
        features: Maps ``(batch, channels, height, width)`` of training images without augmentation, of which every
            position is one vector; or vectors ``(batch, channels)``.
        words: K, at most the number of vectors. The authors take 4096.
        generator: A CPU generator, which the starting words come from.
        method: ``"lloyd"``: all vectors in every iteration, in blocks, on any device. ``"minibatch"``: scikit-learn's
            mini-batch k-means, on the CPU. None: ``"lloyd"`` on a GPU, ``"minibatch"`` on the CPU.
        iterations: Passes over the vectors, at most that many for ``"minibatch"``; 20 in the authors' code.

    Returns:
        ``(words, channels)`` in at least float32, on the device of ``features``.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
        ImportError: ``"minibatch"`` without scikit-learn.
    """
    check_choice("method", method, (None, "lloyd", "minibatch"))
    rows = _vectors("features", features.detach())
    for name, value in (("words", words), ("iterations", iterations)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}")
    if words > rows.shape[0]:
        raise ValueError(f"words: expected at most the {rows.shape[0]} vectors there are, got {words}")
    if method is None:
        method = "minibatch" if rows.device.type == "cpu" else "lloyd"
    if method == "minibatch" and rows.device.type != "cpu":
        raise ValueError(f"method: 'minibatch' needs features on the CPU, got {rows.device}")
    return fit_words(rows, words, generator, minibatch=method == "minibatch", iterations=iterations)


def soft_assignment(
    features: Float[Tensor, "batch channels *positions"],
    vocabulary: Float[Tensor, "words channels"],
    beta: float | None = None,
    *,
    tau: float | None = None,
) -> Float[Tensor, "batch words *positions"]:
    r"""Which words a feature vector is near to: the teacher's target.

    .. math:: p_k = \frac{\exp(-\beta \lVert f - v_k \rVert^2)}{\sum_j \exp(-\beta \lVert f - v_j \rVert^2)}

    :math:`\beta` *multiplies* the squared distance: a larger one is a harder assignment. The authors' option for it
    is called ``temperature``; a temperature proper is :math:`\tau = 1 / \beta`. The right value depends on the scale
    of the features, see :func:`propose_beta`.

    Args:
        features: Maps ``(batch, channels, height, width)`` or vectors ``(batch, channels)``.
        vocabulary: The words ``(words, channels)``.
        beta: :math:`\beta`, above 0; 5 in the authors' configurations for CIFAR-100 and ImageNet.
        tau: :math:`1 / \beta` in its place.

    Returns:
        Probabilities ``(batch, words, ...)`` in at least float32, with the words last in memory.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or not exactly one of ``beta`` and ``tau`` is given.
    """
    rows, words = _matched(features, vocabulary)
    table, bias = _logit_map(words, _beta(beta, tau))
    with torch.autocast(rows.device.type, enabled=False):
        return _as_map(torch.addmm(bias, rows, table).softmax(dim=1), features)


def nearest_word(
    features: Float[Tensor, "batch channels *positions"], vocabulary: Float[Tensor, "words channels"]
) -> Int[Tensor, "batch *positions"]:
    r"""The hard assignment :math:`\arg\min_k \lVert f - v_k \rVert^2`, the limit of a large :math:`\beta`.

    Its loss is the cross-entropy of the predictor's scores with these labels. Arguments and errors as in
    :func:`soft_assignment`; of words that are equally near, one is taken.

    Returns:
        Numbers of words ``(batch, ...)``, int64.
    """
    rows, words = _matched(features, vocabulary)
    table, bias = _logit_map(words, 1.0)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.addmm(bias, rows, table).argmax(dim=1).unflatten(0, _shape(features))


class AssignmentPredictor(nn.Module):
    r"""Predicts from the student's map which words the teacher sees: a 1x1 convolution of cosines.

    .. math:: s_k = \gamma \, \frac{\langle f, w_k \rangle}{\lVert f \rVert \lVert w_k \rVert}

    :math:`\gamma` is one number for all words. It has to be learned: while it is 3, a position whose feature has one
    word's direction and is orthogonal to the 4095 others gives that word 0.5 %, and 9 % if they are all opposite.

    Args:
        channels: Channels of the student's map.
        words: Size of the vocabulary.
        scale: :math:`\gamma` at the beginning, above 0.
        learn_scale: Whether it is learned; the authors fix it at 10 in one of their settings.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, channels: int, words: int, *, scale: float = 3.0, learn_scale: bool = True) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("words", words)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}")
        check_positive("scale", scale)
        self.weight = nn.Parameter(torch.randn(words, channels) * math.sqrt(2 / channels))
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)

    def forward(
        self, maps: Float[Tensor, "batch channels *positions"]
    ) -> Float[Tensor, "batch words *positions"]:
        """Scores before the softmax ``(batch, words, ...)``, with the words last in memory.

        A position whose features are all zero has the score 0 for every word and gets no gradient.

        Raises:
            ValueError: ``maps`` do not have the channels that the predictor was made for.
        """
        rows = _vectors("maps", maps)
        if rows.shape[1] != self.weight.shape[1]:
            raise ValueError(f"maps: expected {self.weight.shape[1]} channels, got {rows.shape[1]}")
        with torch.autocast(rows.device.type, enabled=False):
            # The scale goes into the short matrix, not over all scores.
            directions = unit_rows(self.weight) * self.scale
            dtype = torch.promote_types(rows.dtype, directions.dtype)
            return _as_map(unit_rows(rows).to(dtype) @ directions.to(dtype).mT, maps)


def quest_loss(
    student: Float[Tensor, "batch words hs ws"] | Sequence[Tensor],
    teacher: Float[Tensor, "batch channels ht wt"] | Sequence[Tensor],
    vocabulary: Float[Tensor, "words channels"] | Sequence[Tensor],
    beta: float | Sequence[float] | None = None,
    *,
    tau: float | Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    r"""Divergence of the words that the student predicts from those that the teacher sees.

    .. math:: L = \frac{1}{N P} \sum_{n, x} \mathrm{KL}\big( p(f^t_{nx}) \,\big\|\, \mathrm{softmax}(s_{nx}) \big)

    over the N samples and the P positions of a map, with :math:`p` from :func:`soft_assignment`. It is added to the
    cross-entropy of the labels, with weight 1 in most of the authors' configurations.

    Neither :math:`p` nor the softmax is ever stored: value and gradient are computed together, in blocks of positions,
    so that beside the scores there are two tensors of their size at most. Under ``torch.compile`` they are stored.
    First derivatives only, but under ``torch.compile``.

    Args:
        student: Scores ``(batch, words, hs, ws)`` of an :class:`AssignmentPredictor`.
        teacher: Feature maps ``(batch, channels, ht, wt)`` of the same samples; no gradient flows into them. A map
            that is larger than the student's is average-pooled to its size.
        vocabulary: The words ``(words, channels)``, made from maps of that size; no gradient flows into them.
        beta: Inverse temperature of the teacher's assignment, see :func:`soft_assignment`.
        tau: :math:`1 / \beta` in its place.

    Several levels, as sequences of equal lengths, are added; ``beta`` may then be one number for all.

    Returns:
        Scalar in nats: summed over the words, averaged over samples and positions.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or the student's map is the larger one.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    if isinstance(student, Tensor) and isinstance(teacher, Tensor) and isinstance(vocabulary, Tensor):
        return _level(student, teacher, vocabulary, _beta(beta, tau))
    levels = len(student)
    inverse = _each(levels, "beta", beta), _each(levels, "tau", tau)
    for name, value in (("teacher", teacher), ("vocabulary", vocabulary)):
        if isinstance(value, Tensor) or len(value) != levels or levels < 1:
            raise ValueError(f"{name}: expected as many levels as student ({levels})")
    return torch.stack(
        [
            _level(s, t, v, _beta(b, c))
            for s, t, v, b, c in zip(student, teacher, vocabulary, *inverse, strict=True)
        ]
    ).sum()


def mean_largest_assignment(
    features: Float[Tensor, "batch channels *positions"],
    vocabulary: Float[Tensor, "words channels"],
    beta: float | None = None,
    *,
    tau: float | None = None,
) -> float:
    r"""How hard an assignment is: :math:`\max_k p_k`, averaged over all vectors; 1 is hard, 1/K uniform.

    A comment in an early revision of the authors' code gives about 0.99 for theirs (valeoai/QuEST@112cb39,
    ``vector_quantization.py``). Arguments and errors as in :func:`soft_assignment`.
    """
    rows, words = _matched(features, vocabulary)
    return _mean_largest(rows, words, _beta(beta, tau))


def propose_beta(
    features: Float[Tensor, "batch channels *positions"],
    vocabulary: Float[Tensor, "words channels"],
    mean_largest: float = 0.99,
) -> float:
    r"""The :math:`\beta` at which :func:`mean_largest_assignment` has a given value.

    A fixed :math:`\beta` means nothing for a new teacher: features twice as large need a quarter of it. The mean of the
    largest probabilities grows with :math:`\beta`, so the value is found by bisection, to a relative 1e-4. Some
    thousand vectors are enough; this function reads values and is no part of a training step.

    Args:
        features: Maps ``(batch, channels, height, width)`` or vectors ``(batch, channels)`` of the teacher.
        vocabulary: The words ``(words, channels)``.
        mean_largest: What the mean should be, above 1/K and below 1.

    Raises:
        ValueError: A shape, a dtype or the number does not fit, or no :math:`\beta` gives it: words that stand twice
            share their vectors however large it is.
    """
    rows, words = _matched(features, vocabulary)
    if not 1 / words.shape[0] < mean_largest < 1:
        raise ValueError(
            f"mean_largest: expected a number between 1/{words.shape[0]} (one by the words) and 1, "
            f"got {mean_largest}"
        )
    centre = words.mean(dim=0)
    spread = (words - centre).square().sum(dim=1).mean().item()
    # Beyond this rounding of the distances would tell words apart that are the same.
    size = spread + (rows - centre).square().sum(dim=1).mean().item()
    limit = 1e-3 / torch.finfo(rows.dtype).eps / max(size, torch.finfo(rows.dtype).tiny)
    low = high = min(1 / max(spread, torch.finfo(rows.dtype).tiny), limit)
    while _mean_largest(rows, words, low) > mean_largest:
        low /= 4
    while _mean_largest(rows, words, high) < mean_largest:
        if high >= limit:
            raise ValueError(
                f"mean_largest: no beta gives {mean_largest}, words that stand twice share vectors"
            )
        high = min(4 * high, limit)
    while high > (1 + 1e-4) * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _mean_largest(rows, words, middle) < mean_largest else (low, middle)
    return math.sqrt(low * high)


# Several levels, checks and shapes


def _level(student: Tensor, teacher: Tensor, vocabulary: Tensor, beta: float) -> Tensor:
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)
    size = student.shape[2:]
    if any(mine > theirs for mine, theirs in zip(size, teacher.shape[2:], strict=True)):
        raise ValueError(
            f"student: expected at most the teacher's {teacher.shape[2]} x {teacher.shape[3]} positions, "
            f"got {size[0]} x {size[1]}"
        )
    if student.shape[1] != vocabulary.shape[0]:
        raise ValueError(
            f"student: expected a score for each of {vocabulary.shape[0]} words, got {student.shape[1]}"
        )
    teacher = at_least_float32(teacher.detach())
    if teacher.shape[2:] != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    with torch.autocast(student.device.type, enabled=False):
        rows, words = _matched(teacher, vocabulary.detach())
        table, bias = _logit_map(words, beta)
        scores = _vectors("student", student)
        dtype = torch.promote_types(scores.dtype, rows.dtype)
        parts = scores.to(dtype), rows.to(dtype), table.to(dtype), bias.to(dtype)
        if torch.compiler.is_compiling():  # which fuses, and would unroll the blocks
            logits = torch.addmm(parts[3], *parts[1:3])
            return kl_divergence(logits.log_softmax(dim=1), parts[0].log_softmax(dim=1))
        loss: Tensor
        loss, _ = _AssignmentKL.apply(*parts, torch.is_grad_enabled())
    return loss


def _each(levels: int, name: str, value: float | Sequence[float] | None) -> list[float | None]:
    if value is None or isinstance(value, int | float):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name}: expected one number or {levels}, got {len(value)}")
    return list(value)


def _beta(beta: Any, tau: Any) -> float:
    if (beta is None) == (tau is None):
        raise ValueError(f"beta and tau: expected exactly one of them, got {beta} and {tau}")
    check_positive("beta" if tau is None else "tau", beta if tau is None else tau)
    return float(beta) if tau is None else 1 / tau


def _vectors(name: str, features: Tensor) -> Tensor:
    """Every position as a row, in at least float32; no copy where the channels come last in memory."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
    if features.ndim < 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch, channels, ...), none of them 0, "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    return at_least_float32(features.movedim(1, -1).flatten(0, -2))


def _matched(features: Tensor, vocabulary: Tensor) -> tuple[Tensor, Tensor]:
    rows = _vectors("features", features)
    if vocabulary.ndim != 2 or 0 in vocabulary.shape or not vocabulary.is_floating_point():
        raise ValueError(
            f"vocabulary: expected a floating tensor (words, channels), got {vocabulary.dtype} of shape "
            f"{tuple(vocabulary.shape)}"
        )
    if vocabulary.shape[1] != rows.shape[1]:
        raise ValueError(f"vocabulary: expected words of {rows.shape[1]} channels, got {vocabulary.shape[1]}")
    dtype = torch.promote_types(rows.dtype, at_least_float32(vocabulary).dtype)
    return rows.to(dtype), vocabulary.to(dtype)


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(0, _shape(like)).movedim(-1, 1)


def _shape(features: Tensor) -> tuple[int, ...]:
    return features.shape[0], *features.shape[2:]


def _logit_map(words: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""The assignment's logits are affine in f: :math:`2 \beta \langle f, v_k - \bar v \rangle + b_k`.

    :math:`-\beta \lVert f - v_k \rVert^2` without what all words have in common. Distances stay when the words' mean
    becomes the origin, and the squares of features far from 0 do not cancel then.
    """
    centre = words.mean(dim=0)
    around = words - centre
    table = (2 * beta) * around.mT
    return table, -beta * around.square().sum(dim=1) - centre @ table


def _mean_largest(rows: Tensor, words: Tensor, beta: float) -> float:
    table, bias = _logit_map(words, beta)
    step = max(1, _BLOCK // words.shape[0])
    total = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for block in rows.split(step):
        logits = torch.addmm(bias, block, table)
        total += (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp().sum()
    return total.item() / rows.shape[0]


class _AssignmentKL(_Tiled):
    """Mean divergence over rows, and its gradient with respect to the scores: the difference of two softmaxes."""

    @staticmethod
    def forward(
        scores: Tensor, rows: Tensor, table: Tensor, bias: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        step = max(1, _BLOCK // scores.shape[1])
        gradient = torch.empty_like(scores if with_gradient else scores[:0])
        terms = []
        for start in range(0, len(scores), step):
            block = slice(start, start + step)
            log_p = torch.addmm(bias, rows[block], table).log_softmax(dim=1)
            log_q = scores[block].log_softmax(dim=1)
            p = log_p.exp()
            terms.append(torch.linalg.vecdot(p.flatten(), log_p.sub_(log_q).flatten()))
            if with_gradient:
                torch.sub(log_q.exp_(), p, out=gradient[block])
        return torch.stack(terms).sum() / len(scores), gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # zeros for the second output would be as large as it
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _AssignmentKLGradient.apply(*ctx.saved_tensors, grad_loss), None, None, None, None


class _AssignmentKLGradient(_Gradient):
    @staticmethod
    def forward(scores: Tensor, gradient: Tensor, grad_loss: Tensor) -> Tensor:
        return gradient * (grad_loss / len(scores))
