r"""Structured distillation for dense prediction (Liu et al., CVPR 2019; TPAMI 2020, arXiv:1903.04197).

Three terms beside the labels of the pixels: each pixel's class probabilities (:func:`pixelwise_loss`), how alike the
features of any two places are (:func:`pairwise_loss`), and what a discriminator sees in the whole map
(:func:`holistic_loss`, :class:`HolisticDiscriminator`):

.. math:: L = L_{mc} + \lambda_1 (L_{pi} + L_{pa}) - \lambda_2 L_{ho}, \qquad \lambda_1 = 10, \; \lambda_2 = 0.1

Read were the notes' copies of the paper's equations and the authors' code (irfanICMLL/structure_knowledge_distillation
@ce208e1), ``"official"`` below.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs._checks import (
    at_least_float32,
    check_choice,
    check_floating,
    check_positive,
    check_same_batch,
    check_same_shape,
    check_tensor,
    check_weight_dtype,
)
from kdrefs._maps import check_maps, matched_maps
from kdrefs._typing import Float
from kdrefs.divergences import kl_divergence, softened_cross_entropy, softened_kl
from kdrefs.kernels import unit_rows

Beta = int | tuple[int, int]


def pixelwise_loss(
    student: Float[Tensor, "batch classes h w"],
    teacher: Float[Tensor, "batch classes h w"],
    *,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Divergence between the class probabilities that student and teacher give a pixel.

    .. math:: L_{pi} = \frac{1}{N H W} \sum_{n,i} KL(q^t_{ni} \,\|\, q^s_{ni})

    Args:
        student: Logits ``(batch, classes, height, width)``.
        teacher: The teacher's, same shape; no gradient flows into them.
        variant: None, the equation above: what the authors' code minimises, as a mean over samples (CIRKD@dab64db at
            temperature 1). ``"printed"``: the paper's equation as it stands, :math:`KL(q^s \| q^t)`. ``"official"``:
            the code to the letter, a cross-entropy summed over the batch and divided by the pixels of *one* image:
            its gradient is the batch size times ours.

    Returns:
        Scalar in nats: sum over classes, mean over pixels and samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    check_choice("variant", variant, (None, "printed", "official"))
    ours, theirs = student.movedim(1, -1), teacher.detach().movedim(1, -1)
    if variant == "official":
        return len(student) * softened_cross_entropy(ours, theirs, 1.0)
    if variant == "printed":
        return kl_divergence(*(at_least_float32(x).log_softmax(-1) for x in (ours, theirs)))
    return softened_kl(ours, theirs, 1.0)


def pairwise_loss(
    student: Float[Tensor, "batch student_channels hs ws"],
    teacher: Float[Tensor, "batch teacher_channels ht wt"],
    *,
    alpha: int | None = None,
    beta: Beta | None = None,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Squared difference of the affinity graphs of two feature maps.

    .. math:: L_{pa} = \frac{1}{N |E|} \sum_n \sum_{(i,j) \in E} (a^s_{ij} - a^t_{ij})^2, \qquad
              a_{ij} = \frac{f_i^\top f_j}{\lVert f_i \rVert \lVert f_j \rVert}

    A node is a patch of :math:`\beta` pixels with the mean of their features; edges lead from each node to itself and
    its :math:`\alpha - 1` nearest. On an endless map :math:`|E| = H W \alpha / \beta`, so that the factor is
    :math:`\beta / (H W \alpha)`; the notes print its inverse.

    Args:
        student: Feature maps ``(batch, student_channels, hs, ws)``; the paper takes the last before the classifier.
        teacher: Those of the teacher; no gradient flows into them. Where sizes differ, the larger side is
            average-pooled.
        alpha: :math:`\alpha`, how many nodes of an endless map are no further away than some distance: 1, 5, 9, 13, 21,
            25 … (other numbers would choose among equally near ones). At the edges a node has fewer. None: all nodes.
        beta: :math:`\beta`, a square number for square patches, or ``(rows, columns)``. Patches at the lower and right
            edge may have fewer pixels. None: 1.
        variant: None, the definition above. ``"official"``: the authors' code; patches are max-pooled and by default
            half the map high and wide, all pairs, and norms (plus 1e-8) are constants, so that the gradient keeps a
            part along the features, to which the affinities are blind. ``"cirkd"``: winycg/CIRKD@dab64db; 2x2
            max-pooling by default, and else ours.

    Returns:
        Scalar, a pure number from 0 to 4.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_choice("variant", variant, (None, "official", "cirkd"))
    student, teacher = matched_maps(student, teacher)
    height, width = student.shape[2:]
    if beta is None:
        beta = {None: (1, 1), "cirkd": (2, 2)}.get(variant, (max(1, height // 2), max(1, width // 2)))
    patch = _patch(beta, height, width)
    pool = F.avg_pool2d if variant is None else F.max_pool2d
    s, t = ((x if patch == (1, 1) else pool(x, patch, ceil_mode=True)) for x in (student, teacher))
    rows, columns = s.shape[2:]
    reach = None if alpha is None else _reach(alpha)
    s, t = (_units(x, constant_norms=variant == "official") for x in (s, t))
    with torch.autocast(s.device.type, enabled=False):
        if reach is None:
            if s.shape[2] + t.shape[2] < rows * columns:
                return _gram_distance(s, t)
            return (s @ s.mT - t @ t.mT).square().mean()
        edges = _near(rows, columns, reach, s.device).to(s.dtype)
        return ((s @ s.mT - t @ t.mT).square() * edges).sum() / (edges.sum() * len(s))


def _patch(beta: Beta, height: int, width: int) -> tuple[int, int]:
    sides = beta if isinstance(beta, tuple) else (math.isqrt(max(0, beta)),) * 2
    square = isinstance(beta, tuple) or sides[0] ** 2 == beta
    if not square or len(sides) != 2 or min(sides) < 1 or sides[0] > height or sides[1] > width:
        raise ValueError(
            f"beta: expected a square number or (rows, columns), at least 1 and within {height}x{width}, got {beta!r}"
        )
    return sides[0], sides[1]


def _reach(alpha: int) -> int:
    """The squared distance within which ``alpha`` points of the integer grid lie."""
    if isinstance(alpha, bool) or not isinstance(alpha, int) or alpha < 1:
        raise ValueError(f"alpha: expected an integer from 1 on, got {alpha!r}")
    side = range(-math.isqrt(alpha) - 1, math.isqrt(alpha) + 2)
    distances = sorted(a * a + b * b for a in side for b in side)
    if distances[alpha] == distances[alpha - 1]:
        fits = [n for n in range(1, len(distances)) if distances[n] > distances[n - 1]]
        near = sorted(fits, key=lambda n: abs(n - alpha))[:2]
        raise ValueError(
            f"alpha: {alpha} nodes cannot be told from others as far away, got {alpha}; "
            f"expected 1, 5, 9, 13, 21, 25 …, near it {min(near)} and {max(near)}"
        )
    return distances[alpha - 1]


def _near(rows: int, columns: int, reach: int, device: torch.device) -> Tensor:
    """Which nodes are within reach of each other, bool (nodes, nodes)."""
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    squares = (y[:, None] - y).square()[:, None, :, None] + (x[:, None] - x).square()[None, :, None, :]
    return squares.reshape(rows * columns, rows * columns) <= reach


def _units(maps: Tensor, *, constant_norms: bool) -> Tensor:
    """Nodes as rows of unit norm, (batch, nodes, channels)."""
    rows = maps.flatten(2).mT
    if constant_norms:
        return rows / (torch.linalg.vector_norm(rows.detach(), dim=2, keepdim=True) + 1e-8)
    return unit_rows(rows.reshape(-1, rows.shape[2])).view(rows.shape)


def _gram_distance(s: Tensor, t: Tensor) -> Tensor:
    """The mean over all pairs of nodes from products of channels, where there are fewer of those."""
    both = torch.cat([s, t], 2)
    gram = both.mT @ both
    signs = torch.cat([torch.ones_like(s[0, 0]), -torch.ones_like(t[0, 0])])
    return (gram.square() * signs * signs[:, None]).sum() / (len(s) * s.shape[1] ** 2)


class HolisticDiscriminator(nn.Module):
    r"""One unbounded number a sample: how good a segmentation map of an image is.

    Batch normalisation of the input; ``blocks`` 4x4 convolutions of stride 2 with spectral normalisation and leaky
    ReLU 0.1, each of twice the width of the one before; self-attention after the last ones; a last 4x4 convolution; the
    mean over what is left. The four blocks of width 64 on maps of 65 pixels are the authors', 3.19 million parameters.

    Args:
        classes: Channels of the segmentation maps.
        image_channels: Channels of the images, on which the paper's discriminator is conditional. None: the authors'
            code, which sees the map alone.
        width: Channels of the first block.
        blocks: How often height and width are halved; at least 4 pixels must be left.
        attention: After how many of the last blocks there is self-attention.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        classes: int,
        *,
        image_channels: int | None = 3,
        width: int = 64,
        blocks: int = 4,
        attention: int = 2,
    ) -> None:
        super().__init__()
        counts = {"classes": classes, "image_channels": image_channels or 1, "width": width, "blocks": blocks}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not 0 <= attention <= blocks:
            raise ValueError(f"attention: expected 0 to {blocks} blocks, got {attention!r}")
        self.classes, self.image_channels, self.blocks = classes, image_channels, blocks
        channels = classes + (image_channels or 0)
        self.bn = nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList()
        self.attention = nn.ModuleList()
        for number in range(blocks):
            after = width * 2**number
            self.convs.append(_SpectralConv2d(channels, after, 4, stride=2, padding=1))
            self.attention.append(_SelfAttention(after) if number >= blocks - attention else nn.Identity())
            channels = after
        self.last = nn.Conv2d(channels, 1, 4)

    def forward(
        self,
        maps: Float[Tensor, "batch classes h w"],
        images: Float[Tensor, "batch channels hi wi"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """Judge segmentation maps.

        Args:
            maps: ``(batch, classes, h, w)``; the authors give logits.
            images: The images that they belong to, brought to the size of the maps by bilinear interpolation; None for
                an unconditional discriminator.

        Raises:
            ValueError: A shape does not fit, or there are images where none, or none where some are expected.
        """
        check_maps("maps", maps)
        least = 4 * 2**self.blocks
        if maps.shape[1] != self.classes or min(maps.shape[2:]) < least:
            raise ValueError(
                f"maps: expected (batch, {self.classes}, h, w) of at least {least} pixels, got {tuple(maps.shape)}"
            )
        if (images is None) != (self.image_channels is None):
            wanted = "none" if self.image_channels is None else f"{self.image_channels} channels"
            raise ValueError(
                f"images: expected {wanted}, got {None if images is None else tuple(images.shape)}"
            )
        check_weight_dtype("maps", maps, self.last.weight)
        hidden = maps
        if images is not None:
            check_maps("images", images)
            if images.shape[1] != self.image_channels or len(images) != len(maps):
                raise ValueError(
                    f"images: expected ({len(maps)}, {self.image_channels}, h, w), got {tuple(images.shape)}"
                )
            if images.shape[2:] != maps.shape[2:]:
                images = F.interpolate(images, size=maps.shape[2:], mode="bilinear", align_corners=False)
            hidden = torch.cat([maps, images.to(maps.dtype)], 1)
        hidden = self.bn(hidden)
        for conv, attention in zip(self.convs, self.attention, strict=True):
            hidden = attention(F.leaky_relu(conv(hidden), 0.1))
        return at_least_float32(self.last(hidden)).mean((1, 2, 3))


class _SpectralConv2d(nn.Conv2d):
    """A convolution divided by its matrix's largest singular value, from one step of power iteration a forward pass.

    ``torch.nn.utils.parametrizations.spectral_norm`` changes its buffers in place, which a second derivative of an
    earlier forward pass and ``vmap`` do not bear.
    """

    u: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int, padding: int
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=padding)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                v = F.normalize(matrix.mT @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                if self.training:
                    self.u = u
            weight = self.weight / (u @ matrix @ v)
        return self._conv_forward(maps, weight, self.bias)


class _SelfAttention(nn.Module):
    """Every place plus a learned share, 0 at first, of what it attends to (Zhang et al., SAGAN, ICML 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, max(1, channels // 8), 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        query, key, value = (layer(maps).flatten(2) for layer in (self.query, self.key, self.value))
        weights = (query.mT @ key).softmax(-1)
        return maps + self.share * (value @ weights.mT).view(maps.shape)


def holistic_loss(student: Float[Tensor, "batch"], teacher: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    r"""How much better a discriminator likes the student's maps than the teacher's: a Wasserstein distance, negated.

    .. math:: L_{ho} = \mathbb{E}[D(Q_s \,|\, I)] - \mathbb{E}[D(Q_t \,|\, I)]

    The discriminator minimises it (with :func:`gradient_penalty`); the student *maximises* its first term, as
    :math:`-\lambda_2 L_{ho}` stands in its loss.

    Args:
        student: The discriminator's answers ``(batch,)`` on the student's maps.
        teacher: Its answers on the teacher's.

    Returns:
        Scalar in the discriminator's unit.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        check_tensor(name, value)
        if value.ndim != 1 or len(value) < 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected floating answers (batch,), got {value.dtype} of shape {tuple(value.shape)}"
            )
    return at_least_float32(student).mean() - at_least_float32(teacher).mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    student: Float[Tensor, "batch classes h w"],
    teacher: Float[Tensor, "batch classes h w"],
    shares: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    r"""How far a discriminator's slope is from 1 between the maps of student and teacher.

    .. math:: \mathbb{E}[(\lVert \nabla_Q D(\tilde Q) \rVert_2 - 1)^2], \qquad
              \tilde Q = \epsilon Q_t + (1 - \epsilon) Q_s

    Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, with weight 10 here as there.

    Args:
        discriminator: Maps to answers ``(batch,)``; bind the images beforehand, the slope is with respect to the maps.
        student: The student's maps, as constants.
        teacher: The teacher's, same shape.
        shares: :math:`\epsilon`, from 0 to 1, ``(batch,)``, drawn by the caller.

    Returns:
        Scalar; its gradient reaches the discriminator's parameters.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Data-parallel training: a mean over samples, so workers' losses average to the whole batch's.
    """
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    check_floating("shares", shares, "(batch,)")
    if shares.shape != student.shape[:1]:
        raise ValueError(f"shares: expected ({len(student)},), got {tuple(shares.shape)}")
    if torch.is_inference_mode_enabled():
        raise ValueError("discriminator: expected a call outside torch.inference_mode, which has no slopes")
    mixed = torch.lerp(
        student.detach(), teacher.detach().to(student.dtype), shares.to(student.dtype).view(-1, 1, 1, 1)
    )
    with torch.enable_grad():
        mixed.requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    return (_norms(at_least_float32(slope).flatten(1)) - 1).square().mean()


def _norms(rows: Tensor) -> Tensor:
    """Norms whose second derivative is finite at 0, too."""
    squares = rows.square().sum(1)
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def discriminator_objective(
    discriminator: nn.Module,
    student: Float[Tensor, "batch classes h w"],
    teacher: Float[Tensor, "batch classes h w"],
    images: Float[Tensor, "batch channels hi wi"] | None,
    shares: Float[Tensor, "batch"],
    *,
    penalty: float = 10.0,
) -> Float[Tensor, ""]:
    r"""What the discriminator minimises, :math:`L_{ho} + 10 \, \mathbb{E}[(\lVert \nabla D \rVert - 1)^2]`.

    The student's step comes first and the discriminator's second, on the same maps, as in the authors' code (where all
    of this is multiplied by 0.1 once more). Both networks' maps go through the discriminator in one batch: one after
    the other, its batch normalisation would make maps equal that differ by a factor only.

    Args:
        discriminator: A :class:`HolisticDiscriminator`.
        student: The student's maps, as constants.
        teacher: The teacher's.
        images: For a conditional discriminator.
        shares: Of :func:`gradient_penalty`.
        penalty: Weight of the gradient penalty, above 0.

    Returns:
        Scalar in the discriminator's unit.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit.
    """
    check_positive("penalty", penalty)
    check_maps("student", student)
    check_maps("teacher", teacher)
    check_same_shape("teacher", teacher, "student", student)
    if images is not None:
        check_maps("images", images)
        check_same_batch("images", images, "student", student)
    student, teacher = student.detach(), teacher.detach()
    pairs = None if images is None else torch.cat([images, images])
    ours, theirs = discriminator(torch.cat([student, teacher.to(student.dtype)]), pairs).chunk(2)
    loss = holistic_loss(ours, theirs)
    slopes = gradient_penalty(lambda maps: discriminator(maps, images), student, teacher, shares)
    return loss + penalty * slopes
