"""Batches made on the device: the whole set lies there as uint8, a batch is a gather.

Shuffling, flips, crops and normalisation are batched operations whose parameters come from an explicit
generator once an epoch; no step waits for the device. Images are stored channels last, because a gather
then copies whole pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrefs.data._arrays import (
    Array,
    as_indices,
    as_int64,
    as_tensor,
    check_images,
    check_int,
    check_shape,
    derive_seed,
    named_arrays,
    per_channel,
    per_view,
    take,
)
from kdrefs.data.cache import Split
from kdrefs.data.geometry import Augment, Geometry, draw_geometry, move_boxes, move_images

__all__ = ["Augment", "Batch", "Batches", "Photometric"]

Photometric = Callable[[Tensor, torch.Generator], Tensor]
"""A change of brightness, sharpness, noise …: images (B, C, H, W) in [0, 1], a generator on their device."""


@dataclass
class Batch:
    """Some samples.

    Attributes:
        indices: int64 (B,), numbers of the samples in the full set.
        images: floating (B, C, H, W), channels last in memory, normalised; None without images.
        labels: int64 (B,) or None.
        views: all views of the images, with one geometry; the first is ``images``.
        masks: (B, H, W) of the type given, moved with the images; or None.
        boxes: float32 (B, ..., 4), moved with the images; or None.
        tokens: int64 (B, L) or None.
        extras: further rows by name.
    """

    indices: Tensor
    images: Tensor | None = None
    labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()
    masks: Tensor | None = None
    boxes: Tensor | None = None
    tokens: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)


class Batches:
    """Batches of a set, epoch by epoch.

    Everything random in epoch e follows from ``(seed, e)``: equal seeds give equal bits, on any device, and
    ``epoch(e, start=k)`` continues an epoch without replaying it. A sample's flip and crop depend on its
    number in the full set, so they are the same in the full set and in a subset view.

    Args:
        split: a :class:`~kdrefs.data.cache.Split`, a mapping with ``images`` (and ``labels``, ``masks``,
            ``boxes``, ``tokens``; any other name is an extra), or uint8 images (N, H, W, C); None without
            images.
        labels: integers (N,); instead of those of the split.
        batch_size: samples a batch.
        seed: of order, flips, crops and photometric changes.
        augment: random flip and crop; None for none.
        shuffle: a new order every epoch.
        drop_last: leave out the last batch of an epoch where it is smaller than the others.
        mean: per channel, as fractions of 255; images become (x/255 - mean)/std. None for 0.
        std: likewise. None for 1.
        device: where the set lies and the batches are made.
        dtype: of the images.
        views: how many views of an image a batch has; all share one geometry.
        photometric: one callable (or None) a view, applied before normalisation.
        renderings: for the views after the first, other versions (N, H, W, C) of the same images, for
            instance of lower quality; None for the images themselves.
        fixed_views: with V fixed views, the geometry in epoch e is that of view e mod V, whatever the seed,
            so that a teacher's features of each view can be computed once (see :meth:`view`).
        view_seed: of the geometry of the fixed views.
        extras: rows (N, ...) that come with the batch by name.
        view_extras: rows (V, N, ...); those of the epoch's fixed view come with the batch as extras.
        masks: (N, H, W), moved with the images. Padding is zero, or reflected like the image.
        boxes: (N, ..., 4), xmin ymin xmax ymax in pixels with exclusive maxima, moved with the images.
        tokens: integers (N, L).
        indices: the samples to draw from, numbers in the full set; None for all.

    Raises:
        ValueError: shapes, types or numbers that do not fit each other; the argument is named.
        TypeError: an argument of a wrong Python type.
    """

    def __init__(
        self,
        split: Split | Mapping[str, Array] | Array | None,
        labels: Array | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        views: int = 1,
        photometric: Sequence[Photometric | None] | None = None,
        renderings: Sequence[Array | None] | None = None,
        fixed_views: int | None = None,
        view_seed: int = 0,
        extras: Mapping[str, Array] | None = None,
        view_extras: Mapping[str, Array] | None = None,
        masks: Array | None = None,
        boxes: Array | None = None,
        tokens: Array | None = None,
        indices: Array | Sequence[int] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed = check_int("seed", seed, 0)
        self.view_seed = check_int("view_seed", view_seed, 0)
        self.fixed_views = None if fixed_views is None else check_int("fixed_views", fixed_views, 1)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating type, got {dtype}")
        self.dtype = dtype
        self.augment = augment
        count = check_int("views", views, 1)
        self._photometric = per_view("photometric", photometric, count)
        self._renderings: list[Tensor | None] = [None, *per_view("renderings", renderings, count - 1)]

        named = {"labels": labels, "masks": masks, "boxes": boxes, "tokens": tokens}
        taken = sorted({"images", *named} & (extras or {}).keys())
        if taken:
            raise ValueError(f"extras: {taken} are arguments of their own")
        named |= extras or {}
        given = named_arrays(split) | {name: value for name, value in named.items() if value is not None}
        tensors = {name: as_tensor(name, value) for name, value in given.items()}
        self.full_size = len(next(iter(tensors.values()), ()))
        if self.full_size == 0:
            raise ValueError("split: expected at least one sample")
        for name, value in tensors.items():
            tensors[name] = check_shape(name, value, (self.full_size,)).to(self.device)
        self.images = tensors.pop("images", None)
        self.masks, self.boxes = tensors.pop("masks", None), tensors.pop("boxes", None)
        self.labels = as_int64("labels", tensors.pop("labels", None))
        self.tokens = as_int64("tokens", tensors.pop("tokens", None))
        if self.labels is not None and self.labels.ndim != 1:
            raise ValueError(f"labels: expected (N,), got {tuple(self.labels.shape)}")
        self._prepare_images(mean, std)

        self.extras: dict[str, Tensor] = {}
        self.view_extras: dict[str, Tensor] = {}
        self._extend(tensors, view_extras or {})
        self.indices = torch.arange(self.full_size, device=self.device)
        if indices is not None:
            self.indices = as_indices(indices, self.full_size).to(self.device)
        self._check_steps()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch (before ``drop_last``)."""
        return len(self.indices)

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full if self.drop_last else full + bool(rest)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start + 1``, … of an epoch."""
        check_int("epoch", epoch, 0)
        if check_int("start", start, 0) > len(self):
            raise ValueError(f"start: expected at most {len(self)} batches, got {start}")
        order = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator).to(self.device)]
        view = None if self.fixed_views is None else epoch % self.fixed_views
        return self._run(order, len(self), epoch, view, start)

    def view(self, view: int) -> Iterator[Batch]:
        """All samples once, in the order of ``indices``, with the geometry of a fixed view."""
        if self.fixed_views is None:
            raise ValueError("view: these batches have no fixed views")
        if check_int("view", view, 0) >= self.fixed_views:
            raise ValueError(f"view: expected less than {self.fixed_views}, got {view}")
        steps = -(-self.num_samples // self.batch_size)
        return self._run(self.indices, steps, view, view, 0)

    def subset(self, indices: Array | Sequence[int]) -> Batches:
        """The same set (same memory) restricted to some samples, numbered as in the full set.

        A number that occurs twice is drawn twice an epoch, with the same geometry.
        """
        part = copy.copy(self)
        part.indices = as_indices(indices, self.full_size).to(self.device)
        part._check_steps()
        return part

    def with_seed(self, seed: int) -> Batches:
        """The same set (same memory) in the order and with the geometry of another seed."""
        other = copy.copy(self)
        other.seed = check_int("seed", seed, 0)
        return other

    def with_extras(
        self, extras: Mapping[str, Array] | None = None, view_extras: Mapping[str, Array] | None = None
    ) -> Batches:
        """The same set (same memory) with further rows, of all N samples of the full set.

        Rows of a name that is there already take the place of the former ones.
        """
        more = copy.copy(self)
        more.extras, more.view_extras = dict(self.extras), dict(self.view_extras)
        more._extend(extras or {}, view_extras or {})
        return more

    def _run(self, order: Tensor, steps: int, epoch: int, view: int | None, start: int) -> Iterator[Batch]:
        geometry = None
        if self.augment is not None:
            key = ("epoch", self.seed, epoch) if view is None else ("view", self.view_seed, view)
            generator = torch.Generator().manual_seed(derive_seed("geometry", *key))
            drawn = draw_geometry(self.full_size, self.augment, generator)
            geometry = Geometry(*(parameter.to(self.device) for parameter in drawn))
        for step in range(start, steps):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            moved = None if geometry is None else geometry.select(chosen)
            batch = Batch(chosen, labels=take(self.labels, chosen), tokens=take(self.tokens, chosen))
            batch.extras = {name: rows.index_select(0, chosen) for name, rows in self.extras.items()}
            if view is not None:
                for name, rows in self.view_extras.items():
                    batch.extras[name] = rows[view].index_select(0, chosen)
            if self.images is not None:
                batch.views = self._views(self.images, chosen, moved, (epoch, step))
                batch.images = batch.views[0]
            if self.masks is not None:
                batch.masks = self._pixels(self.masks[..., None], chosen, moved)[..., 0]
            batch.boxes = self._moved_boxes(chosen, moved)
            yield batch

    def _views(
        self, images: Tensor, chosen: Tensor, moved: Geometry | None, key: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        original = self._pixels(images, chosen, moved)
        views = []
        for number, (rendering, change) in enumerate(zip(self._renderings, self._photometric, strict=True)):
            pixels = original if rendering is None else self._pixels(rendering, chosen, moved)
            if change is None:
                views.append(self._normalised(pixels))
            else:
                seed = derive_seed("photometric", self.seed, *key, number)
                generator = torch.Generator(self.device).manual_seed(seed)
                views.append(self._changed(pixels, change, generator))
        return tuple(views)

    def _pixels(self, images: Tensor, chosen: Tensor, moved: Geometry | None) -> Tensor:
        """(B, H, W, C). Images are gathered as flat rows: several times faster than as (H, W, C) blocks."""
        rows = images.reshape(len(images), -1).index_select(0, chosen)
        picked = rows.view(len(chosen), *images.shape[1:])
        return picked if moved is None or self.augment is None else move_images(picked, moved, self.augment)

    def _moved_boxes(self, chosen: Tensor, moved: Geometry | None) -> Tensor | None:
        boxes = take(self.boxes, chosen)
        if boxes is None or moved is None or self.augment is None or self.images is None:
            return boxes
        return move_boxes(boxes, moved, self.augment, *self.images.shape[1:3])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), channels last. By rows of W·C numbers: broadcasting over C alone is slow."""
        batch, height, width, channels = pixels.shape
        rows = pixels.view(batch, height, width * channels).to(self._scale.dtype)
        rows = rows.mul_(self._scale).add_(self._shift).to(self.dtype)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    def _changed(self, pixels: Tensor, change: Photometric, generator: torch.Generator) -> Tensor:
        planes = (pixels.to(self._scale.dtype) / 255).permute(0, 3, 1, 2)
        changed = change(planes, generator)
        if changed.shape != planes.shape:
            raise ValueError(f"photometric: images {tuple(planes.shape)} became {tuple(changed.shape)}")
        channels = pixels.shape[-1]
        scale, shift = (v[:channels, None, None] for v in (self._scale * 255, self._shift))
        return (changed * scale + shift).to(self.dtype, memory_format=torch.channels_last)

    def _prepare_images(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Check all that goes with images, and prepare their normalisation."""
        if self.images is None:
            needing: dict[str, object] = {"masks": self.masks, "boxes": self.boxes, "augment": self.augment}
            needing |= {"mean": mean, "std": std, "views": None if len(self._photometric) == 1 else 1}
            for name, value in needing.items():
                if value is not None:
                    raise ValueError(f"{name}: needs images")
            return
        check_images("images", self.images)
        height, width, channels = self.images.shape[1:]
        if self.masks is not None and self.masks.shape != self.images.shape[:3]:
            expected = tuple(self.images.shape[:3])
            raise ValueError(f"masks: expected {expected}, got {tuple(self.masks.shape)}")
        if self.boxes is not None:
            if self.boxes.ndim < 2 or self.boxes.shape[-1] != 4:
                raise ValueError(f"boxes: expected (N, ..., 4), got {tuple(self.boxes.shape)}")
            self.boxes = self.boxes.float()
        if self.augment and self.augment.pad_mode == "reflect" and self.augment.crop >= min(height, width):
            raise ValueError(f"augment: cannot reflect {self.augment.crop} pixels of {height}x{width}")
        for number, rendering in enumerate(self._renderings):
            if rendering is not None:
                tensor = as_tensor("renderings", rendering)
                check_images("renderings", tensor, tuple(self.images.shape))
                self._renderings[number] = tensor.to(self.device)
        means, stds = per_channel("mean", mean, 0.0, channels), per_channel("std", std, 1.0, channels)
        if any(s <= 0 for s in stds):
            raise ValueError(f"std: expected positive numbers, got {stds}")
        # Half precisions are computed in float32 and rounded once.
        work = torch.promote_types(self.dtype, torch.float32)
        scale = torch.tensor([1 / (255 * s) for s in stds], dtype=torch.float64)
        shift = torch.tensor([-m / s for m, s in zip(means, stds, strict=True)], dtype=torch.float64)
        self._scale = scale.repeat(width).to(self.device, work)
        self._shift = shift.repeat(width).to(self.device, work)

    def _extend(self, extras: Mapping[str, Array], view_extras: Mapping[str, Array]) -> None:
        if view_extras and self.fixed_views is None:
            raise ValueError("view_extras: need fixed_views")
        for name, value in extras.items():
            rows = check_shape(name, as_tensor(name, value), (self.full_size,))
            self.extras[name] = rows.to(self.device)
        for name, value in view_extras.items():
            rows = check_shape(name, as_tensor(name, value), (self.fixed_views or 0, self.full_size))
            self.view_extras[name] = rows.to(self.device)
        both = self.extras.keys() & self.view_extras.keys()
        if both:
            raise ValueError(f"view_extras: {sorted(both)} are names of extras too")

    def _check_steps(self) -> None:
        if len(self) == 0:
            wanted = f"at most {self.num_samples}, the samples, with drop_last"
            raise ValueError(f"batch_size: expected {wanted}, got {self.batch_size}")
