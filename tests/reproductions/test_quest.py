"""The QUEST column: its plan, its arms, what it measures of targets, its figures."""

import math
from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.methods.quest import nearest_word, quest_loss, soft_assignment
from kdrefs.nets import Output
from kdrefs.training import CheckpointError
from reproductions.harness import store
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.quest import figures, targets, words
from reproductions.quest import run as quest
from reproductions.quest.errata import small_noise

QUICK = quest.PROFILES["quick"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", quest.PROFILES)
def test_plan_has_every_arm_and_every_arm_a_title(profile):
    config = quest.PROFILES[profile]
    plan = quest.plan(config)
    for setting in config.settings:
        arms = {*setting.arms, *setting.few}
        assert {run.arm for run in plan if run.data == setting.data} == arms
        assert arms - {"teacher", "student", "kd"} <= quest.ARMS[quest.base(setting.data)].keys()
        assert arms <= figures.ARM_TITLES.keys()


@pytest.mark.parametrize("arm", ["student", "quest", "quest_hard"])
def test_arms_give_their_metrics(arm, shared):
    scores = quest.execute(Run("quest", "quick", "digits", arm, 0), QUICK, shared)
    assert {"accuracy", "agreement", "cross_entropy"} <= scores.keys()
    assert all(0 <= scores[name] <= 100 for name in ("accuracy", "agreement"))


def test_seeds_share_a_training_each_with_its_own_words(shared):
    runs = [Run("quest", "quick", "digits", "quest_k16", seed) for seed in (0, 1)]
    together = quest.execute_together(runs, QUICK, shared)
    alone = [quest.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-4)
    found = [quest.words_of(run, QUICK, shared)[0] for run in runs]
    assert found[0].shape == (16, 64)
    assert not torch.equal(*found)


@pytest.mark.parametrize("beta", [0.3, None])
def test_arms_add_the_loss_of_the_last_maps_and_the_seed_s_words(beta):
    by_seed = {seed: torch.randn(5, 6) for seed in (3, 4)}
    method = quest.method("digits", by_seed, beta)
    torch.manual_seed(4)  # as the protocol does before it makes the regressors of seed 4
    made = method.regressors({"block2": (3, 4, 4), "embedding": (16,)}, {"block2": (6, 4, 4)})
    assert torch.equal(made["embedding"](torch.zeros(2, 16)), by_seed[4])
    student, teacher = torch.randn(2, 3, 4, 4), {"block2": torch.randn(2, 6, 4, 4)}
    scores = made["block2"](student)
    features = {"block2_regressed": scores, "embedding_regressed": by_seed[4]}
    given = Output(torch.zeros(2, 10), features)
    loss = method.phases[0].loss(given, teacher, torch.zeros(2, dtype=torch.int64), 0.0).item()
    if beta is None:
        hard = nearest_word(teacher["block2"], by_seed[4])
        expected = torch.nn.functional.cross_entropy(scores, hard).item()
    else:
        expected = quest_loss(scores, teacher["block2"], by_seed[4], beta).item()
    assert loss == pytest.approx(expected + math.log(10), rel=1e-5)


def test_every_target_sees_the_same_disturbance(shared):
    found = {}
    for arm in ("hint", "quest", "quest_hard"):
        run = Run("quest", "quick", "digits-targets", arm, 0)
        found[arm] = quest.execute(run, QUICK, shared)
        assert {"noise_change", "dropout_change", "photometric_change"} <= found[arm].keys()
        assert quest.execute(run, QUICK, shared) == found[arm]
    assert found["quest_hard"]["mean_largest"] == 1
    assert found["quest"]["mean_largest"] == pytest.approx(0.99, abs=0.03)
    assert "mean_largest" not in found["hint"]


def test_relative_change_has_the_closed_forms():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 4, generator=generator)
    assert targets.relative_change(rows, rows, generator) == 0
    other = torch.randn(20_000, 4, generator=generator)
    assert targets.relative_change(rows, other, generator) == pytest.approx(100, rel=0.02)
    noisy = targets.noisy(rows, 0.5, generator)  # 0.25 a channel, of 2 between two rows
    assert targets.relative_change(rows, noisy, generator) == pytest.approx(12.5, rel=0.02)
    dropped = targets.dropped(rows, 0.3, generator)  # x² p / (1 - p) a channel
    assert targets.relative_change(rows, dropped, generator) == pytest.approx(100 * 3 / 7 / 2, rel=0.03)


