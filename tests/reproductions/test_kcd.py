"""The KCD column: its stages, its E-steps, resumption, what it measures, its figures."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from kdrefs.methods.kcd import augment, condensed_size, partition
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.kcd import condensation, figures
from reproductions.kcd import run as kcd
from reproductions.kcd.sets import TrainingSets
from reproductions.kcd.stages import ALPHA, ARMS, STAGES, Arm, Stage, methods, passes_of, stages_of, steps_of
from reproductions.protocols.pairs import PAIRS, initialised, load_pair_data, representations, teacher
from reproductions.protocols.tables import CIFAR10, CIFAR100, DIGITS

QUICK = kcd.PROFILES["quick"]
SHORT = replace(DIGITS, epochs=STAGES)  # an epoch a stage
PROBE = 1024  # images of a probe


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=30, progress=False)


@pytest.mark.parametrize("profile", kcd.PROFILES)
def test_plan_has_every_arm(profile):
    config = kcd.PROFILES[profile]
    (setting,) = config.settings
    arms = {*setting.arms, *setting.few}
    assert arms == {"teacher", "student", "kd", "pkt", *ARMS}
    assert {run.arm for run in kcd.plan(config)} == arms
    counts = {arm: len([run for run in kcd.plan(config) if run.arm == arm]) for arm in arms - {"teacher"}}
    assert min(counts.values()) >= 3
    assert all(counts[arm] >= 5 for arm in ("kd", "kcd", "kcd_plain", "random", "kd_short"))


# Stages


@pytest.mark.parametrize(("training", "samples"), [(DIGITS, 1297), (CIFAR10, 50_000), (CIFAR100, 50_000)])
def test_stages_cover_all_epochs_and_passes_are_seven_eighths(training, samples):
    stages = stages_of(training, samples, ARMS["kcd"])
    assert [stage.first for stage in stages] == [
        sum(earlier.epochs for earlier in stages[:k]) for k in range(STAGES)
    ]
    assert sum(stage.epochs for stage in stages) == training.epochs
    sizes = [condensed_size(k, samples, variant="official") for k in range(STAGES)]
    assert stages[0].size == samples
    for stage, size in zip(stages, sizes, strict=True):
        assert 0 <= size - stage.size < training.batch_size / 2
    for stage in stages[1:]:  # no batch of a few images ends an epoch
        assert (
            stage.size % training.batch_size == 0
            or 2 * (stage.size % training.batch_size) >= training.batch_size
        )
    assert passes_of(training, samples, ARMS["kcd"]) / (training.epochs * samples) == pytest.approx(
        0.875, abs=4e-3
    )
    short = passes_of(training, samples, ARMS["kd_short"]) / (training.epochs * samples)
    assert short == pytest.approx(0.875, abs=0.045)  # full sets of digits end their epochs with 17 images
    assert steps_of(training, samples) < training.epochs * -(-samples // training.batch_size)


def test_stages_of_the_authors_protocol():
    stages = stages_of(CIFAR100, 50_000, ARMS["kcd"])
    sizes = (
        50_000,
        47_488,
        44_992,
        42_496,
        40_000,
        37_500,
    )  # theirs end with 12, 8 and 4 images in the second to fourth
    assert stages == [Stage(40 * k, 40, size) for k, size in enumerate(sizes)]
    assert stages_of(CIFAR100, 50_000, ARMS["kd_short"]) == [Stage(0, 240, 50_000)]
    assert steps_of(CIFAR100, 50_000) == 40 * sum(-(-stage.size // 64) for stage in stages)


def test_fewer_epochs_than_stages_are_refused():
    with pytest.raises(ValueError, match="epochs: expected at least 6, one a stage, got 5"):
        stages_of(replace(DIGITS, epochs=5), 100, ARMS["kcd"])


def test_milestones_keep_their_place_among_fewer_steps():
    training = replace(SHORT, milestones=(3, 5), batch_size=100)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    stages = stages_of(training, 1000, ARMS["kcd"])
    total = steps_of(training, 1000)
    schedule = condensation._schedule(optimizer, training, stages, total)
    assert sorted(schedule.milestones) == [10 + 10 + 9, 10 + 10 + 9 + 9 + 8]
    full = stages_of(training, 1000, ARMS["kd_short"])
    schedule = condensation._schedule(optimizer, training, full, total)
    assert sorted(schedule.milestones) == [round(total * 3 / 6), round(total * 5 / 6)]


# E-steps


def run_train(arm: Arm, folder, seeds=(0,), *, training=SHORT, store=None, max_steps=10_000):
    """A whole training of a probe's images: six stages of one epoch."""
    context = Context(store=store or RunStore(folder / "store"), max_steps=max_steps, progress=False)
    pair = PAIRS[training.pair]
    students = [initialised(training.student, 10, seed, context.device) for seed in seeds]
    traces = condensation.train(students, seeds, arm, training, context, folder)
    _, _, classes = load_pair_data(pair, probe=True)
    assert classes == 10
    return students, traces


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("teachers"))


