r"""Cross Quality Distillation (Su and Maji, BMVC 2017, arXiv:1604.00433).

Teacher and student look at the *same* image in two qualities: the teacher at the clean one, on which it was trained,
the student at a degraded one. The degradation has to be applied to whole pairs: where images are flipped or cropped
at random, both views move alike (``Batches(..., renderings=...)`` does that).
"""

from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_class_indices,
    check_matrix,
    check_positive,
    check_same_batch,
    check_same_shape,
)
from kdrefs._typing import Float, Integer
from kdrefs.divergences import softened_cross_entropy


def cqd_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, "batch"] | None = None,
    *,
    weight: float = 200.0,
    temperature: float = 10.0,
    teacher_temperature: float | None = None,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of the labels on degraded images plus that of the teacher's answers to the clean ones.

    .. math:: L = CE(y, \mathrm{softmax}(s))
              - \lambda \sum_k \mathrm{softmax}(t / T_1)_k \log \mathrm{softmax}(s / T_2)_k

    with :math:`s` the student's logits for the degraded image and :math:`t` the teacher's for the clean one; sum over
    classes, mean over samples. There is no factor :math:`T^2`: for equal temperatures the gradient is that of
    :math:`(1 + \lambda/T^2)` times :func:`~kdrefs.methods.kd.kd_loss` with :math:`\alpha = \lambda/(T^2 + \lambda)`.
    The authors' 200 at T = 10 (birds) is a weight of 2 there, their 50 (cars) one of 1/2. Values differ by the
    teacher's entropy, which has no gradient. Temperatures and weights: jongchyisu/cross_quality_distillation@cb8149f.

    Args:
        student: Logits for the degraded images, ``(batch, classes)``.
        teacher: Logits for the same images before they were degraded, same shape; no gradient flows into them.
        labels: Class indices ``(batch,)``; None leaves the teacher's term alone, weighted.
        weight: :math:`\lambda`, above 0.
        temperature: :math:`T_2`, of the student, above 0.
        teacher_temperature: :math:`T_1`; None for that of the student. Where the two differ, the authors' own backward
            pass is no derivative of their loss; ours is.
        variant: None, the paper's. ``"logits"``: instead of the teacher's cross-entropy the squared distance of the
            logits over twice the mean squared norm of the teacher's, which stands in the authors' code as a comment;
            temperatures do not matter then.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's; ``"logits"`` divides
    by a mean over the batch, which would have to be the whole batch's.
    """
    check_choice("variant", variant, (None, "logits"))
    check_positive("weight", weight)
    check_positive("temperature", temperature)
    check_positive("teacher_temperature", temperature if teacher_temperature is None else teacher_temperature)
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if variant == "logits":
        size = teacher.square().sum(1).mean().clamp(min=1e-12)  # a teacher that says nothing has no scale
        soft = (student - teacher).square().sum(1).mean() / (2 * size)
    else:
        guide = teacher / (temperature if teacher_temperature is None else teacher_temperature)
        soft = softened_cross_entropy(student / temperature, guide, 1.0)
    if labels is None:
        return weight * soft
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "student", student)
    return F.cross_entropy(student, labels.long()) + weight * soft
