"""Assignments of feature vectors to words for :mod:`kdrefs.methods.quest`, and their divergence in blocks."""

from typing import Any

import torch
from torch import Tensor

from kdrefs._checks import at_least_float32, check_tensor
from kdrefs.divergences import kl_divergence
from kdrefs.pair_sums import _Tiled

# Numbers of one row block of assignments: a few such blocks stay in a core's cache.
_BLOCK = 2**17


def vectors(name: str, features: Tensor) -> Tensor:
    """Every position as a row, in at least float32; no copy where the channels come last in memory."""
    check_tensor(name, features)
    if features.ndim < 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch, channels, ...), none of them 0, "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    return at_least_float32(features.movedim(1, -1).flatten(0, -2))


def matched(features: Tensor, vocabulary: Tensor) -> tuple[Tensor, Tensor]:
    """Every position as a row, and the words in the same dtype."""
    rows = vectors("features", features)
    check_vocabulary(vocabulary)
    if vocabulary.shape[1] != rows.shape[1]:
        raise ValueError(f"vocabulary: expected words of {rows.shape[1]} channels, got {vocabulary.shape[1]}")
    dtype = torch.promote_types(rows.dtype, at_least_float32(vocabulary).dtype)
    return rows.to(dtype), vocabulary.to(dtype)


def check_vocabulary(vocabulary: Tensor) -> None:
    """Raise unless ``vocabulary`` is a floating matrix of words."""
    check_tensor("vocabulary", vocabulary)
    if vocabulary.ndim != 2 or 0 in vocabulary.shape or not vocabulary.is_floating_point():
        raise ValueError(
            f"vocabulary: expected a floating tensor (words, channels), got {vocabulary.dtype} of shape "
            f"{tuple(vocabulary.shape)}"
        )


def as_map(rows: Tensor, like: Tensor) -> Tensor:
    """Rows as a map of the positions of ``like``; a view."""
    return rows.unflatten(0, shape_of(like)).movedim(-1, 1)


def shape_of(features: Tensor) -> tuple[int, ...]:
    """The shape without the channels."""
    return features.shape[0], *features.shape[2:]


def logit_map(words: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""The assignment's logits are affine in f: :math:`2 \beta \langle f, v_k - \bar v \rangle + b_k`.

    :math:`-\beta \lVert f - v_k \rVert^2` without what all words have in common. Distances stay when the words' mean
    becomes the origin, and the squares of features far from 0 do not cancel then.
    """
    centre = words.mean(dim=0)
    around = words - centre
    table = (2 * beta) * around.mT
    return table, -beta * around.square().sum(dim=1) - centre @ table


def mean_largest_of(rows: Tensor, words: Tensor, beta: float) -> float:
    """Largest probability, averaged over the rows."""
    table, bias = logit_map(words, beta)
    step = max(1, _BLOCK // words.shape[0])
    total = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for block in rows.split(step):
        logits = torch.addmm(bias, block, table)
        total += (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp().sum()
    return total.item() / rows.shape[0]


def assignment_kl(scores: Tensor, rows: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Mean over rows of the divergence of the scores' softmax from the assignments of the teacher's ``rows``.

    ``table`` and ``bias`` are those of :func:`logit_map`.
    """
    dtype = torch.promote_types(scores.dtype, rows.dtype)
    scores, rows, table, bias = (value.to(dtype) for value in (scores, rows, table, bias))
    if torch.compiler.is_compiling():  # which fuses, and would unroll the blocks
        logits = torch.addmm(bias, rows, table)
        return kl_divergence(logits.log_softmax(dim=1), scores.log_softmax(dim=1))
    loss: Tensor
    loss, _ = _AssignmentKL.apply(scores, rows, table, bias, torch.is_grad_enabled())
    return loss


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
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad_loss is not None:
            gradient = _AssignmentKLGradient.apply(*ctx.saved_tensors, grad_loss)
        return gradient, None, None, None, None


class _AssignmentKLGradient(_Tiled):
    """The gradient as a function of what it depends on, so that its own derivative is refused, not taken for 0."""

    @staticmethod
    def forward(scores: Tensor, gradient: Tensor, grad_loss: Tensor) -> Tensor:
        return gradient * (grad_loss / len(scores))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise NotImplementedError("quest_loss has first derivatives only")
