"""Recorded steps: what surrounds the recording, with a stand-in on the CPU; the recording itself on CUDA."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrefs.data.batches import Augment, Batches
from kdrefs.methods.pkt import pkt_loss
from kdrefs.nets import build
from kdrefs.training import cosine, fit, fused, graphs, multistep, update
from kdrefs.training.history import Progress
from tests.training.toy import STEPS, ToyBatches, digest, toy_net

ADAM = partial(torch.optim.Adam, lr=2**-6, fused=True)
SGD = partial(torch.optim.SGD, lr=2**-6, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True)


class StandIn:
    """Replays by running again: on the inputs of the recording and into the same memory, as a graph does."""

    def __init__(self, generators):
        self.generators, self.events = generators, []

    def run(self, function):
        self.events.append("run")
        return function()

    def record(self, function):
        self.events.append("record")
        outputs = {}

        def replay():
            self.events.append("replay")
            scalars, after = function()
            for name, value in scalars.items():
                outputs.setdefault(name, torch.empty_like(value)).copy_(value)
            return outputs, after

        return replay


@pytest.fixture
def stand_in(monkeypatch):
    """Recordings without a device; the list of those that were made."""
    made = []

    def make(generators):
        made.append(StandIn(generators))
        return made[-1]

    monkeypatch.setattr(graphs, "Recorder", make)
    monkeypatch.setattr(graphs, "_check_device", lambda device: None)
    return made


def halving(optimizer):
    """Learning rates that single precision holds exactly, so that bits can be compared."""
    return multistep(optimizer, [1, 2], 0.5, steps_per_epoch=STEPS)


def make_state(optimizer_of=ADAM, schedule_of=halving, device="cpu"):
    torch.manual_seed(0)
    net = toy_net().to(device, memory_format=torch.channels_last)
    optimizer = optimizer_of(net.parameters())
    return {
        "net": net,
        "optimizer": optimizer,
        "schedule": schedule_of(optimizer),
        "generator": torch.Generator(device).manual_seed(5),
        "centre": torch.zeros(3, device=device),
    }


def step(state, batch):
    """As in toy, without what changes on the host."""
    images, labels = batch
    noise = torch.randn(images.shape, generator=state["generator"], device=images.device)
    logits = state["net"](images + 0.1 * noise).float()
    loss = F.cross_entropy(logits - state["centre"], labels)
    update(state["optimizer"], loss)
    state["schedule"].step()
    state["centre"].lerp_(logits.detach().mean(0), 0.1)
    return {"loss": loss, "largest": logits.max()}


def train(state, step=step, **options):
    options = {"epochs": 3, "batches": ToyBatches(device=state["centre"].device), **options}
    return fit(step, state, options.pop("batches"), **options)


# ---------------------------------------------------------------- the same training


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("optimizer_of", [ADAM, SGD], ids=["adam", "sgd"])
def test_the_course_is_that_of_a_training_without_a_graph(stand_in, optimizer_of, precision):
    plain, recorded = make_state(optimizer_of), make_state(optimizer_of)
    torch.manual_seed(1)
    expected = train(plain, precision=precision)
    torch.manual_seed(1)
    history = train(recorded, graph=True, precision=precision)
    assert history == expected
    assert digest(recorded, history) == digest(plain, expected)
    assert stand_in[0].events == ["run"] * graphs.WARM_UP + ["record"] + ["replay"] * (
        3 * STEPS - graphs.WARM_UP
    )
    assert stand_in[0].generators == [recorded["generator"]]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [2, 8])
def test_either_kind_of_training_goes_on_with_the_others_checkpoint(tmp_path, stand_in, first, last):
    whole = make_state()
    torch.manual_seed(1)
    expected = digest(whole, train(whole))
    taken = []

    def dying(state, batch):
        taken.append(1)
        if len(taken) == last:
            raise KeyboardInterrupt
        return step(state, batch)

    path = tmp_path / "run.safetensors"
    broken = make_state()
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(broken, dying, checkpoint=path, checkpoint_every=0, graph=first)
    again = make_state()
    torch.manual_seed(77)
    assert digest(again, train(again, checkpoint=path, graph=not first)) == expected


def test_optimisers_and_schedules_are_left_as_they_were(stand_in):
    state = make_state()
    (group,) = state["optimizer"].param_groups
    before = {name: value for name, value in group.items() if name not in ("params", "lr")}
    train(state, graph=True)
    assert {name: value for name, value in group.items() if name not in ("params", "lr")} == before
    assert group["lr"] == 2**-8
    assert isinstance(group["lr"], float)
    assert state["schedule"].last_epoch == 3 * STEPS
    assert "step" not in vars(state["schedule"])


def test_every_step_sees_the_learning_rate_of_the_schedule(stand_in):
    state = make_state(schedule_of=lambda optimizer: cosine(optimizer, 3 * STEPS, warmup_steps=2))
    rates, expected = [], []

    def watched(state, batch):
        (group,) = state["optimizer"].param_groups
        assert isinstance(group["lr"], torch.Tensor)
        rates.append(group["lr"].item())
        expected.extend(state["schedule"].get_last_lr())
        return step(state, batch)

    train(state, watched, graph=True)
    assert rates == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > STEPS


# ---------------------------------------------------------------- batches


def step_of(state, function=step):
    return graphs.RecordedStep(function, state)


def test_scalars_are_new_tensors(stand_in):
    state = make_state()
    recorded = step_of(state)
    given = [recorded(state, batch) for batch in ToyBatches(8).epoch(0)]
    kept = [{name: value.clone() for name, value in scalars.items()} for scalars in given]
    recorded(state, next(ToyBatches(8).epoch(1)))
    assert given == kept
    assert not any(value.requires_grad for scalars in given for value in scalars.values())
    assert len({scalars["loss"].item() for scalars in given}) == len(given)


def test_a_smaller_batch_runs_without_the_recording(stand_in):
    class Uneven(ToyBatches):
        def epoch(self, epoch, start=0):
            for k, (images, labels) in enumerate(super().epoch(epoch, start), start):
                count = 5 if k == self.steps - 1 else 8
                yield images[:count], labels[:count]

    plain, recorded = make_state(), make_state()
    torch.manual_seed(1)
    expected = train(plain, batches=Uneven())
    torch.manual_seed(1)
    assert train(recorded, batches=Uneven(), graph=True) == expected
    assert digest(recorded, None) == digest(plain, None)
    first = ["run"] * 3 + ["record", "replay", "run"]
    assert stand_in[0].events == first + 2 * (["replay"] * 4 + ["run"])


def test_the_batch_is_copied_whatever_holds_it(stand_in):
    """Containers, the same tensor twice, strides, tensors that are given a gradient."""
    state = make_state()
    seen = []

    def look(state, batch):
        assert batch["views"][0] is batch["images"]
        batch["images"].requires_grad_()
        seen.append(
            (
                batch["images"].detach().clone(),
                batch["images"].stride(),
                batch["rest"],
                batch["views"][1].clone(),
            )
        )
        return {"sum": batch["images"].sum()}

    recorded = step_of(state, look)
    for k in range(6):
        images = torch.full((2, 3, 4, 4), float(k)).to(memory_format=torch.channels_last)
        batch = {"images": images, "views": (images, images + 100), "rest": [None, "name", 3]}
        assert recorded(state, batch)["sum"] == 96 * k
        copied, stride, rest, other = seen[-1]
        assert torch.equal(copied, images)
        assert torch.equal(other, images + 100)
        assert stride == images.stride()
        assert rest == [None, "name", 3]
        assert images.requires_grad == (k < graphs.WARM_UP)
    assert stand_in[0].events[3:] == ["record", *["replay"] * 3]


OTHERS = {
    "shape": (torch.zeros(3, 2), torch.zeros(4, 2), 1),
    "dtype": (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2), 1),
    "number": (torch.zeros(4, 2), torch.zeros(4, 2), 2),
    "one tensor twice": (same := torch.zeros(4, 2), same, 1),
    "structure": (torch.zeros(4, 2), [torch.zeros(4, 2)], 1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_batch_is_not_given_to_the_recording(stand_in, kind):
    state = make_state()
    recorded = step_of(state, lambda state, batch: {"sum": batch[0].sum()})
    for _ in range(4):
        recorded(state, (torch.zeros(4, 2), torch.zeros(4, 2), 1))
    assert stand_in[0].events[-1] == "replay"
    recorded(state, OTHERS[kind])
    assert stand_in[0].events[-1] == "run"
    recorded(state, (torch.zeros(4, 2), torch.zeros(4, 2), 1))
    assert stand_in[0].events[-1] == "replay"


# ---------------------------------------------------------------- what a recording cannot follow


def assigning(state, batch):
    state["centre"] = state["centre"] * 0.9
    return step(state, batch)


def counting(state, batch):
    state["seen"] += 1
    return step(state, batch)


def rate_as_number(state, batch):
    return {**step(state, batch), "rate": 0.5}


ONE_CYCLE = partial(OneCycleLR, max_lr=0.1, total_steps=3 * STEPS)


@pytest.mark.parametrize(
    ("make", "function", "message"),
    [
        (make_state, assigning, r"state\['centre'\] has changed, which a recorded step does not follow"),
        (lambda: {**make_state(), "seen": 0}, counting, r"state\['seen'\] has changed"),
        (
            lambda: make_state(SGD, ONE_CYCLE), step,
            r"state\['optimizer'\]\.param_groups\[0\]\['momentum'\] has changed",
        ),
        (make_state, rate_as_number, "step must return tensors with graph=True, got 0.5 for 'rate'"),
        (
            lambda: make_state(partial(torch.optim.Adam, lr=0.1)), step,
            r"graph needs optimisers with fused=True, state\['optimizer'\]\.param_groups\[0\] has None",
        ),
    ],
)  # fmt: skip
def test_refused(stand_in, make, function, message):
    with pytest.raises(ValueError, match=message):
        train(make(), function, graph=True)


def test_batches_elsewhere_are_refused(stand_in):
    state = make_state()
    recorded = step_of(state, lambda state, batch: {"loss": torch.zeros(())})
    batch = (torch.zeros(2), torch.zeros(2, device="meta"))
    for _ in range(graphs.WARM_UP):
        recorded(state, batch)
    with pytest.raises(ValueError, match="graph needs batches on cpu, got a tensor on meta"):
        recorded(state, batch)


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="graph needs a state on a CUDA device, got one on cpu"):
        train(make_state(), graph=True)


def test_fused_optimisers_are_for_cuda():
    assert fused("cpu") == fused(torch.device("cpu")) == {}
    assert fused("cuda") == fused(torch.device("cuda", 1)) == {"fused": True}


class Moves(TorchDispatchMode):
    """Collects operations on tensors of the host, and reads of values by it."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        leaves = tree_leaves((arguments, keywords, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.found.add(function.overloadpacket.__name__)
        return result


