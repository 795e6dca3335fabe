"""Argument checks shared by the losses: shapes, dtypes and Python scalars, never tensor values.

None of them reads a tensor's contents, so they cost no host synchronisation and disappear under
``torch.compile``.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_floating(name: str, value: Tensor, form: str = "") -> None:
    """Raise unless ``value`` is a floating tensor; ``form`` says which shape is expected, which is not checked."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor{form and f' {form}'}, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def check_weight_dtype(name: str, value: Tensor, weight: Tensor) -> None:
    """Raise unless ``value`` has the dtype of a module's ``weight``; under autocast it need not."""
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
        raise ValueError(f"{name}: expected {weight.dtype} like the module's weights, got {value.dtype}")


def check_matrix(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a floating matrix with at least one row and one column."""
    check_tensor(name, value)
    if value.ndim != 2 or value.shape[0] < 1 or value.shape[1] < 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch, features), both at least 1, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def check_samples(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a floating tensor of samples, (batch, ...), without an empty dimension."""
    check_tensor(name, value)
    if value.ndim < 2 or 0 in value.shape or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating tensor (batch, ...) without an empty dimension, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def check_class_indices(name: str, labels: Tensor) -> None:
    """Raise unless ``labels`` are class indices, (batch,)."""
    check_tensor(name, labels)
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: expected class indices (batch,), got {labels.dtype} of shape {tuple(labels.shape)}"
        )


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor, hint: str = "") -> None:
    """Raise unless both tensors have the same shape; ``hint`` says what makes them so."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name} {tuple(other.shape)}, got {tuple(value.shape)}"
            + (f"; {hint}" if hint else "")
        )


def check_same_batch(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have the same number of rows."""
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name}: expected as many rows as {other_name} ({other.shape[0]}), got {value.shape[0]}"
        )


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {sorted(map(str, choices))}, got {value!r}")


def at_least_float32(value: Tensor) -> Tensor:
    """Half precisions become float32: row sums and logarithms need the digits; float64 stays."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
