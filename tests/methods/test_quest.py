"""QUEST against the authors' numbers, plain loops and closed forms; its vocabulary, memory and corner cases."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrefs.methods.quest import (
    AssignmentPredictor,
    fit_vocabulary,
    mean_largest_assignment,
    nearest_word,
    propose_beta,
    quest_loss,
    soft_assignment,
)
from tests.methods.losses import assert_vmap_equals_a_loop, value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "quest_official_loss_some.npz"
CASES = ("f64_small", "f64_near_codebook")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The authors' numbers


def golden(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {
            key.split("__")[1]: torch.from_numpy(value)
            for key, value in arrays.items()
            if key.startswith(case)
        }


def official_predictor(fields: dict[str, Tensor]) -> AssignmentPredictor:
    words, channels = fields["pred_weight"].shape
    predictor = AssignmentPredictor(channels, words).double()
    with torch.no_grad():
        predictor.weight.copy_(fields["pred_weight"])
        predictor.scale.copy_(fields["scale"])
    return predictor


@pytest.mark.parametrize("case", CASES)
def test_target_and_scores_equal_the_authors(case):
    fields = golden(case)
    teacher, words, beta = fields["teacher_feat"], fields["codebook"], fields["temperature"].item()
    target = soft_assignment(teacher, words, beta)
    torch.testing.assert_close(target.movedim(1, -1), fields["p_teacher"], rtol=1e-9, atol=1e-12)
    assert torch.equal(nearest_word(teacher, words), fields["argmin_idx"].squeeze(1))
    largest = mean_largest_assignment(teacher, words, beta)
    assert largest == pytest.approx(fields["vq_mean_max_p"].item(), rel=1e-9)
    scores = official_predictor(fields)(fields["student_feat"])
    torch.testing.assert_close(scores, fields["scores_cos"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_its_gradients_equal_the_authors(case):
    fields = golden(case)
    predictor = official_predictor(fields)

    def loss(student: Tensor) -> Tensor:
        return quest_loss(
            predictor(student), fields["teacher_feat"], fields["codebook"], fields["temperature"].item()
        )

    value, gradient = value_and_gradient(loss, fields["student_feat"])
    assert value == pytest.approx(fields["loss"].item(), rel=1e-9)
    # Where every channel is 0 the authors divide by 1e-12, and the gradient is of the order of its inverse; ours is 0.
    zero = (fields["student_feat"] == 0).all(1, keepdim=True).expand_as(gradient)
    assert (gradient[zero] == 0).all()
    expected = fields["grad_student_feat"]
    torch.testing.assert_close(gradient[~zero], expected[~zero], rtol=1e-9, atol=1e-12)
    weight = fields["grad_pred_weight"].flatten(1)
    torch.testing.assert_close(predictor.weight.grad, weight, rtol=1e-9, atol=1e-12)
    assert predictor.scale.grad.item() == pytest.approx(fields["grad_scale"].item(), rel=1e-9)


# Plain loops and closed forms


def loop_target(vector: list[float], words: list[list[float]], beta: float) -> list[float]:
    weights = [math.exp(-beta * math.dist(vector, word) ** 2) for word in words]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 3, 1, 1)])
def test_loss_equals_a_plain_loop(shape):
    batch, channels, height, width = shape
    teacher, words = draw(*shape), draw(5, channels, seed=1)
    scores = draw(batch, 5, height, width, seed=2)
    total = 0.0
    for n, y, x in itertools.product(range(batch), range(height), range(width)):
        p = loop_target(teacher[n, :, y, x].tolist(), words.tolist(), 0.7)
        powers = [math.exp(value) for value in scores[n, :, y, x].tolist()]
        q = [power / sum(powers) for power in powers]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = total / (batch * height * width)
    assert quest_loss(scores, teacher, words, 0.7).item() == pytest.approx(expected, rel=1e-10)
    assert quest_loss(scores, teacher, words, tau=1 / 0.7).item() == pytest.approx(expected, rel=1e-10)


def test_blocks_change_nothing(monkeypatch):
    scores, teacher, words = draw(3, 7, 3, 3), draw(3, 4, 3, 3, seed=1), draw(7, 4, seed=2)
    whole = value_and_gradient(lambda s: quest_loss(s, teacher, words, 0.5), scores)
    largest = mean_largest_assignment(teacher, words, 0.5)
    monkeypatch.setattr(
        "kdrefs.methods._quest_assignment._BLOCK", 4 * 7
    )  # blocks of four rows, and a last one of three
    parts = value_and_gradient(lambda s: quest_loss(s, teacher, words, 0.5), scores)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-14)
    assert mean_largest_assignment(teacher, words, 0.5) == pytest.approx(largest, rel=1e-12)


def test_scores_equal_a_convolution_of_normalised_maps():
    predictor, maps = AssignmentPredictor(5, 7, scale=2.5).double(), draw(2, 5, 3, 4)
    expected = 2.5 * F.conv2d(
        F.normalize(maps, dim=1), F.normalize(predictor.weight, dim=1)[:, :, None, None]
    )
    torch.testing.assert_close(predictor(maps), expected, rtol=1e-12, atol=1e-12)
    vectors = maps[:, :, 0, 0]
    torch.testing.assert_close(predictor(vectors), expected[:, :, 0, 0], rtol=1e-12, atol=1e-12)


def test_predictor_starts_as_the_authors_do():
    torch.manual_seed(0)
    predictor = AssignmentPredictor(8, 20_000)
    assert predictor.scale.item() == 3
    assert predictor.weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.02)
    assert not AssignmentPredictor(8, 4, learn_scale=False).scale.requires_grad


def test_loss_is_zero_for_the_target_s_own_logarithm():
    teacher, words = draw(2, 4, 3, 3), draw(6, 4, seed=1)
    scores = soft_assignment(teacher, words, 0.8).log() + draw(
        2, 1, 3, 3, seed=2
    )  # a constant a position is free
    value, gradient = value_and_gradient(lambda s: quest_loss(s, teacher, words, 0.8), scores)
    assert value == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_levels_are_added():
    scores = [draw(2, 5, 4, 4), draw(2, 6, 2, 2, seed=1)]
    teachers = [draw(2, 3, 4, 4, seed=2), draw(2, 7, 2, 2, seed=3)]
    words = [draw(5, 3, seed=4), draw(6, 7, seed=5)]
    each = [quest_loss(s, t, v, b) for s, t, v, b in zip(scores, teachers, words, (0.5, 2.0), strict=True)]
    both = quest_loss(scores, teachers, words, (0.5, 2.0))
    assert both.item() == pytest.approx(sum(one.item() for one in each), rel=1e-12)
    same = quest_loss(scores, teachers, words, tau=2.0).item()
    assert same == pytest.approx(quest_loss(scores, teachers, words, (0.5, 0.5)).item(), rel=1e-12)


def test_a_larger_teacher_map_is_average_pooled():
    scores, teacher, words = draw(2, 5, 2, 2), draw(2, 3, 4, 4, seed=1), draw(5, 3, seed=2)
    pooled = F.avg_pool2d(teacher, 2)
    value = quest_loss(scores, teacher, words, 0.5).item()
    assert value == pytest.approx(quest_loss(scores, pooled, words, 0.5).item(), rel=1e-12)
    assignments = soft_assignment(teacher, words, 0.5)
    of_targets = F.kl_div(scores.log_softmax(1), F.avg_pool2d(assignments, 2), reduction="sum").item() / 8
    assert abs(value - of_targets) > 1e-3  # features are pooled, not assignments


# Softness


def test_beta_multiplies_the_distance_and_depends_on_the_features_scale():
    teacher, words = draw(2, 4, 3, 3), draw(6, 4, seed=1)
    by_beta = [mean_largest_assignment(teacher, words, beta) for beta in (0.01, 0.1, 1.0, 10.0, 1e4)]
    assert by_beta == sorted(by_beta)
    assert by_beta[-1] == pytest.approx(1, abs=1e-3)
    assert mean_largest_assignment(teacher, words, tau=10.0) == pytest.approx(by_beta[1])
    scaled = soft_assignment(3 * teacher, 3 * words, 1 / 9)
    torch.testing.assert_close(scaled, soft_assignment(teacher, words, 1.0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("goal", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_proposed_beta_gives_the_mean_asked_for(goal, scale):
    features, words = scale * draw(50, 4), scale * draw(9, 4, seed=1)
    beta = propose_beta(features, words, goal)
    assert mean_largest_assignment(features, words, beta) == pytest.approx(goal, abs=2e-4)


def test_no_beta_separates_words_that_stand_twice(unchecked):
    words = draw(3, 4).repeat(2, 1)
    with pytest.raises(ValueError, match=r"mean_largest: no beta gives 0\.9"):
        propose_beta(draw(20, 4, seed=1), words, 0.9)
    for goal in (1.0, 1 / 6, 0.1):
        with pytest.raises(ValueError, match="mean_largest: expected a number between 1/6"):
            propose_beta(draw(20, 4, seed=1), words, goal)


# The vocabulary

METHODS = ("lloyd", "minibatch")


def clusters(count: int, each: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    centres = 20 * draw(count, channels, seed=7)
    return centres, (centres.repeat(each, 1) + 0.1 * draw(count * each, channels, seed=8)).float()


def test_separate_clusters_are_found():
    centres, features = clusters(6, 80)
    words = fit_vocabulary(features, 6, torch.Generator().manual_seed(0))
    assert torch.cdist(centres.float(), words).amin(1).max() < 0.1
    assert nearest_word(features, words).unique().numel() == 6


@pytest.mark.parametrize("method", METHODS)
def test_every_word_has_a_vector(method):
    features = torch.cat([torch.zeros(300, 3), clusters(5, 4)[1]])  # most positions are dead, as after a ReLU
    words = fit_vocabulary(features, 16, torch.Generator().manual_seed(1), method=method)
    assert nearest_word(features, words).unique().numel() == 16


@pytest.mark.parametrize("method", METHODS)
def test_fewer_distinct_vectors_than_words(method):
    features = draw(3, 4, dtype=torch.float32).repeat(5, 1)
    words = fit_vocabulary(features, 8, torch.Generator().manual_seed(0), method=method)
    assert words.shape == (8, 4)
    assert words.isfinite().all()
    assert torch.cdist(features, words).amin(1).max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_vocabulary_is_reproducible_and_follows_its_generator(method):
    features = draw(400, 4, dtype=torch.float32)
    one, again, other = (
        fit_vocabulary(features, 8, torch.Generator().manual_seed(seed), method=method) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_one_word_is_the_mean(method):
    features = draw(500, 3, dtype=torch.float32) + 5
    words = fit_vocabulary(features, 1, torch.Generator().manual_seed(0), method=method, iterations=50)
    torch.testing.assert_close(words, features.mean(0, keepdim=True), rtol=0, atol=0.1)
    assert torch.equal(soft_assignment(features, words, 5.0), torch.ones(500, 1))


def test_lloyd_equals_plain_k_means(monkeypatch):
    features, generator = draw(60, 2), torch.Generator().manual_seed(3)
    expected = features[torch.randperm(60, generator=torch.Generator().manual_seed(3))[:4]]
    for _ in range(20):
        nearest = torch.cdist(features, expected).argmin(1)
        expected = torch.stack([features[nearest == k].mean(0) for k in range(4)])
    monkeypatch.setattr("kdrefs.methods._quest_vocabulary._BLOCK", 40)  # ten vectors a block
    words = fit_vocabulary(features, 4, generator, method="lloyd")
    torch.testing.assert_close(words, expected, rtol=1e-10, atol=1e-12)


def test_every_position_of_a_map_is_a_vector():
    maps = draw(6, 3, 4, 5, dtype=torch.float32)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 3)
    one, other = (fit_vocabulary(x, 7, torch.Generator().manual_seed(0)) for x in (maps, rows))
    assert torch.equal(one, other)


def test_without_scikit_learn_the_error_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="scikit-learn: install it, or take method='lloyd'"):
        fit_vocabulary(draw(20, 3), 2, torch.Generator())
    assert fit_vocabulary(draw(20, 3), 2, torch.Generator(), method="lloyd").shape == (2, 3)


# Gradients and corner cases


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 3, 1, 1)])
def test_gradients_are_the_derivatives(shape):
    predictor, teacher, words = AssignmentPredictor(3, 4).double(), draw(*shape, seed=1), draw(4, 3, seed=2)

    def loss(student: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        scores = torch.func.functional_call(predictor, {"weight": weight, "scale": scale}, (student,))
        return quest_loss(scores, teacher, words, 0.6)

    given = draw(*shape), draw(4, 3, seed=3), torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, [value.requires_grad_() for value in given])


def test_no_gradient_reaches_teacher_or_vocabulary_and_inputs_stay():
    scores, teacher, words = (
        value.requires_grad_() for value in (draw(2, 5, 2, 2), draw(2, 3, 4, 4, seed=1), draw(5, 3, seed=2))
    )
    before = [value.detach().clone() for value in (scores, teacher, words)]
    quest_loss(scores, teacher, words, 0.5).backward()
    assert teacher.grad is None
    assert words.grad is None
    assert scores.grad.abs().sum() > 0
    assert all(torch.equal(value, old) for value, old in zip((scores, teacher, words), before, strict=True))


def test_second_derivatives_are_refused():
    scores, teacher, words = draw(2, 5, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1), draw(5, 3, seed=2)
    (gradient,) = torch.autograd.grad(quest_loss(scores, teacher, words, 0.5), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


AWKWARD = {
    "zero": lambda x: 0 * x,
    "a zero sample": lambda x: x * (torch.arange(len(x)) > 0).view(-1, 1, 1, 1),
    "one sample": lambda x: x[:1],
    "one position": lambda x: x[:, :, :1, :1],
    "1e-12": lambda x: 1e-12 * x,
    "1e12": lambda x: 1e12 * x,
}


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", AWKWARD)
def test_value_and_gradients_stay_finite_in_float32(name, count):
    student, teacher = (AWKWARD[name](draw(3, 4, 3, 3, seed=i, dtype=torch.float32)) for i in range(2))
    words = draw(count, 4, seed=2, dtype=torch.float32)
    words[count // 2 :] = words[0]  # words that stand twice
    predictor = AssignmentPredictor(4, count)
    value, gradient = value_and_gradient(lambda s: quest_loss(predictor(s), teacher, words, 5.0), student)
    assert math.isfinite(value)
    assert value >= -1e-6
    assert gradient.isfinite().all()
    assert predictor.weight.grad.isfinite().all()
    assert predictor.scale.grad.isfinite()
    if count == 1:
        assert value == pytest.approx(0, abs=1e-6)


def test_features_far_from_the_origin_keep_their_digits():
    teacher, words = draw(4, 3, 2, 2), draw(5, 3, seed=1)
    exact = soft_assignment(teacher, words, 1.0).float()
    far = soft_assignment((teacher + 1000).float(), (words + 1000).float(), 1.0)
    torch.testing.assert_close(far, exact, rtol=0, atol=2e-3)


# Memory


def test_at_most_three_tensors_hold_a_number_for_each_word_and_position(unchecked):
    """Of 64 x 8 x 8 positions and K words; the program's own scores are one of the three."""
    positions, count = 64 * 8 * 8, 512
    predictor = AssignmentPredictor(16, count)
    student, teacher = (draw(64, 16, 8, 8, seed=i, dtype=torch.float32) for i in range(2))
    words, wide = draw(count, 16, seed=2, dtype=torch.float32), set()

    class Storages(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= 4 * positions * count:
                    kept.append(value)  # alive, so that no address is used twice
                    wide.add(value.untyped_storage().data_ptr())
            return out

    kept: list[Tensor] = []
    with Storages():
        quest_loss(predictor(student.requires_grad_()), teacher, words, 0.1).backward()
    assert len(wide) == 3


# Where a loss must work


def test_predictor_and_loss_map_over_members(unchecked):
    teacher, words = draw(2, 3, 2, 2), draw(5, 3, seed=1)
    predictor = AssignmentPredictor(4, 5).double()

    def loss(student: Tensor, vocabulary: Tensor) -> Tensor:
        return quest_loss(predictor(student), teacher, vocabulary, 0.5)

    assert_vmap_equals_a_loop(loss, draw(3, 2, 4, 2, 2, seed=2), torch.stack([words, 2 * words, words + 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype):
    predictor, words = AssignmentPredictor(4, 5), draw(5, 3, seed=1, dtype=torch.float32)
    student, teacher = draw(2, 4, 2, 2, dtype=dtype), draw(2, 3, 2, 2, seed=2, dtype=dtype)
    exact = quest_loss(predictor(student.float()), teacher.float(), words, 0.5)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = quest_loss(predictor(student), teacher, words, 0.5)
    torch.testing.assert_close(half, exact, rtol=0, atol=0)


# Errors

S, T, V = draw(2, 5, 2, 2), draw(2, 3, 4, 4), draw(5, 3)
G = torch.Generator()
BAD_CALLS = {
    "student: expected a floating tensor .* shape \\(5, 2, 2\\)": lambda: quest_loss(S[0], T, V, 1.0),
    "teacher: .* got torch.int64": lambda: quest_loss(S, T.long(), V, 1.0),
    "teacher: expected as many rows as student \\(2\\), got 1": lambda: quest_loss(S, T[:1], V, 1.0),
    "student: expected at most the teacher's 1 x 1 positions, got 2 x 2": lambda: quest_loss(
        S, T[:, :, :1, :1], V, 1.0
    ),
    "student: expected a score for each of 4 words, got 5": lambda: quest_loss(S, T, V[:4], 1.0),
    "vocabulary: expected words of 3 channels, got 2": lambda: quest_loss(S, T, V[:, :2], 1.0),
    "vocabulary: expected a floating tensor \\(words, channels\\)": lambda: soft_assignment(T, V[0], 1.0),
    "beta and tau: expected exactly one of them, got None and None": lambda: soft_assignment(T, V),
    "beta and tau: expected exactly one of them, got 1.0 and 1.0": lambda: quest_loss(S, T, V, 1.0, tau=1.0),
    "beta: expected a finite number above 0, got -1": lambda: soft_assignment(T, V, -1.0),
    "tau: expected a finite number above 0, got 0": lambda: soft_assignment(T, V, tau=0.0),
    "teacher: expected as many levels as student \\(2\\)": lambda: quest_loss([S, S], [T], [V, V], 1.0),
    "vocabulary: expected as many levels as student \\(1\\)": lambda: quest_loss([S], [T], V, 1.0),
    "beta: expected one number or 2, got 1": lambda: quest_loss([S, S], [T, T], [V, V], [1.0]),
    "channels: expected a whole number from 1 on, got 0": lambda: AssignmentPredictor(0, 5),
    "words: expected a whole number from 1 on, got 2.0": lambda: AssignmentPredictor(4, 2.0),
    "scale: expected a finite number above 0, got 0": lambda: AssignmentPredictor(4, 5, scale=0.0),
    "maps: expected 3 channels, got 5": lambda: AssignmentPredictor(3, 5).double()(S),
    "words: expected a whole number from 1 on, got 0": lambda: fit_vocabulary(V, 0, G),
    "words: expected at most the 5 vectors there are, got 6": lambda: fit_vocabulary(V, 6, G),
    "iterations: expected a whole number from 1 on, got True": lambda: fit_vocabulary(
        V, 2, G, iterations=True
    ),
    "method: expected one of .* got 'elkan'": lambda: fit_vocabulary(V, 2, G, method="elkan"),
    "features: expected a floating tensor": lambda: fit_vocabulary(V.long(), 2, G),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(unchecked, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_wrong_types_are_type_errors(unchecked):
    with pytest.raises(TypeError, match="features: expected a tensor, got ndarray"):
        soft_assignment(T.numpy(), V, 1.0)
    with pytest.raises(TypeError, match="beta: expected a number, got str"):
        soft_assignment(T, V, "hard")
