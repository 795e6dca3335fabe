r"""Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018, arXiv:1803.10837).

A batch of features, whatever their width, defines for each sample a distribution over its neighbours: the
row-normalised kernel matrix. The student learns to have the teacher's. Only similarities are compared, so
widths may differ, no layer is added and no label is needed.

The definition followed here is the authors' code (passalis/probabilistic_kt@a58fd1b, ``nn/pkt.py``) rather
than the printed equations where the two disagree; see :func:`pkt_loss` for the diagonal.
"""

import torch
from torch import Tensor

from kdrefs._checks import check_choice, check_class_indices, check_matrix, check_same_batch, check_tensor
from kdrefs._typing import Float, Integer
from kdrefs.divergences import jeffreys_divergence, kl_divergence, quadratic_divergence
from kdrefs.kernels import cosines, log_kernel
from kdrefs.methods._pkt_official import official_pkt_loss, official_supervised_loss, pkth_loss
from kdrefs.pair_sums import cosine_neighbour_kl

_DIVERGENCES = {"kl": kl_divergence, "jeffreys": jeffreys_divergence, "quadratic": quadratic_divergence}

# From this batch size on the default loss never stores the kernel matrix: for 4,096 samples of 512 features three
# times faster, in a fifth of the memory. The dense form below takes at most some 70 MB and has second derivatives.
_TILED_FROM = 1024


def conditional_probabilities(
    features: Float[Tensor, "batch width"],
    *,
    kernel: str = "cosine",
    bandwidth: float | None = None,
    diagonal: bool = True,
) -> Float[Tensor, "batch batch"]:
    r"""Log-probability that sample *i* picks sample *j* as its neighbour.

    .. math:: \log p_{j|i} = \log K(x_i, x_j) - \log \sum_k K(x_i, x_k)

    Args:
        features: ``(batch, width)``.
        kernel: A name that :func:`kdrefs.kernels.log_kernel` knows.
        bandwidth: Scale of a distance kernel, see there.
        diagonal: Whether a sample may pick itself (:math:`k = i` in the sum).

    Returns:
        ``(batch, batch)`` in nats; row *i* is the distribution of sample *i*. Without the diagonal
        :math:`p_{i|i} = 0`, that is ``-inf``.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or ``diagonal=False`` with a single sample,
            which then has nothing to pick.
    """
    check_matrix("features", features)
    log_k = log_kernel(features, kernel=kernel, bandwidth=bandwidth)
    if not diagonal:
        if features.shape[0] < 2:
            raise ValueError(f"features: diagonal=False needs at least 2 samples, got {features.shape[0]}")
        log_k = log_k.masked_fill(_eye(log_k), -torch.inf)
    return log_k.log_softmax(dim=1)


