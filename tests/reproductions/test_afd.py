"""The AFD column: its plan, its arms, how its settings were chosen, what is watched, its figures."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.methods.afd import peers
from reproductions.afd import choose, figures, groups
from reproductions.afd import run as afd
from reproductions.afd.errata import expected_losses, second_gradient
from reproductions.afd.monitors import channel_gap, linear_cka, mean_cosine
from reproductions.harness.runs import Context, Result, Run, RunStore

QUICK = afd.PROFILES["quick"]
PAIR = QUICK.groups[0]
PLANNED = [(group, arm) for group in QUICK.groups for arm in group.arms]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2, progress=False)


@pytest.mark.parametrize("profile", afd.PROFILES)
def test_plan_has_every_arm_of_every_group(profile):
    config = afd.PROFILES[profile]
    plan = afd.plan(config)
    for group in config.groups:
        assert {run.arm for run in plan if run.data == group.data} == set(group.arms) <= groups.ARMS.keys()
        assert len(group.nets) == (3 if "three" in group.data else 2)
    assert len(config.seeds) >= 3


@pytest.mark.parametrize(("group", "arm"), PLANNED, ids=[f"{g.data}-{arm}" for g, arm in PLANNED])
def test_every_quick_arm_gives_its_metrics(group, arm, shared):
    scores = afd.execute(Run("afd", "quick", group.data, arm, 0), QUICK, shared)
    assert scores.keys() == afd.METRICS.keys() - ({"accuracy3"} if len(group.nets) == 2 else set())
    count = len(group.nets)
    own = [scores[f"accuracy{k + 1}"] for k in range(count)]
    assert scores["accuracy"] == pytest.approx(sum(own) / count)
    adversarial = groups.ARMS[arm].matching == "adversarial"
    assert scores["discriminators"] == (
        sum(map(len, peers(count, groups.ARMS[arm].scheme))) if adversarial else 0
    )
    assert 0 < scores["discriminator"] < 1
    assert 0 < scores["adversarial"] < 1


def test_seeds_may_share_a_training(shared):
    runs = [Run("afd", "quick", "digits-mixed", "afd", seed) for seed in (0, 1)]
    together = afd.execute_together(runs, QUICK, shared)
    alone = [afd.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        for name in ("discriminator", "adversarial", "channel_gap", "cka", "cosine"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert together[0]["discriminator"] != together[1]["discriminator"]


def test_arms_share_their_initial_networks():
    one, two = (groups.initial_networks(group, QUICK.recipe, (0, 1), Context()) for group in QUICK.groups[:2])
    for a, b in zip(one[0], two[0], strict=True):  # the small network of both pairs
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(one[0][0].classifier.weight, one[0][1].classifier.weight)
    assert not torch.equal(one[0][0].classifier.weight, one[1][0].classifier.weight)


def test_a_cycle_costs_less_than_all_pairs_and_one_pass_less_than_two():
    price = {arm: groups.cost(QUICK.groups[2], QUICK.recipe, arm) for arm in ("dml", "afd", "afd_pairwise")}
    assert price["dml"]["mflop"] < price["afd"]["mflop"] < price["afd_pairwise"]["mflop"]
    assert [one["discriminators"] for one in price.values()] == [0, 3, 6]
    once = groups.cost(PAIR, QUICK.recipe, "afd_simultaneous")["mflop"]
    assert once < groups.cost(PAIR, QUICK.recipe, "afd")["mflop"]


# One forward pass for two updates


def test_one_forward_pass_of_several_layers_is_refused():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second_gradient(2, again=False)
    assert second_gradient(2, again=True) != 0


def test_one_forward_pass_of_one_layer_has_the_gradient_of_the_weights_before():
    assert second_gradient(1, again=False) == pytest.approx(2.0)  # of the weight 2
    assert second_gradient(1, again=True) == pytest.approx(1.8)  # of the weight that the first step left


def test_expected_losses_of_equal_distributions():
    same = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert expected_losses(same, same, same / (same + same)) == pytest.approx((0.5, 0.25))


# The choice of the settings


def trials(table):
    """Trials that look up what a recipe would give: of the networks' own rate, the schedule, the second rate."""
    seen = []

    def trial(arm, recipe):
        seen.append(arm)
        keys = {
            "independent": (recipe.rate, recipe.epochs),
            "dml": (recipe.epochs, recipe.ramp),
            "afd": recipe.adversarial_rate,
            "l1": recipe.l1_rate,
        }
        return table[arm, keys[arm]]

    return trial, seen


