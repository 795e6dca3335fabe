r"""FT: factor transfer (Kim, Park and Kwak, NeurIPS 2018, arXiv:1802.04977).

Training in two stages. First a *paraphraser*, an autoencoder on the frozen teacher's last feature map, is trained
without labels; its code is the teacher's *factor*. Then the student is trained on labels and on making the factor from
its own map, through a *translator* that is trained with it and thrown away.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs._checks import check_choice, check_same_batch, check_same_shape, check_weight_dtype
from kdrefs._maps import check_maps, matched_maps, unit_channels
from kdrefs._typing import Float
from kdrefs.kernels import unit_rows

_SLOPE = 0.1  # of LeakyReLU, Jangho-Kim/Factor-Transfer-pytorch@e8d6ac6


def factor_channels(channels: int, rate: float) -> int:
    r"""Channels of the factor of a map with ``channels``: :math:`km`, rounded.

    Args:
        channels: m, at least 1.
        rate: The paraphrase rate k, above 0; the paper's are 0.5, 0.75 and 1, its code's 0.5.

    Raises:
        ValueError: An argument is out of range, or nothing is left.
    """
    _check_count("channels", channels)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not round(channels * rate) >= 1:
        raise ValueError(
            f"rate: expected a number that leaves at least one of {channels} channels, got {rate!r}"
        )
    return round(channels * rate)


class Paraphraser(nn.Module):
    r"""Autoencoder on the teacher's feature map whose code is the factor; the height and width stay.

    Encoder: convolutions of 3x3 from :math:`m` to :math:`m`, to :math:`km`, to :math:`km` channels; decoder: transposed
    ones back in the opposite order. Each, the last too, is followed by LeakyReLU with slope 0.1
    (Jangho-Kim/Factor-Transfer-pytorch@e8d6ac6). Trained with :func:`paraphraser_loss` before the student, then frozen.

    Args:
        channels: m, of the teacher's map.
        factor: Channels of the factor, see :func:`factor_channels`.
        batch_norm: Whether each convolution is followed by batch normalisation. The authors' code has it commented out.

    Raises:
        ValueError: A number of channels is not a positive integer.
    """

    def __init__(self, channels: int, factor: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        _check_count("channels", channels)
        _check_count("factor", factor)
        widths = (channels, channels, factor, factor)
        self.encoder = _layers(nn.Conv2d, widths, batch_norm)
        self.decoder = _layers(nn.ConvTranspose2d, widths[::-1], batch_norm)

    def encode(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch factor h w"]:
        """The teacher's factor.

        Raises:
            ValueError: ``maps`` have another number of channels, or outside autocast another dtype, than its
                weights.
        """
        _check_channels(maps, self.encoder)
        return self.encoder(maps)

    def forward(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """The reconstruction of ``maps`` from their factor; raises as :meth:`encode` does."""
        return self.decoder(self.encode(maps))


class Translator(nn.Module):
    r"""Makes a factor of the student's map: the paraphraser's encoder at the student's width.

    Convolutions of 3x3 from :math:`m_s` to :math:`m_s`, to :math:`km`, to :math:`km` channels, each followed by
    LeakyReLU with slope 0.1. Trained with the student, then thrown away.

    Args:
        channels: Of the student's map.
        factor: Channels of the teacher's factor.
        batch_norm: As in :class:`Paraphraser`.

    Raises:
        ValueError: A number of channels is not a positive integer.
    """

    def __init__(self, channels: int, factor: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        _check_count("channels", channels)
        _check_count("factor", factor)
        self.layers = _layers(nn.Conv2d, (channels, channels, factor, factor), batch_norm)

    def forward(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch factor h w"]:
        """The student's factor.

        Raises:
            ValueError: ``maps`` have another number of channels, or outside autocast another dtype, than its
                weights.
        """
        _check_channels(maps, self.layers)
        return self.layers(maps)


def paraphraser_loss(
    reconstruction: Float[Tensor, "batch channels h w"],
    maps: Float[Tensor, "batch channels h w"],
    *,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""What the paraphraser loses of the teacher's map.

    .. math:: L_{rec} = \frac1N \sum_n \lVert x_n - P(x_n) \rVert^2

    Args:
        reconstruction: The paraphraser's output :math:`P(x)`.
        maps: The teacher's :math:`x`, same shape; no gradient flows into them.
        variant: None, above. ``"mean"``: the mean of the squares over everything (RepDistiller), ours divided by the
            values a sample. ``"official"``: the mean of the magnitudes, as in the authors' script, which no
            factor turns into ours.

    Returns:
        Scalar, in squared units of the map; for ``"official"`` in its units.

    Raises:
        ValueError: Shapes differ, a dtype is not floating or the variant is unknown.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_choice("variant", variant, (None, "mean", "official"))
    check_maps("reconstruction", reconstruction)
    check_maps("maps", maps)
    check_same_shape("maps", maps, "reconstruction", reconstruction)
    ours, theirs = _factors(reconstruction, maps)
    if variant == "official":
        return F.l1_loss(ours, theirs)
    squares = F.mse_loss(ours, theirs, reduction="sum")
    return squares / (ours.numel() if variant == "mean" else len(ours))


def factor_loss(
    student: Float[Tensor, "batch student_factor hs ws"],
    teacher: Float[Tensor, "batch teacher_factor ht wt"],
    *,
    p: int = 1,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Distance of the two factors, each divided by its Euclidean norm.

    .. math:: L_{FT} = \frac1N \sum_n \Big\lVert \frac{F_t(x_n)}{\lVert F_t(x_n) \rVert_2}
              - \frac{F_s(x_n)}{\lVert F_s(x_n) \rVert_2} \Big\rVert_p

    The factor of a sample is one vector, channels and positions together.

    Args:
        student: The translator's output.
        teacher: The frozen paraphraser's factor, same shape; no gradient flows into it.
        p: Order of the norm, 1 or 2; it is not squared. The authors' code has 1.
        variant: None, above. ``"official"``: ``p = 1`` as a mean over all values, ours divided by the values a sample
            (the authors, KDZoo, torchdistill; their weights are 500, 200 and 1000). ``"repdistiller"``: what
            RepDistiller has under this name is **not** factor transfer: squares are averaged over the channels before
            the normalisation, so that attention maps are compared, as a mean over positions. It sees neither signs nor
            which channel is which, needs no equal channels, and pools the larger map where sizes differ.

    Returns:
        Scalar, a pure number.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    A sample whose factor is zero everywhere, or has a norm without a square in the dtype, has no direction and gets no
    gradient. Data-parallel training: a mean over
    samples.
    """
    check_choice("variant", variant, (None, "official", "repdistiller"))
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    if variant is not None and p != 1:
        raise ValueError(f"p: the variant {variant!r} has 1, got {p}")
    if variant == "repdistiller":
        pair = (maps.square().mean(1) for maps in matched_maps(student, teacher))
        # Squares reach sizes whose own squares underflow.
        ours, theirs = (unit_rows(maps.flatten(1)) for maps in pair)
    else:
        check_maps("student", student)
        check_maps("teacher", teacher)
        check_same_batch("teacher", teacher, "student", student)
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher: expected the shape of student {tuple(student.shape)}, got {tuple(teacher.shape)}; a "
                "Translator makes the student's factor as wide as the teacher's"
            )
        ours, theirs = (
            unit_channels(factor.unsqueeze(1)).squeeze(1) for factor in _factors(student, teacher)
        )
    gap = ours - theirs
    if variant is not None:
        return gap.abs().mean()
    return torch.linalg.vector_norm(gap, ord=p, dim=1).mean()


def _factors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32, the teacher's detached."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _layers(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: tuple[int, ...], batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(kind(before, after, 3, padding=1))
        layers += [nn.BatchNorm2d(after)] if batch_norm else []
        layers.append(nn.LeakyReLU(_SLOPE))
    return nn.Sequential(*layers)


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: expected an integer from 1 on, got {count!r}")


def _check_channels(maps: Tensor, layers: nn.Sequential) -> None:
    check_maps("maps", maps)
    expected = layers[0].in_channels
    if maps.shape[1] != expected:
        raise ValueError(f"maps: expected {expected} channels, got {maps.shape[1]}")
    check_weight_dtype("maps", maps, next(layers.parameters()))