def pkt_loss(
    student: Float[Tensor, "batch student_width"],
    teacher: Float[Tensor, "batch teacher_width"],
    *,
    kernel: str = "cosine",
    divergence: str = "kl",
    bandwidth: float | None = None,
    teacher_bandwidth: float | None = None,
    diagonal: bool = True,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""Divergence between the teacher's and the student's neighbour distributions.

    .. math:: L = \frac1N \sum_i \sum_j p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}

    with :math:`p` from the teacher and :math:`q` from the student, see :func:`conditional_probabilities`.

    *The diagonal is included*, as in the authors' code and against the printed sums over :math:`j \ne i`.
    With it, :math:`K_{ii} = 1` pins the scale of each row: :math:`p = q` forces equal row sums and hence
    :math:`K^t = K^s`. Without it zero loss only means :math:`K^t_{ij} = c_i K^s_{ij}` off the diagonal: a
    student whose samples all but coincide (every cosine 0.999) has loss 0 against an orthonormal teacher.

    From 1,024 samples on the cosine kernel with ``"kl"`` goes over the pairs in tiles, in memory that grows with
    :math:`N` rather than :math:`N^2` (:func:`kdrefs.pair_sums.cosine_neighbour_kl`), and has first derivatives
    only. Everything else, and whatever is compiled, holds the :math:`N \times N` matrices.

    Args:
        student: Features ``(batch, student_width)``.
        teacher: Features ``(batch, teacher_width)`` of the same samples; no gradient flows into them.
        kernel: ``"cosine"`` (the paper's choice), ``"gaussian"``, ``"laplace"``, ``"student_t"`` or
            ``"cauchy"``.
        divergence: ``"kl"``, ``"jeffreys"`` (symmetric) or ``"quadratic"`` (:math:`\sum_j (p - q)^2`).
        bandwidth: Scale of the student's distance kernel, see :func:`kdrefs.kernels.log_kernel`.
        teacher_bandwidth: Scale of the teacher's; ``bandwidth`` if None.
        diagonal: Whether :math:`j = i` takes part.
        variant: None, ours. ``"official"``: the authors' ``cosine_similarity_loss``, the mean over all
            :math:`N^2` entries with 1e-7 added to norms and probabilities. It equals ours divided by
            :math:`N` up to that epsilon, so a loss weight :math:`w` of theirs (30,000 in RepDistiller) is
            :math:`w / N` here. ``"pkth"``: their later repository, mean over :math:`N^2` and 1e-6, with
            ``kernel`` one of ``rbf`` (a Laplacian), ``adaptive_rbf``, ``cosine``, ``student_t``, ``cauchy``,
            ``combined`` and ``divergence`` one of ``kl``, ``abs``, ``squared``, ``jeffreys``,
            ``exponential``, ``kagan``, ``combined``. Both have finite gradients where the originals return
            NaN (zero rows).

    Returns:
        Scalar, in nats for ``"kl"`` and ``"jeffreys"``: sum over the neighbours, mean over the samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or ``diagonal=False`` with a single sample.

    Data-parallel training: rows compare a sample with the whole batch, so gather the features of all workers
    first (:func:`kdrefs.training.gather_rows`); the mean of the workers' losses is another loss.
    """
    _check_pair(student, teacher)
    teacher = teacher.detach()
    if variant is not None:
        check_choice("variant", variant, ("official", "pkth"))
        if bandwidth is not None or teacher_bandwidth is not None or not diagonal:
            raise ValueError(
                f"variant: {variant!r} has neither bandwidths nor diagonal=False, got bandwidth={bandwidth}, "
                f"teacher_bandwidth={teacher_bandwidth}, diagonal={diagonal}"
            )
        if variant == "pkth":
            return pkth_loss(student, teacher, kernel=kernel, divergence=divergence)
        if (kernel, divergence) != ("cosine", "kl"):
            raise ValueError(
                "variant: 'official' is defined for kernel='cosine' and divergence='kl', "
                f"got kernel={kernel!r}, divergence={divergence!r}"
            )
        return official_pkt_loss(student, teacher)
    check_choice("divergence", divergence, _DIVERGENCES)
    if teacher_bandwidth is None:
        teacher_bandwidth = bandwidth
    if (kernel, divergence, teacher_bandwidth) == ("cosine", "kl", None):
        if student.shape[0] >= _TILED_FROM and not torch.compiler.is_compiling():
            return cosine_neighbour_kl(student, teacher, diagonal=diagonal)
        return _cosine_neighbour_kl(student, teacher, diagonal)
    log_q = conditional_probabilities(student, kernel=kernel, bandwidth=bandwidth, diagonal=diagonal)
    log_p = conditional_probabilities(teacher, kernel=kernel, bandwidth=teacher_bandwidth, diagonal=diagonal)
    return _DIVERGENCES[divergence](log_p, log_q)


def supervised_pkt_loss(
    student: Float[Tensor, "batch width"],
    labels: Integer[Tensor, "batch"],
    *,
    kernel: str = "cosine",
    divergence: str = "kl",
    bandwidth: float | None = None,
    diagonal: bool = True,
    variant: str | None = None,
) -> Float[Tensor, ""]:
    r"""The supervised term: labels take the teacher's place.

    The target :math:`p_{j|i}` is uniform over the samples with the label of *i*. The authors add it to
    :func:`pkt_loss` with weight 0.001.

    Args:
        student: Features ``(batch, width)``.
        labels: Class indices ``(batch,)``.
        kernel: As in :func:`pkt_loss`.
        divergence: ``"kl"`` or ``"quadratic"``; Jeffreys is infinite, since the target has zeros.
        bandwidth: As in :func:`pkt_loss`.
        diagonal: Whether :math:`j = i` takes part. Without it a sample that is alone in its class has no
            target and adds nothing under ``"kl"``.
        variant: ``"official"``: the authors' ``supervised_loss``, again ours divided by :math:`N` up to an
            epsilon of 1e-7.

    Returns:
        Scalar (nats for ``"kl"``): sum over the neighbours, mean over the samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, or ``diagonal=False`` with a single sample.

    Data-parallel training: as for :func:`pkt_loss`, gather first.
    """
    check_matrix("student", student)
    check_class_indices("labels", labels)
    check_same_batch("labels", labels, "student", student)
    if variant is not None:
        check_choice("variant", variant, ("official",))
        if (kernel, divergence, bandwidth, diagonal) != ("cosine", "kl", None, True):
            raise ValueError(
                "variant: 'official' is defined for kernel='cosine', divergence='kl', bandwidth=None and "
                f"diagonal=True, got {kernel!r}, {divergence!r}, {bandwidth}, {diagonal}"
            )
        return official_supervised_loss(student, labels)
    check_choice("divergence", divergence, ("kl", "quadratic"))
    log_q = conditional_probabilities(student, kernel=kernel, bandwidth=bandwidth, diagonal=diagonal)
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    if not diagonal:
        same = same & ~_eye(same)
    count = same.sum(dim=1, keepdim=True).clamp(min=1).to(log_q.dtype)
    log_p = torch.where(same, -count.log(), -torch.inf)
    return _DIVERGENCES[divergence](log_p, log_q)


def nystrom_pkt_loss(
    student: Float[Tensor, "batch student_width"],
    teacher: Float[Tensor, "batch teacher_width"],
    landmarks: Integer[Tensor, "landmarks"] | int,
    *,
    generator: torch.Generator | None = None,
    kernel: str = "cosine",
    divergence: str = "kl",
    bandwidth: float | None = None,
    teacher_bandwidth: float | None = None,
) -> Float[Tensor, ""]:
    r"""PKT on the kernel columns of a few landmarks: :math:`O(Nm)` instead of :math:`O(N^2)`.

    The paper mentions a Nyström-like approximation without spelling it out; this is the plain reading. Every
    sample's distribution is restricted to :math:`m` landmarks of the batch and normalised over them:

    .. math:: L = \frac1N \sum_i \sum_{l \in \text{landmarks}} p_{l|i} \log \frac{p_{l|i}}{q_{l|i}}

    With all samples as landmarks this is :func:`pkt_loss`. With fewer the value falls short of it by about
    :math:`1/m`. On 128 clustered ReLU features, draws of 8, 32 and 96 landmarks scatter by 9, 5 and 2 %, and
    the cosine between their gradient and the full one is 0.31, 0.62 and 0.92: cheap, but not free.

    Args:
        student: Features ``(batch, student_width)``.
        teacher: Features ``(batch, teacher_width)``; no gradient flows into them.
        landmarks: Row numbers ``(m,)`` in the batch, or how many to draw without replacement.
        generator: Source of that draw; needed when ``landmarks`` is a number.
        kernel: As in :func:`pkt_loss`.
        divergence: As in :func:`pkt_loss`.
        bandwidth: As in :func:`pkt_loss`.
        teacher_bandwidth: As in :func:`pkt_loss`.

    Returns:
        Scalar (nats for ``"kl"`` and ``"jeffreys"``): sum over the landmarks, mean over the samples.

    Raises:
        ValueError: A shape, a dtype or an argument does not fit, the number of landmarks is not between 1 and
            the batch size, or the generator is missing.

    Data-parallel training: gather the landmarks' features only; samples may then stay where they are.
    """
    _check_pair(student, teacher)
    check_choice("divergence", divergence, _DIVERGENCES)
    if isinstance(landmarks, int):
        if not 1 <= landmarks <= student.shape[0]:
            raise ValueError(f"landmarks: expected 1 to {student.shape[0]} (the batch size), got {landmarks}")
        if generator is None:
            raise ValueError("generator: expected a torch.Generator to draw the landmarks with, got None")
        draw = torch.randperm(student.shape[0], generator=generator, device=generator.device)[:landmarks]
        landmarks = draw.to(student.device)
    else:
        check_tensor("landmarks", landmarks)
        whole = (
            not landmarks.is_floating_point() and not landmarks.is_complex() and landmarks.dtype != torch.bool
        )
        if landmarks.ndim != 1 or landmarks.shape[0] < 1 or not whole:
            raise ValueError(
                f"landmarks: expected row numbers (m,), got {landmarks.dtype} of shape {tuple(landmarks.shape)}"
            )
        landmarks = landmarks.long()  # bytes would be a mask
    teacher = teacher.detach()
    same = torch.arange(student.shape[0], device=student.device).unsqueeze(1) == landmarks
    if teacher_bandwidth is None:
        teacher_bandwidth = bandwidth
    log_q = log_kernel(student, student[landmarks], kernel=kernel, bandwidth=bandwidth, same=same)
    log_p = log_kernel(teacher, teacher[landmarks], kernel=kernel, bandwidth=teacher_bandwidth, same=same)
    return _DIVERGENCES[divergence](log_p.log_softmax(dim=1), log_q.log_softmax(dim=1))


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_same_batch("teacher", teacher, "student", student)


def _cosine_neighbour_kl(student: Tensor, teacher: Tensor, diagonal: bool) -> Tensor:
    # One logarithm of a quotient, where `conditional_probabilities` takes two, two softmaxes and an exponential.
    if not diagonal and student.shape[0] < 2:
        raise ValueError(f"student: diagonal=False needs at least 2 samples, got {student.shape[0]}")
    p, q = _cosine_conditionals(teacher, diagonal), _cosine_conditionals(student, diagonal)
    return (p * (p / q).log()).sum() / student.shape[0]


def _cosine_conditionals(features: Tensor, diagonal: bool) -> Tensor:
    """Each row's distribution over its neighbours, nowhere 0; without the diagonal that holds ones, which drop out."""
    kernel = cosines(features) + 1  # twice the cosine kernel
    least = 2 * torch.finfo(kernel.dtype).eps
    kernel = torch.threshold(kernel, least, least)
    if diagonal:
        return kernel / kernel.sum(dim=1, keepdim=True)
    eye = _eye(kernel)
    others = kernel.masked_fill(eye, 0.0)
    return (others / others.sum(dim=1, keepdim=True)).masked_fill(eye, 1.0)


def _eye(square: Tensor) -> Tensor:
    return torch.eye(square.shape[0], dtype=torch.bool, device=square.device)
