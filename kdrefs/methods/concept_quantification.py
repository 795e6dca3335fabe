r"""How much a layer knows: concepts by the entropy of input noise (Cheng et al., CVPR 2020, arXiv:2003.03622).

Noise :math:`\sigma_i \epsilon` is added to the pixels of cell i of a grid over the image, as strong as possible while
a layer's output changes little. Where the layer looks closely little noise is allowed: the entropy
:math:`H_i = \log \sigma_i + \tfrac12 \log 2 \pi e` is small. A cell whose entropy lies below that of the background
by more than b is a *concept* (:func:`concept_counts`); three numbers follow how concepts come and go while a network
is trained (:func:`concept_metrics`).

With the disturbance taken to first order the optimum is known (:func:`entropy_map`):
:math:`\sigma_i^2 = \tfrac{\lambda}{2} \sigma_0^2 \, \bar g / g_i`, where :math:`g_i` is the sum of squares of the
Jacobian's columns over the cell. Definitions are those of the authors' released code where ``variant="official"`` is
asked for (Jenniferlyx/Explaining-Knowledge-Distillation-by-Quantifying-the-Knowledge@0269422).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdrefs._checks import check_choice, check_floating, check_positive, check_tensor
from kdrefs._typing import Bool, Float
from kdrefs.methods._concept_quantification_layers import Cells, cell_gains, reading
from kdrefs.methods._concept_quantification_optimum import (
    ENTROPY_OF_ONE,
    LEAST,
    MOST,
    Schedule,
    optimised,
)

_SCHEDULES = {"default": (200, 16, 0.05), "official": (80, 96, 1e-4)}  # steps, draws, rate


class EntropyMap(NamedTuple):
    """Entropies of the noise that a layer bears, and how well they are known.

    Attributes:
        entropy: Nats a pixel and channel, ``(images, rows, columns)``; float64 in closed form.
        standard_error: Of each entropy, from the spread over the probes; zero where the Jacobian was taken whole, and
            ``None`` of an optimisation.
        mean_entropies: Of an optimisation the mean entropy of each image in each step, ``(steps, images)``, NaN after
            an image has stopped; else ``None``.
    """

    entropy: Float[Tensor, "images rows columns"]
    standard_error: Float[Tensor, "images rows columns"] | None = None
    mean_entropies: Float[Tensor, "steps images"] | None = None


class ConceptCounts(NamedTuple):
    """Concepts of each image.

    Attributes:
        concepts: Which cells are concepts, ``(images, rows, columns)``.
        foreground: How many of them lie on the object, ``(images,)``.
        background: How many do not.
        chance: Share of the object's cells in all cells: what ``foreground / (foreground + background)`` would be if
            concepts fell anywhere.
    """

    concepts: Bool[Tensor, "images rows columns"]
    foreground: Tensor
    background: Tensor
    chance: Tensor


class ConceptMetrics(NamedTuple):
    r"""The numbers of the three hypotheses; ``M`` checkpoints.

    Attributes:
        foreground: :math:`N^{fg}`, concepts on the object, mean over the images, ``(M,)``.
        background: :math:`N^{bg}`, likewise.
        ratio: :math:`\lambda`, mean over the images of the share of concepts that lie on the object, ``(M,)``.
        undefined: Share of the images without any concept, whose share is 0/0, ``(M,)``.
        chance: What the share would be by chance.
        d_mean: Mean over the images of the weight distance at which an image has most concepts on the object.
        d_std: Standard deviation of it over the images (divided by their number).
        d_variance: Its square, which the authors' script prints under the name of a standard deviation.
        rho: Share of the cells that ever were concepts on the object that are so at the last checkpoint.
        rho_background: The same off the object.
        rho_total: The same for all cells.
    """

    foreground: Tensor
    background: Tensor
    ratio: Tensor
    undefined: Tensor
    chance: float
    d_mean: float
    d_std: float
    d_variance: float
    rho: float
    rho_background: float
    rho_total: float


def entropy_map(
    net: nn.Module,
    images: Float[Tensor, "images channels height width"],
    layer: str,
    grid: int | tuple[int, int] = 16,
    *,
    method: Literal["closed-form", "optimise"] = "closed-form",
    variant: Literal["default", "official"] = "default",
    probes: int = 64,
    trade_off: float = 7.0,
    sigma: float = 0.01,
    steps: int | None = None,
    draws: int | None = None,
    rate: float | None = None,
    chunk: int = 64,
    generator: torch.Generator | None = None,
) -> EntropyMap:
    r"""Entropy of the noise that each cell of each image bears.

    Both methods minimise

    .. math:: \frac{\mathbb E\,\lVert f(x + \sigma \epsilon) - f(x) \rVert^2}{D \sigma_f^2}
              - \lambda \frac1n \sum_{i=1}^n H_i, \qquad H_i = \log \sigma_i + \tfrac12 \log 2 \pi e,

    over the n cells' :math:`\sigma_i` in [0.001, 1]; D numbers in the layer, :math:`\sigma_f^2` the mean squared change
    at the initial :math:`\sigma_0`.

    - ``"closed-form"``: the optimum to first order in the noise, :math:`\sigma_i^2 = \tfrac{\lambda}{2} \sigma_0^2\,
      \bar g / g_i`. :math:`g_i` is estimated by Hutchinson's probes, one backward pass each for all images of a chunk;
      where the layer has no more numbers than there are probes, the Jacobian is taken whole, in as many passes.
      Differences between the cells of an image depend neither on the trade-off nor on the initial :math:`\sigma_0`.
    - ``"optimise"``: stochastic gradient descent, image by image though batched. By default to convergence (Adam on
      :math:`\log \sigma`, averaged over the second half of the steps). ``variant="official"``: as the authors' code
      has it, a ReLU behind the layer, plain descent on :math:`\sigma` clamped before each use, after 60 steps a stop
      where a mean entropy has passed -2.8 and 1.5 times the trade-off elsewhere, and of all steps that whose mean
      entropy is closest to -2.8.

    The network is evaluated in eval mode and put back; parameters get no gradients. An image's feature must depend on
    no other image. Under autocast the network runs in that precision and the sums do not.

    Source: Cheng et al., section 3 and released code; the closed form is ours.

    Args:
        net: Any differentiable network. Gradients come from PyTorch, so operations must have one.
        images: ``(N, C, H, W)``, as the network takes them; entropies are relative to their unit.
        layer: A feature of a network of :mod:`kdrefs.nets`, ``"logits"``, or the name of a submodule.
        grid: Rows and columns of the grid, or one number for both; at most H and W.
        method: See above.
        variant: Of ``"optimise"``.
        probes: Of ``"closed-form"``; the error of an entropy falls with their square root, its bias with their number.
        trade_off: The weight :math:`\lambda` of the entropy; the authors have 7 for VGG and AlexNet, 6 for ResNets.
        sigma: Initial standard deviation :math:`\sigma_0`, from 0.001 to 1.
        steps: Of the optimisation; default 200, official 80.
        draws: Of noise in each step; default 16, official 96.
        rate: Learning rate; default 0.05 (of the logarithm), official 1e-4 (of :math:`\sigma` itself).
        chunk: Images, noisy ones included, in one forward pass: bounds the memory, changes results in rounding only.
        generator: Of probes and noise; ``None`` is a fresh one with seed 0.

    Returns:
        The map; ``entropy`` has the largest value for a cell that the layer does not see.

    Raises:
        ValueError: An argument is out of range, or there is no such layer.
    """
    rows, columns = _check_grid(grid, images)
    check_choice("method", method, ("closed-form", "optimise"))
    check_choice("variant", variant, ("default", "official"))
    if method == "closed-form" and variant != "default":
        raise ValueError(f"variant: {variant!r} is one of method='optimise', got method={method!r}")
    check_positive("trade_off", trade_off)
    check_positive("sigma", sigma)
    if not LEAST <= sigma <= MOST:
        raise ValueError(f"sigma: expected {LEAST:g} to {MOST:g}, got {sigma}")
    usual = _SCHEDULES[variant]
    steps, draws = (usual[0] if steps is None else steps), (usual[1] if draws is None else draws)
    rate = usual[2] if rate is None else rate
    check_positive("rate", rate)
    for name, value in {"probes": probes, "steps": steps, "draws": draws, "chunk": chunk}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seeds = torch.randint(2**62, (len(images),), generator=generator, device=generator.device).tolist()
    # A tensor made in inference mode has no gradients; a copy made outside of it may have some.
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), reading(net, layer) as read:
        images = images.clone() if images.is_inference() else images.detach()
        cells = Cells((rows, columns), (images.shape[2], images.shape[3]), images.device)
        if method == "closed-form":
            gains, exact = cell_gains(read, images, cells, seeds, probes, chunk)
            return _closed_form(gains, exact, trade_off, sigma)
        schedule = Schedule(variant == "official", trade_off, sigma, steps, draws, rate)
        entropy, path = optimised(read, images, cells, seeds, schedule, chunk)
        return EntropyMap(entropy, mean_entropies=path)


def _closed_form(gains: Tensor, exact: bool, trade_off: float, sigma: float) -> EntropyMap:
    """From gains ``(N, probes, rows, columns)``; a probe's influence on H is that on its logarithms (delta method)."""
    gain = gains.mean(1)
    mean = gain.mean((1, 2), keepdim=True)
    constant = ENTROPY_OF_ONE + math.log(sigma) + 0.5 * math.log(trade_off / 2)
    entropy = (constant + 0.5 * (mean.log() - gain.log())).nan_to_num(nan=torch.inf)
    entropy = entropy.clamp(ENTROPY_OF_ONE + math.log(LEAST), ENTROPY_OF_ONE + math.log(MOST))
    if exact:
        return EntropyMap(entropy, torch.zeros_like(entropy))
    influence = 0.5 * (gains.mean((2, 3), keepdim=True) / mean[:, None] - gains / gain[:, None])
    error = influence.nan_to_num(nan=0.0).square().sum(1).sqrt()
    return EntropyMap(entropy, error / math.sqrt(gains.shape[1] * max(1, gains.shape[1] - 1)))


