"""PKT against the authors' numbers, plain loops, closed forms and the properties its definition promises."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from kdrefs.divergences import softened_cross_entropy
from kdrefs.kernels import KERNELS, cosine_kernel
from kdrefs.methods import _pkt_official, pkt
from kdrefs.methods.pkt import conditional_probabilities, nystrom_pkt_loss, pkt_loss, supervised_pkt_loss
from kdrefs.pair_sums import cosine_neighbour_kl
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
DIVERGENCES = ("kl", "jeffreys", "quadratic")
PKTH_KERNELS = ("rbf", "adaptive_rbf", "cosine", "student_t", "cauchy")
PKTH_DIVERGENCES = ("kl", "abs", "squared", "jeffreys", "exponential", "kagan")


def golden(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The file's arrays by case and field."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / f"pkt_official_{name}.npz", allow_pickle=False) as arrays:
        for key, value in arrays.items():
            case, _, field = key.rpartition("__")
            cases.setdefault(case, {})[field] = value
    return cases


def assert_matches(loss, case: dict[str, np.ndarray], student: np.ndarray, noise: float = 0.0) -> None:
    value, gradient = value_and_gradient(loss, student)
    rtol = 1e-9 if student.dtype == np.float64 else 1e-5
    assert value == pytest.approx(case["loss"].item(), rel=rtol, abs=1e-12 if rtol == 1e-9 else 1e-9)
    assert gradient.isfinite().all()
    theirs = case["grad_student"]
    finite = np.isfinite(theirs)
    assert finite.any()
    atol = max(rtol, noise) * np.abs(theirs[finite]).max() + 1e-12
    np.testing.assert_allclose(gradient.numpy()[finite], theirs[finite], rtol=rtol, atol=atol)


def features(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


# The authors' numbers


@pytest.mark.parametrize("name", sorted(golden("cosine_loss_some")))
def test_official_variant_equals_the_authors_loss(name):
    case = golden("cosine_loss_some")[name]
    teacher = torch.from_numpy(case["teacher"])
    assert_matches(lambda s: pkt_loss(s, teacher, variant="official"), case, case["student"])


@pytest.mark.parametrize("name", sorted(golden("cosine_loss_eps")))
def test_official_variant_has_epsilon_in_the_authors_places(name):
    case = golden("cosine_loss_eps")[name]
    teacher, eps = torch.from_numpy(case["teacher"]), case["eps"].item()
    # Opposite vectors leave a kernel of pure rounding (1e-16), which shows beside an epsilon as small as 1e-12.
    noise = 1e-4 if name == "f64_antipodal__eps1e-12" else 0.0
    assert_matches(lambda s: _pkt_official.official_pkt_loss(s, teacher, eps), case, case["student"], noise)


@pytest.mark.parametrize("name", sorted(golden("supervised_loss")))
def test_official_supervised_term_equals_the_authors_loss(name):
    case = golden("supervised_loss")[name]
    labels = torch.from_numpy(case["labels"])
    assert_matches(lambda s: supervised_pkt_loss(s, labels, variant="official"), case, case["student"])


@pytest.mark.parametrize("name", sorted(golden("repo_kd_loss")))
def test_softened_cross_entropy_is_the_repository_s_kd_baseline(name):
    case = golden("repo_kd_loss")[name]
    teacher, temperature = torch.from_numpy(case["teacher_logits"]), case["T"].item()
    assert_matches(lambda s: softened_cross_entropy(s, teacher, temperature), case, case["student_logits"])


PKTH_CASES = [name for name, case in golden("pkth_kernels_some").items() if "loss" in case]


@pytest.mark.parametrize("name", PKTH_CASES)
def test_pkth_variant_equals_the_authors_later_loss(name):
    cases = golden("pkth_kernels_some")
    inputs, kernel, divergence = name.split("__")
    student, teacher = cases[inputs]["student"], torch.from_numpy(cases[inputs]["teacher"])
    assert_matches(
        lambda s: pkt_loss(s, teacher, kernel=kernel, divergence=divergence, variant="pkth"),
        cases[name],
        student,
    )


def test_golden_files_cover_every_pkth_kernel_and_divergence():
    covered = {tuple(name.split("__")[1:]) for name in PKTH_CASES}
    assert covered == {*itertools.product(PKTH_KERNELS, PKTH_DIVERGENCES), ("combined", "combined")}


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_official_is_ours_divided_by_the_batch_size(rows):
    student, teacher = features(rows, 5), features(rows, 9, seed=1)
    ours, our_gradient = value_and_gradient(lambda s: pkt_loss(s, teacher), student)
    theirs, their_gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, variant="official"), student)
    assert theirs == pytest.approx(ours / rows, rel=1e-4)
    torch.testing.assert_close(their_gradient, our_gradient / rows, rtol=1e-3, atol=1e-6)
    labels = torch.arange(rows) % 3
    assert supervised_pkt_loss(student, labels, variant="official").item() == pytest.approx(
        supervised_pkt_loss(student, labels).item() / rows, rel=1e-4
    )


# Plain loops and closed forms


def loop_kernel(a: Tensor, b: Tensor, kernel: str, bandwidth: float) -> float:
    distance = math.dist(a.tolist(), b.tolist())
    match kernel:
        case "cosine":
            return (torch.dot(a, b) / (a.norm() * b.norm()) + 1).item() / 2
        case "gaussian":
            return math.exp(-(distance**2) / bandwidth)
        case "laplace":
            return math.exp(-distance / bandwidth)
        case "student_t":
            return 1 / (1 + distance / bandwidth)
        case _:
            return 1 / (1 + (distance / bandwidth) ** 2)


def loop_conditionals(x: Tensor, kernel: str, bandwidth: float, diagonal: bool) -> list[dict[int, float]]:
    rows = []
    for i, a in enumerate(x):
        row = {j: loop_kernel(a, b, kernel, bandwidth) for j, b in enumerate(x) if diagonal or j != i}
        rows.append({j: value / sum(row.values()) for j, value in row.items()})
    return rows


def loop_divergence(p: list[dict[int, float]], q: list[dict[int, float]], divergence: str) -> float:
    term = {
        "kl": lambda a, b: a * math.log(a / b),
        "jeffreys": lambda a, b: (a - b) * math.log(a / b),
        "quadratic": lambda a, b: (a - b) ** 2,
    }[divergence]
    return sum(term(row[j], other[j]) for row, other in zip(p, q, strict=True) for j in row) / len(p)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_equals_a_plain_loop(kernel, divergence, diagonal):
    student, teacher = features(6, 4), features(6, 7, seed=1)
    widths = {} if kernel == "cosine" else {"bandwidth": 2.0, "teacher_bandwidth": 3.0}
    p = loop_conditionals(teacher, kernel, 3.0, diagonal)
    q = loop_conditionals(student, kernel, 2.0, diagonal)
    loss = pkt_loss(student, teacher, kernel=kernel, divergence=divergence, diagonal=diagonal, **widths)
    assert loss.item() == pytest.approx(loop_divergence(p, q, divergence), rel=1e-10)
    log_p = conditional_probabilities(
        teacher, kernel=kernel, diagonal=diagonal, bandwidth=widths.get("teacher_bandwidth")
    )
    expected = [[row.get(j, 0.0) for j in range(6)] for row in p]
    torch.testing.assert_close(log_p.exp(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("divergence", ["kl", "quadratic"])
def test_supervised_term_equals_a_plain_loop(divergence, diagonal):
    student, labels = features(6, 4), torch.tensor([3, 1, 3, 1, 3, 1])
    q = loop_conditionals(student, "cosine", 1.0, diagonal)
    total = 0.0
    for i in range(6):
        same = [j for j in q[i] if labels[i] == labels[j]]
        for j in q[i]:
            p = 1 / len(same) if j in same else 0.0
            if divergence == "kl":
                total += p * math.log(p / q[i][j]) if p else 0.0
            else:
                total += (p - q[i][j]) ** 2
    loss = supervised_pkt_loss(student, labels, divergence=divergence, diagonal=diagonal)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


def test_a_sample_alone_in_its_class_adds_nothing_without_the_diagonal():
    student = features(4, 3)
    loss = supervised_pkt_loss(student, torch.tensor([0, 1, 2, 3]), diagonal=False)
    assert loss.item() == 0.0


def test_two_samples_have_the_closed_form():
    # Angle of 60 degrees: K = 3/4; right angle: K = 1/2. Rows (1, K) / (1 + K).
    student = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    teacher = torch.eye(2, dtype=torch.float64)
    expected = 2 / 3 * math.log((2 / 3) / (4 / 7)) + 1 / 3 * math.log((1 / 3) / (3 / 7))
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("cosine", "expected"), [(0.0, 0.0), (0.5, 0.095), (0.9, 0.228), (0.999, 0.263)])
def test_without_the_diagonal_a_collapsed_student_has_no_loss(cosine, expected):
    teacher = torch.eye(6, dtype=torch.float64)
    gram = torch.full((6, 6), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    student = torch.linalg.cholesky(gram)
    assert pkt_loss(student, teacher, diagonal=False).item() == pytest.approx(0, abs=1e-12)
    assert 6 * pkt_loss(student, teacher).item() == pytest.approx(expected, abs=5e-4)


def test_zero_loss_with_the_diagonal_means_equal_kernels():
    teacher, student = features(5, 3), features(5, 3, seed=10).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [student], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pkt_loss(student, teacher)
        loss.backward()
        return loss

    assert closure() > 0.01
    optimizer.step(closure)
    assert pkt_loss(student, teacher).item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(cosine_kernel(student), cosine_kernel(teacher), rtol=0, atol=1e-6)


# Gradients


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_derivative(kernel, divergence, diagonal):
    teacher = features(5, 6, seed=1)
    student = features(5, 3).requires_grad_()
    bandwidth = (
        None if kernel == "cosine" else 2.0
    )  # the Gaussian's own is a constant to autograd, not to differences

    def loss(s: Tensor) -> Tensor:
        return pkt_loss(
            s, teacher, kernel=kernel, divergence=divergence, diagonal=diagonal, bandwidth=bandwidth
        )

    assert torch.autograd.gradcheck(loss, (student,))
    labels = torch.tensor([0, 0, 1, 1, 0])
    if divergence != "jeffreys":
        assert torch.autograd.gradcheck(
            lambda s: supervised_pkt_loss(
                s, labels, kernel=kernel, divergence=divergence, bandwidth=bandwidth
            ),
            (student,),
        )


@pytest.mark.parametrize("variant", [None, "official", "pkth"])
def test_no_gradient_reaches_the_teacher(variant):
    student, teacher = features(4, 3).requires_grad_(), features(4, 3, seed=1).requires_grad_()
    pkt_loss(student, teacher, variant=variant).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    if variant is None:
        nystrom_pkt_loss(student, teacher, torch.tensor([0, 1])).backward()
        assert teacher.grad is None


def awkward(name: str, rows: int, width: int) -> Tensor:
    x = features(rows, width, dtype=torch.float32)
    if name == "zero row":
        x[1] = 0
    elif name == "all zero":
        x = torch.zeros_like(x)
    elif name == "duplicate rows":
        x[1] = x[0]
    elif name == "all equal":
        x = x[:1].expand(rows, width).clone()
    elif name == "opposite rows":
        x[1] = -x[0]
    elif name == "mixed norms":
        x = x * torch.logspace(-12, 12, rows).unsqueeze(1)
    else:
        x = x * float(name)
    return x


AWKWARD = [
    "zero row",
    "all zero",
    "duplicate rows",
    "all equal",
    "opposite rows",
    "mixed norms",
    "1e-12",
    "1e12",
]


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", AWKWARD)
def test_value_and_gradient_stay_finite_in_float32(name, side):
    student = awkward(name, 8, 4) if side != "teacher" else features(8, 4, dtype=torch.float32)
    teacher = awkward(name, 8, 6) if side != "student" else features(8, 6, dtype=torch.float32)
    for kernel, divergence, diagonal in itertools.product(KERNELS, DIVERGENCES, (True, False)):
        options = {"kernel": kernel, "divergence": divergence, "diagonal": diagonal}
        value, gradient = value_and_gradient(lambda s, o=options: pkt_loss(s, teacher, **o), student)
        assert math.isfinite(value), options
        assert value >= -1e-6, options
        assert gradient.isfinite().all(), options


@pytest.mark.parametrize("name", ["zero row", "all zero", "duplicate rows", "opposite rows", "1e-12", "1e12"])
def test_variants_stay_finite_where_the_authors_code_does_not(name):
    student, teacher = awkward(name, 8, 4), awkward(name, 8, 6)
    losses = [lambda s: pkt_loss(s, teacher, variant="official")]
    losses.append(lambda s: supervised_pkt_loss(s, torch.arange(8) % 3, variant="official"))
    if not name.startswith("1e"):
        for kernel in PKTH_KERNELS:
            losses.append(lambda s, k=kernel: pkt_loss(s, teacher, kernel=k, variant="pkth"))
    for loss in losses:
        value, gradient = value_and_gradient(loss, student)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


def test_the_scale_of_a_row_changes_nothing_from_1e_minus_30_to_1e30():
    student, teacher = features(8, 4, dtype=torch.float32), features(8, 6, seed=1, dtype=torch.float32)
    reference, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher), student)
    scales = torch.logspace(-30, 30, 8).unsqueeze(1)
    scaled, scaled_gradient = value_and_gradient(lambda s: pkt_loss(s, teacher), student * scales)
    assert scaled == pytest.approx(reference, rel=1e-5)
    torch.testing.assert_close(scaled_gradient * scales, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tiny_batches(rows, kernel):
    student, teacher = features(rows, 3), features(rows, 5, seed=1)
    value, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, kernel=kernel), student)
    assert gradient.isfinite().all()
    if rows == 1:  # the only distribution over one sample
        assert value == 0.0
    else:
        # With its default bandwidth the Gaussian sees two points at the same distance, whatever they are.
        assert value == 0.0 if kernel == "gaussian" else value > 0
        # One neighbour is picked with certainty.
        assert pkt_loss(student, teacher, kernel=kernel, diagonal=False).item() == 0.0


def test_a_single_sample_has_no_neighbour_without_the_diagonal(unchecked):
    with pytest.raises(ValueError, match="diagonal=False needs at least 2 samples, got 1"):
        pkt_loss(features(1, 3), features(1, 3), diagonal=False)


# Invariances


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", KERNELS)
@given(rows=st.integers(2, 9), width=st.integers(1, 6), other=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_invariances(kernel, divergence, rows, width, other, seed):
    student, teacher = features(rows, width, seed), features(rows, other, seed + 1)
    options = {"kernel": kernel, "divergence": divergence}
    value = pkt_loss(student, teacher, **options).item()
    assert value >= -1e-12
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    rotation = torch.linalg.qr(features(width, width, seed + 2)).Q
    padded = torch.nn.functional.pad(student, (0, 3))
    same = {
        "permutation of the samples": (student[order], teacher[order]),
        "rotation of the student's space": (student @ rotation, teacher),
        "more columns of zeros": (padded, teacher),
        "both widths at once": (padded, torch.nn.functional.pad(teacher, (2, 0))),
    }
    if kernel in ("cosine", "gaussian"):  # the Gaussian's default bandwidth follows the scale
        same["scale"] = (3.7 * student, 0.2 * teacher)
    if kernel != "cosine":
        same["shift"] = (student + 5.0, teacher - 3.0)
    for name, (s, t) in same.items():
        assert pkt_loss(s, t, **options).item() == pytest.approx(value, rel=1e-7, abs=1e-10), name
    assert pkt_loss(student, student, **options).item() == 0.0


def test_a_batch_of_copies_has_the_same_loss():
    # k copies of every sample spread each probability over k equal ones: no change of the divergence per sample.
    student, teacher = features(6, 4), features(6, 5, seed=1)
    value = pkt_loss(student, teacher).item()
    for copies in (2, 5):
        repeated = pkt_loss(student.repeat(copies, 1), teacher.repeat(copies, 1)).item()
        assert repeated == pytest.approx(value, rel=1e-12)
        official = pkt_loss(student.repeat(copies, 1), teacher.repeat(copies, 1), variant="official").item()
        assert official == pytest.approx(value / (6 * copies), rel=1e-4)


def test_jeffreys_is_symmetric_and_kl_is_not():
    a, b = features(6, 4), features(6, 4, seed=1)
    assert pkt_loss(a, b, divergence="jeffreys").item() == pytest.approx(
        pkt_loss(b, a, divergence="jeffreys").item(), rel=1e-12
    )
    assert pkt_loss(a, b).item() != pytest.approx(pkt_loss(b, a).item(), rel=1e-3)


# Landmarks


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_landmarks_give_the_full_loss(kernel, divergence):
    student, teacher = features(9, 4), features(9, 6, seed=1)
    options = {"kernel": kernel, "divergence": divergence}
    full, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, **options), student)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    value, other = value_and_gradient(lambda s: nystrom_pkt_loss(s, teacher, order, **options), student)
    assert value == pytest.approx(full, rel=1e-8)
    torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-9)


def test_landmarks_equal_a_plain_loop():
    student, teacher, chosen = features(6, 4), features(6, 5, seed=1), [4, 1, 2]
    total = 0.0
    for i in range(6):
        k, h = ([loop_kernel(x[i], x[j], "cosine", 1.0) for j in chosen] for x in (teacher, student))
        total += sum(a / sum(k) * math.log(a / sum(k) / (b / sum(h))) for a, b in zip(k, h, strict=True))
    loss = nystrom_pkt_loss(student, teacher, torch.tensor(chosen))
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


def landmark_error(landmarks: int, draws: int = 40) -> tuple[float, float, float]:
    """Bias and spread of the value relative to the full loss, and mean cosine of the gradients."""
    labels = torch.arange(128) % 10
    teacher = (3 * features(10, 32, seed=5)[labels] + features(128, 32, seed=6)).relu()
    student = (features(10, 16, seed=7)[labels] + features(128, 16, seed=8)).relu()
    full, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher), student)
    generator = torch.Generator().manual_seed(0)
    values, cosines = [], []
    for _ in range(draws):
        value, other = value_and_gradient(
            lambda s: nystrom_pkt_loss(s, teacher, landmarks, generator=generator), student
        )
        values.append(value / full)
        cosines.append(torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0).item())
    return float(np.mean(values)) - 1, float(np.std(values)), float(np.mean(cosines))


def test_landmark_error_shrinks_with_their_number():
    # 128 clustered ReLU features. The value falls short of the full loss by about 1/m; single draws scatter,
    # and their gradients turn towards the full one.
    few, some, many = (landmark_error(m) for m in (8, 32, 96))
    assert few[0] == pytest.approx(-1 / 8, abs=0.03)
    assert some[0] == pytest.approx(-1 / 32, abs=0.02)
    assert abs(many[0]) < 0.005
    assert 0.15 > few[1] > 1.5 * some[1] > 3 * many[1]
    assert 0.25 < few[2] < 0.4 < some[2] < 0.7 < 0.9 < many[2]


def test_drawn_landmarks_come_from_the_generator():
    student, teacher = features(12, 4), features(12, 6, seed=1)

    def draw(seed: int) -> float:
        return nystrom_pkt_loss(student, teacher, 5, generator=torch.Generator().manual_seed(seed)).item()

    assert draw(0) == draw(0) != draw(1)


# Where a loss must work


@pytest.mark.parametrize("variant", [None, "official", "pkth"])
def test_vmap_equals_a_loop(unchecked, variant):
    students, teachers = features(3 * 7, 4).view(3, 7, 4), features(3 * 7, 5, seed=1).view(3, 7, 5)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return pkt_loss(s, t, variant=variant)

    assert_vmap_equals_a_loop(loss, students, teachers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [None, "official", "pkth"])
def test_half_precision_features_are_compared_in_float32(variant, dtype):
    student, teacher = (features(16, n, seed=n).to(dtype) for n in (8, 12))
    exact = pkt_loss(student.float(), teacher.float(), variant=variant)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(pkt_loss(student, teacher, variant=variant), exact, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pkt_loss(student, teacher, variant=variant), exact, rtol=0, atol=0)
        from_float32 = pkt_loss(student.float(), teacher.float(), variant=variant)
    torch.testing.assert_close(from_float32, exact, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"kernel": "gaussian", "divergence": "jeffreys", "diagonal": False},
                {"kernel": "student_t", "divergence": "quadratic", "bandwidth": 2.0},
                {"variant": "official"},
                {"variant": "pkth", "kernel": "adaptive_rbf"},
            )
        ),
    ],
    ids=str,
)
def test_traces_to_one_graph(unchecked, compiler, options):
    compiled = torch.compile(pkt_loss, fullgraph=True, backend="aot_eager")
    for rows in (16, 11):  # the second size is traced with a symbolic one
        student, teacher = features(rows, 4), features(rows, 6, seed=1)
        value, gradient = value_and_gradient(lambda s, t=teacher: pkt_loss(s, t, **options), student)
        traced, traced_gradient = value_and_gradient(lambda s, t=teacher: compiled(s, t, **options), student)
        assert traced == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(traced_gradient, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_the_other_losses_trace_to_one_graph(unchecked, compiler):
    student, teacher, labels = features(16, 4), features(16, 6, seed=1), torch.arange(16) % 3
    supervised = torch.compile(supervised_pkt_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(supervised(student, labels), supervised_pkt_loss(student, labels))
    landmarks = torch.tensor([3, 1, 7])
    nystrom = torch.compile(nystrom_pkt_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        nystrom(student, teacher, landmarks), nystrom_pkt_loss(student, teacher, landmarks)
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kernel": "gaussian", "diagonal": False}], ids=str)
def test_compiles_to_machine_code(unchecked, compiler, options):
    compiled = torch.compile(pkt_loss, fullgraph=True)
    student, teacher = features(16, 4), features(16, 6, seed=1)
    value, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, **options), student)
    fast, fast_gradient = value_and_gradient(lambda s: compiled(s, teacher, **options), student)
    assert fast == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-7, atol=1e-12)


# Large batches


@pytest.fixture
def tiled(monkeypatch) -> list[int]:
    """Any batch counts as large; lists the batch sizes that went through the tiles."""
    sizes = []

    def recorded(student: Tensor, teacher: Tensor, *, diagonal: bool) -> Tensor:
        sizes.append(student.shape[0])
        return cosine_neighbour_kl(student, teacher, diagonal=diagonal)

    monkeypatch.setattr(pkt, "_TILED_FROM", 2)
    monkeypatch.setattr(pkt, "cosine_neighbour_kl", recorded)
    return sizes


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ({}, True),
        ({"diagonal": False}, True),
        ({"divergence": "jeffreys"}, False),
        ({"kernel": "gaussian"}, False),
        ({"variant": "official"}, False),
    ],
    ids=str,
)
def test_large_batches_go_through_tiles_where_the_form_has_them(monkeypatch, tiled, options, goes):
    student, teacher = features(30, 4), features(30, 6, seed=1)
    value, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, **options), student)
    assert tiled == [30] * goes
    monkeypatch.setattr(pkt, "_TILED_FROM", 31)
    dense, dense_gradient = value_and_gradient(lambda s: pkt_loss(s, teacher, **options), student)
    assert tiled == [30] * goes
    assert value == pytest.approx(dense, rel=1e-10)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-10, atol=1e-12)


def test_a_bandwidth_is_refused_in_large_batches_too(unchecked, tiled):
    for options in ({"bandwidth": 1.0}, {"teacher_bandwidth": 1.0}):
        with pytest.raises(ValueError, match="bandwidth: the cosine kernel has none"):
            pkt_loss(X, Y, **options)


def test_large_batches_under_function_transforms(unchecked, tiled):
    students, teachers = features(3 * 7, 4).view(3, 7, 4), features(3 * 7, 5, seed=1).view(3, 7, 5)
    expected = [
        value_and_gradient(lambda x, t=t: pkt_loss(x, t), s)[1]
        for s, t in zip(students, teachers, strict=True)
    ]
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(pkt_loss))(students, teachers), torch.stack(expected)
    )
    assert tiled == [7] * 4


def test_compiled_large_batches_stay_dense(unchecked, compiler, tiled):
    student, teacher = features(16, 4), features(16, 6, seed=1)
    compiled = torch.compile(pkt_loss, fullgraph=True, backend="aot_eager")
    traced, traced_gradient = value_and_gradient(lambda s: compiled(s, teacher), student)
    assert tiled == []
    value, gradient = value_and_gradient(lambda s: pkt_loss(s, teacher), student)
    assert tiled == [16]
    assert traced == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(traced_gradient, gradient, rtol=1e-7, atol=1e-12)


# Errors

X, Y = features(4, 3), features(4, 5)
BAD_CALLS = {
    "student: expected a floating tensor": lambda: pkt_loss(X[0], Y),
    "student: .* got torch.int64": lambda: pkt_loss(X.long(), Y),
    "teacher: expected a floating tensor .* got .* \\(0, 5\\)": lambda: pkt_loss(X, Y[:0]),
    "teacher: expected as many rows as student \\(4\\), got 3": lambda: pkt_loss(X, Y[:3]),
    "kernel: expected one of .* got 'rbf'": lambda: pkt_loss(X, Y, kernel="rbf"),
    "divergence: expected one of .* got 'js'": lambda: pkt_loss(X, Y, divergence="js"),
    "bandwidth: expected a finite number above 0, got 0": lambda: pkt_loss(
        X, Y, kernel="cauchy", bandwidth=0.0
    ),
    "bandwidth: expected a finite number above 0, got nan": lambda: pkt_loss(
        X, Y, kernel="gaussian", bandwidth=math.nan
    ),
    "bandwidth: the cosine kernel has none": lambda: pkt_loss(X, Y, bandwidth=1.0),
    "variant: expected one of .* got 'theirs'": lambda: pkt_loss(X, Y, variant="theirs"),
    "variant: 'official' is defined for": lambda: pkt_loss(X, Y, kernel="gaussian", variant="official"),
    "variant: 'official' has neither": lambda: pkt_loss(X, Y, diagonal=False, variant="official"),
    "kernel: expected one of .* got 'gaussian'": lambda: pkt_loss(X, Y, kernel="gaussian", variant="pkth"),
    "divergence: 'combined' goes with": lambda: pkt_loss(X, Y, divergence="combined", variant="pkth"),
    "labels: expected class indices": lambda: supervised_pkt_loss(X, torch.zeros(4)),
    "labels: expected as many rows as student": lambda: supervised_pkt_loss(
        X, torch.zeros(3, dtype=torch.int64)
    ),
    "divergence: expected one of \\['kl', 'quadratic'\\]": lambda: supervised_pkt_loss(
        X, torch.zeros(4, dtype=torch.int64), divergence="jeffreys"
    ),
    "variant: 'official' is defined for kernel": lambda: supervised_pkt_loss(
        X, torch.zeros(4, dtype=torch.int64), diagonal=False, variant="official"
    ),
    "landmarks: expected 1 to 4": lambda: nystrom_pkt_loss(X, Y, 5, generator=torch.Generator()),
    "generator: expected": lambda: nystrom_pkt_loss(X, Y, 2),
    "landmarks: expected row numbers": lambda: nystrom_pkt_loss(X, Y, torch.zeros(2, 2, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_wrong_types_are_type_errors(unchecked):
    with pytest.raises(TypeError, match="student: expected a tensor, got ndarray"):
        pkt_loss(X.numpy(), Y)
    with pytest.raises(TypeError, match="bandwidth: expected a number, got str"):
        pkt_loss(X, Y, kernel="cauchy", bandwidth="wide")


def test_shape_annotations_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        pkt_loss(X, Y[:3])
    assert pkt_loss(X, Y, kernel="cauchy", bandwidth=2).isfinite()  # an int where a float is asked for
