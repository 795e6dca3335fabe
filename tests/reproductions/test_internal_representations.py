"""The internal-representations column: its tasks, its arms' steps, its standard profile on tiny files, its figures."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt

from kdrefs.data import texts
from kdrefs.methods.internal_representations import attention_kl, cls_cosine_loss
from kdrefs.nets.transformer import Transformer
from reproductions.harness.runs import Context, Result, Run, RunStore
from reproductions.internal_representations import figures, students, tasks
from reproductions.internal_representations import run as internal
from tests.nets.test_transformer import bert_weights

QUICK, STANDARD = (internal.PROFILES[name] for name in ("quick", "standard"))
COLUMN = "internal_representations"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Context:
    return Context(store=RunStore(tmp_path_factory.mktemp("store")), max_steps=2)


@pytest.mark.parametrize("profile", internal.PROFILES)
def test_plan_has_every_arm(profile):
    config = internal.PROFILES[profile]
    plan = internal.plan(config)
    assert {run.arm for run in plan} == {"teacher", *config.arms}
    assert {run.data for run in plan} == {config.recipe.task.name}
    shared = len(config.teacher_seeds) == 1
    assert [run.seed for run in plan if run.arm == "teacher"] == ([0] if shared else list(config.seeds))
    assert set(config.few) <= set(config.arms)


# Tasks


def test_counting_is_what_it_says():
    task = tasks.Counting(train=300, test=50)
    train, test = tasks.load_task(task)
    assert (train.tokens.shape, test.tokens.shape) == ((300, task.length), (50, task.length))
    for tokens, label in zip(train.tokens.tolist(), train.labels.tolist(), strict=True):
        length = next((k for k, token in enumerate(tokens) if token == 0), task.length)
        assert task.shortest <= length
        assert set(tokens[length:]) <= {0}
        assert tokens[0] == 1
        marked = [token for token in tokens if token >= 2 + task.values]
        assert len(marked) == 1
        assert label == min(2, tokens.count(marked[0] - task.values))
    assert set(train.labels.tolist()) == {0, 1, 2}
    assert max(train.tokens.max(), test.tokens.max()) < task.vocabulary
    lengths = (train.tokens != 0).sum(1)
    assert (lengths.min(), lengths.max()) == (task.shortest, task.length)
    again, _ = tasks.load_task(task)
    assert torch.equal(again.tokens, train.tokens)
    few, _ = tasks.load_task(tasks.Counting(), probe=True)
    assert len(few.labels) == tasks.PROBE_TRAIN


# Arms


@pytest.mark.parametrize("arm", ["teacher", *QUICK.arms])
def test_every_quick_arm_gives_its_metrics(arm, shared):
    scores = internal.execute(Run(COLUMN, "quick", "counting", arm, 1), QUICK, shared)
    assert scores.keys() == internal.METRICS.keys()
    assert 0 <= scores["accuracy"] <= 100
    own = arm == "teacher"
    assert (scores["agreement"] == 100) >= own
    assert (scores["attention_kl"] == 0) == own
    assert (abs(scores["cls_cosine"]) < 1e-6) == own


def test_seeds_may_share_a_training(shared):
    runs = [Run(COLUMN, "quick", "counting", "sid", seed) for seed in (0, 1)]
    tokens = torch.tensor([[1, 3, 8, 3, 0, 0]])
    pair = internal.networks_of(runs, QUICK, shared)
    for run, network in zip(runs, pair, strict=True):
        (alone,) = internal.networks_of([run], QUICK, shared)
        logits = (one(tokens, tokens != 0).logits for one in (network, alone))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    assert not torch.equal(pair[0].classifier.weight, pair[1].classifier.weight)


def test_a_teacher_asked_once_teaches_the_same(tmp_path):
    run = Run(COLUMN, "quick", "counting", "all", 0)
    found = []
    for once in (True, False):
        config = replace(QUICK, recipe=replace(QUICK.recipe, ask_once=once))
        context = Context(store=RunStore(tmp_path / str(once)), max_steps=3)
        found.append(internal.networks_of([run], config, context)[0].state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", QUICK.arms)
def test_schedules_fill_their_share_of_the_steps(arm):
    chosen = QUICK.arms[arm]
    schedule = students.schedule_of(chosen, 2, 320, 0.5)
    assert (schedule is None) == (chosen.schedule is None)
    if schedule is None:
        return
    seen = []
    for _ in range(320):
        seen.append(schedule.phase)
        schedule.advance()
    internal_steps = sum(not phase.classify for phase in seen)
    assert internal_steps == (0 if chosen.schedule == "all" else 160)
    assert {seen.count(phase) for phase in schedule.phases[:-1]} <= {80}


def test_copied_students_start_from_the_teacher_s_layers(tmp_path):
    context = Context(store=RunStore(tmp_path), max_steps=1)
    recipe = replace(QUICK.recipe, rate=1e-12, teacher_rate=1e-12)
    guides = students.teachers_of(recipe, (0,), context)
    for copied in (True, False):
        arm = students.Arm(copied=copied)
        (student,) = students.students_of(recipe, arm, (0,), guides, context)
        for own, number in zip(student.layers, recipe.matched, strict=True):
            aim = guides[0].layers[number - 1].query.weight
            assert torch.allclose(own.query.weight, aim, atol=1e-6) == copied


def test_measures_compare_matched_layers(shared):
    runs = [Run(COLUMN, "quick", "counting", "kd", 0)]
    (student,), (guide,) = (call(runs, QUICK, shared) for call in (internal.networks_of, internal.guides_of))
    _, test = students.parts(QUICK.recipe, shared)
    mask = test.tokens != 0
    with torch.no_grad():
        own, aim = student(test.tokens, mask).features, guide(test.tokens, mask).features
    pairs = list(enumerate(QUICK.recipe.matched, start=1))
    divergence = sum(attention_kl(own[f"attention{k}"], aim[f"attention{n}"], mask) for k, n in pairs) / 2
    cosine = sum(cls_cosine_loss(own[f"layer{k}"], aim[f"layer{n}"]) for k, n in pairs) / 2
    scores = students.measure(student, guide, QUICK.recipe, shared)
    assert scores["attention_kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert scores["cls_cosine"] == pytest.approx(cosine.item(), rel=1e-4)


# The standard profile on files that the test writes


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A cache with a BERT of two layers and a few sentences, and a profile of their size."""
    from safetensors.torch import save_file

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s"]
    torch.manual_seed(0)
    network = Transformer(len(words), 2, width=16, heads=2, depth=4, feedforward=24, length=8)
    folders = {name: tmp_path / name for name in ("minilm", "snippets")}
    for folder in folders.values():
        folder.mkdir()
    weights = {name: value.contiguous() for name, value in bert_weights(network).items()}
    save_file(weights, folders["minilm"] / "model.safetensors")
    (folders["minilm"] / "vocab.txt").write_text("\n".join(words))
    (folders["minilm"] / "config.json").write_text('{"num_attention_heads": 2}')
    lines = [f"{k}\t{1 if k % 3 else -1}\t{'good' if k % 3 else 'bad'} films {k}" for k in range(60)]
    (folders["snippets"] / "snippets.tsv").write_text("\n".join(lines))
    monkeypatch.setenv("KDREFS_DATA", str(tmp_path))
    for name, files in (("MINILM", texts.MINILM), ("SNIPPETS", texts.SNIPPETS)):
        folder = folders[name.lower()]
        found = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
        loader = f"load_{name.lower()}"
        original = getattr(texts, loader)
        load = lambda original=original, found=found: original(digests=found, download=False)  # noqa: E731
        for module in (tasks, students):
            if hasattr(module, loader):
                monkeypatch.setattr(module, loader, load)
    sizes = {
        "width": 16,
        "heads": 2,
        "feedforward": 24,
        "teacher_depth": 4,
        "matched": (2, 4),
        "batch_size": 8,
    }
    task = tasks.Snippets(length=8, train=30, test=8)
    recipe = replace(STANDARD.recipe, task=task, epochs=2, teacher_epochs=1, **sizes)
    return replace(STANDARD, recipe=recipe)