SECOND = {("afd", 1e-4): 1.0, ("afd", 5e-4): 3.0, ("afd", 2e-3): 2.0}
SECOND |= {("l1", 1e-4): 2.0, ("l1", 5e-4): 2.0, ("l1", 2e-3): 1.0}


def test_choice_takes_the_cheapest_schedule_that_is_no_worse():
    table = {("independent", (0.03, 8)): 40.0, ("independent", (0.1, 8)): 50.0} | SECOND
    table |= {("dml", (8, 0.0)): 49.0, ("dml", (8, 0.5)): 50.0}
    trial, seen = trials(table)
    chosen = choose.choose(QUICK.recipe, trial)
    assert (chosen.rate, chosen.epochs, chosen.ramp) == (0.1, 8, 0.5)
    assert (chosen.adversarial_rate, chosen.l1_rate) == (5e-4, 1e-4)
    assert seen.count("afd") == seen.count("l1") == len(choose.SECOND_RATES)


def test_choice_takes_the_least_bad_schedule_where_none_is_no_worse():
    table = {("independent", (0.03, epochs)): 50.0 for epochs in (8, 12)} | SECOND
    table |= {("independent", (0.1, 8)): 40.0}
    table |= {("dml", schedule): 45.0 for schedule in choose.SCHEDULES} | {("dml", (8, 1.0)): 48.0}
    chosen = choose.choose(QUICK.recipe, trials(table)[0])
    assert (chosen.rate, chosen.epochs, chosen.ramp) == (0.03, 8, 1.0)


def test_held_out_images_are_a_tenth_of_each_class_and_are_not_trained_on():
    labels = torch.arange(400) % 10
    kept, held = choose.held_out(labels)
    assert torch.bincount(labels[held]).tolist() == [4] * 10
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(400))


def test_trials_never_see_the_test_set(shared, monkeypatch, capsys):
    seen = []
    original = choose.load_pair_data

    def without_test(pair, **options):
        train, _, classes = original(pair, **options)
        return train, None, classes

    def batches(pair, split, **options):
        seen.append((len(split.labels), len(options["indices"])))
        return made(pair, split, **options)

    made = choose.make_batches
    for module in (choose, groups):
        monkeypatch.setattr(module, "load_pair_data", without_test)
    monkeypatch.setattr(choose, "make_batches", batches)
    assert 0 <= choose.trial_on(PAIR, (0,), shared)("dml", QUICK.recipe) <= 100
    assert seen[0][1] < 0.12 * seen[0][0]
    assert "dml" in capsys.readouterr().out


def test_the_recipe_is_one_of_the_choices():
    assert (QUICK.recipe.epochs, QUICK.recipe.ramp) in choose.SCHEDULES
    assert QUICK.recipe.rate in choose.RATES
    assert {QUICK.recipe.adversarial_rate, QUICK.recipe.l1_rate} <= {*choose.SECOND_RATES}


# What is watched


