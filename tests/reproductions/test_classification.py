"""The shared table: what its rows have in common, alone and together, cached and live, broken off and resumed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdrefs.data.batches import Augment
from kdrefs.data.sets import load_set
from kdrefs.nets import Output
from kdrefs.nets.fold import fold_batchnorm
from reproductions.at import run as at
from reproductions.fitnets import run as fitnets
from reproductions.harness.files import plain
from reproductions.harness.runs import Context, Run, RunStore
from reproductions.kd import run as kd
from reproductions.nst import run as nst
from reproductions.protocols import classification, joint, pairs
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, initialised, teacher
from reproductions.protocols.rows import INPUT_GRADIENT, Method, Phase, cross_entropy
from reproductions.protocols.settings import Setting
from reproductions.protocols.tables import CIFAR10, DIGITS

PAIR = PAIRS["digits"]
TRAINING = replace(DIGITS, epochs=4, batch_size=64, evaluate_every=None)
STEPS = 5  # an epoch: four batches of 64 images and one of 44
SOURCE = "a" * 64
COLUMNS = {"kd": kd, "at": at, "nst": nst, "fitnets": fitnets}
# One row of each kind: logits; input gradients; maps; two phases with regressors, maps and logits.
ROWS = {
    "kd": kd.methods("digits")["kd_t2"],
    "at": at.methods("digits")["at_gradient"],
    "nst": nst.methods("digits")["nst"],
    "fitnets": fitnets.methods("digits")["fitnets"],
}


@pytest.fixture(scope="module", autouse=True)
def small():
    """300 training and 100 test images: a whole training takes a moment."""
    digits = load_set("digits")
    few = replace(digits, train=pairs._head(digits.train, 300), test=pairs._head(digits.test, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "load_set", {"digits": few}.__getitem__)
        yield


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Its store keeps the teachers and what they said."""
    return Context(store=RunStore(tmp_path_factory.mktemp("store")))


@pytest.fixture
def fits(monkeypatch):
    """The trainings of the students, each with its arguments, what every step saw and its history."""
    calls, original = [], joint.fit

    def spy(step, state, batches, **options):
        call = SimpleNamespace(seen=[], rates=[], batches=batches, **options)

        def watched(state, batch):
            modules = {name: value for name, value in state.items() if isinstance(value, nn.Module)}
            weights = {
                f"{name}.{part.removeprefix('network.')}": tensor.detach().clone()
                for name, module in modules.items()
                for part, tensor in module.named_parameters()
            }
            tensors = {"images": batch.images, "labels": batch.labels, **batch.extras}
            call.seen.append((weights, {name: value.clone() for name, value in tensors.items()}))
            call.rates.append(state["optimizer"].param_groups[0]["lr"])
            return step(state, batch)

        calls.append(call)
        call.history = original(watched, state, batches, **options)
        return call.history

    monkeypatch.setattr(joint, "fit", spy)
    return calls


def train(method, seeds, context, folder, training=TRAINING):
    students = [initialised(training.student, 10, seed, torch.device("cpu")) for seed in seeds]
    best = joint.train(students, seeds, method, training, context, folder, source=SOURCE)
    return students, best


def supervised(*shares):
    """Cross-entropy in phases, which lists how far each step of a training was."""
    seen = []

    def loss(output, targets, labels, progress):
        seen.append(progress)
        return cross_entropy(output, labels)

    return Method(tuple(Phase(loss, share) for share in shares)), seen


def assert_same(one, other, *, rtol, atol):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def config_of(training=TRAINING, arms=("teacher", "student", "kd", "own"), **options):
    settings = (Setting("digits", training, arms),)
    return Config(
        profile="quick", settings=settings, seeds=(0, 1), data=("digits",), budget_minutes=1, **options
    )


def run_of(arm, seed=0, column="kd", data="digits"):
    return Run(column, "quick", data, arm, seed)


# ---------------------------------------------------------------- what is run


