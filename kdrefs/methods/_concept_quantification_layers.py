"""Reading one layer of any network, and sums over the cells of a grid of pixels."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdrefs.training import evaluation_mode

Read = Callable[[Tensor], Tensor]


@contextmanager
def reading(net: nn.Module, layer: str) -> Iterator[Read]:
    """Give a function from images to the named layer's output, with gradients, while ``net`` is in eval mode.

    A name in the mapping ``features`` of what the network returns comes first, then ``"logits"``, then a submodule,
    whose output is copied where it leaves the module, so that an in-place activation behind it changes nothing.

    Raises:
        ValueError: There is no such layer, it runs more than once, or gives no floating tensor with a row an image.
    """
    seen: list[object] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        seen.append(output.clone() if isinstance(output, Tensor) else output)

    module = dict(net.named_modules()).get(layer)
    hook = None if module is None else module.register_forward_hook(keep)

    def read(images: Tensor) -> Tensor:
        seen.clear()
        output = net(images)
        features = getattr(output, "features", None)
        features = features if isinstance(features, Mapping) else {}
        if layer in features:
            value = features[layer]
        elif layer == "logits" and hasattr(output, "logits"):
            value = output.logits
        elif len(seen) == 1:
            value = seen[0]
        elif seen:
            raise ValueError(f"layer: {layer!r} runs {len(seen)} times in one forward pass, expected once")
        else:
            known = ", ".join([*features, *filter(None, dict(net.named_modules()))])
            raise ValueError(
                f"layer: expected a feature or a submodule of the network ({known}), got {layer!r}"
            )
        seen.clear()
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.shape[:1] != images.shape[:1]
        ):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"layer: expected {layer!r} to be a floating tensor with {len(images)} rows, got {came}"
            )
        return value

    try:
        with evaluation_mode(net):
            yield read
    finally:
        if hook is not None:
            hook.remove()


class Cells:
    """A grid of cells over images; a pixel belongs to the cell that nearest-neighbour upsampling gives it.

    Args:
        grid: Rows and columns.
        size: Height and width of the images in pixels.
        device: Where the images are.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> None:
        self.grid, self.count = grid, grid[0] * grid[1]
        self.places = tuple(
            torch.arange(pixels, device=device) * cells // pixels
            for cells, pixels in zip(grid, size, strict=True)
        )
        self.members = tuple(
            torch.nn.functional.one_hot(places, cells).double()
            for places, cells in zip(self.places, grid, strict=True)
        )

    def spread(self, values: Tensor) -> Tensor:
        """Every pixel gets its cell's value: (..., rows, columns) to (..., height, width)."""
        rows, columns = self.places
        return values[..., rows, :][..., columns]

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the pixels of each cell, float64: (..., height, width) to (..., rows, columns)."""
        rows, columns = self.members
        return rows.mT @ values.double() @ columns


def generators(seeds: list[int], device: torch.device) -> list[torch.Generator]:
    """A generator for each image, so that its random numbers depend neither on chunks nor on other images."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def cell_gains(
    read: Read, images: Tensor, cells: Cells, seeds: list[int], probes: int, chunk: int
) -> tuple[Tensor, bool]:
    """Squared derivatives of a layer by the pixels of each cell, probe by probe.

    Args:
        read: From :func:`reading`.
        images: ``(N, C, H, W)``.
        cells: Over the images.
        seeds: One an image.
        probes: Random directions of +-1 in the layer's space; where it has no more numbers than that, its unit vectors
            are taken instead, and nothing is random.
        chunk: Images in one forward pass.

    Returns:
        Gains ``(N, directions, rows, columns)``, float64, whose mean over the directions is proportional to the sum of
        squares of the Jacobian's columns of the cell; and whether they are exact.
    """
    parts = []
    exact = False
    for start in range(0, len(images), chunk):
        inputs = images[start : start + chunk].detach().requires_grad_()
        drawn = generators(seeds[start : start + chunk], images.device)
        with torch.enable_grad():
            feature = read(inputs)
        if not feature.requires_grad:
            raise ValueError("layer: its output does not depend on the images")
        width = feature[0].numel()
        exact = width <= probes
        found = []
        directions = min(width, probes)
        for number in range(directions):
            if exact:
                direction = torch.zeros_like(feature)
                direction.flatten(1)[:, number] = 1
            else:
                signs = [torch.randint(2, feature.shape[1:], generator=g, device=g.device) for g in drawn]
                direction = (2 * torch.stack(signs) - 1).to(feature.dtype)
            (slope,) = torch.autograd.grad(feature, inputs, direction, retain_graph=number < directions - 1)
            found.append(cells.sums(slope.double().square().sum(1)))
        parts.append(torch.stack(found, dim=1))
    return torch.cat(parts), exact
