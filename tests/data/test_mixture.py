"""Mixed batches: a fixed mix, both sets whole, the same from any start."""

from __future__ import annotations

import pytest
import torch

from kdrefs.data.batches import Batches
from kdrefs.data.mixture import MixedBatches


def rows(count: int, size: int, offset: int, **options) -> Batches:
    extras = {"number": torch.arange(count) + offset}
    images = torch.zeros(count, 2, 2, 1, dtype=torch.uint8)
    return Batches(images, batch_size=size, seed=offset, drop_last=True, extras=extras, **options)


def test_every_batch_has_the_mix_and_each_set_goes_through_its_own_epochs() -> None:
    mixed = MixedBatches(rows(6, 2, 0), rows(20, 4, 100))
    assert len(mixed) == 5
    numbers = torch.stack([batch.extras["number"] for epoch in range(3) for batch in mixed.epoch(epoch)])
    assert numbers.shape == (15, 6)
    assert ((numbers < 100).sum(1) == 2).all()
    labelled, unlabelled = numbers[:, :2], numbers[:, 2:]
    for start in range(0, 15, 3):  # three batches are an epoch of the first set
        assert sorted(labelled[start : start + 3].flatten().tolist()) == list(range(6))
    for start in range(0, 15, 5):
        assert sorted(unlabelled[start : start + 5].flatten().tolist()) == list(range(100, 120))
    assert labelled[:3].tolist() != labelled[3:6].tolist()


@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (0, 2), (1, 1), (2, 4)])
def test_an_epoch_goes_on_from_any_batch(epoch: int, start: int) -> None:
    mixed = MixedBatches(rows(6, 2, 0), rows(20, 4, 100))
    whole = [batch.extras["number"] for batch in mixed.epoch(epoch)]
    rest = [batch.extras["number"] for batch in mixed.epoch(epoch, start)]
    assert len(rest) == 5 - start
    assert all(torch.equal(one, other) for one, other in zip(whole[start:], rest, strict=True))


def test_images_and_indices_are_joined() -> None:
    batch = next(iter(MixedBatches(rows(6, 2, 0), rows(20, 4, 100)).epoch(0)))
    assert batch.images is not None
    assert batch.images.shape == (6, 1, 2, 2)
    assert len(batch) == 6
    assert batch.labels is None


def test_sets_that_do_not_fit_are_refused() -> None:
    whole = rows(6, 2, 0)
    kept = Batches(torch.zeros(5, 2, 2, 1, dtype=torch.uint8), batch_size=2)
    with pytest.raises(ValueError, match="second: expected drop_last"):
        MixedBatches(whole, kept)
    other = Batches(torch.zeros(8, 2, 2, 1, dtype=torch.uint8), batch_size=2, drop_last=True)
    with pytest.raises(ValueError, match=r"extras: \['number'\] in one set and not in the other"):
        next(iter(MixedBatches(whole, other).epoch(0)))
    labelled = Batches(
        torch.zeros(8, 2, 2, 1, dtype=torch.uint8), torch.zeros(8).long(), batch_size=2, drop_last=True
    )
    with pytest.raises(ValueError, match="labels: is in one set and not in the other"):
        next(iter(MixedBatches(whole, labelled).epoch(0)))