def test_plan_goes_through_settings_arms_and_seeds():
    settings = (
        Setting("cifar10", CIFAR10, ("teacher", "student"), few=("extra",)),
        Setting("digits", DIGITS, ("teacher", "own"), few=("more",), first=4),
    )
    config = replace(config_of(), settings=settings, seeds=(7, 3, 5, 1, 9))
    found = [(run.data, run.arm, run.seed) for run in classification.plan("column", config)]
    assert found == [
        ("cifar10", "teacher", 7),
        *(("cifar10", "student", seed) for seed in (7, 3, 5, 1, 9)),
        *(("cifar10", "extra", seed) for seed in (7, 3, 5)),
        *(("digits", "teacher", seed) for seed in (7, 3, 5, 1)),
        *(("digits", "own", seed) for seed in (7, 3, 5, 1)),
        *(("digits", "more", seed) for seed in (7, 3, 5)),
    ]
    assert {(run.column, run.profile) for run in classification.plan("column", config)} == {
        ("column", "quick")
    }


def test_runs_do_not_depend_on_other_arms_and_settings():
    config, run = config_of(), run_of("kd")
    known = plain(classification.relevant_config(run, config))
    other = Setting("digits-deep", replace(DIGITS, epochs=1), ("student",))
    more = replace(config, settings=(other, replace(config.settings[0], arms=("kd",), few=("new",), first=1)))
    assert plain(classification.relevant_config(run, replace(more, seeds=(5,), budget_minutes=9))) == known
    for changed in (config_of(replace(TRAINING, rate=0.5)), replace(config, teacher_weights="other")):
        assert plain(classification.relevant_config(run, changed)) != known


@pytest.mark.parametrize(
    ("training", "arm", "device", "shared"),
    [
        (DIGITS, "student", "cpu", True),
        (DIGITS, "own", "cuda", True),
        (DIGITS, "teacher", "cpu", False),
        (CIFAR10, "student", "cpu", False),
        (CIFAR10, "student", "cuda", True),
        (CIFAR10, "teacher", "cuda", False),
    ],
)
def test_seeds_are_trained_together_where_calls_cost_most(training, arm, device, shared):
    found = classification.together(run_of(arm), config_of(training), device)
    assert (found is not None) == shared
    if shared:
        assert found == classification.together(run_of(arm, seed=4), config_of(training), device)
        assert found != classification.together(run_of(f"{arm}2"), config_of(training), device)


@pytest.mark.parametrize("column", COLUMNS)
def test_shares_of_every_row_add_up_to_one(column):
    for config in COLUMNS[column].PROFILES.values():
        for setting in config.settings:
            for arm, method in COLUMNS[column].methods(setting.data).items():
                assert sum(phase.share for phase in method.phases) == pytest.approx(1), arm


@pytest.mark.parametrize("column", COLUMNS)
def test_a_name_stands_for_one_target_within_a_column(column):
    """What the teacher said is kept by the target's name: two targets of one name would be mixed up."""
    layers = ("block1", "block2", "block1_pre", "block2_pre")
    features = {name: torch.randn(4, 6, 4, 4) for name in layers}
    output = Output(torch.randn(4, 10), features | {INPUT_GRADIENT: torch.randn(4, 1, 8, 8)})
    known = {}
    for arm, method in COLUMNS[column].methods("digits").items():
        for name, target in method.targets.items():
            value = target(output)
            same = torch.equal(value, known.setdefault(name, value))
            assert same, f"{name} of {arm}"


# ---------------------------------------------------------------- together and alone


