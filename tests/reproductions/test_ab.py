"""The column of activation boundaries: its plan, its arms, its measure of similarity, its parts of a training set."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kdrefs.methods.ab import ab_loss
from kdrefs.methods.fitnets import hint_loss
from kdrefs.methods.kd import kd_loss
from kdrefs.nets import Output
from reproductions.ab import figures, similarity
from reproductions.ab import run as ab
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.protocols import classification, joint
from reproductions.protocols.pairs import PAIRS, labelled_subset, load_pair_data, teacher

QUICK = ab.PROFILES["quick"]
READ = {"activation_similarity", "middle_similarity"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("profile", ab.PROFILES)
def test_plan_has_every_arm_and_seed_once(profile):
    config = ab.PROFILES[profile]
    plan = ab.plan(config)
    for setting in config.settings:
        for arm in (*setting.arms, *setting.few):
            seeds = [run.seed for run in plan if (run.data, run.arm) == (setting.data, arm)]
            assert len(seeds) >= (1 if arm == "teacher" else 3)
            assert seeds == list(config.seeds[: len(seeds)])


def test_quick_needs_no_download():
    assert QUICK.data == ("digits",)
    assert QUICK.download_mb == 0


@pytest.mark.parametrize(
    ("data", "arm", "expected"),
    [
        ("digits", "ab", ab.METRICS.keys()),
        ("digits", "ab_kd", ab.METRICS.keys()),
        ("digits", "teacher", ab.METRICS.keys()),
        ("digits-short", "ab_middle", ab.METRICS.keys()),
        ("digits-few", "hint", ab.METRICS.keys()),
        ("digits-few", "student", ab.METRICS.keys()),
        ("digits-first", "ab", READ),
    ],
)
def test_a_quick_arm_gives_its_metrics(data, arm, expected, shared):
    scores = ab.execute(Run("ab", "quick", data, arm, 0), QUICK, shared)
    assert scores.keys() - {"accuracy@best"} == set(expected)
    assert all(0 <= scores[name] <= 100 for name in scores.keys() - {"cross_entropy"})


def test_seeds_in_one_training_are_the_seeds_alone(shared):
    runs = [Run("ab", "quick", "digits-few", "ab_middle", seed) for seed in (0, 1)]
    both = ab.execute_together(runs, QUICK, shared)
    alone = [ab.execute(run, QUICK, shared) for run in runs]
    for one, other in zip(both, alone, strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("data", ["digits", "digits-short", "digits-few", "digits-first", "cifar100"])
def test_every_method_sees_every_image_equally_often(data):
    for method in ab.methods(data).values():
        assert sum(phase.share for phase in method.phases) == pytest.approx(1)
        assert len(method.phases) == (1 if data == "digits-first" or method.regressors is None else 2)


# The first stage


def test_signs_survive_packing_and_half_precision():
    maps = draw(3, 16, 4, 5, seed=1)
    maps[0, :4] = 0
    packed = ab.pack(maps).half()
    assert packed.shape == (3, 2, 4, 5)
    like = torch.empty(3, 16, 4, 5).to(memory_format=torch.channels_last)
    unpacked = ab.unpack(packed, like)
    assert torch.equal(unpacked, (maps > 0).float())
    assert unpacked.is_contiguous(memory_format=torch.channels_last)


def first_stage(arm: str):
    """Value of an arm's first stage on drawn maps, by hand and by the column, and what got a gradient."""
    method, stages = ab.methods("digits")[arm], ab.stages_of("digits")
    students = {name: draw(3, 4, 6, 6, seed=k).requires_grad_() for k, (name, _) in enumerate(stages)}
    guides = {name: draw(3, 8, 6, 6, seed=9 + k) for k, (_, name) in enumerate(stages)}
    targets = {name: ask(Output(torch.zeros(3, 10), guides)) for name, ask in method.targets.items()}
    targets.pop("logits", None)
    assert method.regressors is not None
    modules = method.regressors(
        {name: value.shape[1:] for name, value in students.items()},
        {name: value.shape[1:] for name, value in targets.items()},
    )
    logits = torch.randn(3, 10, requires_grad=True)
    features = students | {f"{name}_regressed": module(students[name]) for name, module in modules.items()}
    value = method.phases[0].loss(Output(logits, features), targets, torch.arange(3), 0.0)
    value.backward()
    assert logits.grad is None
    assert all(p.grad is not None for module in modules.values() for p in module.parameters())
    return value, features, guides, {name for name, maps in students.items() if maps.grad is not None}


def test_boundaries_of_all_stages_are_weighed_as_the_authors_weigh_them():
    value, features, guides, trained = first_stage("ab")
    stages = ab.stages_of("digits")
    parts = [ab_loss(features[f"{ours}_regressed"], guides[theirs]) for ours, theirs in stages]
    torch.testing.assert_close(value, 0.003 * (parts[0] / 2 + parts[1]))
    assert trained == {"block1_pre", "block2_pre"}


