"""DarkRank against its authors' and RKD's numbers, enumerated permutations, and the corners of its arguments."""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.darkrank import hard_darkrank_loss, soft_darkrank_loss
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LOSSES = {"soft": soft_darkrank_loss, "hard": hard_darkrank_loss}
VARIANTS = [("soft", None), ("soft", "official"), ("hard", None), ("hard", "official"), ("hard", "rkd")]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The authors' numbers and RKD's


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_soft_equals_the_authors(case):
    with np.load(GOLDEN / "darkrank_official_listnet_p1.5_s2.0_L4.npz", allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        expected, expected_gradient = golden[f"{case}_loss"].item(), golden[f"{case}_grad_s_official"]
    scale, power = 2.0, 1.5
    options = {"alpha": scale**power, "beta": 2 * power, "variant": "official"}
    value, gradient = value_and_gradient(
        lambda s: soft_darkrank_loss(s, teacher, normalize=False, **options), student
    )
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)
    # The rows have unit norm, so that normalising them again changes the gradient alone.
    assert soft_darkrank_loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize(("alpha", "beta", "length"), [(3, 3, 4), (2, 3, 4), (1, 2, 3)])
def test_hard_equals_rkd(case, alpha, beta, length):
    with np.load(GOLDEN / "darkrank_rkdrepo_hard.npz", allow_pickle=False) as golden:
        student, teacher = (torch.from_numpy(golden[f"{case}_{side}"]) for side in "st")
        name = f"a{alpha}b{beta}L{length}_{case}"
        expected, expected_gradient = golden[f"{name}_loss"].item(), golden[f"{name}_grad_s"]
    options = {"alpha": alpha, "beta": beta, "list_length": length}
    value, gradient = value_and_gradient(
        lambda s: hard_darkrank_loss(s, teacher, variant="rkd", **options), student
    )
    assert value == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-9, atol=1e-12)
    plain = hard_darkrank_loss(student, teacher, normalize=False, **options).item()
    assert plain == pytest.approx(expected, rel=1e-9)


def test_rkd_takes_four_neighbours_by_default():
    student, teacher = rows(7, 3), rows(7, 5, seed=1)
    four = hard_darkrank_loss(student, teacher, variant="rkd", list_length=4).item()
    assert hard_darkrank_loss(student, teacher, variant="rkd").item() == four
    assert hard_darkrank_loss(student, teacher).item() != pytest.approx(four, rel=1e-3)


# Enumerated permutations


def lists(student: Tensor, teacher: Tensor, alpha: float, beta: float, length: int, queries: int) -> list:
    """For each query the scores of student and teacher of its neighbours, from near to far by the teacher."""
    found = []
    for q in range(queries):
        others = [j for j in range(len(student)) if j != q]
        distances = [
            [math.dist(x[q].tolist(), x[j].tolist()) for j in range(len(x))] for x in (student, teacher)
        ]
        others.sort(key=lambda j: distances[1][j])
        found.append([[-alpha * side[j] ** beta for j in others[:length]] for side in distances])
    return found


def log_likelihood(scores: list[float]) -> float:
    """Plackett-Luce: of drawing the candidates in the order in which they stand."""
    return sum(s - math.log(sum(math.exp(x) for x in scores[i:])) for i, s in enumerate(scores))


