"""The KSANC column: its plan, its arms, whom a step trains, how weights were chosen, its figures."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.training import Members
from reproductions.harness.errata import load_errata
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.ksanc import choose, figures, squeezing, training
from reproductions.ksanc import run as ksanc
from reproductions.ksanc.training import Arm
from reproductions.protocols import joint
from reproductions.protocols.holdout import held_out
from reproductions.protocols.pairs import PAIRS, initialised, load_pair_data, make_batches
from reproductions.protocols.rows import Method, Phase, logits_of
from reproductions.protocols.tables import DIGITS

QUICK = ksanc.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2, progress=False)


@pytest.mark.parametrize("profile", ksanc.PROFILES)
def test_plan_has_every_arm_and_every_arm_a_title(profile):
    config = ksanc.PROFILES[profile]
    plan = ksanc.plan(config)
    for setting in config.settings:
        arms = {*setting.arms, *setting.few}
        assert {run.arm for run in plan if run.data == setting.data} == arms
        assert arms <= {"teacher", "student", "kd", *ksanc.ARMS} == figures.ARM_TITLES.keys()
    assert set(ksanc.ROWS) <= set(config.settings[0].arms)


@pytest.mark.parametrize("arm", ["teacher", "student", *ksanc.ARMS])
def test_every_arm_gives_its_metrics(arm, shared):
    scores = ksanc.execute(Run("ksanc", "quick", "digits", arm, 0), QUICK, shared)
    squeezes = arm in ksanc.ARMS and ksanc.ARMS[arm].reading is not None
    expected = ksanc.METRICS.keys() - (set() if squeezes else {"positions"})
    assert scores.keys() - {"accuracy@best"} == expected
    assert all(0 <= scores[name] <= 100 for name in expected - {"cross_entropy"})
    if arm == "ksanc_average":
        assert scores["positions"] == pytest.approx(100)


def test_terms_are_added_one_after_the_other():
    arms = ksanc.ARMS
    assert arms["backbone"] == Arm(ksanc.BACKBONE)
    assert arms["backbone_adv"] == replace(arms["backbone"], adversarial=ksanc.ADVERSARIAL, mu=ksanc.MU)
    for name, reading in (("ksanc", "lifted"), ("ksanc_figure", "maps"), ("ksanc_average", "average")):
        whole = replace(arms["backbone_adv"], intermediate=ksanc.LAYERS[reading], reading=reading)
        assert arms[name] == whole
    with pytest.raises(ValueError, match="reading: expected one exactly"):
        Arm(1.0, intermediate=1.0)


def test_seeds_may_share_a_training(shared):
    runs = [Run("ksanc", "quick", "digits", "ksanc", seed) for seed in (0, 1)]
    together = ksanc.execute_together(runs, QUICK, shared)
    alone = [ksanc.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
        assert one["positions"] == pytest.approx(other["positions"], rel=1e-4)
    assert together[0]["cross_entropy"] != together[1]["cross_entropy"]


def test_the_recipe_is_that_of_the_shared_table(shared, tmp_path):
    """With the first term alone, a training is that of the protocol with the same loss: equal to rounding."""
    arm, seed = Arm(0.02), 0
    (one,) = training.initial(arm, DIGITS, (seed,), shared)
    training.train([one], arm, DIGITS, (seed,), replace(shared, max_steps=15), tmp_path / "own")
    other = initialised(DIGITS.student, 10, seed, torch.device("cpu"))

    def loss(output, targets, labels, progress):
        return 0.02 * (output.logits - targets["logits"]).square().sum(1).mean()

    method = Method((Phase(loss),), {"logits": logits_of})
    context = replace(shared, max_steps=15)
    joint.train([other], (seed,), method, DIGITS, context, tmp_path / "joint", source="test")
    for ours, theirs in zip(one.student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_trains_discriminator_and_student_each_with_its_own_loss(shared, tmp_path, monkeypatch):
    seen = []
    update = training.update
    monkeypatch.setattr(
        training,
        "update",
        lambda optimizer, loss: (seen.append(type(optimizer).__name__), update(optimizer, loss)),
    )
    arm = ksanc.ARMS["ksanc"]
    (one,) = training.initial(arm, DIGITS, (3,), shared)
    before = [p.detach().clone() for p in one.squeezer.parameters()]
    training.train([one], arm, DIGITS, (3,), replace(shared, max_steps=1), tmp_path)
    assert seen == ["Adam", "SGD"]
    after = list(one.squeezer.parameters())
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


def test_teachers_estimators_stand_still_and_are_those_of_the_seed(shared):
    first, second = squeezing.guides_of("lifted", DIGITS, (0, 1), shared)
    again = squeezing.guides_of("lifted", DIGITS, (0, 1), shared)
    for one, other in zip((first, second), again, strict=True):
        for a, b in zip(one.squeezer.parameters(), other.squeezer.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first.squeezer.layers[0].score.weight, second.squeezer.layers[0].score.weight)
    assert [layer.projection is None for layer in first.squeezer.layers] == [False, False]
    (figure,) = squeezing.guides_of("maps", DIGITS, (0,), shared)
    assert all(layer.projection is None for layer in figure.squeezer.layers)


def test_average_is_the_control_without_attention(shared):
    (guide,) = squeezing.guides_of("average", DIGITS, (0,), shared)
    split, _, _ = load_pair_data(PAIRS["digits"], probe=True)
    batches = make_batches(PAIRS["digits"], split, device=torch.device("cpu"), training=False, batch_size=4)
    images = next(iter(batches)).images
    with torch.no_grad():
        output, found = guide.network(images), guide(images)
    expected = torch.cat([output.features[name].mean((2, 3)) for name in ("block1", "block2")], 1)
    torch.testing.assert_close(found["squeezed"], expected)
    assert squeezing.layers_of(DIGITS)[1] == squeezing.Layers("embedding", ("block1", "block2"))


def test_teachers_are_asked_on_each_batch_where_views_are_not_fixed(shared, tmp_path):
    fresh = replace(DIGITS, views=None)
    for seeds in ((0,), (0, 1)):
        found = training.initial(ksanc.ARMS["ksanc"], fresh, seeds, shared)
        training.train(found, ksanc.ARMS["ksanc"], fresh, seeds, shared, tmp_path / str(len(seeds)))
        assert all(torch.isfinite(p).all() for one in found for p in one.student.parameters())


def test_counting_positions_has_the_closed_forms():
    uniform = torch.full((2, 3, 4), 1 / 12)
    assert squeezing.counting_positions(uniform) == pytest.approx(100)
    one = torch.zeros(2, 3, 4)
    one[:, 0, 0] = 1
    assert squeezing.counting_positions(one) == pytest.approx(100 / 12)
    half = torch.zeros(1, 2, 2)
    half[0, 0] = 0.5
    assert squeezing.counting_positions(half) == pytest.approx(50)


def test_as_one_is_members_for_several():
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    assert isinstance(squeezing.as_one(nets), Members)
    assert squeezing.as_one(nets[:1]) is nets[0]


# The choice of the weights


def test_each_step_of_the_choice_has_as_many_trials_and_takes_the_best():
    seen = []

    def trial(arm: Arm) -> float:
        seen.append(arm)
        wanted = {"lifted": 0.3, "maps": 0.001, "average": 0.01}
        score = -abs(math.log(arm.backbone / 0.05))
        if arm.adversarial:
            score -= abs(math.log(arm.adversarial / 0.3)) + abs(math.log(arm.mu / 1e-3))
        if arm.reading:
            score -= abs(math.log(arm.intermediate / wanted[arm.reading]))
        return score

    found = choose.choose(trial)
    assert found["backbone"] == Arm(0.05)
    assert found["game"] == Arm(0.05, 0.3, 1e-3)
    assert [found[name].intermediate for name in ("lifted", "maps", "average")] == [0.3, 0.001, 0.01]
    steps = [len(choose.BACKBONES), len(choose.GAMES), *[len(choose.LAYERS)] * 3]
    assert steps == [9] * 5
    assert len(seen) == len(set(seen)) == 45


def test_weights_of_the_run_are_among_the_trials():
    assert ksanc.BACKBONE in choose.BACKBONES
    assert (ksanc.ADVERSARIAL, ksanc.MU) in choose.GAMES
    assert set(ksanc.LAYERS.values()) <= set(choose.LAYERS)


def test_trials_never_see_the_test_set_and_train_on_the_rest(shared, monkeypatch, capsys):
    original, sizes = choose.make_batches, []

    def watched(pair, split, **options):
        sizes.append(len(split.labels))
        return original(pair, split, **options)

    monkeypatch.setattr(choose, "make_batches", watched)
    trial = choose.trial_on(DIGITS, (0,), shared)
    score = trial(Arm(0.02))
    assert 0 <= score <= 100
    assert f"{score:.2f} %" in capsys.readouterr().out
    train_split, _, _ = load_pair_data(PAIRS["digits"], probe=True)
    assert sizes == [len(train_split.labels)]
    kept, held = held_out(torch.from_numpy(train_split.labels))
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(train_split.labels)))
    assert 0.05 < len(held) / len(train_split.labels) < 0.15


def test_a_trial_that_diverges_counts_nothing(shared, capsys):
    assert choose.trial_on(DIGITS, (0,), replace(shared, max_steps=30))(Arm(1e6)) == 0
    assert "diverges" in capsys.readouterr().out


# Errata and figures


@pytest.mark.parametrize("erratum", load_errata("ksanc"), ids=lambda erratum: erratum.id)
def test_erratum_is_proved(erratum):
    evidence = erratum.check()
    assert evidence.holds, evidence.summary


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


class Fake:
    """A result as figures read it."""

    def __init__(self, arm: str) -> None:
        self.run = Run("ksanc", "quick", "digits", arm, 0)
        self.provenance = SimpleNamespace(seeds=(0,))


def test_attention_figure_shows_what_the_estimators_weight(closed, shared, monkeypatch):
    monkeypatch.setattr(figures.Context, "of", lambda result: shared)
    results = [Fake("ksanc"), Fake("ksanc_figure")]
    maps = figures.attention_maps(results[0], QUICK, (0, 1, 2))
    assert [tuple(one.shape) for one in maps.values()] == [(3, 8, 8), (3, 4, 4)] * 2
    for one in maps.values():
        torch.testing.assert_close(one.sum((1, 2)), torch.ones(3))
    figure = figures.attention_figure(results, QUICK, images=3)
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(panels) == 3 * 9
    assert panels[3].sum() == pytest.approx(64, rel=1e-4)  # in units of equal weights
