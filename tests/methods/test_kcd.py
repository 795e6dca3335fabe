"""KCD against the authors' code index for index and pixel for pixel, plain loops, properties and corner cases."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.kcd import (
    KnowledgeValue,
    augment,
    condense,
    condensed_size,
    partition,
    prediction_entropy,
    ranks,
    strengths,
)
from kdrefs.methods.kd import kd_loss
from kdrefs.training import fit, update
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"kcd_official_{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The authors' code


def test_six_stages_equal_the_authors_index_for_index_and_pixel_for_pixel():
    fields = golden("estep_v3_N120")
    samples, tau = len(fields["images"]), fields["threshold"].item()
    value = KnowledgeValue(samples, variant="official")
    stored = fields["images"].clone()
    current = torch.arange(samples)
    for stage in range(6):
        assert torch.equal(current.sort().values, fields[f"s{stage}_remain_before"].sort().values)
        assert len(current) == fields["set_size_used_for_training_per_stage"][stage]
        rows = fields[f"s{stage}_entropy_rows"]
        for column in rows.T:
            value.record_entropies(current, column[current])
        keep = condensed_size(stage + 1, samples, tau=tau, variant="official")
        parts = partition(value.score(fields["hard_coded_alpha"].item()), keep, len(current) - keep)
        assert torch.equal(parts.kept, fields[f"s{stage}_remain_after"])
        assert torch.equal(parts.low, fields[f"s{stage}_mix_remain_K1L"])
        assert torch.equal(parts.dropped, fields[f"s{stage}_lost_K0"])
        stored[parts.low] = augment(stored[parts.low], stored[parts.dropped], variant="official")
        assert torch.equal(stored, fields[f"s{stage}_mixed_images"])
        current = parts.kept
    recorded = fields["entropy_record"]
    assert torch.equal(value.frequency, (recorded >= 0).sum(1))


def test_strengths_and_blended_pixels_equal_the_authors():
    fields = golden("eps_L10")
    share = strengths(10, variant="official")
    assert torch.equal(1 - share, fields["keep_rate"])
    torch.testing.assert_close(share, fields["eps"], rtol=0, atol=1e-7)
    constant = torch.full((10, 1), 200, dtype=torch.uint8)
    mixed = augment(constant, torch.zeros_like(constant), variant="official")
    assert torch.equal(mixed[:, 0], fields["mix_of_200_and_0"])
    fields = golden("mixup_uint8")
    mixed = augment(fields["K1L_images"], fields["K0_images"], variant="official")
    assert torch.equal(mixed, fields["mixed"])


def test_loss_and_entropy_equal_the_authors():
    fields = golden("losses")
    student, teacher, labels = (fields[name] for name in ("student_logits", "teacher_logits", "labels"))
    torch.testing.assert_close(prediction_entropy(student), fields["entropy_T1"], rtol=1e-5, atol=1e-6)
    value, gradient = value_and_gradient(lambda s: kd_loss(s, teacher, labels), student)
    assert value == pytest.approx(fields["total_loss_gamma0p1_alpha0p9"].item(), rel=1e-5)
    torch.testing.assert_close(gradient, fields["grad_total"], rtol=1e-5, atol=1e-6)
    alone = kd_loss(student, teacher, temperature=fields["kd_T"].item())
    assert alone.item() == pytest.approx(fields["distill_kl"].item(), rel=1e-5)


# The value


def test_entropy_equals_a_plain_loop():
    logits = draw(3, 4, 5)
    for row, value in zip(logits.view(-1, 5).tolist(), prediction_entropy(logits).view(-1), strict=True):
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row]
        assert value.item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-12)


@pytest.mark.parametrize("gap", [50.0, 104.0, 1e4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entropy_of_a_certain_prediction_is_0_where_the_authors_product_is_nan(gap, dtype):
    logits = torch.tensor([[0.0, -gap, -gap]], dtype=dtype)
    p = logits.float().softmax(1)
    assert (-(p * p.log()).sum()).isnan().item() == (gap >= 104)
    assert prediction_entropy(logits).item() == pytest.approx(0, abs=1e-18 if gap > 50 else 1e-19)
    assert prediction_entropy(torch.zeros(1, 7, dtype=dtype)).item() == pytest.approx(math.log(7), rel=1e-6)


def test_running_mean_is_equation_12_and_values_outside_the_batch_stay():
    value, by_hand, count = KnowledgeValue(6), [0.0] * 6, [0] * 6
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        indices = torch.randperm(6, generator=generator)[: 1 + step % 4]
        logits = draw(len(indices), 3, seed=step)
        value.record(indices, logits)
        for n, entropy in zip(indices.tolist(), prediction_entropy(logits).tolist(), strict=True):
            count[n] += 1
            by_hand[n] = (count[n] - 1) / count[n] * by_hand[n] + entropy / count[n]
    assert value.frequency.tolist() == count
    torch.testing.assert_close(value.mean, torch.tensor(by_hand, dtype=torch.float64))
    expected = [v * f**0.03 for v, f in zip(by_hand, count, strict=True)]
    torch.testing.assert_close(value.score(), torch.tensor(expected, dtype=torch.float64))


def test_members_have_values_of_their_own():
    both, alone = KnowledgeValue(5, members=2), [KnowledgeValue(5) for _ in range(2)]
    for step in range(3):
        indices = torch.stack([torch.randperm(5)[:3] for _ in range(2)])
        logits = draw(2, 3, 4, seed=step).float()
        both.record(indices, logits)
        for one, i, x in zip(alone, indices, logits, strict=True):
            one.record(i, x)
    assert torch.equal(both.score(), torch.stack([one.score() for one in alone]))


def test_never_recorded_points_come_first_and_bad_logits_are_not_recorded():
    value = KnowledgeValue(4)
    logits = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [3.0, 0.0]])
    value.record(torch.tensor([0, 1, 2]), logits)
    assert value.frequency.tolist() == [1, 0, 1, 0]
    assert condense(value.score(), 4).tolist() == [1, 3, 0, 2]


def test_official_does_not_count_an_entropy_of_0():
    indices, entropies = torch.arange(2), torch.tensor([0.0, 0.5])
    counts = {}
    for variant in (None, "official"):
        value = KnowledgeValue(2, variant=variant)
        value.record_entropies(indices, entropies)
        counts[variant] = value.frequency.tolist()
    assert counts == {None: [1, 1], "official": [0, 1]}


def test_more_training_raises_the_score_and_alpha_0_ignores_it():
    value = KnowledgeValue(2)
    for indices in ([0, 1], [0], [0]):
        value.record_entropies(torch.tensor(indices), torch.full((len(indices),), 0.5))
    assert value.score()[0] / value.score()[1] == pytest.approx(3**0.03)
    assert value.score(0.0).tolist() == [0.5, 0.5]


def test_state_is_the_means_and_survives_a_checkpoint(tmp_path):
    net = torch.nn.Linear(3, 2)
    batches = [(torch.arange(4) + 4 * k, draw(4, 3, seed=k).float()) for k in range(3)]

    class Set:
        def __len__(self):
            return 3

        def epoch(self, epoch, start=0):
            yield from batches[start:]

    def step(state, batch):
        logits = state["net"](batch[1])
        update(state["optimizer"], logits.square().mean())
        state["value"].record(batch[0], logits)
        return {}

    def train(path, **options):
        torch.manual_seed(0)
        net.reset_parameters()
        state = {
            "net": net,
            "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
            "value": KnowledgeValue(12),
        }
        fit(step, state, Set(), epochs=2, checkpoint=path, **options)
        return state["value"]

    whole = train(tmp_path / "whole")

    def interrupted(state, batch):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return step(state, batch)

    left, plain = 4, step
    step = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", checkpoint_every=0.0)
    step = plain
    resumed = train(tmp_path / "parts")
    assert torch.equal(resumed.total, whole.total)
    assert resumed.frequency.tolist() == [2] * 12


def test_a_state_of_another_set_is_refused_and_changes_nothing():
    value = KnowledgeValue(3)
    value.record_entropies(torch.arange(3), torch.ones(3))
    before = value.total.clone()
    with pytest.raises(ValueError, match=r"state: expected 'total' of shape \(3,\), got \(4,\)"):
        value.load_state_dict(KnowledgeValue(4).state_dict())
    with pytest.raises(ValueError, match=r"'frequency' of shape .* got nothing"):
        value.load_state_dict({"total": torch.zeros(3)})
    assert torch.equal(value.total, before)


# Ranks and parts


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_parts_follow_the_ranks_over_all_points(values, data):
    score = torch.tensor(values, dtype=torch.float64)
    keep = data.draw(st.integers(1, len(values)))
    removed = data.draw(st.integers(0, min(keep, len(values) - keep)))
    order = sorted(range(len(values)), key=lambda n: (-values[n], n))
    assert [ranks(score)[n].item() for n in order] == list(range(len(order)))
    parts = partition(score, keep, removed)
    assert parts.kept.tolist() == order[:keep] == condense(score, keep).tolist()
    assert len(parts.low) == len(parts.dropped) == removed
    assert parts.low.tolist() == order[keep - removed : keep]
    assert parts.dropped.tolist() == order[keep : keep + removed]


def test_kept_points_are_those_above_1_minus_tau():
    score, tau = draw(10), 0.7
    p = 1 - ranks(score).double() / 10
    kept = condense(score, condensed_size(5, 10, tau=tau))
    assert sorted(kept.tolist()) == (p > 1 - tau + 1e-9).nonzero().flatten().tolist()


def test_sizes_of_the_official_schedule():
    official = [condensed_size(stage, 50_000, variant="official") for stage in range(8)]
    assert official == [50_000, 47_500, 45_000, 42_500, 40_000, 37_500, 35_000, 35_000]
    assert sum(official[:6]) / 6 / 50_000 == 0.875


@given(st.integers(1, 500), st.integers(1, 8), st.floats(0.05, 1.0))
def test_default_sizes_fall_from_all_to_the_floor_and_stay_there(samples, stages, tau):
    sizes = [condensed_size(stage, samples, tau=tau, stages=stages) for stage in range(stages + 3)]
    assert sizes[0] == samples
    assert sizes == sorted(sizes, reverse=True)
    if stages > 1:
        assert set(sizes[stages - 1 :]) == {math.ceil(round(tau * samples, 6))}
    steps = [a - b for a, b in pairwise(sizes[:stages])]
    assert not steps or max(steps) - min(steps) <= 1


def test_a_stage_that_removes_nothing_has_no_points_to_blend():
    parts = partition(draw(10), 7, 0)
    assert len(parts.kept) == 7
    assert len(parts.low) == len(parts.dropped) == 0
    images = torch.zeros(10, 2, 2, 1, dtype=torch.uint8)
    assert augment(images[parts.low], images[parts.dropped]).shape == (0, 2, 2, 1)


# Blending


def test_strengths_run_from_0_to_the_maximum_and_the_official_ones_stop_short():
    assert strengths(4).tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert strengths(4, variant="official").tolist() == pytest.approx([0, 0.075, 0.15, 0.225])
    assert strengths(1).tolist() == strengths(1, variant="official").tolist() == [0.0]
    assert strengths(0).shape == (0,)


@pytest.mark.parametrize("variant", [None, "official"])
def test_blending_equals_a_plain_loop_and_leaves_its_arguments(variant):
    low, dropped = ((100 * draw(5, 2, 3, seed=k).abs()).clamp(0, 255).to(torch.uint8) for k in range(2))
    before = low.clone()
    mixed = augment(low, dropped, variant=variant)
    for j, (image, a, b) in enumerate(zip(mixed, low, dropped, strict=True)):
        share = 0.3 * j / (5 if variant else 4)
        exact = (1 - share) * a.double() + share * b.double()
        wanted = exact.floor() if variant else exact.round()
        near = (exact - exact.round()).abs() < 1e-4 if variant else ((exact % 1) - 0.5).abs() < 1e-4
        assert torch.equal(image[~near], wanted[~near].to(torch.uint8))
    assert torch.equal(low, before)


def test_blending_of_floating_images_is_exact_and_keeps_their_type():
    low, dropped = draw(3, 2, 2), draw(3, 2, 2, seed=1)
    mixed = augment(low, dropped, maximum=0.5)
    torch.testing.assert_close(mixed[0], low[0])
    torch.testing.assert_close(mixed[2], (low[2] + dropped[2]) / 2)
    assert augment(low.bfloat16(), dropped.bfloat16()).dtype == torch.bfloat16


def test_persistent_blending_loses_the_clean_image_and_ours_does_not():
    clean = torch.tensor([[200], [100], [0]], dtype=torch.uint8)
    stored = clean.clone()
    for _ in range(2):  # the second point is at the border twice
        stored[:2] = augment(stored[:2], stored[[2, 2]], variant="official")
    assert stored[1].item() < augment(clean[:2], clean[[2, 2]], variant="official")[1].item() < 100
    assert augment(clean[:2], clean[[2, 2]])[1].item() == 70


# Devices and errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_values_are_those_of_the_cpu():
    values = [KnowledgeValue(9, device=device) for device in ("cpu", "cuda")]
    for step in range(3):
        indices, logits = torch.randperm(9)[:5], draw(5, 4, seed=step)
        for value in values:
            value.record(indices.to(value.total.device), logits.to(value.total.device))
    assert values[1].total.device.type == "cuda"
    torch.testing.assert_close(values[1].score().cpu(), values[0].score())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KnowledgeValue(0), "samples: expected 1 or more, got 0"),
        (lambda: KnowledgeValue(3, members=0), "members: expected 1 or more, got 0"),
        (lambda: KnowledgeValue(3, variant="ours"), "variant: expected one of"),
        (lambda: KnowledgeValue(3).score(math.nan), "alpha: expected a finite number, got nan"),
        (
            lambda: KnowledgeValue(3).record(torch.arange(2), torch.zeros(3, 2)),
            r"indices: expected \(batch\).*got \(2,\) and \(3,\)",
        ),
        (
            lambda: KnowledgeValue(3, members=2).record(torch.arange(2), torch.zeros(2, 2)),
            r"indices: expected \(members, batch\)",
        ),
        (lambda: prediction_entropy(torch.zeros(2, 3, dtype=torch.int64)), "logits: expected a floating"),
        (lambda: condense(torch.zeros(2, 2), 1), "score: expected a floating vector"),
        (lambda: ranks(torch.tensor([0.0, math.nan])), "score: 1 of 2 values are NaN"),
        (lambda: condense(torch.zeros(3), 4), "keep: expected 1 to 3, got 4"),
        (lambda: partition(torch.zeros(4), 3, 2), "removed: expected 0 to 1, got 2"),
        (lambda: condensed_size(-1, 5), "stage: expected 0 or more, got -1"),
        (lambda: condensed_size(1, 5, tau=0.0), "tau: expected a number above 0 and at most 1, got 0.0"),
        (lambda: condensed_size(1, 5, variant="v3"), "variant: expected one of"),
        (lambda: strengths(3, 1.5), "maximum: expected a number from 0 to 1, got 1.5"),
        (lambda: augment(torch.zeros(2, 3), torch.zeros(3, 3)), r"dropped: expected torch.float32 \(2, 3\)"),
        (
            lambda: augment(torch.zeros(2, 3).long(), torch.zeros(2, 3).long()),
            "low: expected floating or uint8",
        ),
    ],
)
def test_errors_name_what_came(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_student_s_logits_get_no_gradient_from_their_value():
    logits = torch.zeros(2, 3, requires_grad=True)
    assert not prediction_entropy(logits).requires_grad
    assert F.softmax(logits, 1).requires_grad