@pytest.mark.parametrize("row", ROWS)
def test_a_member_trained_together_is_the_run_alone(row, context, tmp_path, fits):
    together, _ = train(ROWS[row], (0, 1), context, tmp_path / "together")
    both = [step for call in fits for step in call.seen]
    fits.clear()
    (alone,), _ = train(ROWS[row], (1,), context, tmp_path / "alone")
    single = [step for call in fits for step in call.seen]
    assert len(both) == len(single) == 4 * STEPS
    # The same start, regressors included; every batch and target to the bit.
    assert_same({name: value[1] for name, value in both[0][0].items()}, single[0][0], rtol=0, atol=0)
    assert not torch.equal(both[0][1]["images"][0], both[0][1]["images"][1])
    for (_, batch), (_, expected) in zip(both, single, strict=True):
        assert_same({name: value[1] for name, value in batch.items()}, expected, rtol=0, atol=0)
    assert_same(dict(together[1].named_parameters()), dict(alone.named_parameters()), rtol=1e-3, atol=1e-4)
    start = dict(initialised(TRAINING.student, 10, 1, torch.device("cpu")).named_parameters())
    moved = max((value - start[name]).abs().max().item() for name, value in alone.named_parameters())
    assert moved > 0.05, "the tolerance means something"


def test_running_statistics_of_members_come_back(context, tmp_path):
    together, _ = train(ROWS["kd"], (0, 1), context, tmp_path / "together")
    (alone,), _ = train(ROWS["kd"], (1,), context, tmp_path / "alone")
    assert_same(dict(together[1].named_buffers()), dict(alone.named_buffers()), rtol=1e-3, atol=1e-4)