def maps(seed=0, channels=3):
    return torch.randn(20, channels, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_channel_gap():
    one = maps()
    assert channel_gap(one, one) == 0
    assert channel_gap(one, one.flip(0)) == pytest.approx(0, abs=1e-12)  # the distribution is the same
    assert channel_gap(torch.zeros_like(one), torch.zeros_like(one)) == 0
    assert channel_gap(one, torch.zeros_like(one)) == pytest.approx(1)
    # Constant maps of 1 and 3: means 1 and 3 in each of three channels, no deviation.
    assert channel_gap(torch.ones(2, 3, 2, 2), 3 * torch.ones(2, 3, 2, 2)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other: expected the shape"):
        channel_gap(one, maps(channels=4))


def test_linear_cka_by_its_definition():
    one, two = maps().flatten(1).numpy(), maps(1, 5).flatten(1).numpy()
    x, y = (a - a.mean(0) for a in (one, two))
    expected = (np.linalg.norm(y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert linear_cka(maps(), maps(1, 5)) == pytest.approx(expected, rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64)).Q
    assert linear_cka(maps().flatten(1), 3 * maps().flatten(1) @ rotation) == pytest.approx(1)
    assert linear_cka(maps(), torch.ones(20, 3)) == 0
    with pytest.raises(ValueError, match="other: expected 20 samples"):
        linear_cka(maps(), maps()[:5])


def test_mean_cosine():
    assert mean_cosine(maps(), 2 * maps()) == pytest.approx(1)
    assert mean_cosine(maps(), -maps()) == pytest.approx(-1)
    assert mean_cosine(maps(), torch.zeros(20, 3, 4, 4)) == 0


def test_curves_belong_to_their_member_and_average_the_networks():
    epochs = [{"logit0[0]": 1.0, "logit1[0]": 3.0, "logit0[1]": 5.0, "logit1[1]": 7.0} | {
        f"{name}{k}[{m}]": 0.0 for name in ("discriminator", "adversarial") for k in (0, 1) for m in (0, 1)
    } | {f"{name}[{m}]": float(m) for name in ("channel_gap", "cosine", "cka") for m in (0, 1)}]  # fmt: skip
    assert groups._of_member(epochs, 0, 2)["logit"] == [2.0]
    assert groups._of_member(epochs, 1, 2)["logit"] == [6.0]
    assert groups._of_member(epochs, 1, 2)["cka"] == [1.0]


# Figures


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def results():
    names = [name for name in afd.METRICS if name != "accuracy3"]
    return [
        Result.model_construct(run=Run("afd", "quick", group.data, arm, seed), metrics=dict.fromkeys(names, 90.0 + seed)
                               | ({"accuracy3": 91.0} if len(group.nets) == 3 else {}))
        for group, arm in PLANNED
        for seed in (0, 1)
    ]  # fmt: skip


def test_every_arm_has_a_title():
    arms = {arm for config in afd.PROFILES.values() for group in config.groups for arm in group.arms}
    assert arms == figures.ARM_TITLES.keys()


def test_accuracy_figure_has_a_row_for_each_network_and_the_ensemble(results, closed):
    figure = figures.accuracy_figure(results, QUICK.groups)
    rows = [len(axes.get_yticklabels()) for axes in figure.axes]
    assert rows == [len(group.arms) * (len(group.nets) + 1) for group in QUICK.groups]


def test_monitors_figure_draws_the_mean_over_the_seeds(results, closed, monkeypatch):
    curves = {
        "discriminator": [0.2, 0.4],
        "adversarial": [0.5, 0.3],
        "channel_gap": [0.1, 0.1],
        "cka": [0.7, 0.8],
    }
    monkeypatch.setattr(figures, "_curves", lambda *_: [curves, {name: [0.0, 0.0] for name in curves}])
    figure = figures.monitors_figure(results, QUICK, PAIR)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.1, 0.2])
    assert figure.axes[0].lines[-1].get_ydata()[0] == 0.5  # where it is fooled


def test_cost_figure_counts_discriminators(closed):
    small = replace(QUICK, groups=(PAIR,))
    axes = figures.cost_figure(small, counts=(2, 3)).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines[figures.ARM_TITLES["afd"]] == [2, 3]
    assert lines[figures.ARM_TITLES["afd_pairwise"]] == [2, 6]
    assert lines[figures.ARM_TITLES["dml"]] == [0, 0]
