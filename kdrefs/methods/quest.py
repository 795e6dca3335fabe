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
from kdrefs.kernels import unit_rows
from kdrefs.methods._quest_assignment import (
    as_map,
    assignment_kl,
    check_vocabulary,
    logit_map,
    matched,
    mean_largest_of,
    shape_of,
    vectors,
)
from kdrefs.methods._quest_vocabulary import fit_words


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
        ValueError: A shape, a dtype or an argument does not fit, or a feature is not finite.
        ImportError: ``"minibatch"`` without scikit-learn.
    """
    check_choice("method", method, (None, "lloyd", "minibatch"))
    rows = vectors("features", features).detach()
    for name, value in (("words", words), ("iterations", iterations)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}")
    if not bool(rows.isfinite().all()):
        raise ValueError("features: expected finite values, got NaN or infinity")
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
    rows, words = matched(features, vocabulary)
    table, bias = logit_map(words, _beta(beta, tau))
    with torch.autocast(rows.device.type, enabled=False):
        return as_map(torch.addmm(bias, rows, table).softmax(dim=1), features)


def nearest_word(
    features: Float[Tensor, "batch channels *positions"], vocabulary: Float[Tensor, "words channels"]
) -> Int[Tensor, "batch *positions"]:
    r"""The hard assignment :math:`\arg\min_k \lVert f - v_k \rVert^2`, the limit of a large :math:`\beta`.

    Its loss is the cross-entropy of the predictor's scores with these labels. Arguments and errors as in
    :func:`soft_assignment`; of words that are equally near, one is taken.

    Returns:
        Numbers of words ``(batch, ...)``, int64.
    """
    rows, words = matched(features, vocabulary)
    table, bias = logit_map(words, 1.0)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.addmm(bias, rows, table).argmax(dim=1).unflatten(0, shape_of(features))


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
        rows = vectors("maps", maps)
        if rows.shape[1] != self.weight.shape[1]:
            raise ValueError(f"maps: expected {self.weight.shape[1]} channels, got {rows.shape[1]}")
        with torch.autocast(rows.device.type, enabled=False):
            # The scale goes into the short matrix, not over all scores.
            directions = unit_rows(self.weight) * self.scale
            dtype = torch.promote_types(rows.dtype, directions.dtype)
            return as_map(unit_rows(rows).to(dtype) @ directions.to(dtype).mT, maps)


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
    for name, value in (("student", student), ("teacher", teacher), ("vocabulary", vocabulary)):
        if not isinstance(value, Tensor | Sequence):
            raise TypeError(f"{name}: expected a tensor or one a level, got {type(value).__name__}")
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
    rows, words = matched(features, vocabulary)
    return mean_largest_of(rows, words, _beta(beta, tau))


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
        ValueError: A shape, a dtype or the number does not fit, squares are not finite, or no :math:`\beta` gives the
            number: words that stand twice share their vectors however large it is.
    """
    rows, words = matched(features, vocabulary)
    if not 1 / words.shape[0] < mean_largest < 1:
        raise ValueError(
            f"mean_largest: expected a number between 1/{words.shape[0]} (one by the words) and 1, "
            f"got {mean_largest}"
        )
    centre = words.mean(dim=0)
    spread = (words - centre).square().sum(dim=1).mean().item()
    # Beyond this rounding of the distances would tell words apart that are the same.
    size = spread + (rows - centre).square().sum(dim=1).mean().item()
    if not math.isfinite(size):
        raise ValueError("features and vocabulary: expected numbers whose squares have a finite sum")
    if spread == 0:
        raise ValueError(f"mean_largest: no beta gives {mean_largest}, all words are the same")
    limit = 1e-3 / torch.finfo(rows.dtype).eps / max(size, torch.finfo(rows.dtype).tiny)
    low = high = min(1 / max(spread, torch.finfo(rows.dtype).tiny), limit)
    while mean_largest_of(rows, words, low) > mean_largest:
        low /= 4
    while mean_largest_of(rows, words, high) < mean_largest:
        if high >= limit:
            raise ValueError(
                f"mean_largest: no beta gives {mean_largest}, words that stand twice share vectors"
            )
        high = min(4 * high, limit)
    while high > (1 + 1e-4) * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_largest_of(rows, words, middle) < mean_largest else (low, middle)
    return math.sqrt(low * high)


# Several levels, checks and shapes


def _level(student: Tensor, teacher: Tensor, vocabulary: Tensor, beta: float) -> Tensor:
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_vocabulary(vocabulary)
    check_same_batch("teacher", teacher, "student", student)
    size = (student.shape[2], student.shape[3])
    if size[0] > teacher.shape[2] or size[1] > teacher.shape[3]:
        raise ValueError(
            f"student: expected at most the teacher's {teacher.shape[2]} x {teacher.shape[3]} positions, "
            f"got {size[0]} x {size[1]}"
        )
    if student.shape[1] != vocabulary.shape[0]:
        raise ValueError(
            f"student: expected a score for each of {vocabulary.shape[0]} words, got {student.shape[1]}"
        )
    teacher = at_least_float32(teacher.detach())
    if tuple(teacher.shape[2:]) != size:
        teacher = F.adaptive_avg_pool2d(teacher, size)
    with torch.autocast(student.device.type, enabled=False):
        rows, words = matched(teacher, vocabulary.detach())
        table, bias = logit_map(words, beta)
        return assignment_kl(vectors("student", student), rows, table, bias)


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
