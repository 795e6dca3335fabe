r"""AB: distillation of activation boundaries (Heo et al., AAAI 2019, arXiv:1811.03233).

What is transferred of a hidden neuron is where it switches on and off, not how strongly it responds: the teacher's sign
is a label for the student's neuron, learned with a squared hinge before the student sees a class label. Features are
read *before* their activation, on both sides.
"""

from torch import Tensor, nn

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

_CIFAR10_SCALE = 0.003  # bhheo/AB_distillation@a7701d3, cifar10_AB_distillation.py


class Connector(nn.Module):
    r"""Maps the student's channels to as many as the teacher has: a 1x1 convolution without bias, batch normalisation.

    As in the authors' code (bhheo/AB_distillation@a7701d3). In eval mode it is an affine map of the channels at each
    position. It is trained with the student and thrown away after the transfer.

    Args:
        student_channels: Channels of the student's layer.
        teacher_channels: Channels of the teacher's layer.

    Raises:
        ValueError: A number of channels is not a positive integer.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        for name, count in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected an integer from 1 on, got {count!r}")
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(teacher_channels)

    def forward(
        self, maps: Float[Tensor, "batch student_channels h w"]
    ) -> Float[Tensor, "batch teacher_channels h w"]:
        """The student's pre-activations ``maps`` in the teacher's channels.

        Raises:
            ValueError: ``maps`` have another number of channels, or outside autocast another dtype, than the connector.
        """
        check_maps("maps", maps)
        if maps.shape[1] != self.conv.in_channels:
            raise ValueError(f"maps: expected {self.conv.in_channels} channels, got {maps.shape[1]}")
        check_weight_dtype("maps", maps, self.conv.weight)
        return self.bn(self.conv(maps))


def ab_loss(
    student: Float[Tensor, "batch *neurons"],
    teacher: Float[Tensor, "batch *neurons"],
    *,
    margin: float = 1.0,
    form: str = "surrogate",
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""How far the student's neurons are from the right side of their boundaries.

    .. math:: L = \frac1N \sum_n \sum_i \max(0, \mu - \ell_{ni} s_{ni})^2, \qquad
              \ell_{ni} = \begin{cases} 1 & t_{ni} > 0 \\ -1 & t_{ni} \le 0 \end{cases}

    The paper's alternative loss for one layer; the sum runs over its neurons (channels and positions), the mean over
    the samples. The teacher's magnitudes do not enter, and a neuron on the right side by the margin costs nothing.

    Args:
        student: Pre-activations ``(batch, ...)``, after a :class:`Connector` where widths differ. Behind a ReLU none is
            below 0, and each neuron that the teacher has inactive costs :math:`\mu^2` whatever the student does.
        teacher: Pre-activations of the teacher, same shape; no gradient flows into them. Only their signs are read.
        margin: :math:`\mu`, above 0; the paper's is 1, KDZoo's 2.
        form: ``"surrogate"``, above. ``"ideal"``: what it stands for: the number of neurons on the wrong
            side, :math:`\frac1N \sum_n \lVert \rho(t_n) - \rho(s_n) \rVert_1` with :math:`\rho(x) = 1` for
            :math:`x > 0`, else 0. It has no gradient and no margin.
        variant: The reduction. None: as above, and as in torchdistill. ``"official"``: the authors' function sums over
            the samples too: ours times N; their scripts divide by N later and weigh the layers, see
            :func:`ab_layer_weights`. ``"repdistiller"``: ours times 0.003, the weight of the authors' CIFAR-10 script
            inside the loss (RepDistiller, MMRazor). ``"mean"``: the mean over all neurons, ours divided by their number
            a sample (KDZoo).

    Returns:
        Scalar, in squared units of the pre-activations; for ``"ideal"`` a number of neurons.

    Raises:
        ValueError: Shapes differ, a dtype is not floating, or an argument is unknown.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's (``"official"``: add).
    """
    check_positive("margin", margin)
    check_choice("form", form, ("surrogate", "ideal"))
    check_choice("variant", variant, (None, "official", "repdistiller", "mean"))
    student, active = _checked(student, teacher)
    if form == "ideal":
        total = ((student.detach() > 0) != active).to(student.dtype).sum()
    else:
        labels = active.to(student.dtype) * 2 - 1  # a product is several times as fast as a choice of two
        total = (margin - labels * student).relu().square().sum()
    if variant == "official":
        return total
    if variant == "mean":
        return total / student.numel()
    return total * ((_CIFAR10_SCALE if variant == "repdistiller" else 1) / student.shape[0])


def ab_layer_weights(layers: int, *, scale: float = _CIFAR10_SCALE) -> tuple[float, ...]:
    r"""Weights of the layers' losses from the image upwards, in the authors' scripts.

    .. math:: w_k = c \, 2^{k - n}, \qquad k = 1, \dots, n

    Halved from layer to layer downwards, where maps have more positions. :math:`c` is 3/1000 for wide residual networks
    on CIFAR-10 and 1/1000 in the transfer from ResNet to MobileNet (bhheo/AB_distillation@a7701d3).

    Args:
        layers: How many, at least 1.
        scale: :math:`c`, above 0: the weight of the uppermost layer.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers: expected an integer from 1 on, got {layers!r}")
    check_positive("scale", scale)
    return tuple(scale * 2.0 ** (k - layers) for k in range(1, layers + 1))


def activation_similarity(
    student: Float[Tensor, "batch *neurons"], teacher: Float[Tensor, "batch *neurons"]
) -> Float[Tensor, ""]:
    r"""Share of the neurons that student and teacher have both active or both inactive, from 0 to 1.

    .. math:: 1 - \frac{1}{N M} \sum_n \lVert \rho(t_n) - \rho(s_n) \rVert_1

    with :math:`M` neurons a sample. Two random halves agree at 0.5, a constant answer at the share of the more frequent
    one, so it is to be read beside a control.

    Args:
        student: Pre-activations ``(batch, ...)``.
        teacher: Those of the teacher, same shape.

    Raises:
        ValueError: Shapes differ or a dtype is not floating.
    """
    return 1 - ab_loss(student, teacher, form="ideal", variant="mean")


def _checked(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The student's pre-activations, at least float32, and which neurons the teacher has active."""
    check_samples("student", student)
    check_samples("teacher", teacher)
    check_same_shape(
        "teacher", teacher, "student", student, "a Connector maps the student's channels to the teacher's"
    )
    return at_least_float32(student), teacher.detach() > 0