def concept_counts(
    entropy: Float[Tensor, "images rows columns"],
    foreground: Bool[Tensor, "*images rows columns"],
    threshold: float = 0.2,
    *,
    baseline: Literal["image", "set"] = "image",
) -> ConceptCounts:
    r"""Concepts on the object and off it: cells with :math:`\bar H - H_i > b`.

    :math:`\bar H` is the mean entropy of the background, of each image by itself (the paper's text), or averaged over
    the images of the set (``baseline="set"``, the authors' code). In closed form and with the former, a concept is a
    cell whose gain exceeds :math:`e^{2b}` times the geometric mean of the background's.

    Args:
        entropy: Nats, from :func:`entropy_map`.
        foreground: Cells of the object, of each image or of all alike.
        threshold: b, at least 0, nats; 0.2 in the authors' code.
        baseline: See above.

    Raises:
        ValueError: The threshold is negative, or an image has no cell of the background.
    """
    check_choice("baseline", baseline, ("image", "set"))
    _check_threshold(threshold)
    inside = _check_foreground(foreground, entropy)
    outside = ~inside
    cells = outside.sum((1, 2))
    level = torch.where(outside, entropy, 0).sum((1, 2)) / cells
    if baseline == "set":
        level = level.mean().expand_as(level)
    concepts = level[:, None, None] - entropy > threshold
    return ConceptCounts(
        concepts,
        (concepts & inside).sum((1, 2)),
        (concepts & outside).sum((1, 2)),
        inside.double().mean((1, 2)),
    )


