"""Batches against a plain loop over single images, and their promises about randomness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from kdrefs.data import Augment, Batch, Batches, Split, load_set
from kdrefs.data._arrays import derive_seed
from kdrefs.data.composites import composites, mask_boxes
from kdrefs.data.geometry import Geometry, draw_geometry, move_boxes, move_images


def random_images(count: int = 23, height: int = 6, width: int = 5, channels: int = 3) -> Tensor:
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_set(count: int = 23) -> dict[str, Any]:
    return {"images": random_images(count), "labels": torch.arange(count) % 4}


def plain_loop(images: Tensor, geometry: Geometry, augment: Augment) -> Tensor:
    """Pad, crop and flip one image after the other; (B, H, W, C) uint8 in and out."""
    mode = {"zeros": "constant", "reflect": "reflect"}[augment.pad_mode]
    moved = []
    for image, flip, (top, left) in zip(
        images, geometry.flip.tolist(), geometry.offset.tolist(), strict=True
    ):
        planes = pad(image.permute(2, 0, 1)[None].float(), [augment.crop] * 4, mode)[0]
        planes = planes[:, top : top + image.shape[0], left : left + image.shape[1]]
        moved.append(planes.flip(2) if flip else planes)
    return torch.stack(moved).permute(0, 2, 3, 1).to(torch.uint8)


def joined(batches: Iterable[Batch], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def assert_same_batches(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert a.images is not None
        assert b.images is not None
        assert torch.equal(a.images, b.images)
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.labels, b.labels)
        assert a.extras.keys() == b.extras.keys()
        assert all(torch.equal(a.extras[name], b.extras[name]) for name in a.extras)


# Geometry


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.integers(1, 4),
    crop=st.integers(0, 6),
    flip=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_motion_is_that_of_a_plain_loop(
    height: int, width: int, channels: int, crop: int, flip: bool, mode: Any, seed: int
) -> None:
    assume(mode == "zeros" or crop < min(height, width))
    augment = Augment(flip, crop, mode)
    images = random_images(9, height, width, channels)
    geometry = draw_geometry(9, augment, torch.Generator().manual_seed(seed))
    assert torch.equal(move_images(images, geometry, augment), plain_loop(images, geometry, augment))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_motion_keeps_other_types(dtype: torch.dtype) -> None:
    augment = Augment(True, 2)
    images = (random_images(8) > 127).to(torch.uint8)
    geometry = draw_geometry(8, augment, torch.Generator().manual_seed(1))
    moved = move_images(images.to(dtype), geometry, augment)
    assert moved.dtype == dtype
    assert torch.equal(moved.to(torch.uint8), plain_loop(images, geometry, augment))


def test_parameters_are_drawn_uniformly() -> None:
    geometry = draw_geometry(40_000, Augment(True, 3), torch.Generator().manual_seed(0))
    assert abs(geometry.flip.float().mean() - 0.5) < 0.01
    counts = torch.bincount(geometry.offset[:, 0] * 7 + geometry.offset[:, 1], minlength=49)
    expected = 40_000 / 49
    assert float(((counts - expected) ** 2 / expected).sum()) < 85.4  # 0.1 % quantile of chi squared, 48 d.f.


def test_boxes_move_as_their_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(200, 12, 10, dtype=torch.bool)
    for mask in masks:
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        down, right = torch.randint(1, 5, (2,), generator=generator).tolist()
        mask[top : top + down, left : left + right] = True
    augment = Augment(True, 4)
    geometry = draw_geometry(200, augment, generator)
    moved = move_images(masks[..., None], geometry, augment)[..., 0]
    boxes = move_boxes(mask_boxes(masks), geometry, augment, 12, 10)
    visible = moved.flatten(1).any(1)
    assert 150 < int(visible.sum()) < 200  # both cases occur
    assert torch.equal(boxes[visible], mask_boxes(moved)[visible])
    gone = boxes[~visible]
    assert bool((((gone[:, 2] - gone[:, 0]) * (gone[:, 3] - gone[:, 1])) == 0).all())
    many = move_boxes(mask_boxes(masks)[:, None].repeat(1, 3, 1), geometry, augment, 12, 10)
    assert torch.equal(many, boxes[:, None].repeat(1, 3, 1))


# One epoch


@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_covers_every_sample_once(
    count: int, batch_size: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    assume(not drop_last or batch_size <= count)
    data = random_set(count)
    batches = Batches(data, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    found = list(batches.epoch(epoch))
    assert len(found) == len(batches)
    sizes = [len(batch) for batch in found]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    indices = joined(found, "indices")
    assert len(indices.unique()) == len(indices)
    assert len(indices) == (count - count % batch_size if drop_last else count)
    if not shuffle:
        assert torch.equal(indices, torch.arange(len(indices)))
    assert torch.equal(joined(found, "labels"), data["labels"][indices])
    expected = data["images"][indices].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(joined(found, "images"), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "augment", [Augment(True, 2), Augment(False, 3, "reflect"), Augment(True), Augment()]
)
def test_images_are_those_of_a_plain_loop_with_the_same_parameters(augment: Augment) -> None:
    data = random_set()
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    batches = Batches(data, batch_size=5, seed=3, augment=augment, mean=mean, std=std)
    generator = torch.Generator().manual_seed(derive_seed("geometry", "epoch", 3, 7))
    geometry = draw_geometry(23, augment, generator)
    moved = plain_loop(data["images"], geometry, augment).permute(0, 3, 1, 2).double() / 255
    expected = (moved - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for batch in batches.epoch(7):
        assert batch.images is not None
        torch.testing.assert_close(batch.images.double(), expected[batch.indices], rtol=1e-5, atol=2e-6)


def test_images_lie_channels_last_and_labels_are_int64() -> None:
    split = Split(random_images().numpy(), np.arange(23, dtype=np.uint8))
    batch = next(iter(Batches(split, batch_size=4, augment=Augment(True, 1))))
    assert batch.images is not None
    assert batch.labels is not None
    assert batch.images.shape == (4, 3, 6, 5)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
    assert batch.indices.dtype == torch.int64
    assert len(batch.views) == 1
    assert batch.views[0] is batch.images
    assert batch.masks is batch.boxes is batch.tokens is None


def test_half_precision_is_the_rounded_float32() -> None:
    options: dict[str, Any] = {"batch_size": 23, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}
    exact = next(iter(Batches(random_images(), dtype=torch.float64, **options))).images
    single = next(iter(Batches(random_images(), **options))).images
    half = next(iter(Batches(random_images(), dtype=torch.bfloat16, **options))).images
    assert exact is not None
    assert single is not None
    assert half is not None
    assert exact.dtype == torch.float64
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(half, single.to(torch.bfloat16))


# Randomness


def test_same_seed_same_bits_other_seed_or_epoch_others() -> None:
    data = random_set(200)

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(data, batch_size=64, seed=seed, augment=Augment(True, 2))
        return joined(batches.epoch(epoch), "indices").tolist()

    one, two = (Batches(data, batch_size=64, seed=1, augment=Augment(True, 2)) for _ in range(2))
    list(two.epoch(5))  # what was drawn before has no influence
    torch.rand(3)
    assert_same_batches(one.epoch(2), two.epoch(2))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("start", range(6))
def test_epoch_can_be_entered_anywhere(start: int) -> None:
    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.randn(images.shape, generator=generator)

    batches = Batches(
        random_set(),
        batch_size=5,
        augment=Augment(True, 2),
        views=2,
        photometric=[noise, None],
        fixed_views=3,
    )
    assert_same_batches(list(batches.epoch(4))[start:], batches.epoch(4, start=start))


def test_epochs_can_be_interleaved() -> None:
    batches = Batches(random_set(), batch_size=5, augment=Augment(True, 2))
    expected = list(batches.epoch(0)), list(batches.epoch(1))
    pairs = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert_same_batches(expected[0], [a for a, _ in pairs])
    assert_same_batches(expected[1], [b for _, b in pairs])


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Batches(random_set(), batch_size=5, augment=Augment(True, 2)).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


# Subsets, fixed views, paired views


def test_subset_keeps_numbers_geometry_and_memory() -> None:
    data = random_set()
    full = Batches(data, batch_size=5, augment=Augment(True, 2), extras={"score": torch.arange(23.0)})
    part = full.subset([20, 3, 7, 11])
    assert full.images is not None
    assert part.images is not None
    assert part.images.data_ptr() == full.images.data_ptr()
    assert (part.num_samples, len(part), full.num_samples) == (4, 1, 23)
    of_full = {int(i): x for b in full.epoch(3) for i, x in zip(b.indices, b.views[0], strict=True)}
    batch = next(part.epoch(3))
    assert sorted(batch.indices.tolist()) == [3, 7, 11, 20]
    assert batch.labels is not None
    assert torch.equal(batch.labels, data["labels"][batch.indices])
    assert torch.equal(batch.extras["score"], batch.indices.float())
    for number, image in zip(batch.indices.tolist(), batch.views[0], strict=True):
        assert torch.equal(image, of_full[number])
    assert part.subset(np.array([1, 2])).indices.tolist() == [1, 2]  # numbers of the full set
    same = Batches(data, batch_size=5, augment=Augment(True, 2), indices=torch.tensor([20, 3, 7, 11]))
    assert torch.equal(next(same.epoch(3)).views[0], batch.views[0])


def test_a_number_given_twice_is_drawn_twice() -> None:
    part = Batches(random_set(), batch_size=8).subset([4, 4, 9])
    assert sorted(joined(part.epoch(0), "indices").tolist()) == [4, 4, 9]


def test_fixed_views_come_back_and_carry_their_extras() -> None:
    features = torch.randn(3, 23, 2, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"batch_size": 5, "augment": Augment(True, 2), "fixed_views": 3}
    batches = Batches(random_set(), seed=1, view_extras={"teacher": features}, **options)
    other_seed = Batches(random_set(), seed=2, drop_last=True, **options)
    for epoch in range(7):
        view = epoch % 3
        in_order = list(batches.view(view))
        assert torch.equal(joined(in_order, "indices"), torch.arange(23))
        images = joined(in_order, "images")
        for batch in [*batches.epoch(epoch), *other_seed.epoch(epoch), *other_seed.view(view)]:
            assert torch.equal(batch.views[0], images[batch.indices])
        for batch in batches.epoch(epoch):
            assert torch.equal(batch.extras["teacher"], features[view, batch.indices])
    orders = {tuple(joined(batches.epoch(epoch), "indices").tolist()) for epoch in range(6)}
    assert len(orders) == 6  # the order is new every epoch although the geometry is not
    views = {joined(batches.view(view), "images").numpy().tobytes() for view in range(3)}
    assert len(views) == 3
    other_views = Batches(random_set(), view_seed=1, **options)
    assert not torch.equal(joined(other_views.view(0), "images"), joined(batches.view(0), "images"))


def test_view_of_a_subset_has_its_samples_in_order() -> None:
    full = Batches(random_set(), batch_size=2, augment=Augment(True, 2), fixed_views=2, drop_last=True)
    part = full.subset([9, 2, 5])
    assert joined(part.view(1), "indices").tolist() == [9, 2, 5]
    assert torch.equal(joined(part.view(1), "images"), joined(full.view(1), "images")[[9, 2, 5]])


def test_paired_views_share_their_geometry() -> None:
    data = random_set()
    poor = data["images"] // 16 * 16

    def darker(images: Tensor, generator: torch.Generator) -> Tensor:
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        return images * 0.5

    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.randn(images.shape, generator=generator)

    options: dict[str, Any] = {"augment": Augment(True, 2), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    paired = Batches(
        data,
        batch_size=23,
        views=4,
        photometric=[None, darker, noise, None],
        renderings=[None, None, poor],
        **options,
    )
    batch = next(paired.epoch(2))
    clean = Batches(data, batch_size=23, augment=options["augment"])
    moved = next(clean.epoch(2)).images
    assert moved is not None
    mean, std = (torch.tensor(options[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert batch.images is batch.views[0]
    torch.testing.assert_close(batch.views[0], (moved - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.views[1], (moved * 0.5 - mean) / std, rtol=1e-5, atol=1e-5)
    of_poor = next(Batches(poor, batch_size=23, augment=options["augment"]).epoch(2)).views[0]
    torch.testing.assert_close(batch.views[3], (of_poor - mean) / std, rtol=1e-5, atol=1e-5)
    drawn = (batch.views[2] * std + mean - moved).flatten()
    assert abs(float(drawn.mean())) < 0.1
    assert abs(float(drawn.std()) - 1) < 0.1
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    again, later = next(paired.epoch(2)), next(paired.epoch(3))
    assert torch.equal(again.views[2], batch.views[2])
    assert not torch.equal(later.views[2][:1], batch.views[2][:1])


def test_photometric_noise_is_new_for_every_seed_epoch_step_and_view() -> None:
    def noise(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.randn(images.shape, generator=generator)

    grey = torch.full((6, 2, 2, 1), 128, dtype=torch.uint8)
    drawn = {
        view.numpy().tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for batch in Batches(grey, batch_size=2, seed=seed, views=2, photometric=[noise, noise]).epoch(epoch)
        for view in batch.views
    }
    assert len(drawn) == 2 * 2 * 3 * 2


# What moves along, what is gathered


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_masks_and_boxes_move_with_their_image(mode: Any) -> None:
    split = composites("train", 60, size=32, digit=16, jitter=2)
    augment = Augment(True, 3, mode)
    batches = Batches(split, batch_size=60, augment=augment)
    batch = next(batches.epoch(0))
    geometry = draw_geometry(
        60, augment, torch.Generator().manual_seed(derive_seed("geometry", "epoch", 0, 0))
    )
    masks = torch.from_numpy(split.extras["masks"])
    expected = plain_loop(masks[..., None], geometry, augment)[..., 0][batch.indices]
    assert batch.masks is not None
    assert batch.boxes is not None
    assert batch.images is not None
    assert torch.equal(batch.masks, expected)
    assert torch.equal(batch.boxes, mask_boxes(batch.masks.bool()))
    assert float(batch.images[:, 0][batch.masks.bool()].min()) > 0.5  # white digits: the mask lies on them
    assert set(batch.extras) == set()


def test_without_augmentation_boxes_and_masks_stay() -> None:
    split = composites("test", 10)
    batch = next(iter(Batches(split, batch_size=10, shuffle=False)))
    assert batch.boxes is not None
    assert batch.masks is not None
    np.testing.assert_array_equal(batch.boxes.numpy(), split.extras["boxes"])
    np.testing.assert_array_equal(batch.masks.numpy(), split.extras["masks"])


def test_tokens_and_extras_without_images() -> None:
    tokens = torch.arange(40).view(10, 4).to(torch.int32)
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    batches = Batches(None, torch.arange(10), tokens=tokens, extras={"logits": logits}, batch_size=4)
    for batch in batches.epoch(1):
        assert batch.images is None
        assert batch.views == ()
        assert batch.tokens is not None
        assert batch.tokens.dtype == torch.int64
        assert torch.equal(batch.tokens, tokens[batch.indices].long())
        assert torch.equal(batch.extras["logits"], logits[batch.indices])
        assert torch.equal(batch.indices, joined([batch], "labels"))
    only = Batches(None, extras={"x": logits}, batch_size=10)
    assert next(iter(only)).labels is None


def test_extras_are_added_without_touching_the_original() -> None:
    batches = Batches(random_set(), batch_size=5, fixed_views=2)
    more = batches.with_extras({"a": torch.arange(23)}, {"b": torch.arange(46).view(2, 23)})
    batch = next(more.epoch(1))
    assert torch.equal(batch.extras["a"], batch.indices)
    assert torch.equal(batch.extras["b"], 23 + batch.indices)
    assert next(batches.epoch(1)).extras == {}
    assert torch.equal(next(more.with_extras({"a": torch.zeros(23)}).epoch(0)).extras["a"], torch.zeros(5))


def test_named_set_goes_straight_in() -> None:
    digits = load_set("digits")
    batches = Batches(digits.test, batch_size=128, shuffle=False, mean=(0.3,), std=(0.35,))
    assert (len(batches), batches.num_samples) == (4, 500)
    images = joined(batches, "images")
    expected = (torch.from_numpy(digits.test.images).permute(0, 3, 1, 2) / 255 - 0.3) / 0.35
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)


def test_read_only_and_strided_arrays_are_taken() -> None:
    images = random_images().numpy().copy()
    images.flags.writeable = False
    flipped = Batches(images[:, ::-1], batch_size=23, shuffle=False)
    expected = torch.from_numpy(images[:, ::-1].copy()).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(joined(flipped, "images"), expected)


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_has_no_operation_that_waits_for_the_device() -> None:
    split = composites("train", 30)
    steps = Batches(
        split, batch_size=5, augment=Augment(True, 2, "reflect"), extras={"a": torch.zeros(30)}
    ).epoch(0)
    next(steps)
    with Operations() as seen:
        next(steps)
    # `index` is here because it waits where the index is a mask.
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "index"}
    assert "index_select" in seen.names
    assert not seen.names & waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_the_bits_are_those_of_the_cpu_and_no_step_waits() -> None:
    data = random_set(100)
    options: dict[str, Any] = {"batch_size": 10, "augment": Augment(True, 2), "seed": 5}
    cpu = Batches(data, **options)
    gpu = Batches(data, device="cuda", **options).epoch(1)
    found = [next(gpu)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += list(gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(cpu.epoch(1), found, strict=True):
        assert torch.equal(a.indices, b.indices.cpu())
        torch.testing.assert_close(a.views[0], b.views[0].cpu(), rtol=1e-6, atol=1e-6)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int"),
        ({"batch_size": True}, TypeError, "batch_size: expected an int"),
        ({"batch_size": 24, "drop_last": True}, ValueError, "batch_size: expected at most 23"),
        ({"seed": -1}, ValueError, "seed: expected 0 or more"),
        ({"views": 0}, ValueError, "views: expected 1 or more"),
        ({"fixed_views": 0}, ValueError, "fixed_views: expected 1 or more"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected a floating type"),
        ({"mean": (0.5,)}, ValueError, "mean: expected 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std: expected positive"),
        ({"photometric": [None, None]}, ValueError, "photometric: expected 1"),
        ({"views": 2, "renderings": []}, ValueError, "renderings: expected 1"),
        ({"views": 2, "renderings": [random_images(22)]}, ValueError, r"renderings: expected uint8 \(23, 6"),
        ({"augment": Augment(crop=5, pad_mode="reflect")}, ValueError, "augment: cannot reflect 5 pixels"),
        ({"labels": torch.zeros(22, dtype=torch.int64)}, ValueError, r"labels: expected first sizes \(23,\)"),
        ({"labels": torch.zeros(23)}, ValueError, "labels: expected integers"),
        ({"labels": torch.zeros(23, 2, dtype=torch.int64)}, ValueError, r"labels: expected \(N,\)"),
        ({"labels": [1] * 23}, TypeError, "labels: expected an array or a tensor, got list"),
        ({"masks": torch.zeros(23, 6, 4)}, ValueError, r"masks: expected \(23, 6, 5\)"),
        ({"boxes": torch.zeros(23, 3)}, ValueError, r"boxes: expected \(N, ..., 4\)"),
        ({"boxes": torch.full((23, 4), torch.nan)}, ValueError, "boxes: not all values are finite"),
        ({"tokens": torch.zeros(23, 2)}, ValueError, "tokens: expected integers"),
        ({"extras": {"a": torch.zeros(5)}}, ValueError, r"a: expected first sizes \(23,\)"),
        ({"extras": {"a": torch.full((23,), torch.inf)}}, ValueError, "a: not all values are finite"),
        ({"extras": {"a": torch.tensor(1.0)}}, ValueError, "a: expected at least one dimension"),
        ({"extras": {"labels": torch.zeros(23)}}, ValueError, r"extras: \['labels'\]"),
        ({"view_extras": {"a": torch.zeros(2, 23)}}, ValueError, "view_extras: need fixed_views"),
        ({"fixed_views": 3, "view_extras": {"a": torch.zeros(2, 23)}}, ValueError, r"a: .*\(3, 23\)"),
        (
            {"fixed_views": 1, "extras": {"a": torch.zeros(23)}, "view_extras": {"a": torch.zeros(1, 23)}},
            ValueError,
            r"view_extras: \['a'\]",
        ),
        ({"indices": []}, ValueError, "indices: expected at least one"),
        ({"indices": [23]}, ValueError, "indices: expected 0 to 22"),
        ({"indices": [-1]}, ValueError, "indices: expected 0 to 22"),
        ({"indices": torch.ones(23, dtype=torch.bool)}, ValueError, "indices: expected integers"),
        ({"indices": [0.5]}, ValueError, "indices: expected integers"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Batches(random_images(), **{"batch_size": 4, **change})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 5, 5, 3), "images: expected uint8"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "images: expected uint8"),
        (torch.zeros(4, 5, 5, dtype=torch.uint8), "images: expected uint8"),
        (torch.zeros(0, 5, 5, 3, dtype=torch.uint8), "split: expected at least one sample"),
        (None, "split: expected at least one sample"),
    ],
)
def test_bad_images_are_named(images: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(images, batch_size=2)


@pytest.mark.parametrize(
    "option",
    [
        {"augment": Augment(True)},
        {"mean": (0.5,)},
        {"views": 2},
        {"masks": torch.zeros(4, 2, 2)},
        {"boxes": torch.zeros(4, 4)},
    ],
)
def test_what_needs_images_says_so(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: needs images"):
        Batches(None, torch.zeros(4, dtype=torch.int64), batch_size=2, **option)


def test_bad_epochs_are_named_at_once() -> None:
    batches = Batches(random_set(), batch_size=5)
    with pytest.raises(ValueError, match="start: expected at most 5"):
        batches.epoch(0, start=6)
    with pytest.raises(ValueError, match="epoch: expected 0 or more"):
        batches.epoch(-1)
    with pytest.raises(TypeError, match="epoch: expected an int"):
        batches.epoch(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no fixed views"):
        batches.view(0)
    with pytest.raises(ValueError, match="view: expected less than 2"):
        Batches(random_set(), batch_size=5, fixed_views=2).view(2)
    with pytest.raises(ValueError, match="batch_size: expected at most 3"):
        Batches(random_set(), batch_size=5, drop_last=True).subset([1, 2, 3])


def test_photometric_change_of_shape_is_refused() -> None:
    batches = Batches(random_set(), batch_size=5, photometric=[lambda x, _: x[:, :1]])
    with pytest.raises(ValueError, match="photometric"):
        next(batches.epoch(0))


@pytest.mark.parametrize(
    ("options", "error"),
    [({"crop": -1}, ValueError), ({"crop": 1.5}, TypeError), ({"pad_mode": "edge"}, ValueError)],
)
def test_bad_augmentation_is_named(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Augment(**options)
