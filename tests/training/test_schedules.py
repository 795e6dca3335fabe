"""Learning-rate schedules against their closed forms."""

import math

import pytest
import torch

from kdrefs.training import cosine, multistep, one_cycle


def rates(make, steps, groups=(1.0,)):
    """Learning rate of each group that steps 0, 1, … use."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in groups]
    optimizer = torch.optim.SGD(parameters, 1.0)
    schedule = make(optimizer)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [row[0] for row in used] if len(groups) == 1 else used


def test_multistep_drops_at_the_start_of_the_named_epochs():
    used = rates(lambda optimizer: multistep(optimizer, [2, 3], 0.1, steps_per_epoch=4), 16)
    assert used == pytest.approx([1.0] * 8 + [0.1] * 4 + [0.01] * 4)


def test_cosine():
    used = rates(lambda optimizer: cosine(optimizer, 10, final=0.2), 13)
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * min(t, 10) / 10)) for t in range(13)]
    assert used == pytest.approx(expected)
    assert used[0] == 1.0
    assert used[5] == pytest.approx(0.6)
    assert used[10:] == pytest.approx([0.2] * 3)


def test_cosine_with_warm_up():
    used = rates(lambda optimizer: cosine(optimizer, 12, warmup_steps=3), 12)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert used[3:] == pytest.approx(rates(lambda optimizer: cosine(optimizer, 9), 9))


def test_cosine_equals_torchs():
    reference = rates(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), 20)
    assert rates(lambda optimizer: cosine(optimizer, 20), 20) == pytest.approx(reference)


def test_one_cycle_is_two_straight_lines():
    used = rates(lambda optimizer: one_cycle(optimizer, 12, warmup_steps=4, final=0.1), 14)
    assert used[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert used[4:12] == pytest.approx([1 - 0.9 * t / 8 for t in range(8)])
    assert used[12:] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: multistep(optimizer, [1], 0.5, steps_per_epoch=2),
        lambda optimizer: cosine(optimizer, 6, warmup_steps=2),
        lambda optimizer: one_cycle(optimizer, 6, warmup_steps=2),
    ],
)
def test_groups_keep_their_ratio(make):
    for one, other in rates(make, 6, (0.5, 0.05)):
        assert one == pytest.approx(10 * other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: multistep(o, [1], steps_per_epoch=0), "steps_per_epoch must be positive, got 0"),
        (lambda o: multistep(o, [1], 0.0, steps_per_epoch=2), r"gamma must be positive, got 0\.0"),
        (lambda o: multistep(o, [3, 2], steps_per_epoch=2), r"milestones must be increasing .*\(3, 2\)"),
        (
            lambda o: multistep(o, [0], steps_per_epoch=2),
            r"milestones must be increasing epochs from 1 on, got \(0,\)",
        ),
        (lambda o: cosine(o, 0), "total_steps must be positive, got 0"),
        (lambda o: cosine(o, 5, warmup_steps=5), r"warmup_steps must lie in \[0, 5\), got 5"),
        (lambda o: cosine(o, 5, final=1.5), r"final must lie in \[0, 1\], got 1\.5"),
        (lambda o: one_cycle(o, 5, warmup_steps=-1), r"warmup_steps must lie in \[0, 5\), got -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1))