def test_hint_and_boundaries_of_the_middle_stage_differ_in_the_loss_alone():
    value, features, guides, trained = first_stage("ab_middle")
    ours, theirs = features["block1_pre_regressed"], guides["block1_pre"]
    torch.testing.assert_close(value, 0.003 * ab_loss(ours, theirs))
    value, features, guides, also = first_stage("hint")
    torch.testing.assert_close(
        value, 0.003 * (features["block1_pre_regressed"] - theirs).square().sum() / len(theirs)
    )
    torch.testing.assert_close(
        value, 0.003 * 2 * hint_loss(features["block1_pre_regressed"], guides["block1_pre"])
    )
    assert trained == also == {"block1_pre"}


def test_second_stages_are_the_labels_or_the_teacher():
    logits, guide, labels = draw(6, 5, seed=1), draw(6, 5, seed=2), torch.arange(6) % 5
    given = Output(logits, {}), {"logits": guide}, labels, 0.5
    alone = kd_loss(logits, guide, temperature=3) / 9
    hard = torch.nn.functional.cross_entropy(logits, labels)
    arms = ab.methods("digits")
    torch.testing.assert_close(arms["ab_kd"].phases[1].loss(*given), alone)
    torch.testing.assert_close(arms["kd_only"].phases[0].loss(*given), alone)
    for name in ("ab", "ab_middle", "hint"):
        torch.testing.assert_close(arms[name].phases[1].loss(*given), hard)


# Parts of the training set


def test_a_part_is_all_that_a_student_sees(shared, monkeypatch):
    seen: list[Tensor] = []
    original = joint._step

    def watched(*arguments):
        step = original(*arguments)

        def watching(state, batch):
            seen.append(batch.indices)
            return step(state, batch)

        return watching

    monkeypatch.setattr(joint, "_step", watched)
    run, context = Run("ab", "quick", "digits-few", "student", 3), replace(shared, max_steps=12)
    classification.students_of([run], QUICK, context, {}, "reproductions.ab.run", fraction=0.05)
    split = load_pair_data(PAIRS["digits"], probe=True)[0]
    expected = labelled_subset(split.labels, 0.05, 3)
    assert set(torch.cat(seen).tolist()) == set(expected.tolist())
    assert 30 < len(expected) < 70


# The measure


class Layer(nn.Module):
    """A network whose only layer is ``weight`` times the image's channels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Output:
        maps = torch.einsum("oc,nchw->nohw", self.weight, images)
        return Output(maps.mean((2, 3)), {"pre": maps})


def similarity_of(student: nn.Module, context: Context) -> float:
    guide = Layer(torch.tensor([[1.0], [-1.0]]))
    (found,) = similarity.similarities(student, guide, PAIRS["digits"], [("pre", "pre")], context)
    return found


def test_a_student_that_knows_the_map_in_other_coordinates_has_all_boundaries(shared):
    assert similarity_of(Layer(torch.tensor([[-3.0]])), shared) == pytest.approx(100)
    # Channels that are copies of each other leave the least squares without a unique answer.
    assert similarity_of(Layer(torch.tensor([[2.0], [2.0], [2.0]])), shared) == pytest.approx(100)


def test_a_student_that_knows_nothing_has_the_more_frequent_sign(shared):
    split = load_pair_data(PAIRS["digits"], probe=True)[1]
    bright = float(
        (torch.from_numpy(split.images.copy()) > 127).double().mean()
    )  # the normalised image above 0
    found = similarity_of(Layer(torch.tensor([[0.0]])), shared)
    assert found == pytest.approx(100 * max(bright, 1 - bright), abs=0.5)


def test_a_teacher_read_from_itself_is_near_the_top(shared):
    pair = PAIRS["digits"]
    guide = teacher(shared, pair, 0)
    stages = [("block1_pre", "block1_pre"), ("block2_pre", "block2_pre")]
    for found in similarity.similarities(guide, guide, pair, stages, shared):
        assert 90 < found <= 100


def test_loss_figure_shows_hinge_count_and_squared_distance():
    active, inactive = figures.loss_figure().axes
    for axes, response, side in ((active, 0.3, 1), (inactive, -2.0, -1)):
        count, hinge, square = (line.get_ydata() for line in axes.lines[:3])
        values = axes.lines[0].get_xdata()
        assert square[abs(values - response).argmin()] == pytest.approx(0, abs=1e-3)
        right = side * values >= 1
        assert max(hinge[k] for k in range(len(values)) if right[k]) == 0
        assert all(one <= other for one, other in zip(count, hinge, strict=True))