@pytest.mark.parametrize("variant", [None, "official"])
@pytest.mark.parametrize(
    ("alpha", "beta", "length"), [(3.0, 3.0, 4), (0.7, 1.0, 3), (2.0, 4.0, 5), (1.0, 2.0, 1)]
)
def test_soft_equals_a_loop_over_all_permutations(alpha, beta, length, variant):
    student, teacher = F.normalize(rows(6, 3)), F.normalize(rows(6, 4, seed=1))
    queries = 3 if variant else 6
    total = 0.0
    for s, t in lists(student, teacher, alpha, beta, length, queries):
        for order in permutations(range(len(s))):
            log_p, log_q = (log_likelihood([x[k] for k in order]) for x in (t, s))
            total += math.exp(log_p) * ((0.0 if variant else log_p) - log_q)
    options = {"alpha": alpha, "beta": beta, "list_length": length, "variant": variant}
    value = soft_darkrank_loss(3 * student, teacher, **options).item()
    assert value == pytest.approx(total / queries, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("variant", [None, "official"])
@pytest.mark.parametrize("length", [1, 3, None])
def test_hard_equals_a_loop(length, variant):
    student, teacher = F.normalize(rows(6, 3)), F.normalize(rows(6, 4, seed=1))
    queries = 3 if variant else 6
    losses = [-log_likelihood(s) for s, _ in lists(student, teacher, 1.5, 3.0, length or 5, queries)]
    if variant:  # the authors' guard
        losses = [-math.log(math.exp(-loss) + 1e-12) for loss in losses]
    value = hard_darkrank_loss(student, teacher, alpha=1.5, list_length=length, variant=variant).item()
    assert value == pytest.approx(sum(losses) / queries, rel=1e-8, abs=1e-11)


def test_official_value_saturates_and_its_gradient_does_not():
    teacher = rows(8, 4)
    student = -3 * teacher + rows(8, 4, seed=1)
    options = {"alpha": 40.0, "beta": 4.0, "list_length": None}
    value, gradient = value_and_gradient(
        lambda s: hard_darkrank_loss(s, teacher, variant="official", **options), student
    )
    assert value == pytest.approx(-math.log(1e-12), rel=1e-6)
    half = hard_darkrank_loss(student, teacher, **options).item()
    assert half > 60
    assert gradient.norm() > 1


@pytest.mark.parametrize("name", LOSSES)
def test_official_gradient_passes_the_queries_by(name):
    student, teacher = rows(6, 3), rows(6, 4, seed=1)
    gradients = [
        value_and_gradient(lambda s, v=v: LOSSES[name](s, teacher, list_length=2, variant=v), student)[1]
        for v in (None, "official")
    ]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()
    alone = value_and_gradient(
        lambda s: LOSSES[name](s, teacher[:2], list_length=1, variant="official"), student[:2]
    )[1]
    assert alone.abs().max() == 0  # a list of one says nothing


# Invariances and corners


@given(
    samples=st.integers(2, 7),
    length=st.integers(1, 6),
    alpha=st.floats(0.1, 10),
    beta=st.floats(0.5, 5),
    seed=st.integers(0, 2**16),
)
def test_invariances(samples, length, alpha, beta, seed):
    student, teacher = rows(samples, 3, seed=seed), rows(samples, 4, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(samples, generator=generator)
    rotation = torch.linalg.qr(rows(3, 3, seed=seed + 2))[0]
    options = {"alpha": alpha, "beta": beta, "list_length": length}
    for loss in LOSSES.values():
        value = loss(student, teacher, **options).item()
        assert value >= -1e-12
        same = {
            "order of the samples": (student[order], teacher[order]),
            "rotation": (student @ rotation, teacher),
            "lengths of the rows": (student * (0.1 + torch.rand(samples, 1).double()), 7 * teacher),
            "further dimensions": (F.pad(student, (0, 2)), teacher),
        }
        for change, (s, t) in same.items():
            assert loss(s, t, **options).item() == pytest.approx(value, rel=1e-6, abs=1e-9), change
    assert soft_darkrank_loss(teacher, teacher, **options).item() == pytest.approx(0, abs=1e-12)
    best = hard_darkrank_loss(teacher, teacher, **options).item()
    assert best <= hard_darkrank_loss(-teacher.flip(0), teacher, **options).item() + 1e-9


def test_soft_is_cross_entropy_less_the_teacher_s_entropy():
    student, teacher = rows(6, 3), rows(6, 4, seed=1)
    s, t = torch.cat([student, student]), torch.cat([teacher, teacher])
    # Twice the same batch: the first half are the queries, each of which has its own duplicate as a neighbour.
    gaps = [(soft_darkrank_loss(x, t, variant="official") - soft_darkrank_loss(x, t)).item() for x in (s, t)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9)
    assert gaps[0] > 0.1


def test_a_query_is_never_its_own_neighbour():
    teacher = rows(5, 3)
    teacher[3] = teacher[1]
    student = rows(5, 3, seed=1)
    # Query 1: its duplicate 3 comes first, and nothing of the loss is about the pair (1, 1).
    alone = torch.stack([student[1], student[3]])
    far = torch.cat([alone, 50 * rows(1, 3, seed=2)])
    near = torch.stack([teacher[1], teacher[3], -teacher[1]])
    value = hard_darkrank_loss(far, near, normalize=False, alpha=1.0, beta=1.0).item()
    distances = torch.cdist(far, far)
    expected = 0.0
    for q, (first, second) in enumerate([(1, 2), (0, 2), (0, 1)]):
        one, two = -distances[q, first], -distances[q, second]
        expected -= float(one - torch.logaddexp(one, two)) / 3
    assert value == pytest.approx(expected, rel=1e-9)
    assert math.isfinite(hard_darkrank_loss(student, teacher).item())


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 3.0])
def test_gradients_stay_finite(name, variant, beta):
    zero, twin = rows(6, 3).float(), rows(6, 3).float()
    zero[2] = 0
    twin[4] = twin[0]
    teacher = rows(6, 4, seed=1).float()
    duplicates = teacher.clone()
    duplicates[5] = duplicates[1]
    for student in (zero, twin, 1e12 * twin, 1e-12 * twin, torch.ones(6, 3), twin[:2], twin[:3]):
        for guide in (teacher, duplicates, torch.ones(6, 4)):
            if variant == "rkd" and student.abs().max() > 1e6:  # distances of rows as they come
                continue
            value, gradient = value_and_gradient(
                lambda s, g=guide: LOSSES[name](s, g[: len(s)], beta=beta, variant=variant), student
            )
            assert math.isfinite(value)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_gradient_is_the_derivative(name, variant):
    student, teacher = rows(5, 3).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    if variant != "official":
        assert torch.autograd.gradcheck(
            lambda s: LOSSES[name](s, teacher, list_length=3, variant=variant), student
        )
    before = student.detach().clone(), teacher.detach().clone()
    LOSSES[name](student, teacher, variant=variant).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_longer_than_the_batch_takes_all_others(name):
    student, teacher = rows(4, 3), rows(4, 3, seed=1)
    value = LOSSES[name](student, teacher, list_length=3).item()
    assert LOSSES[name](student, teacher, list_length=9).item() == value


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_counts_in_single(name):
    student, teacher = rows(6, 4).bfloat16(), rows(6, 4, seed=1).bfloat16()
    exact = LOSSES[name](student.float(), teacher.float())
    half = LOSSES[name](student, teacher)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](student.float(), teacher.float()), exact, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_compile_without_breaks(name, variant, unchecked, compiler):
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return LOSSES[name](student, teacher, variant=variant)

    student, teacher = rows(6, 4).float(), rows(6, 4, seed=1).float()
    plain = value_and_gradient(lambda s: loss(s, teacher), student)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(lambda s: compiled(s, teacher), student)
    assert value == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(gradient, plain[1])


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_vmap_over_students(name, variant, unchecked):
    assert_vmap_equals_a_loop(
        lambda s, t: LOSSES[name](s, t, variant=variant), rows(3, 5, 4), rows(3, 5, 6, seed=1)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_cuda_without_waiting_for_the_device(name, variant):
    student, teacher = rows(6, 4), rows(6, 4, seed=1)
    expected, expected_gradient = value_and_gradient(
        lambda s: LOSSES[name](s, teacher, variant=variant), student
    )
    on_device, guide = student.cuda().requires_grad_(), teacher.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = LOSSES[name](on_device, guide, variant=variant)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(on_device.grad.cpu(), expected_gradient)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": rows(4)}, r"student: expected a floating tensor \(batch, features\)"),
        ({"teacher": rows(4, 3).long()}, "teacher: expected a floating tensor"),
        ({"teacher": rows(3, 3)}, r"teacher: expected as many rows as student \(4\), got 3"),
        ({"student": rows(1, 3), "teacher": rows(1, 3)}, "student: expected at least 2 samples"),
        ({"alpha": 0}, "alpha: expected a finite number above 0, got 0"),
        ({"beta": -1.0}, "beta: expected a finite number above 0, got -1.0"),
        ({"list_length": 0}, "list_length: expected an integer from 1 .*, got 0"),
        ({"list_length": 2.0}, r"list_length: expected an integer from 1 .*, got 2\.0"),
        ({"list_length": True}, "list_length: expected an integer from 1 .*, got True"),
        ({"variant": "listnet"}, "variant: expected one of .*, got 'listnet'"),
    ],
)
def test_errors_name_the_argument(unchecked, name, changes, message):
    arguments = {"student": rows(4, 3), "teacher": rows(4, 3, seed=1)} | changes
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(ValueError, match=message):
        LOSSES[name](student, teacher, **arguments)


def test_soft_names_its_longest_list():
    with pytest.raises(ValueError, match="list_length: expected an integer from 1 to 12, got 13"):
        soft_darkrank_loss(rows(20, 3), rows(20, 3), list_length=13)
    with pytest.raises(ValueError, match=r"variant: expected one of .*, got 'rkd'"):
        soft_darkrank_loss(rows(4, 3), rows(4, 3), variant="rkd")
