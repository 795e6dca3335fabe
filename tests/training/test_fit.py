"""The training loop: what it calls, measures, watches over and puts back."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdrefs.training import History, evaluation_mode, fit, flushed_denormals, update
from kdrefs.training import fit as fit_function
from kdrefs.training.checkpoint import load_checkpoint
from kdrefs.training.history import Progress
from kdrefs.training.modes import flushes_denormals
from tests.training.toy import EPOCHS, STEPS, ToyBatches, contents, digest, toy_fit, toy_state, toy_step

fit_module = sys.modules[fit_function.__module__]
SETTINGS = {
    "epochs": EPOCHS, "steps_per_epoch": STEPS, "max_steps": None, "evaluate_every": 1, "monitor": "accuracy",
    "mode": "max", "precision": "float32",
}  # fmt: skip


class Numbers:
    """Batches that are numbers: 10 * epoch + position."""

    def __init__(self, steps=4):
        self.steps = steps
        self.asked = []

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        self.asked.append((epoch, start))
        for k in range(start, self.steps):
            yield torch.tensor(10.0 * epoch + k)


def record(state, batch):
    return {"value": batch}


# ---------------------------------------------------------------- epochs, means, evaluations


def test_every_batch_once_and_means_per_epoch():
    seen = []

    def step(state, batch):
        seen.append(batch.item())
        return {"value": batch, "square": batch**2, "one": 1}

    batches = Numbers()
    history = fit(step, {}, batches, epochs=2)
    assert seen == [0, 1, 2, 3, 10, 11, 12, 13]
    assert batches.asked == [(0, 0), (1, 0)]
    assert history == History(
        epochs=[
            {"value": 1.5, "square": 3.5, "one": 1.0},
            {"value": 11.5, "square": 133.5, "one": 1.0},
        ],
        steps=8,
    )


def test_means_are_summed_in_double_precision():
    """0.1 in single precision, 3,000 times: a single-precision sum would be off by more than 1e-6."""
    tenth = torch.tensor(0.1)
    history = fit(lambda state, batch: {"tenth": tenth}, {}, Numbers(3000), epochs=1)
    assert history.epochs[0]["tenth"] == pytest.approx(tenth.item(), abs=1e-12)


def test_a_scalar_that_comes_on_some_steps_is_averaged_over_those():
    def step(state, batch):
        return {"value": batch} if batch % 2 else {"even": batch}

    assert fit(step, {}, Numbers(), epochs=1).epochs == [{"even": 1.0, "value": 2.0}]


def test_returned_tensor_may_be_reused_by_the_step():
    buffer = torch.zeros((), dtype=torch.float64)

    def step(state, batch):
        buffer.copy_(batch)
        return {"value": buffer}

    assert fit(step, {}, Numbers(), epochs=1).epochs == [{"value": 1.5}]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_evaluate_every(every, expected):
    history = fit(
        record, {}, Numbers(), epochs=5, evaluate=lambda state, epoch: {"e": epoch}, evaluate_every=every
    )
    assert history.evaluations == [{"epoch": epoch, "e": float(epoch)} for epoch in expected]


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_best_and_last_are_kept_apart(mode, best):
    values = [math.nan, 0.2, 0.9, 0.9, 0.5]
    history = fit(
        record, {}, Numbers(), epochs=5, evaluate=lambda state, epoch: {"map": values[epoch], "other": -epoch},
        monitor="map", mode=mode,
    )  # fmt: skip
    assert history.best_epoch == best
    assert history.best == {"epoch": best, "map": values[best], "other": -best}
    assert history.last == {"epoch": 4, "map": 0.5, "other": -4.0}


def test_without_evaluation_there_is_neither_best_nor_last():
    history = fit(record, {}, Numbers(), epochs=1)
    with pytest.raises(ValueError, match="nothing was evaluated"):
        _ = history.last
    with pytest.raises(ValueError, match="no best epoch"):
        _ = history.best


@pytest.mark.parametrize(("limit", "seen"), [(1, 1), (4, 4), (6, 6), (99, 12)])
def test_max_steps(limit, seen):
    steps = []

    def step(state, batch):
        steps.append(batch.item())
        return {"value": batch}

    history = fit(step, {}, Numbers(), epochs=3, max_steps=limit, evaluate=lambda state, epoch: {"e": epoch})
    assert steps == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23][:seen]
    assert history.steps == seen
    assert history.last["epoch"] == len(history.epochs) - 1 == (seen - 1) // 4
    assert history.epochs[-1]["value"] == pytest.approx(
        sum(steps[4 * ((seen - 1) // 4) :]) / ((seen - 1) % 4 + 1)
    )


def test_max_steps_resumes(tmp_path):
    whole = toy_state()
    expected = digest(whole, toy_fit(whole, max_steps=8))
    count = []

    def step(state, batch):
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt
        return toy_step(state, batch)

    path = tmp_path / "probe.safetensors"
    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_state(), step, checkpoint=path, checkpoint_every=0, max_steps=8)
    again = toy_state()
    assert digest(again, toy_fit(again, checkpoint=path, max_steps=8)) == expected


def test_stages_follow_one_another():
    """The same state trained by two calls of half the epochs, with batches that go on, ends with the same bits."""

    class Later(ToyBatches):
        def epoch(self, epoch, start=0):
            return super().epoch(epoch + 1, start)

    whole, halves = toy_state(), toy_state()
    torch.manual_seed(1)
    fit(toy_step, whole, ToyBatches(), epochs=2)
    torch.manual_seed(1)
    fit(toy_step, halves, ToyBatches(), epochs=1)
    fit(toy_step, halves, Later(), epochs=1)
    assert digest(whole, None) == digest(halves, None)


# ---------------------------------------------------------------- what must not happen


def test_nan_scalar_names_itself_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"

    def step(state, batch):
        scalars = toy_step(state, batch)
        return (
            scalars if state["seen"] <= 8 * (STEPS + 2) else {**scalars, "loss": scalars["loss"] * math.nan}
        )

    with pytest.raises(FloatingPointError) as found:
        toy_fit(toy_state(), step, checkpoint=path)
    assert re.fullmatch(
        r"loss is not finite in epoch 1, step 2 \(both from 0\): loss = nan, largest = \d\.\d+; "
        rf"the last sound checkpoint is {re.escape(str(path))}, after 5 steps in all",
        str(found.value),
    )
    kept = toy_state()
    progress = load_checkpoint(path, kept, SETTINGS)
    assert (progress["epoch"], progress["step"], kept["seen"]) == (1, 0, 8 * STEPS)
    whole = toy_state()
    expected = digest(whole, toy_fit(whole))
    assert digest(kept, toy_fit(kept, checkpoint=path)) == expected


def test_nan_scalar_is_found_before_a_checkpoint_within_the_epoch(tmp_path):
    path = tmp_path / "run.safetensors"
    steps = []

    def step(state, batch):
        steps.append(1)
        return {
            "loss": torch.tensor(math.inf if len(steps) == 3 else 1.0),
            "term": math.nan if len(steps) == 3 else 1,
        }

    message = (
        r"loss and term are not finite in epoch 0, step 2 .*loss = inf, term = nan; .*after 2 steps in all"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(step, {"weight": 1.0}, Numbers(), epochs=1, checkpoint=path, checkpoint_every=0)
    kept = load_checkpoint(
        path, {"weight": 0.0}, {**SETTINGS, "epochs": 1, "steps_per_epoch": 4, "monitor": None}
    )
    assert kept["step"] == 2


def test_parameter_that_is_not_finite_is_named():
    net = nn.Linear(2, 2)

    def step(state, batch):
        with torch.no_grad():
            net.bias[1] = math.inf
        return {"loss": batch}

    message = (
        r"student\.bias is not finite in epoch 0 \(from 0\), after 4 steps, the last with loss = 3; "
        "there is no checkpoint before it"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(step, {"student": net}, Numbers(), epochs=1)


def other_net():
    state = toy_state()
    state["net"][5] = nn.Linear(64, 4)
    return state


def other_keys():
    state = toy_state()
    del state["centre"]
    return {**state, "middle": torch.zeros(3)}


def other_optimizer():
    state = toy_state()
    return {**state, "optimizer": torch.optim.SGD(state["net"].parameters(), 0.1)}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (other_net, {}, r"'net.5.weight' is float32 \(3, 64\) there and float32 \(4, 64\) here"),
        (other_keys, {}, "'middle' is absent there"),
        (other_optimizer, {}, "'optimizer' is Adam there and SGD here"),
        (toy_state, {"epochs": 4}, "'epochs' is 3 there and 4 here"),
        (toy_state, {"max_steps": 4}, "'max_steps' is None there and 4 here"),
        (toy_state, {"precision": "bf16"}, "'precision' is 'float32' there and 'bf16' here"),
    ],
)
def test_checkpoint_of_another_training_is_refused_and_left_alone(tmp_path, make, options, message):
    path = tmp_path / "run.safetensors"
    toy_fit(toy_state(), checkpoint=path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    state = make()
    before = contents(state)
    before = ({name: tensor.clone() for name, tensor in before[0].items()}, before[1])
    with pytest.raises(ValueError, match=message) as caught:
        fit(toy_step, state, ToyBatches(), **{"epochs": EPOCHS, "checkpoint": path, **SAME, **options})
    assert str(path) in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    after = contents(state)
    assert after[1] == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())


SAME = {"evaluate": lambda state, epoch: {"accuracy": 0.0}, "monitor": "accuracy"}


def test_state_may_not_change_its_parts(tmp_path):
    def step(state, batch):
        state["centre"] = torch.zeros(4)
        return {}

    with pytest.raises(ValueError, match="state must keep its keys, classes and shapes"):
        fit(step, {"centre": torch.zeros(3)}, Numbers(), epochs=1, checkpoint=tmp_path / "run.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"monitor": "map"}, "monitor must be None without evaluate, got 'map'"),
        ({"mode": "best"}, "mode must be one of max, min, got 'best'"),
        ({"precision": "fp16"}, "precision must be one of float32, bf16, got 'fp16'"),
        (
            {"evaluate": lambda state, epoch: {"accuracy": 1.0}, "monitor": "map"},
            r"monitor must be one of the evaluated numbers \(accuracy\), got 'map'",
        ),
        ({"evaluate": lambda state, epoch: {"epoch": 1.0}}, "evaluate must not return 'epoch'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fit(record, {}, Numbers(), **{"epochs": 1, **options})


def test_bad_step_and_batches():
    with pytest.raises(ValueError, match=r"step must return scalars, got 'loss' of shape \(3,\)"):
        fit(lambda state, batch: {"loss": torch.zeros(3)}, {}, Numbers(), epochs=1)
    with pytest.raises(ValueError, match=r"len\(batches\) must be at least 1, got 0"):
        fit(record, {}, Numbers(0), epochs=1)
    with pytest.raises(TypeError, match=r"state\['note'\] must be a module.*got str"):
        fit(record, {"note": "text"}, Numbers(), epochs=1)

    class Short(Numbers):
        def __len__(self):
            return 6

    with pytest.raises(
        ValueError, match=r"batches.epoch\(0, 0\) yielded 4 batches, len\(batches\) promised 6"
    ):
        fit(record, {}, Short(), epochs=1)


# ---------------------------------------------------------------- checkpoints in time


def test_checkpoints_follow_the_clock_and_the_epochs(tmp_path, monkeypatch):
    clock, written = [0.0], []

    def step(state, batch):
        clock[0] += 10
        return {"value": batch}

    monkeypatch.setattr(fit_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(fit_module, "save_checkpoint", lambda *arguments: written.append(clock[0]))
    fit(step, {}, Numbers(8), epochs=2, checkpoint=tmp_path / "run.safetensors", checkpoint_every=25)
    assert written == [30, 60, 80, 110, 140, 160]


def test_no_checkpoint_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_fit(toy_state())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- speed


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_no_value_is_read_within_an_epoch():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    rows, before = torch.randn(4, 3), []

    def step(state, batch):
        before.append(reads.count)
        loss = net(rows).square().mean()
        update(optimizer, loss)
        return {"loss": loss, "norm": net.weight.norm()}

    with Reads() as reads:
        fit(step, {"net": net, "optimizer": optimizer}, Numbers(20), epochs=2)
        inside = reads.count
        torch.ones(()).item()
    assert reads.count == inside + 1  # the counter counts
    assert before[0] == before[19]
    assert before[20] > before[19]  # once an epoch the means are read
    assert before[20] == before[39]


@pytest.mark.parametrize("already", [False, True])
def test_denormals_are_flushed_and_the_mode_restored(already):
    torch.set_flush_denormal(already)
    try:
        inside = []

        def step(state, batch):
            tiny = torch.full((64,), 1e-38)
            inside.append((tiny * 0.1).view(torch.int32).any().item())
            return {}

        fit(step, {}, Numbers(1), epochs=1)
        assert inside == [False]
        assert flushes_denormals() == already
        with pytest.raises(ZeroDivisionError), flushed_denormals():
            inside.append(1 / (not flushes_denormals()))
        assert flushes_denormals() == already
    finally:
        torch.set_flush_denormal(False)


THREADS = """
import torch
from kdrefs.training import flushed_denormals

