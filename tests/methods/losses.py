"""What the tests of all losses do alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[float, Tensor]:
    """A loss and its gradient with respect to its argument, which is left as it was."""
    student = torch.as_tensor(student).clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.item(), student.grad


def assert_vmap_equals_a_loop(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor
) -> None:
    """Raise unless ``vmap`` over the first dimension gives what a loop gives, value and gradient."""
    pairs = list(zip(students, teachers, strict=True))
    torch.testing.assert_close(
        torch.vmap(loss)(students, teachers), torch.stack([loss(s, t) for s, t in pairs])
    )
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(loss))(students, teachers),
        torch.stack([value_and_gradient(lambda x, t=t: loss(x, t), s)[1] for s, t in pairs]),
    )