def concept_metrics(
    entropy: Float[Tensor, "images checkpoints rows columns"],
    foreground: Bool[Tensor, "*images rows columns"],
    distance: Float[Tensor, "checkpoints"],
    threshold: float = 0.2,
    *,
    variant: Literal["default", "official"] = "default",
) -> ConceptMetrics:
    r"""The numbers of the three hypotheses, from entropy maps at several checkpoints of one training.

    With :math:`S_j(I)` the concepts of image I at checkpoint j:

    .. math::
       \lambda &= \mathbb E_I \frac{N^{fg}(I)}{N^{fg}(I) + N^{bg}(I)}, \qquad
       \hat m(I) = \operatorname*{arg\,max}_k N_k^{fg}(I) \text{ (the first)}, \\
       D_{mean} &= \mathbb E_I\, d_{\hat m(I)}, \quad D_{std} = \sqrt{\operatorname{Var}_I d_{\hat m(I)}}, \qquad
       \rho = \mathbb E_I \frac{|S_M(I)|}{|\bigcup_{j=1}^M S_j(I)|} .

    By default the background's entropy is that of each image, and an image for which :math:`\lambda` or
    :math:`\rho` is 0/0 is left out of its mean (NaN if all are). ``variant="official"`` averages the background's
    entropy over the images, one number a checkpoint, and counts 0/0 as 0, as the authors' script does; the script
    prints ``d_variance`` as :math:`D_{std}`.

    The union grows with the number of checkpoints: compare :math:`\rho` and D for equal lists of checkpoints only.

    Args:
        entropy: Nats.
        foreground: Cells of the object, of each image or of all alike.
        distance: Weight distance at each checkpoint, from :func:`weight_distance`.
        threshold: b, nats.
        variant: See above.

    Raises:
        ValueError: Shapes do not fit, or an image has no cell of the background.
    """
    check_choice("variant", variant, ("default", "official"))
    check_floating("entropy", entropy, "(images, checkpoints, rows, columns)")
    check_floating("distance", distance, "(checkpoints,)")
    if entropy.ndim != 4:
        raise ValueError(
            f"entropy: expected (images, checkpoints, rows, columns), got {tuple(entropy.shape)}"
        )
    if distance.shape != entropy.shape[1:2] or len(distance) < 1:
        raise ValueError(
            f"distance: expected ({entropy.shape[1]},), one a checkpoint, got {tuple(distance.shape)}"
        )
    official = variant == "official"
    inside = _check_foreground(foreground, entropy[:, 0])
    counts = [
        concept_counts(maps, inside, threshold, baseline="set" if official else "image")
        for maps in entropy.unbind(1)
    ]
    on, off = (
        torch.stack(values, dim=1).double()
        for values in zip(*((c.foreground, c.background) for c in counts), strict=True)
    )
    concepts = torch.stack([c.concepts for c in counts], dim=1)
    reached = distance.double()[on.argmax(1)]
    shares = [
        _mean_share((concepts[:, -1] & region).sum((1, 2)), (concepts.any(1) & region).sum((1, 2)), official)
        for region in (inside, ~inside, torch.ones_like(inside))
    ]
    return ConceptMetrics(
        foreground=on.mean(0),
        background=off.mean(0),
        ratio=_mean_share(on, on + off, official),
        undefined=(on + off == 0).double().mean(0),
        chance=counts[0].chance.mean().item(),
        d_mean=reached.mean().item(),
        d_std=reached.std(correction=0).item(),
        d_variance=reached.var(correction=0).item(),
        rho=shares[0].item(),
        rho_background=shares[1].item(),
        rho_total=shares[2].item(),
    )


