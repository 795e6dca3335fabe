r"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015, arXiv:1412.6550).

Training in two stages. First the lower half of the student learns to predict a middle layer of the teacher (the
*hint*) through a regressor, which is thrown away; then the whole student is trained by distillation, the weight of
the teacher falling from epoch to epoch (:func:`teacher_weight`).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_positive,
    check_same_shape,
    check_samples,
    check_weight_dtype,
)
from kdrefs._maps import check_maps
from kdrefs._typing import Float


class HintRegressor(nn.Module):
    r"""Maps the student's guided layer to the shape of the teacher's hint layer.

    The paper's regressor is a convolution without padding whose kernel makes up for the difference in size,
    :math:`(H_s - H_t + 1) \times (W_s - W_t + 1)`, followed by the hint layer's own non-linearity (section 2.2).

    Args:
        student: ``(channels, height, width)`` of the guided layer.
        teacher: ``(channels, height, width)`` of the hint layer.
        activation: The hint layer's non-linearity: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or None where the hint is
            taken before it.
        variant: None, the paper's. ``"repdistiller"``: a 3x3 convolution with stride 2 where the student's map is
            twice as large, a transposed 4x4 one where it is half as large, else the paper's kernel; batch
            normalisation before the non-linearity (HobbitLong/RepDistiller@b84f547).

    Raises:
        ValueError: A shape or a name does not fit, or the hint is larger than the guided layer in a way that the
            variant has no convolution for.
    """

    def __init__(
        self,
        student: tuple[int, int, int],
        teacher: tuple[int, int, int],
        *,
        activation: str | None = "relu",
        variant: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, _ACTIVATIONS)
        check_choice("variant", variant, (None, "repdistiller"))
        _check_shape("student", student)
        _check_shape("teacher", teacher)
        self.student_shape = tuple(student)
        (channels, height, width), (outputs, rows, columns) = student, teacher
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if variant == "repdistiller" and (height, width) == (2 * rows, 2 * columns):
            self.conv = nn.Conv2d(channels, outputs, 3, stride=2, padding=1)
        elif variant == "repdistiller" and (2 * height, 2 * width) == (rows, columns):
            self.conv = nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1)
        elif height >= rows and width >= columns:
            self.conv = nn.Conv2d(channels, outputs, (height - rows + 1, width - columns + 1))
        else:
            raise ValueError(
                f"student: expected at least {rows} x {columns} positions, the hint's, got {height} x {width}"
            )
        self.bn = nn.BatchNorm2d(outputs) if variant == "repdistiller" else nn.Identity()
        self.activation = _ACTIVATIONS[activation]()

    def forward(
        self, maps: Float[Tensor, "batch student_channels hs ws"]
    ) -> Float[Tensor, "batch teacher_channels ht wt"]:
        """Predict the hint ``(batch, teacher_channels, ...)`` from the guided layer's ``maps``.

        Raises:
            ValueError: ``maps`` do not have the shape that the regressor was made for, or outside autocast its dtype.
        """
        check_maps("maps", maps)
        if tuple(maps.shape[1:]) != self.student_shape:
            expected = ", ".join(map(str, self.student_shape))
            raise ValueError(f"maps: expected the shape (batch, {expected}), got {tuple(maps.shape)}")
        check_weight_dtype("maps", maps, self.conv.weight)
        return self.activation(self.bn(self.conv(maps)))


def hint_loss(
    student: Float[Tensor, "batch *features"],
    teacher: Float[Tensor, "batch *features"],
    *,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Half the squared distance between the regressor's output and the hint.

    .. math:: L = \frac1N \sum_n \tfrac12 \lVert u_h(x_n) - r(v_g(x_n)) \rVert^2

    Equation 3 of the paper: the sum runs over channels and positions, the mean over the samples.

    Args:
        student: The regressor's output ``(batch, ...)``, maps or vectors.
        teacher: The hint, same shape; no gradient flows into it.
        variant: None, the paper's. ``"mean"``: the mean of the squares over everything, without the half
            (RepDistiller, mdistiller, KDZoo): ours times 2 divided by the values a sample, :math:`CHW`.
            ``"official"``: the authors' Theano code sums over the rows of the maps only and averages over channels,
            columns and samples (adri-romsor/FitNets@0f633b1): ours divided by :math:`CW`.

    Returns:
        Scalar, in squared units of the feature.

    Raises:
        ValueError: Shapes differ, a dtype is not floating, or ``"official"`` is asked for something that is no map.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_choice("variant", variant, (None, "mean", "official"))
    check_samples("student", student)
    check_samples("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student, "a HintRegressor maps one to the other")
    squares = F.mse_loss(at_least_float32(student), at_least_float32(teacher.detach()), reduction="sum")
    if variant == "mean":
        return squares / student.numel()
    if variant == "official":
        check_maps("student", student)
        return squares / (2 * student.numel() // student.shape[2])
    return squares / (2 * student.shape[0])


def teacher_weight(progress: float, *, start: float = 4.0, end: float = 1.0) -> float:
    r"""Weight of the distillation term in the second stage, falling in a straight line.

    .. math:: \lambda(u) = \lambda_0 + (\lambda_1 - \lambda_0) u

    Section 2.3 lets the weight decay; the authors' code takes it from 4 to 1, between the epochs 5 and 400
    (adri-romsor/FitNets@0f633b1).

    Args:
        progress: Share of the second stage that is done, from 0 to 1.
        start: Weight at its beginning, above 0.
        end: Weight at its end, above 0.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A weight is no number.
    """
    check_positive("start", start)
    check_positive("end", end)
    if isinstance(progress, bool) or not isinstance(progress, int | float) or not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a number from 0 to 1, got {progress!r}")
    return start + (end - start) * progress


def _check_shape(name: str, shape: tuple[int, int, int]) -> None:
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"{name}: expected (channels, height, width), each at least 1, got {tuple(shape)}")


_ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