@pytest.mark.parametrize("arm", ["kcd", "kcd_plain", "random", "anti"])
def test_each_stage_trains_on_what_the_ranking_keeps(arm, tmp_path, store):
    _, (trace,) = run_train(ARMS[arm], tmp_path, store=store)
    sizes = [stage.size for stage in stages_of(SHORT, PROBE, ARMS[arm])]
    assert [len(points) for points in trace.kept] == sizes
    mean = trace.total / trace.frequency
    for k in range(STAGES - 1):
        score = mean[k] * trace.frequency[k].double() ** ALPHA
        if arm == "random":
            score = torch.rand(PROBE, generator=torch.Generator().manual_seed(0))
        parts = partition(-score if arm == "anti" else score, sizes[k + 1], sizes[k] - sizes[k + 1])
        assert torch.equal(trace.kept[k + 1], parts.kept)
        assert torch.equal(trace.low[k + 1], parts.low)
        assert torch.equal(trace.dropped[k + 1], parts.dropped)
    # Exactly the points of a stage were recorded in it, once an epoch.
    seen = trace.frequency.diff(dim=0, prepend=torch.zeros(1, PROBE, dtype=torch.int64))
    for k in range(STAGES):
        assert seen[k].nonzero().flatten().tolist() == sorted(trace.kept[k].tolist())
        assert seen[k].max() == 1
    if arm == "random":
        assert kcd.fate(trace, PROBE)["readmitted"] == 0


def test_blended_images_and_the_teachers_answers_on_them_reach_the_student(tmp_path, store):
    context = Context(store=store, max_steps=10_000, progress=False)
    pair, method = PAIRS["digits"], methods(SHORT)["kd"]
    split, _, _ = load_pair_data(pair, probe=True)
    source = TrainingSets(pair, split, [0], method, SHORT, context)
    parts = partition(torch.rand(PROBE), 900, 50)
    batches = source.stage([parts.kept], [parts])
    images = torch.from_numpy(split.images)
    mixed = augment(images[parts.low], images[parts.dropped])
    assert torch.equal(batches.images[parts.low], mixed)
    others = torch.ones(PROBE, dtype=torch.bool)
    others[parts.low] = False
    assert torch.equal(batches.images[others], images[others])
    assert batches.num_samples == 900
    clean = source.stage([parts.kept])
    given, asked = batches.view_extras["logits"][0], clean.view_extras["logits"][0]
    assert torch.equal(given[others], asked[others])
    guide = teacher(context, pair, 0)
    wanted = representations(guide, batches.subset(parts.low), view=0)["logits"]
    torch.testing.assert_close(given[parts.low], wanted)
    assert (given[parts.low[-10:]] - asked[parts.low[-10:]]).abs().max() > 0.1


def test_a_stage_that_removes_nothing_blends_nothing(store):
    context = Context(store=store, max_steps=10_000, progress=False)
    split, _, _ = load_pair_data(PAIRS["digits"], probe=True)
    source = TrainingSets(PAIRS["digits"], split, [0], methods(SHORT)["kd"], SHORT, context)
    parts = partition(torch.rand(PROBE), 900, 0)
    batches = source.stage([parts.kept], [parts])
    assert batches.num_samples == 900
    assert torch.equal(batches.images, source.stage([parts.kept]).images)


