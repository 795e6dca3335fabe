"""The factor transfer column: its plan, both stages of its arms, and what belongs to which seed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrefs.methods.ft import Paraphraser, factor_loss
from kdrefs.nets import Output
from reproductions.ft import figures
from reproductions.ft import run as ft
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.protocols import unsupervised
from reproductions.protocols.pairs import PAIRS, teacher
from reproductions.protocols.tables import DIGITS

QUICK = ft.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("profile", ft.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = ft.PROFILES[profile]
    plan = ft.plan(config)
    assert {run.arm for run in plan} == {"teacher", "student", "kd", *ft.ARMS}
    for setting in config.settings:
        for arm in (*setting.arms, *setting.few):
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert len(seeds) >= (1 if arm == "teacher" else 3)
            assert seeds == list(config.seeds[: len(seeds)])


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize("arm", ["kd", "ft", "ft_direct", "ft_untrained", "ft_repdistiller"])
def test_a_quick_arm_gives_its_metrics(arm, shared):
    scores = ft.execute(Run("ft", "quick", "digits", arm, 0), QUICK, shared)
    lacks = {"reconstruction"} if arm in ("kd", "ft_direct") else set()
    assert scores.keys() - {"accuracy@best"} == ft.METRICS.keys() - lacks
    assert 0 <= scores["accuracy"] <= 100
    assert scores.get("reconstruction", 1) > 0


def test_students_with_a_paraphraser_train_alone_and_baselines_together():
    runs = {arm: Run("ft", "quick", "digits", arm, 0) for arm in ("student", "kd", *ft.ARMS)}
    assert {arm for arm, run in runs.items() if ft.together(run, QUICK, "cpu")} == {"student", "kd"}
    assert all(ft.together(runs[arm], QUICK, "cuda") is None for arm in ft.ARMS)


# The first stage


def test_paraphrasers_are_frozen_of_their_arm_and_of_their_seed(shared):
    def weights(arm: str, seed: int) -> Tensor:
        found = ft.paraphraser("digits", arm, DIGITS, seed, shared)
        assert found is not None
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())
        return found.encoder[0].weight

    first = weights("ft", 0)
    assert torch.equal(first, weights("ft", 0))
    assert torch.equal(first, weights("ft_repdistiller", 0))
    assert not torch.equal(first, weights("ft", 1))
    assert not torch.equal(first, weights("ft_untrained", 0))  # the steps of the probe
    assert first.shape == (64, 64, 3, 3)
    wide = ft.paraphraser("digits", "ft_k75", DIGITS, 0, shared)
    assert wide is not None
    assert wide.encode(torch.randn(1, 64, 2, 2)).shape[1] == 48
    assert ft.paraphraser("digits", "ft_direct", DIGITS, 0, shared) is None


def test_an_untrained_paraphraser_is_the_trained_one_s_beginning(shared):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(unsupervised.OWN_SEED + 3)
        made = Paraphraser(64, 32, batch_norm=True)
    found = ft.paraphraser("digits", "ft_untrained", DIGITS, 3, shared)
    assert found is not None
    for one, other in zip(made.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("views", [1, None])
def test_first_stage_sees_the_teacher_s_maps_and_no_label(views, shared):
    seen: list[Tensor] = []

    def loss(module: nn.Module, maps: Tensor) -> Tensor:
        seen.append(maps)
        return module(maps.mean((2, 3))).square().mean()

    def fitted(seed: int) -> nn.Module:
        return unsupervised.trained_on_teacher(
            "linear", lambda shape: nn.Linear(shape[0], 3), loss, ft.target("digits"),
            replace(DIGITS, views=views), seed, 1, 0.1, shared, module="reproductions.ft.run",
            about={"views": views},
        )  # fmt: skip

    one = fitted(5)
    assert len(seen) == 2  # the probe's steps
    assert seen[0].shape == (128, 64, 2, 2)
    assert seen[0].min() >= 0
    assert not any(parameter.requires_grad for parameter in one.parameters())
    fitted(5)
    assert len(seen) == 2  # found again
    fitted(6)
    assert len(seen) == 4


def test_training_a_paraphraser_lowers_what_it_loses(shared):
    context = replace(shared, max_steps=40)
    guide = teacher(context, PAIRS["digits"], 0)
    left = {}
    for arm in ("ft", "ft_untrained"):
        frozen = ft.paraphraser("digits", arm, DIGITS, 0, context)
        assert frozen is not None
        left[arm] = ft.lost(frozen, guide, "digits", DIGITS, context)
    assert left["ft"] < 0.8 * left["ft_untrained"]


# The second stage


def test_group_is_what_the_next_layer_gets():
    maps = draw(2, 4, 4, 4, seed=1)
    assert torch.equal(ft.group("digits", maps), F.max_pool2d(maps, 2))
    assert torch.equal(ft.group("cifar10", maps), maps)
    assert ft.target("digits")[0] == "block2_group"
    assert ft.target("cifar10")[0] == "layer3_group"


@pytest.mark.parametrize(
    ("arm", "variant", "weight", "width"),
    [
        ("ft", "official", 500, 32),
        ("ft_k100", "official", 500, 64),
        ("ft_direct", "official", 500, 64),
        ("ft_repdistiller", "repdistiller", 200, 32),
    ],
)
def test_second_stage_is_labels_and_the_weighed_factors(arm, variant, weight, width):
    frozen = None if arm == "ft_direct" else Paraphraser(64, width).requires_grad_(False)
    method = ft.method("digits", arm, frozen)
    (phase,) = method.phases
    ((name, ask),) = method.targets.items()
    guide = ask(Output(torch.zeros(3, 10), {"block2": draw(3, 64, 4, 4, seed=2)}))
    assert method.regressors is not None
    ((read, module),) = method.regressors({"block2": (8, 4, 4)}, {name: guide.shape[1:]}).items()
    maps, logits = draw(3, 8, 4, 4, seed=3).requires_grad_(), draw(3, 10, seed=4).requires_grad_()
    made = module(maps)
    assert made.shape == (3, width, 2, 2)
    labels = torch.arange(3)
    value = phase.loss(Output(logits, {f"{read}_regressed": made}), {name: guide.half()}, labels, 0.5)
    factor = guide.half().float() if frozen is None else frozen.encode(guide.half().float())
    expected = F.cross_entropy(logits, labels) + weight * factor_loss(made, factor, variant=variant)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert maps.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in module.parameters())
    if frozen is not None:
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_blindness_figure_shows_one_loss_that_sees_and_one_that_does_not():
    for axes in figures.blindness_figure().axes:
        paper, theirs = (line.get_ydata() for line in axes.lines[:2])
        assert paper[0] == pytest.approx(0, abs=1e-12)
        assert paper[-1] > 0.9
        assert max(theirs) < 1e-9