@pytest.mark.parametrize("arm", ["teacher", *STANDARD.arms])
def test_every_standard_arm_runs(arm, tiny, tmp_path):
    context = Context(store=RunStore(tmp_path / "store"), max_steps=4)
    scores = internal.execute(Run(COLUMN, "standard", "snippets", arm, 0), tiny, context)
    assert scores.keys() == internal.METRICS.keys()
    assert all(0 <= scores[name] <= 100 for name in ("accuracy", "agreement"))


def test_the_standard_teacher_starts_pretrained(tiny):
    from kdrefs.data.texts import Encoder

    encoder: Encoder = students.load_minilm()
    network = students.initial(tiny.recipe, 4, 0, torch.device("cpu"))
    wanted = encoder.weights["encoder.layer.3.attention.self.query.weight"]
    assert torch.equal(network.layers[3].query.weight, wanted)
    student = students.initial(tiny.recipe, 2, 0, torch.device("cpu"))
    assert torch.equal(student.tokens.weight, network.tokens.weight)
    assert not torch.equal(student.layers[0].query.weight, network.layers[0].query.weight)
    assert internal.inputs(STANDARD).keys() == {"minilm", "snippets"}
    assert internal.inputs(QUICK) == {}


# Figures


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_arm_has_a_title():
    arms = {arm for config in internal.PROFILES.values() for arm in config.arms}
    assert {"teacher", *arms} == figures.ARM_TITLES.keys()


def test_attention_figure_shows_the_attention(closed, monkeypatch, shared):
    class Given:
        def __init__(self, arm: str) -> None:
            self.run = Run(COLUMN, "quick", "counting", arm, 0)

    networks = {
        arm: internal.networks_of([Given(arm).run], QUICK, shared)[0] for arm in ("teacher", "kd", "sid")
    }
    monkeypatch.setattr(figures, "_network", lambda result, config: networks[result.run.arm])
    monkeypatch.setattr(Context, "of", lambda result: shared)
    results: list[Result] = [Given("sid"), Given("kd")]
    figure = figures.attention_figure(results, QUICK, ("kd", "sid"), number=3)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    _, test = students.parts(QUICK.recipe, shared)
    tokens = test.tokens[3:4]
    kept = int((tokens != 0).sum())
    assert len(shown) == 6
    with torch.no_grad():
        found = networks["sid"](tokens, tokens != 0).features["attention2"][0].mean(0)[:kept, :kept]
    torch.testing.assert_close(torch.as_tensor(shown[5]), found)
    labels = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert labels[0] == "cls"
    assert sum(label.startswith("*") for label in labels) == 1
