"""The column of noisy collaboration: its arms, its teachers and students, resumption, what is measured, its figures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from kdrefs.methods.noisy_kd import soft_randomization_loss
from kdrefs.nets.small import SmallCNN
from kdrefs.training import Members
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.noisy_kd import collaboration, figures
from reproductions.noisy_kd import run as noisy
from reproductions.noisy_kd.collaboration import ARMS, GUIDES, Arm, DropoutCNN, Guide
from reproductions.protocols.pairs import PAIRS
from reproductions.protocols.robustness import Pixels

QUICK = noisy.PROFILES["quick"]
DIGITS = replace(QUICK.recipe, attacked=20, passes=3)
SMALL = replace(QUICK, recipe=DIGITS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2, progress=False)


# The arms


@pytest.mark.parametrize("profile", noisy.PROFILES)
def test_plan_has_every_arm_and_seed(profile):
    config = noisy.PROFILES[profile]
    plan = noisy.plan(config)
    assert {run.arm for run in plan} == {*ARMS, *GUIDES}
    assert len(plan) == len(config.seeds) * len({*ARMS, *GUIDES})
    assert len(config.seeds) >= (5 if profile == "quick" else 3)


def test_sweeps_have_the_values_of_the_issue():
    dropouts = {guide.dropout for guide in GUIDES.values()}
    sigmas, own = {arm.sigma for arm in ARMS.values()}, {arm.label_noise for arm in ARMS.values()}
    assert dropouts == {0, 0.2, 0.4}
    assert sigmas == {0, 0.05, 0.1, 0.2}
    assert own == {guide.label_noise for guide in GUIDES.values()} == {0, 0.2, 0.4}
    assert {arm.guide for arm in ARMS.values()} <= {None, *GUIDES.values()}


def test_controls_differ_in_one_thing():
    for rate in ("20", "40"):
        fickle, still, averaged = (ARMS[f"{name}_d{rate}"] for name in ("fickle", "kd", "averaged"))
        assert fickle == replace(still, answers="fickle")
        assert averaged == replace(still, answers="averaged")
        assert ARMS[f"messy_t{rate}"] == replace(ARMS["kd"], guide=Guide(label_noise=int(rate) / 100))
        assert ARMS[f"messy_ts{rate}"].guide == ARMS[f"messy_t{rate}"].guide
    for sigma in ("05", "10", "20"):
        assert ARMS[f"noise_{sigma}"] == replace(ARMS[f"soft_{sigma}"], guide=None)


# Networks


def test_network_is_the_small_one_in_eval_mode():
    options = dict(DIGITS.student)
    ours = collaboration.made(options, 0.5, 3, torch.device("cpu")).eval()
    plain = SmallCNN(**options).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(ours(images).logits, plain(images).logits)
    ours.dropout.train()
    assert not torch.equal(ours(images).logits, ours(images).logits)
    assert ours.dropout.p == 0.5


def test_initial_weights_do_not_depend_on_dropout():
    one, other = (collaboration.made(DIGITS.teacher, rate, 3, torch.device("cpu")) for rate in (0.0, 0.4))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_answers_of_a_teacher():
    guide = DropoutCNN(0.5, **DIGITS.teacher).eval()
    images = torch.randn(6, 1, 8, 8)
    still = guide(images).logits
    torch.testing.assert_close(collaboration.answer(guide, images, Arm(), DIGITS), still)
    fickle = [collaboration.answer(guide, images, Arm(answers="fickle"), DIGITS) for _ in range(2)]
    assert not torch.equal(*fickle)
    many = replace(DIGITS, passes=3000)
    mean = collaboration.answer(guide, images, Arm(answers="averaged"), many)
    again = collaboration.answer(guide, images, Arm(answers="averaged"), many)
    torch.testing.assert_close((mean / 4).softmax(1), (again / 4).softmax(1), atol=0.01, rtol=0)
    assert not any(part.training for part in guide.modules())


def test_a_seed_has_one_teacher_for_all_arms(shared):
    one = collaboration.teachers(Guide(), [0], DIGITS, shared)[0]
    both = collaboration.teachers(Guide(), [1, 0], DIGITS, shared)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(one(images).logits, both[1](images).logits)
    assert not torch.equal(one(images).logits, both[0](images).logits)


# Labels and noise


def test_labels_are_drawn_once_for_a_seed(shared):
    split, _, classes = collaboration.splits(DIGITS, shared)
    one, again = (collaboration.corrupted(split, 0.4, classes, 3) for _ in range(2))
    other = collaboration.corrupted(split, 0.4, classes, 4)
    assert np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.labels, other.labels)
    assert (one.labels != split.labels).sum() == round(0.4 * len(split.labels))
    assert collaboration.corrupted(split, 0, classes, 3) is split


def record(monkeypatch, arm: Arm, context: Context, folder, seeds=(0,)) -> list[dict[str, torch.Tensor]]:
    """What a training gives its networks and its loss, step by step."""
    guides = None if arm.guide is None else collaboration.teachers(arm.guide, seeds, DIGITS, context)
    seen: list[dict[str, torch.Tensor]] = []
    real = collaboration._loss

    def spied(arm, recipe):
        loss = real(arm, recipe)

        def call(logits, answers, labels):
            seen.append({"logits": logits, "answers": answers, "labels": labels})
            return loss(logits, answers, labels)

        return call

    monkeypatch.setattr(collaboration, "_loss", spied)
    networks = [collaboration.made(DIGITS.student, 0.0, seed, context.device) for seed in seeds]
    images: list[torch.Tensor] = []
    networks[0].register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].detach().clone()))
    collaboration._train(networks, guides, arm, seeds, DIGITS, 1, context, folder)
    return [one | {"images": image} for one, image in zip(seen, images, strict=True)]


def test_the_student_sees_noise_and_the_teacher_does_not(monkeypatch, shared, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    clean = record(monkeypatch, Arm(), shared, tmp_path / "a")
    noisy_ = record(monkeypatch, Arm(sigma=0.1), shared, tmp_path / "b")
    for one, other in zip(clean, noisy_, strict=True):
        delta = other["images"] - one["images"]
        deviation = 0.1 / PAIRS["digits"].std[0]
        assert delta.std().item() == pytest.approx(deviation, rel=0.05)
        assert abs(delta.mean().item()) < 0.02 * deviation + 0.01
        torch.testing.assert_close(other["answers"], one["answers"])
        assert torch.equal(other["labels"], one["labels"])


def test_arms_have_their_losses():
    logits, answers, labels = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    alone = collaboration._loss(ARMS["noise_10"], DIGITS)(logits, answers, labels)
    torch.testing.assert_close(alone, F.cross_entropy(logits, labels))
    soft = collaboration._loss(ARMS["soft_10"], DIGITS)(logits, answers, labels)
    torch.testing.assert_close(
        soft, soft_randomization_loss(logits, answers, labels, temperature=4.0, alpha=0.9)
    )


def test_members_have_noise_of_their_own_and_as_alone():
    state = {f"noise{k}": torch.Generator().manual_seed(k) for k in range(2)}
    both = collaboration._normal(state, torch.zeros(2, 3, 1, 8, 8), 2)
    alone = collaboration._normal({"noise0": torch.Generator().manual_seed(1)}, torch.zeros(3, 1, 8, 8), 1)
    assert torch.equal(both[1], alone)
    assert not torch.equal(both[0], both[1])


# Runs


@pytest.mark.parametrize(
    "arm", ["teacher", "teacher_n20", "student", "fickle_d40", "averaged_d20", "soft_10", "messy_ts40"]
)
def test_arms_give_their_metrics(arm, shared):
    scores = noisy.execute(Run("noisy_kd", "quick", "digits", arm, 0), SMALL, shared)
    assert scores.keys() == noisy.METRICS.keys()
    assert all(0 <= value <= 100 for value in scores.values())
    assert (scores["agreement"] == 100) == (arm in GUIDES)


@pytest.mark.parametrize("arm", ["soft_10", "messy_s20", "averaged_d20"])
def test_seeds_may_share_a_training(arm, shared):
    seeds = (0, 1)
    together = collaboration.students(arm, seeds, DIGITS, shared)
    alone = [collaboration.students(arm, [seed], DIGITS, shared)[0] for seed in seeds]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if arm != "averaged_d20" else {"rtol": 0.2, "atol": 0.02}
    for one, other in zip(together, alone, strict=True):  # masks of dropout are drawn anew in another company
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_interrupted_training_ends_with_the_same_bits(tmp_path):
    """Noise and dropout go on where they were."""
    arm, recipe = replace(ARMS["fickle_d40"], sigma=0.1), replace(DIGITS, student_epochs=2, teacher_epochs=1)
    found = []
    for name in ("whole", "broken"):
        context = Context(store=RunStore(tmp_path / "store"), max_steps=24, progress=False)
        guides = collaboration.teachers(arm.guide, [0], recipe, context)
        folder = tmp_path / name
        folder.mkdir()
        network = collaboration.made(recipe.student, 0.0, 0, context.device)
        if name == "broken":
            real, steps = collaboration.update, []

            def failing(*arguments, real=real, steps=steps):
                steps.append(1)
                if len(steps) == 19:  # in the second epoch of sixteen steps
                    raise KeyboardInterrupt
                real(*arguments)

            collaboration.update = failing
            with pytest.raises(KeyboardInterrupt):
                collaboration._train([network], guides, arm, [0], recipe, 2, context, folder)
            collaboration.update = real
        collaboration._train([network], guides, arm, [0], recipe, 2, context, folder)
        found.append(network)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_of_a_recipe_trains_again(shared):
    for name, changes in (("radius", 0.5), ("test_sigma", 0.5), ("attacked", 7)):
        other = replace(DIGITS, **{name: changes})
        assert collaboration._training_of(DIGITS, "teacher", "student") == collaboration._training_of(
            other, "teacher", "student"
        )
    other = replace(DIGITS, student_epochs=1)
    assert collaboration._training_of(DIGITS, "teacher") == collaboration._training_of(other, "teacher")
    assert collaboration._training_of(DIGITS, "teacher", "student") != collaboration._training_of(
        other, "teacher", "student"
    )


def test_what_shares_a_training():
    standard = noisy.PROFILES["standard"]
    run = Run("noisy_kd", "standard", "cifar10", "kd", 0)
    assert noisy.together(run, standard, "cpu") is None
    assert noisy.together(run, standard, "cuda") == "cifar10/kd"
    assert noisy.together(Run("noisy_kd", "quick", "digits", "kd", 0), QUICK, "cpu") == "digits/kd"
    assert noisy.together(Run("noisy_kd", "quick", "digits", "teacher_n20", 0), QUICK, "cpu") is None


def test_measures_see_noise_and_attack(shared):
    class Brightness(torch.nn.Module):
        """Tells zeros and ones by whether the mean is above one half; sure of itself."""

        def forward(self, images):
            score = 100 * images.mean((1, 2, 3))  # normalised: zero is one half
            others = [score - score - 200] * 8
            return SimpleNamespace(logits=torch.stack([-score, score, *others], 1))

    network = Brightness()
    pair, (_, test, _) = PAIRS["digits"], collaboration.splits(DIGITS, shared)
    pixels = Pixels.of(test, pair.mean, pair.std, "cpu")
    found = noisy.measure(network, network, 0, replace(DIGITS, radius=0.0, attacked=10**6), shared)
    expected = (pixels.images.mean((1, 2, 3)) > 0.5).long() == pixels.labels
    assert (
        found["accuracy"]
        == found["attacked_accuracy"]
        == pytest.approx(100 * expected.double().mean().item())
    )
    harder = noisy.measure(network, network, 0, replace(DIGITS, radius=0.5, attacked=10**6), shared)
    assert harder["attacked_accuracy"] < found["accuracy"]


# Figures


@pytest.fixture
def closed():
    yield
    plt.close("all")


def test_sweeps_name_arms_and_have_a_value_each():
    for _, values, lines in figures.SWEEPS.values():
        for arms in lines.values():
            assert len(arms) == len(values)
            assert set(arms) <= ARMS.keys()
    drawn = {arm for _, _, lines in figures.SWEEPS.values() for arms in lines.values() for arm in arms}
    assert drawn == ARMS.keys()


@pytest.mark.parametrize("sweep", figures.SWEEPS)
def test_sweep_figure_draws_the_means(closed, sweep):
    def result(arm, seed):
        metrics = {name: 10.0 * seed + len(arm) for name in noisy.METRICS}
        return SimpleNamespace(run=Run("noisy_kd", "quick", "digits", arm, seed), metrics=metrics)

    results = [result(arm, seed) for arm in ARMS for seed in (0, 1)]
    figure = figures.sweep_figure(results, sweep)
    _, _, lines = figures.SWEEPS[sweep]
    for axes in figure.axes:
        curves = [line for line in axes.get_lines() if line.get_marker() == "o"]
        for curve, arms in zip(curves, lines.values(), strict=True):
            assert list(curve.get_ydata()) == pytest.approx([5.0 + len(arm) for arm in arms])


def test_fickle_figure_shows_images_and_answers(closed, shared):
    run = Run("noisy_kd", "quick", "digits", "teacher_d40", 0)
    result = SimpleNamespace(run=run, provenance=SimpleNamespace(device="cpu", source="", threads=1))
    original = Context.of
    try:
        Context.of = classmethod(lambda cls, result, store=None: shared)
        figure = figures.fickle_figure([result], SMALL, images=2, asked=5)
    finally:
        Context.of = original
    assert len([axes for axes in figure.axes if axes.images]) == 2


def test_members_of_teachers_answer_together():
    guides = [DropoutCNN(0.5, **DIGITS.teacher).eval() for _ in range(2)]
    images = torch.randn(2, 4, 1, 8, 8)
    together = collaboration.answer(Members(guides), images, Arm(), DIGITS)
    for k, guide in enumerate(guides):
        torch.testing.assert_close(together[k], guide(images[k]).logits.detach(), rtol=1e-4, atol=1e-5)
