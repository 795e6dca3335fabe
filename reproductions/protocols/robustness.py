"""Accuracy of a classifier on images that were disturbed at random, or as badly as a bounded change can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.data.cache import Split
from kdrefs.training import evaluation_mode

CHUNK = 500  # images a network sees at once


@dataclass(frozen=True)
class Pixels:
    """Images in [0, 1] with what a network's normalisation does to them.

    Attributes:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        mean: ``(C, 1, 1)``.
        std: ``(C, 1, 1)``.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(
        cls,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        *,
        count: int | None = None,
    ) -> Pixels:
        """The images of a split, or ``count`` of them spread evenly over it, without augmentation."""
        chosen = torch.arange(len(split.labels))
        if count is not None and count < len(chosen):
            chosen = torch.linspace(0, len(split.labels) - 1, count).long()
        images = torch.from_numpy(split.images[chosen.numpy()]).permute(0, 3, 1, 2)
        return cls(
            (images.float() / 255).to(device),
            torch.from_numpy(split.labels[chosen.numpy()]).long().to(device),
            torch.tensor(mean, device=device).view(-1, 1, 1),
            torch.tensor(std, device=device).view(-1, 1, 1),
        )

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """What ``network``, which was trained on normalised images, says of images in [0, 1]."""
        parts = ((part - self.mean) / self.std for part in images.split(CHUNK))
        return torch.cat([network(part).logits.float() for part in parts])

    def chunks(self) -> Iterator[Pixels]:
        """The same images, so many at a time that a gradient's maps fit into memory."""
        for images, labels in zip(self.images.split(CHUNK), self.labels.split(CHUNK), strict=True):
            yield replace(self, images=images, labels=labels)


def projected_gradient_descent(
    network: nn.Module,
    pixels: Pixels,
    *,
    radius: float,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Images near the given ones that raise the network's cross-entropy as far as a few steps can.

    .. math:: x \leftarrow \Pi\big(x + \eta\, \mathrm{sign}\, \nabla_x CE(y, f(x))\big)

    where :math:`\Pi` cuts off what is further than ``radius`` from the original in any pixel, and what is outside
    of [0, 1]. Radius and step are in the units of [0, 1] images, whatever the normalisation. Source: Madry et al.,
    "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1.

    Args:
        network: In eval mode within; its flags and gradients are left as they are.
        pixels: Images, labels and normalisation.
        radius: Largest change of a pixel, from 0 on.
        steps: From 1 on.
        step_size: :math:`\eta`; None for ``2.5 * radius / steps``.
        generator: Draws the beginning uniformly from the cube around each image, on the images' device; None begins
            at the images.

    Returns:
        Images ``(N, C, H, W)`` in [0, 1].

    Raises:
        ValueError: A number is out of range.
    """
    if not (radius >= 0 and (step_size is None or step_size > 0)) or steps < 1:
        raise ValueError(
            "radius, step_size, steps: expected radius from 0 on, step_size above 0, steps from 1 on, "
            f"got {radius}, {step_size} and {steps}"
        )
    size = 2.5 * radius / steps if step_size is None else step_size
    with evaluation_mode(network):
        return torch.cat(
            [_attacked(network, part, radius, steps, size, generator) for part in pixels.chunks()]
        )


def _attacked(
    network: nn.Module,
    pixels: Pixels,
    radius: float,
    steps: int,
    size: float,
    generator: torch.Generator | None,
) -> Tensor:
    images = pixels.images
    low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=1)
    if generator is not None:
        start = torch.rand(images.shape, generator=generator, device=images.device)
        images = (images + radius * (2 * start - 1)).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            loss = F.cross_entropy(pixels.logits(network, images), pixels.labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, images)
        images = torch.clamp(images.detach() + size * slope.sign(), low, high)
    return images.detach()


def accuracy_on(network: nn.Module, pixels: Pixels, images: Tensor) -> float:
    """Share of the images that the network, in eval mode, gives their label."""
    with evaluation_mode(network):
        found = pixels.logits(network, images).argmax(1) == pixels.labels
    return found.double().mean().item()


def noisy_accuracy(
    network: nn.Module, pixels: Pixels, sigma: float, generator: torch.Generator, *, draws: int = 1
) -> float:
    """Accuracy on images with Gaussian noise of deviation ``sigma`` cut off to [0, 1], mean over ``draws``."""
    hits = []
    for _ in range(draws):
        noise = torch.randn(pixels.images.shape, generator=generator, device=pixels.images.device)
        hits.append(accuracy_on(network, pixels, (pixels.images + sigma * noise).clamp(0, 1)))
    return sum(hits) / len(hits)