def test_the_example_of_the_errata_is_what_the_column_measures():
    generator = torch.Generator().manual_seed(0)
    rows = 2 * torch.rand(200_000, 1, generator=generator) - 1
    vocabulary, sigma = torch.tensor([[-0.5], [0.5]]), 0.1
    disturbed = rows + sigma * torch.randn(rows.shape, generator=generator)
    for target, expected in zip(
        (targets.hint_target, targets.hard_target(vocabulary)), small_noise(sigma), strict=True
    ):
        change = targets.relative_change(target(rows), target(disturbed), generator)
        assert change == pytest.approx(expected, rel=0.05)
    soft = targets.soft_target(vocabulary, 3.0)
    assert torch.equal(soft(rows[:5]), soft_assignment(rows[:5], vocabulary, 3.0))


def test_beta_and_words_are_kept(shared, monkeypatch):
    first = (
        words.beta_of(shared, "digits", "block2", 16, 0.7),
        words.vocabulary(shared, "digits", "block2", 16, 0),
    )
    monkeypatch.setattr(words, "teacher_maps", None)  # not asked again
    assert words.beta_of(shared, "digits", "block2", 16, 0.7) == first[0] > 0
    assert torch.equal(words.vocabulary(shared, "digits", "block2", 16, 0), first[1])


def test_damaged_words_are_set_aside_and_made_again(tmp_path, monkeypatch):
    context = Context(store=RunStore(tmp_path), max_steps=2)
    maps = torch.randn(30, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(words, "teacher_maps", lambda *_: maps)
    first = words.vocabulary(context, "digits", "block2", 4, 0)
    (path,) = tmp_path.rglob("words.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    # In the process that made them the file's own digest finds it, in the next one that of the artifact.
    with pytest.raises(CheckpointError, match=r"words\.safetensors is damaged"):
        words.vocabulary(context, "digits", "block2", 4, 0)
    monkeypatch.setattr(store, "_CHECKED", set())
    with pytest.warns(UserWarning, match=r"artifacts/vocabulary/.* is damaged: set aside as .*\.damaged"):
        again = words.vocabulary(context, "digits", "block2", 4, 0)
    assert torch.equal(again, first)
    assert [file.read_bytes() for file in tmp_path.rglob("*.damaged/words.safetensors")] == [content]


def test_inverse_temperatures_are_those_of_soft_arms(shared):
    class Result:
        def __init__(self, arm: str) -> None:
            self.run = Run("quest", "quick", "digits", arm, 0)

    results = [Result(arm) for arm in ("student", "quest", "quest_p70", "quest_hard")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "of", lambda result: shared)
        found = figures.inverse_temperatures(results, QUICK.settings[0], QUICK)
    assert {arm: wanted for arm, (wanted, _) in found.items()} == {"quest": 0.99, "quest_p70": 0.7}
    assert found["quest"][1] > found["quest_p70"][1] > 0


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_words_figure_shows_the_nearest_patches_of_the_most_used_words():
    vocabulary = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    maps = torch.zeros(3, 2, 2, 2)
    maps[:, 0, 0, 1] = torch.tensor([9.0, 10.0, 8.0])  # word 1 at row 0, column 1 of every image
    maps[0, 0, 1, 1] = 9.5  # and once more in the first
    maps[2, 1, 1, 0] = 10.0
    shares, places = figures.most_used(maps, vocabulary, 2, 3)
    assert shares == pytest.approx([7 / 12, 4 / 12])
    assert places[1] == [(1, 0, 1), (0, 1, 1), (2, 0, 1)]
    picture = torch.arange(64, dtype=torch.uint8).view(8, 8, 1)
    cut = figures.patch(picture, 1, 0, 4)
    assert cut.shape == (12, 12)
    assert (cut[:, :4] == 0).all()
    assert (cut[:8, 4:] == picture[:, :, 0].numpy()).all()


def test_changes_figure_has_a_mark_for_each_target_and_disturbance(closed):
    class Result:
        def __init__(self, arm: str, seed: int) -> None:
            self.run = Run("quest", "quick", "digits-targets", arm, seed)
            self.metrics = {f"{name}_change": 10.0 + seed for name in figures.DISTURBANCES}

    setting = next(one for one in QUICK.settings if one.data == "digits-targets")
    results = [Result(arm, seed) for arm in figures.COLOURS for seed in range(3)]
    (axes,) = figures.changes_figure(results, setting).axes
    assert len(axes.containers) == 12
    assert [text.get_text() for text in axes.get_xticklabels()] == list(figures.DISTURBANCES.values())