def test_first_stage_is_that_of_every_arm(tmp_path, store):
    nets = [run_train(ARMS[arm], tmp_path / arm, store=store, max_steps=8)[0][0] for arm in ("kcd", "anti")]
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("views", [1, None])
def test_a_killed_training_ends_with_the_bits_of_an_unbroken_one(views, tmp_path, store, monkeypatch):
    training = replace(SHORT, views=views)
    (whole,), (trace,) = run_train(ARMS["kcd"], tmp_path / "whole", training=training, store=store)
    original, left = condensation.update, 21  # in the middle of the third stage

    def killing(optimizer, loss):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        original(optimizer, loss)

    fit = condensation.fit
    monkeypatch.setattr(condensation, "update", killing)
    monkeypatch.setattr(
        condensation, "fit", lambda *args, **options: fit(*args, **options, checkpoint_every=0.0)
    )
    with pytest.raises(KeyboardInterrupt):
        run_train(ARMS["kcd"], tmp_path / "parts", training=training, store=store)
    monkeypatch.undo()
    (resumed,), (again,) = run_train(ARMS["kcd"], tmp_path / "parts", training=training, store=store)
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(trace.kept, again.kept, strict=True))
    assert torch.equal(trace.total, again.total)
    assert torch.equal(trace.watched, again.watched)


def test_seeds_share_a_training_each_with_its_own_set(tmp_path, store):
    students, traces = run_train(ARMS["kcd"], tmp_path / "both", (0, 1), store=store)
    for seed in (0, 1):
        (alone,), (trace,) = run_train(ARMS["kcd"], tmp_path / f"{seed}", (seed,), store=store)
        torch.testing.assert_close(traces[seed].total[0], trace.total[0], rtol=1e-3, atol=1e-3)
        # Rounding may move a point over the border.
        assert torch.isin(traces[seed].kept[1], trace.kept[1]).float().mean() > 0.99
        assert traces[seed].watched[-1, 0] == pytest.approx(trace.watched[-1, 0], abs=3)
        weights = [net.state_dict()["classifier.weight"] for net in (students[seed], alone)]
        assert F.cosine_similarity(weights[0].flatten(), weights[1].flatten(), dim=0) > 0.99
    assert not torch.equal(traces[0].kept[1].sort().values, traces[1].kept[1].sort().values)


# What is measured


@pytest.mark.parametrize("arm", ["student", "kd", "pkt", *ARMS])
def test_arms_give_their_metrics(arm, shared):
    scores = kcd.execute(Run("kcd", "quick", "digits", arm, 0), QUICK, shared)
    expected = kcd.METRICS.keys() - ({"readmitted"} if arm in ("student", "kd", "pkt", "kd_short") else set())
    assert {name.removesuffix("@best") for name in scores} == expected
    assert scores["kept"] == pytest.approx(100 if arm in ("student", "kd", "pkt", "kd_short") else 95, abs=5)


def test_teacher_gives_its_accuracy(shared):
    scores = kcd.execute(Run("kcd", "quick", "digits", "teacher", 0), QUICK, shared)
    assert scores.keys() == {"accuracy", "agreement", "cross_entropy"}
    assert scores["agreement"] == 100


def test_fate_counts_points_that_came_back():
    def sets(*points):
        return tuple(torch.tensor(one) for one in points)

    empty = sets([], [], [])
    trace = condensation.Trace(
        sets([0, 1, 2, 3], [0, 1], [0, 2]),
        empty,
        empty,
        torch.zeros(3, 4),
        torch.zeros(3, 4),
        torch.zeros(3, 2),
    )
    # 2 and 3 were dropped first, then 1; of these three, 2 came back.
    assert kcd.fate(trace, 4) == {"kept": 50.0, "readmitted": pytest.approx(100 / 3)}
    assert kcd.fate(None, 4) == {"kept": 100.0}


