"""What the losses on feature maps share: shape checks, a common size, unit channels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs._checks import check_same_batch
from kdrefs._typing import Float


def check_maps(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a floating tensor (batch, channels, height, width) without an empty dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.ndim != 4 or 0 in value.shape or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch, channels, height, width), none of them 0, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def matched_maps(
    student: Float[Tensor, "batch student_channels hs ws"],
    teacher: Float[Tensor, "batch teacher_channels ht wt"],
) -> tuple[Tensor, Tensor]:
    """Both feature maps in one dtype, at least float32, and at one size; the teacher's detached.

    Where the sizes differ, each side that is larger in a dimension is average-pooled to the smaller one's size in
    it, as in RepDistiller.

    Raises:
        ValueError: Something is not a feature map, or the batch sizes differ.
    """
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _pooled(student, size), _pooled(teacher, size)


def unit_channels(maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels positions"]:
    """Each channel's map as a vector of unit Euclidean norm.

    A channel that is zero everywhere stays zero and gets no gradient; so does one whose norm has no square in the
    dtype (below 1e-19 or above 1e19 in float32).
    """
    rows = maps.flatten(2)
    norms = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    # A product with the inverse has a cheaper gradient than the quotient.
    return rows * (1 / norms.masked_fill(norms < torch.finfo(rows.dtype).tiny ** 0.5, torch.inf))


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == torch.Size(size) else F.adaptive_avg_pool2d(maps, size)
