r"""Knowledge distillation (Hinton, Vinyals and Dean, NIPS 2014 deep learning workshop, arXiv:1503.02531).

The student learns the teacher's softened predictions beside the labels. The Kullback-Leibler divergence itself is
:func:`kdrefs.divergences.softened_kl`; here it gets its weight, its labels and the names under which toolboxes
compute something else.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import at_least_float32, check_choice, check_class_indices, check_matrix, check_same_batch
from kdrefs._typing import Float, Integer
from kdrefs.divergences import softened_kl


def kd_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, "batch"] | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    scale: bool = True,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Divergence from the teacher's softened predictions, mixed with the labels' cross-entropy.

    .. math:: L = (1 - \alpha) \, CE(y, \mathrm{softmax}(s))
              + \alpha \, T^2 \, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    The sum runs over the classes, the mean over the samples. Section 2 of the paper adds the two terms with a
    weight that it leaves open and asks for the factor :math:`T^2`, which keeps the ratio of the two gradients when
    the temperature changes. The values T = 4 and :math:`\alpha = 0.9` are those of the code that most tables were
    made with (szagoruyko/attention-transfer@893df54, HobbitLong/RepDistiller@b84f547).

    Args:
        student: Logits ``(batch, classes)``.
        teacher: Logits of the same samples, same shape; no gradient flows into them.
        labels: Class indices ``(batch,)``; None leaves the divergence alone, with weight 1.
        temperature: T, above 0.
        alpha: Weight of the divergence, from 0 to 1; the labels have the rest.
        scale: Multiply the divergence by :math:`T^2`. Without it, as in the code of FitNets, AB and CQD, a weight
            :math:`w` is :math:`w / T^2` here.
        variant: None, ours. ``"mean"``: the divergence averaged over batch *and* classes, which is what
            ``torch.nn.KLDivLoss()`` does by default: ours divided by the number of classes. ``"torchdistill"``: the
            factor :math:`T^2` only where the labels have a share, that is where they are given and
            :math:`\alpha < 1` (yoshitomo-matsubara/torchdistill@3e4373c, whose own ``alpha`` is the labels' weight).

    Returns:
        Scalar in nats.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha!r}")
    if variant is not None:
        check_choice("variant", variant, ("mean", "torchdistill"))
        if not scale:
            raise ValueError(f"scale: {variant!r} decides about the factor itself, got scale=False")
    if variant == "torchdistill":
        scale = labels is not None and alpha < 1
    if labels is not None:
        _check_labels(labels, student)
    divergence = softened_kl(student, teacher, temperature, scale=scale)
    if variant == "mean":
        divergence = divergence / student.shape[1]
    if labels is None:
        return divergence
    cross_entropy = F.cross_entropy(at_least_float32(student), labels.long())
    return torch.lerp(cross_entropy.to(divergence.dtype), divergence, alpha)


def _check_labels(labels: Tensor, student: Tensor) -> None:
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "student", student)