def weight_distance(weights: Sequence[Tensor]) -> Float[Tensor, "checkpoints"]:
    r"""Length of the path that a weight tensor has gone, in units of its first norm.

    .. math:: d_m = \sum_{k=1}^m \frac{\lVert w_k - w_{k-1} \rVert}{\lVert w_0 \rVert}

    Frobenius norms. With the weights after each epoch this is the paper's definition; with those after each mini-batch
    the authors' code's, which is never shorter.

    Args:
        weights: :math:`w_0, w_1, \dots` of equal shape.

    Returns:
        float64, 0 first.

    Raises:
        ValueError: Shapes differ, there is no weight, or the first is zero.
    """
    for number, weight in enumerate(weights):
        check_floating(f"weights[{number}]", weight)
    if not weights or any(weight.shape != weights[0].shape for weight in weights):
        raise ValueError(f"weights: expected tensors of one shape, got {[tuple(w.shape) for w in weights]}")
    flat = torch.stack([weight.detach().double().flatten() for weight in weights])
    start = torch.linalg.vector_norm(flat[0])
    if start == 0:
        raise ValueError("weights: expected a first tensor that is not zero everywhere")
    moves = torch.linalg.vector_norm(flat.diff(dim=0), dim=1)
    return torch.cat([moves.new_zeros(1), moves.cumsum(0)]) / start


def _mean_share(part: Tensor, whole: Tensor, zero_counts: bool) -> Tensor:
    """Mean over the images of part / whole, where 0/0 is 0 or left out."""
    share = torch.where(whole > 0, part.double() / whole.clamp(min=1), 0.0 if zero_counts else torch.nan)
    return share.nanmean(0)


def _check_grid(grid: int | tuple[int, int], images: Tensor) -> tuple[int, int]:
    check_tensor("images", images)
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"images: expected a floating tensor (images, channels, height, width), none of them 0, "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if not (1 <= rows <= images.shape[2] and 1 <= columns <= images.shape[3]):
        raise ValueError(f"grid: expected 1 to {tuple(images.shape[2:])} rows and columns, got {grid}")
    return rows, columns


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number of at least 0, got {threshold!r}")


def _check_foreground(foreground: Tensor, entropy: Tensor) -> Tensor:
    """The object's cells of each image."""
    check_floating("entropy", entropy, "(images, rows, columns)")
    check_tensor("foreground", foreground)
    if entropy.ndim != 3 or 0 in entropy.shape:
        raise ValueError(
            f"entropy: expected (images, rows, columns), none of them 0, got {tuple(entropy.shape)}"
        )
    if foreground.dtype != torch.bool or foreground.shape not in (entropy.shape, entropy.shape[1:]):
        raise ValueError(
            f"foreground: expected bool {tuple(entropy.shape)} or {tuple(entropy.shape[1:])}, "
            f"got {foreground.dtype} {tuple(foreground.shape)}"
        )
    inside = foreground.expand(entropy.shape)
    if inside.flatten(1).all(1).any():
        raise ValueError(
            "foreground: expected a cell of the background in every image, whose entropy is the baseline"
        )
    return inside