# Figures


@pytest.fixture(scope="module")
def traces(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("traces")
    return {
        arm: dict(zip((0, 1), run_train(ARMS[arm], folder / arm, (0, 1), store=store)[1], strict=True))
        for arm in ("kcd", "random")
    }


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    assert figures.ARM_TITLES.keys() == {"teacher", "student", "kd", "pkt", *ARMS}


def test_fates_are_all_points_and_agree_with_the_metric(traces):
    for trace in traces["kcd"].values():
        groups = figures.fates(trace)
        assert sorted(n for points in groups.values() for n in points.tolist()) == list(range(PROBE))
        left = len(groups["came back"]) + len(groups["dropped for good"])
        assert kcd.fate(trace, PROBE)["readmitted"] == pytest.approx(100 * len(groups["came back"]) / left)
    assert len(figures.fates(traces["random"][0])["came back"]) == 0


def test_leavers_are_in_their_stage_and_not_in_the_next(traces):
    for points, now, later in zip(
        figures.leavers(traces["kcd"][0]), traces["kcd"][0].kept, traces["kcd"][0].kept[1:], strict=False
    ):
        assert len(points) >= len(now) - len(later)
        assert torch.isin(points, now).all()
        assert not torch.isin(points, later).any()


def test_recorded_entropy_of_a_stage_is_the_mean_of_what_it_added(traces):
    trace = traces["kcd"][0]
    values = figures.recorded(trace)
    assert values[0] == pytest.approx((trace.total[0].sum() / PROBE).item())
    added = trace.total[1] - trace.total[0]
    assert values[1] == pytest.approx(added[trace.kept[1]].mean().item())


def test_overlap_of_a_seed_with_itself_is_whole_and_random_seeds_overlap_by_chance(traces):
    one = traces["kcd"][0]
    assert figures.overlap({0: one, 1: one}) == [1.0] * (STAGES - 1)
    shares = figures.overlap(traces["random"])
    left_out = [1 - len(points) / PROBE for points in traces["random"][0].kept[1:]]
    assert shares == pytest.approx(left_out, abs=0.08)


def test_figures_show_what_they_are_given(traces):
    trace = traces["kcd"][0]
    dropped = figures.dropped_figure(trace, QUICK, "digits", columns=5)
    assert len(dropped.axes) == 5 * (STAGES - 1)
    assert all(axes.images for axes in dropped.axes)
    blending = figures.blending_figure(trace, QUICK, "digits", columns=4)
    line = blending.axes[0].lines[1].get_ydata()
    assert len(line) == len(trace.low[1])
    assert (line[0], line[-1]) == (0, pytest.approx(0.3))
    assert len(figures.values_figure(trace).axes) == 3
    entropies = figures.entropies_figure(traces)
    assert [text.get_text() for text in entropies.axes[1].get_legend().get_texts()] == [
        figures.ARM_TITLES[arm] for arm in traces
    ]
    shown = figures.overlap_figure(traces).axes[0].lines
    assert list(shown[1].get_ydata()) == pytest.approx([100 * x for x in figures.overlap(traces["random"])])


def test_traces_are_found_again_by_their_results(tmp_path, monkeypatch):
    store = RunStore(tmp_path)
    config = replace(QUICK, settings=(replace(QUICK.settings[0], recipe=SHORT),))
    context = Context(store=store, progress=False)
    runs = [Run("kcd", "quick", "digits", "kcd", seed) for seed in (0, 1)]
    kcd.execute_together(runs, config, context)
    origin = SimpleNamespace(seeds=(0, 1), device="cpu", source="", threads=torch.get_num_threads())
    results = [SimpleNamespace(run=run, provenance=origin) for run in runs]
    monkeypatch.setattr(condensation, "train", None)  # nothing is trained again
    monkeypatch.setattr(figures.Context, "of", lambda result: context)
    found = figures.traces_of(results, config, "kcd")
    assert found.keys() == {0, 1}
    assert len(found[1].kept) == STAGES
