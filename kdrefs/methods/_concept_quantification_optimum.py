"""Entropy maps by optimisation of the noise: to convergence, and as the authors' code stops it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods._concept_quantification_layers import Cells, Read, generators

LEAST, MOST = 1e-3, 1.0  # standard deviations that noise may have
ENTROPY_OF_ONE = 1.4189385332046727  # of a standard normal number, nats
LEVEL = -2.8  # mean entropy at which the authors' code takes a map
CHECKED, RAISED = (
    60,
    1.5,
)  # after so many steps their code stops an image, or raises its trade-off by this factor


@dataclass(frozen=True)
class Schedule:
    """How the noise is optimised."""

    official: bool
    trade_off: float
    sigma: float
    steps: int
    draws: int
    rate: float


def optimised(
    read: Read, images: Tensor, cells: Cells, seeds: list[int], schedule: Schedule, chunk: int
) -> tuple[Tensor, Tensor]:
    """Entropies ``(N, rows, columns)``, and the mean entropy that each step used ``(steps, N)``, NaN once stopped.

    ``chunk`` noisy images, of one image or several, go through the network at once. Every image has its own loss,
    noise and stop: several at once differ from one by one in rounding only.
    """
    count = max(1, chunk // schedule.draws)
    parts = [
        _group(read, images[start : start + count], cells, seeds[start : start + count], schedule, chunk)
        for start in range(0, len(images), count)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)


class _Disturbance:
    """Mean squared change of the layer by noise, image by image; fresh noise in every call."""

    def __init__(
        self, read: Read, images: Tensor, cells: Cells, seeds: list[int], schedule: Schedule, chunk: int
    ):
        self.read, self.images, self.cells, self.schedule = read, images, cells, schedule
        self.drawn = generators(seeds, images.device)
        self.slice = max(1, chunk // len(images))
        self.clean = self._feature(images)

    def _feature(self, images: Tensor) -> Tensor:
        feature = self.read(images)
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32)).flatten(1)
        return F.relu(feature) if self.schedule.official else feature

    def value_and_gradient(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of standard deviations ``(B, rows, columns)``: values ``(B,)`` and their gradient."""
        draws, shape = self.schedule.draws, self.images.shape[1:]
        noise = torch.stack(
            [torch.randn(draws, *shape, generator=g, device=g.device, dtype=sigma.dtype) for g in self.drawn],
            dim=1,
        )
        value, gradient = torch.zeros_like(sigma[:, 0, 0]), torch.zeros_like(sigma)
        for start in range(0, draws, self.slice):
            part = noise[start : start + self.slice]
            with torch.enable_grad():
                leaf = sigma.detach().requires_grad_()
                noisy = self.images + self.cells.spread(leaf)[:, None] * part
                feature = self._feature(noisy.flatten(0, 1).to(self.images.dtype))
                change = (feature.unflatten(0, part.shape[:2]) - self.clean).square().mean(2).sum(0) / draws
                gradient += torch.autograd.grad(change.sum(), leaf)[0]
            value += change.detach()
        return value, gradient


def _group(
    read: Read, images: Tensor, cells: Cells, seeds: list[int], schedule: Schedule, chunk: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(images.dtype, torch.float32)
    sigma = torch.full((len(images), *cells.grid), schedule.sigma, dtype=dtype, device=images.device)
    disturbance = _Disturbance(read, images, cells, seeds, schedule, chunk)
    scale, _ = disturbance.value_and_gradient(sigma)
    # An image whose layer no noise reaches has no scale; its entropy alone is raised.
    weight = torch.where(scale > 0, 1 / scale, 0)[:, None, None]
    follow = _official if schedule.official else _converged
    return follow(disturbance, sigma, weight, cells, schedule)


def _converged(
    disturbance: _Disturbance, sigma: Tensor, weight: Tensor, cells: Cells, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Adam on the logarithm of sigma; the entropy is the mean over the second half of the steps."""
    log = sigma.log().requires_grad_()
    optimizer = torch.optim.Adam([log], lr=schedule.rate)
    total, path = torch.zeros_like(sigma), []
    bounds = torch.tensor([LEAST, MOST], dtype=log.dtype, device=log.device).log()
    for step in range(schedule.steps):
        with torch.no_grad():
            log.clamp_(*bounds)
        entropy = log.detach() + ENTROPY_OF_ONE
        path.append(entropy.mean((1, 2)))
        if step >= schedule.steps // 2:
            total += entropy
        _, slope = disturbance.value_and_gradient(log.detach().exp())
        # By the chain rule from sigma to its logarithm, whose mean is the entropy's.
        log.grad = slope * weight * log.detach().exp() - schedule.trade_off / cells.count
        optimizer.step()
    return total / (schedule.steps - schedule.steps // 2), torch.stack(path)


def _official(
    disturbance: _Disturbance, sigma: Tensor, weight: Tensor, cells: Cells, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Plain gradient descent on sigma; the entropy is that of the step whose mean is closest to :data:`LEVEL`."""
    trade_off = torch.full_like(sigma[:, 0, 0], schedule.trade_off)
    running = torch.ones_like(trade_off, dtype=torch.bool)
    best, closest = torch.zeros_like(sigma), torch.full_like(trade_off, torch.inf)
    path: list[Tensor] = []
    for step in range(schedule.steps):
        if step == CHECKED:
            running = torch.stack(path).amax(0) <= LEVEL
            trade_off = trade_off * RAISED
            if not running.any():
                break
        sigma = sigma.clamp(LEAST, MOST)
        entropy = sigma.log() + ENTROPY_OF_ONE
        mean = entropy.mean((1, 2))
        path.append(torch.where(running, mean, torch.nan))
        closer = running & ((mean - LEVEL).abs() < closest)
        closest = torch.where(closer, (mean - LEVEL).abs(), closest)
        best = torch.where(closer[:, None, None], entropy, best)
        _, slope = disturbance.value_and_gradient(sigma)
        slope = slope * weight - trade_off[:, None, None] / (cells.count * sigma)
        sigma = sigma - schedule.rate * slope
    rest = [torch.full_like(path[0], torch.nan)] * (schedule.steps - len(path))
    return best, torch.stack([*path, *rest])