def test_batches_networks_losses_and_sums_stay_on_the_device():
    """On a pretended device that has no values: reading one raises, and every tensor has a place."""
    images, labels = torch.zeros(64, 32, 32, 3, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    run = Progress()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            net, teacher = build("resnet8"), build("resnet8").eval()
        options = {
            "augment": Augment(flip=True, crop=4),
            "mean": [0.5] * 3,
            "extras": {"row": labels},
        }
        epoch = Batches(images, labels, batch_size=16, device="cuda", **options).epoch(0)
        next(epoch)  # the order and the geometry of an epoch are drawn on the host
        with Moves() as moves:
            for batch in epoch:
                output, target = net(batch.images), teacher(batch.images)
                loss = F.cross_entropy(output.logits, batch.labels) + batch.extras["row"].float().mean()
                loss = loss + pkt_loss(output.features["pool"], target.features["pool"])
                run.count(
                    {"loss": loss, "accuracy": (output.logits.argmax(1) == batch.labels).float().mean()}
                )
            assert moves.found == set()
            torch.ones(2)
            assert moves.found == {"ones"}  # the collector collects
    assert run.step == 3
    assert {row.device.type for row in run.values.values()} == {"cuda"}


# ---------------------------------------------------------------- CUDA

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Interrupted(ToyBatches):
    """Ends the training after so many batches: a recorded step cannot, it is not called any more."""

    def __init__(self, last):
        super().__init__(device="cuda")
        self.left = last

    def epoch(self, epoch, start=0):
        for batch in super().epoch(epoch, start):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def assert_near(one, other, tolerance):
    for name, value in one["net"].state_dict().items():
        torch.testing.assert_close(other["net"].state_dict()[name], value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(other["centre"], one["centre"], rtol=tolerance, atol=tolerance)
    assert other["schedule"].state_dict() == one["schedule"].state_dict()


@cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bf16", 1e-2)])
@pytest.mark.parametrize("optimizer_of", [ADAM, SGD], ids=["adam", "sgd"])
def test_cuda_recorded_training_follows_the_plain_one(monkeypatch, optimizer_of, precision, tolerance):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, recorded = make_state(optimizer_of, device="cuda"), make_state(optimizer_of, device="cuda")
    torch.manual_seed(1)
    expected = train(plain, precision=precision)
    torch.manual_seed(1)
    history = train(recorded, precision=precision, graph=True)
    for one, other in zip(expected.epochs, history.epochs, strict=True):
        assert other == pytest.approx(one, rel=10 * tolerance)
    assert_near(plain, recorded, tolerance)
    assert torch.equal(plain["generator"].get_state(), recorded["generator"].get_state())


@cuda
@pytest.mark.parametrize("last", [2, 8])
def test_cuda_recorded_training_resumes(tmp_path, monkeypatch, last):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    path = tmp_path / "run.safetensors"
    whole, broken, again = (make_state(device="cuda") for _ in range(3))
    torch.manual_seed(1)
    train(whole, graph=True)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(broken, batches=Interrupted(last), checkpoint=path, checkpoint_every=0, graph=True)
    torch.manual_seed(77)
    train(again, checkpoint=path, graph=True)
    assert_near(whole, again, 1e-4)


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_cuda_replays_do_not_wait_for_the_device():
    state, run = make_state(device="cuda"), Progress()
    recorded = step_of(state)
    batches = list(ToyBatches(10, "cuda").epoch(0))
    for batch in batches[: graphs.WARM_UP + 1]:
        run.count(recorded(state, batch))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[graphs.WARM_UP + 1 :]:
            run.count(recorded(state, batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 10


@cuda
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_cuda_records_compiled_networks():
    plain, recorded = (make_state(SGD, device="cuda") for _ in range(2))
    for state in (plain, recorded):
        state["net"][4] = torch.nn.Identity()  # the compiler draws its dropout masks elsewhere
    train(plain)
    train(recorded, compile=True, graph=True)
    assert_near(plain, recorded, 1e-3)


@cuda
def test_cuda_a_step_that_reads_a_value_is_refused():
    def reading(state, batch):
        scalars = step(state, batch)
        scalars["loss"].item()
        return scalars

    with pytest.raises(RuntimeError) as caught:
        train(make_state(device="cuda"), reading, graph=True)
    assert any("step could not be recorded" in note for note in caught.value.__notes__)
