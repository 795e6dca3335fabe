"""Many runs in one training: each member is the run made alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdrefs.data.batches import Augment, Batches
from kdrefs.divergences import softened_kl
from kdrefs.methods.pkt import pkt_loss
from kdrefs.nets import Output
from kdrefs.nets.small import SmallCNN
from kdrefs.training import (
    MemberBatches,
    Members,
    as_one,
    as_several,
    batches_as_one,
    each,
    evaluation_mode,
    fit,
    per_member,
    update,
    write_back,
)

SEEDS = (0, 1, 5)
EPOCHS, STEPS = 4, 5
OPTIMISERS = {
    "adam": lambda module: torch.optim.Adam(module.parameters(), 1e-2, weight_decay=1e-4),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, nesterov=True),
}


def net(seed, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return SmallCNN(channels=(4, 8), **options).to(dtype)


def batches(seed, dtype=torch.float64, **options):
    """76 images of the size of digits: five batches of 16, the last one of 12."""
    generator = torch.Generator().manual_seed(99)
    images = torch.randint(256, (76, 8, 8, 1), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (76,), generator=generator)
    options = {"batch_size": 16, "augment": Augment(crop=1), "mean": [0.5], "std": [0.25], **options}
    return Batches(images, labels, seed=seed, dtype=dtype, **options)


def alone(state, batch):
    loss = F.cross_entropy(state["net"](batch.images).logits, batch.labels)
    update(state["optimizer"], loss)
    return {"loss": loss}


def together(state, batch):
    losses = each(F.cross_entropy)(state["net"](batch.images).logits, batch.labels)
    update(state["optimizer"], losses.sum())
    return {f"loss{k}": loss for k, loss in enumerate(losses)}


def close(member, single):
    expected = single.state_dict()
    assert member.state_dict().keys() == expected.keys()
    for name, value in member.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_member_is_the_run_made_alone(optimiser):
    singles, histories = [net(seed) for seed in SEEDS], []
    members = Members([net(seed) for seed in SEEDS])
    start = members.state_dict()["network.classifier.weight"].clone()
    for seed, single in zip(SEEDS, singles, strict=True):
        state = {"net": single, "optimizer": OPTIMISERS[optimiser](single)}
        histories.append(fit(alone, state, batches(seed), epochs=EPOCHS))
    state = {"net": members, "optimizer": OPTIMISERS[optimiser](members)}
    history = fit(together, state, MemberBatches([batches(seed) for seed in SEEDS]), epochs=EPOCHS)
    assert history.steps == EPOCHS * STEPS == 20
    for member, single in zip(members.unstacked(), singles, strict=True):
        close(member, single)
        assert int(member.blocks[0].bn.num_batches_tracked) == 20
    for k, single_history in enumerate(histories):
        expected = [epoch["loss"] for epoch in single_history.epochs]
        assert [epoch[f"loss{k}"] for epoch in history.epochs] == pytest.approx(expected, rel=1e-9)
    assert (members.network.classifier.weight - start).abs().max() > 0.01


def test_a_killed_training_resumes_with_the_same_bits(tmp_path):
    class Killed(BaseException):
        pass

    def run(step, **options):
        members = Members([net(seed, torch.float32) for seed in SEEDS])
        state = {"net": members, "optimizer": OPTIMISERS["adam"](members)}
        sets = MemberBatches([batches(seed, torch.float32) for seed in SEEDS])
        return fit(step, state, sets, epochs=2, **options), members.state_dict()

    def dying(state, batch, taken=[]):  # noqa: B006 - counts its calls
        taken.append(1)
        if len(taken) == 8:
            raise Killed
        return together(state, batch)

    history, expected = run(together)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        run(dying, checkpoint=checkpoint, checkpoint_every=0)
    torch.manual_seed(77)
    again, values = run(together, checkpoint=checkpoint)
    assert again == history
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert "network.blocks.0.bn.running_mean" in expected


def test_one_network_with_several_loss_weights_and_one_teacher():
    """The members see the same batches, so that the teacher is run once for all of them."""
    weights, calls = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), []
    teacher = net(9).eval()
    teacher.register_forward_hook(lambda *_: calls.append(1))

    def loss(output, weight, *, labels, target):
        kd = softened_kl(output.logits, target.logits, temperature=4.0)
        return (1 - weight) * F.cross_entropy(output.logits, labels) + weight * kd

    def step(state, batch):
        with evaluation_mode(teacher):
            target = teacher(batch.images)
        if isinstance(state["net"], Members):
            output = state["net"](batch.images, shared=True)
            value = each(loss)(output, weights, labels=batch.labels, target=target).sum()
        else:
            value = loss(state["net"](batch.images), state["weight"], labels=batch.labels, target=target)
        update(state["optimizer"], value)
        return {"loss": value}

    members = Members([net(0) for _ in weights])
    state = {"net": members, "optimizer": OPTIMISERS["adam"](members)}
    fit(step, state, batches(0), epochs=2)
    assert len(calls) == 2 * STEPS
    for member, weight in zip(members.unstacked(), weights, strict=True):
        single = net(0)
        state = {"net": single, "optimizer": OPTIMISERS["adam"](single), "weight": weight}
        fit(step, state, batches(0), epochs=2)
        close(member, single)


def test_a_distillation_loss_of_each_member():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 12, d, generator=generator, dtype=torch.float64) for d in (4, 7))
    expected = [pkt_loss(s, t, kernel="gaussian") for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(each(pkt_loss)(student, teacher, kernel="gaussian"), torch.stack(expected))


# ---------------------------------------------------------------- modes, buffers, randomness


def test_training_flags_reach_the_members():
    members = Members([net(seed) for seed in SEEDS])
    images = next(iter(batches(0))).images
    members(images, shared=True)
    before = {name: buffer.clone() for name, buffer in members.named_buffers()}
    with evaluation_mode(members):
        output = members(images, shared=True)
        assert not members.network.blocks[0].bn.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in members.named_buffers())
    assert members.network.blocks[0].bn.training
    for k, member in enumerate(members.unstacked()):
        with evaluation_mode(member):
            expected = member(images)
        torch.testing.assert_close(output.logits[k], expected.logits)
        torch.testing.assert_close(output.features["block2"][k], expected.features["block2"])
    assert not Members([net(0).eval()]).training


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_forward_passes_in_one_step(memory_format):
    """As with one network: the second updates the running statistics again, the backward pass goes through both."""
    singles = [net(seed).to(memory_format=memory_format) for seed in SEEDS]
    members = Members(singles)
    first, second = (
        b.images for b, _ in zip(MemberBatches([batches(s) for s in SEEDS]).epoch(0), "ab", strict=False)
    )
    output = members(first).logits.square().sum((1, 2)) + members(second).logits.square().sum((1, 2))
    output.sum().backward()
    for k, single in enumerate(singles):
        loss = sum(
            single(images[k].contiguous(memory_format=memory_format)).logits.square().sum()
            for images in (first, second)
        )
        loss.backward()
        torch.testing.assert_close(output[k], loss)
        torch.testing.assert_close(
            members.network.blocks[0].conv.weight.grad[k], single.blocks[0].conv.weight.grad
        )
        close(members.unstacked()[k], single)


def test_dropout_differs_between_members():
    torch.manual_seed(0)
    members = Members([nn.Sequential(nn.Linear(3, 100), nn.Dropout(0.5))] * 4)
    rows = torch.ones(2, 3)
    output = members(rows, shared=True)
    assert len({tuple((row == 0).tolist()) for row in output.flatten(1)}) == 4
    members.eval()
    output = members(rows, shared=True)
    assert all(torch.equal(one, output[0]) for one in output)


class Centred(nn.Module):
    """A buffer that is assigned anew, not changed in place; tied weights; a frozen parameter."""

    def __init__(self, start):
        super().__init__()
        self.register_buffer("centre", torch.full((3,), float(start)))
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.outer.bias.requires_grad_(False)

    def forward(self, x):
        self.centre = 0.5 * self.centre + 0.5 * x.mean(0)
        return self.outer(self.inner(x - self.centre))


def test_reassigned_buffers_tied_and_frozen_weights():
    singles = [Centred(start) for start in range(3)]
    members = Members(singles)
    assert members.network.outer.weight is members.network.inner.weight
    assert not members.network.outer.bias.requires_grad
    rows = torch.randn(3, 5, 3)
    output = members(rows)
    output.sum().backward()
    for k, (single, member) in enumerate(zip(singles, members.unstacked(), strict=True)):
        expected = single(rows[k])
        expected.sum().backward()
        torch.testing.assert_close(output[k], expected)
        torch.testing.assert_close(member.centre, single.centre)
        assert member.outer.weight is member.inner.weight
        torch.testing.assert_close(members.network.inner.weight.grad[k], single.inner.weight.grad)
        assert not member.outer.bias.requires_grad


def test_members_copy_and_are_copied():
    singles = [net(seed).eval() for seed in SEEDS]
    members = Members(singles)
    assert len(members) == len(list(members.unstacked())) == 3
    assert {name for name, _ in members.named_parameters()} == {
        f"network.{name}" for name, _ in singles[0].named_parameters()
    }
    for member, single in zip(members.unstacked(), singles, strict=True):
        assert type(member) is SmallCNN
        assert not member.training
        assert all(
            torch.equal(value, single.state_dict()[name]) for name, value in member.state_dict().items()
        )
        with torch.no_grad():
            member.classifier.weight.zero_()
            single.classifier.bias.fill_(7)
    assert members.network.classifier.weight.abs().amin(dim=(1, 2)).gt(0).all()
    assert (members.network.classifier.bias != 7).all()


def test_the_output_is_that_of_the_network():
    members = Members([net(seed) for seed in SEEDS])
    output = members(torch.zeros(3, 2, 1, 8, 8, dtype=torch.float64))
    assert type(output) is Output
    assert output.logits.shape == (3, 2, 10)
    assert output.features["embedding"].shape == (3, 2, 16)


@pytest.mark.slow
def test_the_forward_pass_compiles(compiler):
    members = Members([net(seed, torch.float32) for seed in SEEDS])
    expected = Members(members.unstacked())
    images = torch.randn(3, 4, 1, 8, 8)
    output = torch.compile(members, fullgraph=True)(images)
    torch.testing.assert_close(output.logits, expected(images).logits, rtol=1e-4, atol=1e-5)
    for name, value in members.named_buffers():
        torch.testing.assert_close(value, expected.get_buffer(name), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_member_is_the_run_made_alone_on_cuda():
    members, singles = Members([net(s).cuda() for s in SEEDS]), [net(s).cuda() for s in SEEDS]
    sets = [batches(seed, device="cuda") for seed in SEEDS]
    fit(together, {"net": members, "optimizer": OPTIMISERS["adam"](members)}, MemberBatches(sets), epochs=2)
    for single, part, member in zip(singles, sets, members.unstacked(), strict=True):
        fit(alone, {"net": single, "optimizer": OPTIMISERS["adam"](single)}, part, epochs=2)
        close(member, single)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "modules: expected at least one, got none"),
        (
            [SmallCNN(channels=(4, 8)), SmallCNN(channels=(4, 6))],
            r"modules\[1\]: .* is .*, but .* in modules\[0\]",
        ),
        ([nn.Dropout(0.1), nn.Dropout(0.2)], "p=0.2.* but .*p=0.1"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], r"modules\[1\]"),
        ([nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval()], "training=False, but .* training=True"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)], "'weight' is .* requires_grad=False"),
        ([nn.ReLU(), nn.GELU()], "GELU.* but ReLU"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], "'weight' is torch.float64"),
    ],
)
def test_unlike_members_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        Members(others)


@pytest.mark.parametrize("shape", [(), (2, 4), (4, 3, 4)])
def test_inputs_need_one_batch_a_member(shape):
    members = Members([nn.Linear(4, 2) for _ in range(3)])
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected \(3, B, ...\), got"):
        members(torch.zeros(shape))


# ---------------------------------------------------------------- batches


def test_batches_in_lockstep():
    rows, tokens = torch.arange(76.0), torch.arange(152).view(76, 2)
    options = {"extras": {"row": rows}, "tokens": tokens, "views": 2, "renderings": None}
    singles = [batches(seed, **options) for seed in SEEDS]
    sets = MemberBatches(singles)
    assert len(sets) == STEPS
    stacked = list(sets.epoch(3, start=1))
    assert len(stacked) == STEPS - 1
    assert stacked[-1].labels.shape == (3, 12)
    for k, single in enumerate(singles):
        for batch, expected in zip(stacked, single.epoch(3, start=1), strict=True):
            assert torch.equal(batch.indices[k], expected.indices)
            assert torch.equal(batch.labels[k], expected.labels)
            assert torch.equal(batch.images[k], expected.images)
            assert torch.equal(batch.views[1][k], expected.views[1])
            assert torch.equal(batch.tokens[k], expected.tokens)
            assert torch.equal(batch.extras["row"][k], expected.extras["row"])
            assert batch.masks is None
    assert not torch.equal(stacked[0].indices[0], stacked[0].indices[1])


def test_another_seed_shifts_every_member_as_if_alone():
    sets = MemberBatches([batches(seed) for seed in SEEDS])
    shifted = sets.with_seed(sets.seed + 1000)
    assert [member.seed for member in shifted.members] == [1000, 1001, 1005]
    expected = next(batches(5).with_seed(1005).epoch(0))
    assert torch.equal(next(shifted.epoch(0)).indices[2], expected.indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "members: expected at least one, got none"),
        (
            lambda: [batches(0), batches(1, batch_size=8)],
            r"members\[1\]: expected .* \(5, 16, 12\).* got \(10, 8, 4\)",
        ),
        (lambda: [batches(0), batches(1, drop_last=True)], r"got \(4, 16, 16\)"),
        (lambda: [batches(0), batches(1).subset(range(70))], r"got \(5, 16, 6\)"),
    ],
)
def test_batches_out_of_step_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        MemberBatches(make())


@pytest.mark.parametrize(
    "more", [{"extras": {"row": torch.zeros(76)}}, {"tokens": torch.zeros(76, 2).long()}]
)
def test_batches_of_unlike_content_are_refused(more):
    for sets in ([batches(0), batches(1, **more)], [batches(0, **more), batches(1)]):
        with pytest.raises(ValueError, match="in the batches of some and not of others"):
            next(MemberBatches(sets).epoch(0))


@pytest.mark.parametrize("seeds", [(3,), (0, 1, 5)], ids=["one", "several"])
def test_one_code_for_one_network_and_for_several(seeds):
    networks = [net(seed) for seed in seeds]
    before = [copy.deepcopy(one.state_dict()) for one in networks]
    whole = as_one(networks)
    assert isinstance(whole, Members) == (len(seeds) > 1)
    order = batches_as_one([batches(seed) for seed in seeds])
    optimizer = OPTIMISERS["sgd"](whole)
    batch = next(iter(order.epoch(0)))
    losses = per_member(F.cross_entropy, whole)(whole(batch.images).logits, batch.labels)
    assert losses.shape == ((len(seeds),) if len(seeds) > 1 else ())
    update(optimizer, losses.sum())
    found = [one.state_dict() for one in as_several(whole)]
    write_back(whole, networks)
    for one, state, old in zip(networks, found, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
        assert any(not torch.equal(value, old[name]) for name, value in one.state_dict().items())


def test_weights_of_members_go_back_to_as_many_networks():
    networks = [net(seed) for seed in SEEDS]
    with pytest.raises(ValueError, match="longer"):
        write_back(as_one(networks), networks[:-1])
    for empty in (as_one, batches_as_one):
        with pytest.raises(ValueError, match="expected at least one, got none"):
            empty([])