torch.set_num_threads(2)
with flushed_denormals():
    torch.ones(1 << 20).mul_(2)
print(torch.full((1 << 20,), 1e-38).mul_(0.1).view(torch.int32).eq(0).any().item())
"""


@pytest.mark.slow
def test_no_thread_goes_on_flushing_denormals():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n", done.stderr


# ---------------------------------------------------------------- precision


def test_bf16_runs_the_step_under_autocast_and_the_update_outside():
    net = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    rows, seen = torch.randn(16, 8), {}
    net.weight.register_hook(lambda gradient: seen.update(inside=torch.is_autocast_enabled("cpu")))

    def step(state, batch):
        output = net(rows)
        seen.update(forward=torch.is_autocast_enabled("cpu"), dtype=output.dtype)
        update(optimizer, output.float().square().mean())
        seen.update(after=torch.is_autocast_enabled("cpu"), gradient=net.weight.grad.dtype)
        return {}

    def evaluate(state, epoch):
        seen.update(evaluate=torch.is_autocast_enabled("cpu"))
        return {}

    fit(step, {"net": net}, Numbers(1), epochs=1, precision="bf16", evaluate=evaluate)
    assert seen == {
        "forward": True, "dtype": torch.bfloat16, "inside": False, "after": True, "gradient": torch.float32,
        "evaluate": False,
    }  # fmt: skip


def test_bf16_sees_weights_that_change_within_a_step():
    net = nn.Linear(4, 4, bias=False)
    rows, outputs = torch.randn(2, 4), []

    def step(state, batch):
        outputs.append(net(rows).detach())
        with torch.no_grad():
            net.weight.mul_(2)
        outputs.append(net(rows).detach())
        return {}

    fit(step, {"net": net}, Numbers(1), epochs=1, precision="bf16")
    assert torch.equal(outputs[1], 2 * outputs[0])


def test_bf16_trains_nearly_as_float32_and_resumes_with_the_same_bits(tmp_path):
    losses, digests = {}, {}
    for name, options in {
        "float32": {}, "bf16": {"precision": "bf16"},
        "again": {"precision": "bf16", "checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 0},
    }.items():  # fmt: skip
        state = toy_state()
        history = toy_fit(state, **options)
        losses[name], digests[name] = [epoch["loss"] for epoch in history.epochs], digest(state, history)
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bf16"] != losses["float32"]
    assert digests["again"] == digests["bf16"]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_modules_give_the_same_numbers_to_rounding():
    def train(compile):
        state = toy_state()
        state["net"][4] = nn.Identity()  # the compiler draws its dropout masks elsewhere
        calls = []

        def step(state, batch):
            calls.append(state["net"]._compiled_call_impl is not None)
            return toy_step(state, batch)

        def evaluate(state, epoch):
            calls.append(state["net"]._compiled_call_impl is None)
            return {}

        history = fit(step, state, ToyBatches(), epochs=2, compile=compile, evaluate=evaluate)
        assert all(calls) == compile
        assert state["net"]._compiled_call_impl is None
        return history, state

    (eager, eager_state), (compiled, compiled_state) = train(False), train(True)
    for one, other in zip(eager.epochs, compiled.epochs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert eager_state["net"].state_dict().keys() == compiled_state["net"].state_dict().keys()
    for one, other in zip(eager_state["net"].parameters(), compiled_state["net"].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- small parts


def test_update_is_one_plain_optimiser_step():
    net = nn.Linear(3, 2)
    net.weight.grad = torch.full_like(net.weight, 100.0)  # of an earlier step
    rows, before = torch.randn(5, 3), net.weight.detach().clone()
    loss = net(rows).square().mean()
    (gradient,) = torch.autograd.grad(loss, net.weight, retain_graph=True)
    update(torch.optim.SGD(net.parameters(), 0.5), loss)
    assert torch.allclose(net.weight, before - 0.5 * gradient)


def test_evaluation_mode_restores_every_flag():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    net[1].eval()  # frozen statistics stay frozen
    flags = [part.training for part in net.modules()]
    assert len(set(flags)) == 2
    with evaluation_mode(net):
        assert not any(part.training for part in net.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in net.modules()] == flags
    with pytest.raises(RuntimeError, match="within"), evaluation_mode(net):
        raise RuntimeError("within")
    assert [part.training for part in net.modules()] == flags
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- progress


def test_progress_shows_epoch_steps_and_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    fit(record, {}, Numbers(), epochs=3, progress=True, evaluate=lambda state, epoch: {"map": 0.25})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 3/3" in shown.err
    assert "value 11.5  map 0.25" in shown.err
    assert "12/12" in shown.err


@pytest.mark.parametrize("progress", [None, False])
def test_progress_is_silent_without_a_terminal(capsys, progress):
    fit(record, {}, Numbers(), epochs=1, progress=progress)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_without_rich(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"] + ["rich.console"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert fit(record, {}, Numbers(), epochs=1).steps == 4
    with pytest.raises(ImportError, match="the progress bar needs rich"):
        fit(record, {}, Numbers(), epochs=1, progress=True)


# ---------------------------------------------------------------- CUDA

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cuda_resumes_with_the_same_bits(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    path = tmp_path / "run.safetensors"
    whole = toy_state("cuda")
    expected = digest(whole, toy_fit(whole, precision=precision))
    taken = []

    def step(state, batch):
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return toy_step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        toy_fit(toy_state("cuda"), step, checkpoint=path, checkpoint_every=0, precision=precision)
    again = toy_state("cuda")
    torch.cuda.manual_seed(77)
    assert digest(again, toy_fit(again, checkpoint=path, precision=precision)) == expected


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_cuda_steps_do_not_wait_for_the_device():
    state = toy_state("cuda")
    batches = list(ToyBatches(device="cuda").epoch(0))

    class Resident:
        def __len__(self):
            return len(batches)

        def epoch(self, epoch, start=0):
            yield from batches[start:]

    def step(state, batch):
        torch.cuda.set_sync_debug_mode("error")
        return toy_step(state, batch)

    counts = []
    original = Progress.count

    def count(self, scalars):
        original(self, scalars)
        counts.append(1)
        if len(counts) % STEPS == 0:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count", count)
        try:
            fit(step, state, Resident(), epochs=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(counts) == 2 * STEPS