def test_regressors_follow_from_the_seed_alone(context):
    shapes = ({"block1": (4, 8, 8), "block2": (8, 4, 4)}, {"block1": (32, 8, 8), "logits": (10,)})
    made = []
    for seed in (3, 3, 4):
        torch.rand(len(made) + 1)
        before = torch.get_rng_state()
        (regressor,) = joint._regressors(ROWS["fitnets"], shapes, seed, context).values()
        assert torch.equal(before, torch.get_rng_state())
        assert regressor.training
        made.append(torch.cat([value.flatten() for value in regressor.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_regressors_are_trained_and_fit_the_shapes(context, tmp_path, fits):
    train(ROWS["fitnets"], (0,), context, tmp_path)
    first, last = fits[0].seen[0][0], fits[0].seen[-1][0]
    names = [name for name in first if name.startswith("regressor_block1.")]
    assert names
    assert all(not torch.equal(first[name], last[name]) for name in names)


# ---------------------------------------------------------------- what the teacher says


@pytest.mark.parametrize("row", ROWS)
def test_cached_targets_are_those_of_the_teacher_on_the_batch(row, context):
    pair, method = replace(PAIR, augment=Augment(crop=1)), ROWS[row]
    split, _, _ = pairs.load_pair_data(pair)
    training = replace(TRAINING, views=2)
    (batches,) = joint.member_batches(pair, split, [1], method, training, context, SOURCE)
    guide = fold_batchnorm(teacher(context, pair, 1))
    epochs = [list(batches.epoch(epoch)) for epoch in (0, 1)]
    for batch in [*epochs[0], *epochs[1]]:
        live = joint.targets_of(guide, batch.images, batch.labels, method)
        halves = {
            name: 2e-3 if value.dtype == torch.float16 else 1e-4 for name, value in batch.extras.items()
        }
        assert halves.keys() == live.keys() == method.targets.keys()
        for name, tolerance in halves.items():
            torch.testing.assert_close(batch.extras[name].float(), live[name], rtol=tolerance, atol=1e-5)
    order = [torch.cat([batch.indices for batch in epoch]).argsort() for epoch in epochs]
    for name in method.targets:
        one, two = (
            torch.cat([batch.extras[name] for batch in epoch])[chosen]
            for epoch, chosen in zip(epochs, order, strict=True)
        )
        assert not torch.equal(one, two), "the views differ"


@pytest.mark.parametrize("row", ["kd", "at"])
@pytest.mark.parametrize("seeds", [(1,), (0, 1)], ids=["alone", "together"])
def test_a_live_teacher_gives_what_its_cached_answers_give(row, seeds, context, tmp_path):
    cached, _ = train(ROWS[row], seeds, context, tmp_path / "cached")
    live, _ = train(ROWS[row], seeds, context, tmp_path / "live", replace(TRAINING, views=None))
    for one, other in zip(cached, live, strict=True):
        assert_same(one.state_dict(), other.state_dict(), rtol=2e-3, atol=2e-4)


def test_maps_are_kept_in_half_precision_and_nothing_else(context):
    split, _, _ = pairs.load_pair_data(PAIR)
    found = {}
    for method in ROWS.values():
        (batches,) = joint.member_batches(PAIR, split, [0], method, TRAINING, context, SOURCE)
        found |= {name: value.dtype for name, value in batches.view_extras.items()}
    assert found == {
        "logits": torch.float32,
        INPUT_GRADIENT: torch.float32,
        "block1": torch.float16,
        "block2_pre": torch.float16,
    }


def test_a_teacher_is_asked_once_for_all_columns(context, monkeypatch):
    split, _, _ = pairs.load_pair_data(PAIR)
    joint.member_batches(PAIR, split, [0, 1], ROWS["kd"], TRAINING, context, SOURCE)
    folders = set((context.store.root / "artifacts" / "target").iterdir())

    def fail(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr(joint, "targets_of", fail)
    other = at.methods("digits")["at_kd"].targets["logits"]
    method = Method(ROWS["kd"].phases, {"logits": other})
    joint.member_batches(PAIR, split, [1], method, TRAINING, context, "b" * 64)
    assert set((context.store.root / "artifacts" / "target").iterdir()) == folders
    own = Method(ROWS["kd"].phases, {"logits": lambda output: output.logits})
    with pytest.raises(AssertionError, match="asked again"):
        joint.member_batches(PAIR, split, [1], own, TRAINING, context, "b" * 64)


# ---------------------------------------------------------------- phases and recipe


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["alone", "together"])
def test_phases_share_the_epochs_and_know_how_far_they_are(seeds, context, tmp_path, fits):
    method, seen = supervised(0.25, 0.75)
    train(method, seeds, context, tmp_path)
    assert [call.epochs for call in fits] == [1, 3]
    assert seen == [step / 5 for step in range(5)] + [step / 15 for step in range(15)]
    # Each phase has an optimiser, a schedule and orders of its own; the student goes on.
    # One cycle each: warm-up over none of 5 and one of 15 steps, then down.
    assert [fits[0].rates[0], *fits[1].rates[:2]] == pytest.approx([0.03, 0.015, 0.03])
    assert [call.batches.seed for call in fits] == [0, 1000]
    name = "student.classifier.weight"
    start, last, next_ = fits[0].seen[0][0][name], fits[0].seen[-1][0][name], fits[1].seen[0][0][name]
    assert 0 < (next_ - last).abs().max() < (next_ - start).abs().max()


@pytest.mark.parametrize("shares", [(), (0.5,), (0.5, 0.6)])
def test_shares_that_do_not_add_up_to_one_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares that add up to 1"):
        supervised(*shares)


def test_phases_spend_the_epochs_of_the_table(context, tmp_path, fits):
    method, _ = supervised(1 / 3, 1 / 3, 1 / 3)
    train(method, (0,), context, tmp_path, replace(TRAINING, epochs=8))
    assert sum(call.epochs for call in fits) == 8


def test_a_phase_without_an_epoch_is_refused(context, tmp_path):
    method, _ = supervised(0.05, 0.95)
    with pytest.raises(ValueError, match="epochs"):
        train(method, (0,), context, tmp_path)


def test_every_phase_goes_through_the_milestones(context, tmp_path, fits):
    method, _ = supervised(0.5, 0.5)
    train(method, (0,), context, tmp_path, replace(TRAINING, epochs=8, milestones=(4, 6), rate=0.1))
    assert [call.rates[-1] for call in fits] == pytest.approx([1e-3, 1e-3])


def test_one_phase_goes_through_the_milestones(context, tmp_path, fits):
    method, _ = supervised(1.0)
    train(method, (0,), context, tmp_path, replace(TRAINING, milestones=(1, 3), rate=0.1))
    assert fits[0].rates == pytest.approx([0.1] * STEPS + [0.01] * 2 * STEPS + [0.001] * STEPS)


@pytest.mark.parametrize(
    ("changes", "kind", "defaults"),
    [
        ({}, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
        ({"nesterov": False}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        (
            {"optimizer": "adam", "weight_decay": 0.0, "rate": 0.001},
            torch.optim.Adam,
            {"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0},
        ),
    ],
)
def test_recipe_reaches_the_optimiser_of_student_and_regressors(changes, kind, defaults):
    state = {"student": nn.Linear(2, 3), "regressor_x": nn.Linear(3, 1), "done": 0}
    optimizer = joint._optimizer(state, replace(TRAINING, **changes))
    assert type(optimizer) is kind
    assert defaults.items() <= optimizer.defaults.items()
    (group,) = optimizer.param_groups
    expected = [*state["student"].parameters(), *state["regressor_x"].parameters()]
    assert {id(one) for one in group["params"]} == {id(one) for one in expected}


def test_precision_reaches_the_student(context, tmp_path):
    kinds = set()

    def loss(output, targets, labels, progress):
        kinds.add(output.logits.dtype)
        return cross_entropy(output, labels)

    training = replace(TRAINING, epochs=1, precision="bf16")
    train(Method((Phase(loss),)), (0,), context, tmp_path, training)
    assert kinds == {torch.bfloat16}


# ---------------------------------------------------------------- broken off, probed


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["alone", "together"])
def test_a_training_killed_within_a_phase_resumes_with_the_same_bits(seeds, context, tmp_path):
    class Killed(BaseException):
        pass

    method = ROWS["fitnets"]
    calls, limit = [], 13  # within the third of the second phase's three epochs, of which one is kept

    def counted(loss):
        def call(*arguments):
            calls.append(1)
            if len(calls) == limit:
                raise Killed
            return loss(*arguments)

        return call

    watched = replace(method, phases=tuple(Phase(counted(one.loss), one.share) for one in method.phases))
    training = replace(TRAINING, evaluate_every=1)
    expected, best = train(method, seeds, context, tmp_path / "unbroken", training)
    with pytest.raises(Killed):
        train(watched, seeds, context, tmp_path / "broken", training)
    torch.manual_seed(99)
    again, best_again = train(watched, seeds, context, tmp_path / "broken", training)
    assert len(calls) == 13 + 10
    assert best_again == best
    for one, other in zip(expected, again, strict=True):
        assert_same(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_probe_stops_every_phase_and_sees_few_images(context, fits, monkeypatch):
    probe = replace(context, max_steps=3)
    asked, original = [], pairs.load_pair_data

    def spy(pair, *, probe=False):
        asked.append(probe)
        return original(pair, probe=probe)

    for module in (pairs, joint, classification):
        monkeypatch.setattr(module, "load_pair_data", spy)
    values = classification.execute_together(
        [run_of("own")], config_of(), probe, {"own": ROWS["fitnets"]}, kd.__name__
    )
    assert [len(call.seen) for call in fits] == [3, 3]
    assert asked
    assert all(asked)
    assert values[0].keys() == classification.METRICS.keys()
    abouts = list((context.store.root / "artifacts" / "classification").glob("*/artifact.json"))
    assert any('"max_steps":3' in path.read_text().replace(" ", "") for path in abouts)


# ---------------------------------------------------------------- evaluation


def test_metrics_are_those_computed_by_hand():
    _, test, _ = pairs.load_pair_data(PAIR)

    class Fixed(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(seed))

        def forward(self, images):
            return Output(images.flatten(1) @ self.weight, {})

    student, guide = Fixed(0), Fixed(1)
    found = classification.evaluate(student, guide, TRAINING, Context())
    pixels = (test.images.reshape(100, -1) / 255 - 0.5) / 0.5
    logits, others = (pixels @ net.weight.double().numpy() for net in (student, guide))
    chosen = logits.argmax(1)
    surprise = np.log(np.exp(logits).sum(1)) - logits[np.arange(100), test.labels]
    assert found == {
        "accuracy": pytest.approx((chosen == test.labels).sum()),
        "agreement": pytest.approx((chosen == others.argmax(1)).sum()),
        "cross_entropy": pytest.approx(surprise.mean(), rel=1e-5),
    }
    assert 0 < found["agreement"] < 100


def test_best_epoch_stands_beside_the_last_one(context, fits):
    def unlearning(output, targets, labels, progress):
        return cross_entropy(output, labels) * (1 if progress < 0.6 else -1)

    methods = {
        "own": Method(
            (Phase(lambda o, t, labels, p: cross_entropy(o, labels), 0.25), Phase(unlearning, 0.75))
        )
    }
    runs, config = [run_of("own", seed) for seed in (0, 1)], config_of(replace(TRAINING, evaluate_every=1))
    found = classification.execute_together(runs, config, context, methods, kd.__name__)
    assert [len(call.history.evaluations) for call in fits] == [1, 3]
    for seed, values in enumerate(found):
        rates = [epoch[str(seed)] for epoch in fits[-1].history.evaluations]
        assert values["accuracy"] == pytest.approx(100 * rates[-1])
        assert values["accuracy@best"] == pytest.approx(100 * max(rates))
        assert values["accuracy@best"] > values["accuracy"]
    # Read again from what was kept, and without the best where no epoch was looked at.
    assert classification.execute_together(runs, config, context, methods, kd.__name__) == found
    assert len(fits) == 2
    (plain_values,) = classification.execute_together([run_of("student")], config_of(), context, {}, "")
    assert plain_values.keys() == classification.METRICS.keys()


def test_the_teacher_is_a_row_of_its_own(context, fits):
    (values,) = classification.execute_together([run_of("teacher")], config_of(), context, {}, "")
    assert values["agreement"] == 100
    assert values["accuracy"] > 50
    assert fits == []


# ---------------------------------------------------------------- what columns share


def folders(context):
    return set((context.store.root / "artifacts" / "classification").glob("?" * 32))


@pytest.mark.parametrize("arm", ["student", "kd"])
def test_baselines_are_trained_once_for_all_columns(arm, tmp_path):
    context = Context(store=RunStore(tmp_path), max_steps=2)
    found = []
    for column in COLUMNS.values():
        runs = [run_of(arm, seed, column.COLUMN) for seed in (0, 1)]
        found.append(column.execute_together(runs, column.PROFILES["quick"], context))
        assert len(folders(context)) == 1
    assert all(values == found[0] for values in found)


def test_own_arms_belong_to_their_column_and_partners(tmp_path):
    context = Context(store=RunStore(tmp_path), max_steps=1)
    methods = {"own": ROWS["nst"]}

    def call(*seeds, module=kd.__name__, training=TRAINING):
        runs = [run_of("own", seed) for seed in seeds]
        classification.students_of(runs, config_of(training), context, methods, module)
        return len(folders(context))

    assert [call(0), call(0), call(1), call(0, 1)] == [1, 1, 2, 3]
    assert call(0, module=at.__name__) == 4
    assert call(0, training=replace(TRAINING, rate=0.2)) == 5


def test_students_come_back_in_evaluation_mode(context):
    students, best = classification.students_of([run_of("kd")], config_of(), context, {}, "")
    assert not any(part.training for student in students for part in student.modules())
    assert best == {}


def test_an_unknown_arm_is_named(context):
    with pytest.raises(KeyError, match="attention"):
        classification.students_of([run_of("attention")], config_of(), context, ROWS, kd.__name__)
