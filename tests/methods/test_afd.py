"""AFD against golden vectors and plain loops; who is trained by which loss; the two updates of a mini-batch."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrefs.data.batches import Batches
from kdrefs.divergences import softened_kl
from kdrefs.methods.afd import (
    Discriminators,
    FeatureDiscriminator,
    TransferLayers,
    adversarial_loss,
    discriminator_loss,
    mutual_logit_loss,
    peers,
    train_afd,
)
from kdrefs.nets import Output
from kdrefs.training import MemberBatches, Members
from tests.methods.losses import value_and_gradient

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "afd_formula_losses.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(size: int, seed: int = 0) -> Tensor:
    return draw(size, seed=seed).sigmoid()


# The losses


@pytest.mark.parametrize("own", [1, 2])
def test_logit_loss_equals_the_formula(golden, own):
    student, peer = golden[f"z{own}"], golden[f"z{3 - own}"]
    call = partial(mutual_logit_loss, peer=peer, labels=golden["y"], temperature=golden["T"].item())
    value, gradient = value_and_gradient(lambda z: call(z), student)
    assert value == pytest.approx(golden[f"L_logit{own}"].item(), rel=1e-9)
    torch.testing.assert_close(gradient, golden[f"grad_z{own}"], rtol=1e-9, atol=1e-12)


def test_logit_loss_at_every_temperature(golden):
    found = [
        mutual_logit_loss(golden["z1"], golden["z2"], golden["y"], temperature=t).item() for t in range(1, 5)
    ]
    np.testing.assert_allclose(found, golden["L_logit1_at_T"], rtol=1e-9)


def test_adversarial_losses_equal_the_formula(golden):
    peer, own = golden["D1_on_net2"], golden["D1_on_net1"]
    assert discriminator_loss(peer, own).item() == pytest.approx(golden["L_D1"].item(), rel=1e-9)
    assert adversarial_loss(own).item() == pytest.approx(golden["L_G1"].item(), rel=1e-9)


@given(samples=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_losses_equal_plain_loops(samples, seed):
    peer, own = answers(samples, seed), answers(samples, seed + 1)
    judged, fooling = 0.0, 0.0
    for one, other in zip(peer.tolist(), own.tolist(), strict=True):
        judged += ((1 - one) ** 2 + other**2) / samples
        fooling += (1 - other) ** 2 / samples
    assert discriminator_loss(peer, own).item() == pytest.approx(judged, rel=1e-12)
    assert adversarial_loss(own).item() == pytest.approx(fooling, rel=1e-12)

    logits, guide, labels = (
        draw(samples, 4, seed=seed),
        draw(samples, 4, seed=seed + 1),
        torch.arange(samples) % 4,
    )
    total = 0.0
    for z, t, y in zip(logits, guide, labels, strict=True):
        p, q = (t / 2).softmax(0), (z / 2).softmax(0)
        total += -z.log_softmax(0)[y].item()
        total += 0.7 * 4 * sum((p[c] * (p[c] / q[c]).log()).item() for c in range(4))
    got = mutual_logit_loss(logits, guide, labels, temperature=2, weight=0.7)
    assert got.item() == pytest.approx(total / samples, rel=1e-10)


def test_gradients_are_the_derivatives():
    one, two = answers(5).requires_grad_(), answers(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(discriminator_loss, (one, two))
    assert torch.autograd.gradcheck(adversarial_loss, two)
    logits, guide = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda z: mutual_logit_loss(z, guide, torch.arange(3)), logits)


def test_peer_gets_no_gradient():
    student, peer = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    mutual_logit_loss(student, peer, torch.arange(3)).backward()
    assert peer.grad is None
    assert student.grad.abs().sum() > 0


def test_optimal_discriminator():
    """Three maps, some more often the peer's, some the own: the best answers are p / (p + q)."""
    peer, own = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 2])
    p, q = (torch.bincount(x, minlength=3).double() / 6 for x in (peer, own))
    best = (p / (p + q)).requires_grad_()
    least = discriminator_loss(best[peer], best[own])
    (gradient,) = torch.autograd.grad(least, best)
    assert gradient.abs().max().item() < 1e-12
    for seed in range(20):
        other = (best.detach() + 0.1 * draw(3, seed=seed)).clamp(0, 1)
        assert discriminator_loss(other[peer], other[own]) > least


def test_fooled_discriminator():
    half = torch.full((4,), 0.5)
    assert (discriminator_loss(half, half).item(), adversarial_loss(half).item()) == (0.5, 0.25)


def test_mistakes_are_named(unchecked):
    good = answers(4)
    for call, message in {
        (lambda: discriminator_loss(good, answers(3))): "own: expected as many rows as peer",
        (lambda: discriminator_loss(good[:, None], good)): "peer: expected a floating tensor",
        (lambda: adversarial_loss(good.long())): "own: expected a floating tensor",
        (lambda: mutual_logit_loss(draw(3, 4), draw(3, 5), torch.arange(3))): "peer: expected the shape of student",
        (lambda: mutual_logit_loss(draw(3, 4), draw(3, 4), torch.arange(2))): "labels: expected as many rows",
        (lambda: mutual_logit_loss(draw(3, 4), draw(3, 4), torch.arange(3), temperature=0)): "temperature",
        (lambda: FeatureDiscriminator((3, 0, 4))): "shape: expected",
        (lambda: FeatureDiscriminator((3, 4, 4))(torch.zeros(2, 3, 5, 4))): "maps: expected the shape",
        (lambda: peers(1)): "count: expected at least 2",
        (lambda: peers(3, "ring")): "scheme: expected one of",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="own: expected a tensor"):
        adversarial_loss(0.5)


# Who learns from whom


def test_cycle_is_the_golden_one(golden):
    for count in (2, 3, 4):
        sources = golden[f"cyclic_K{count}_real_source_of_D_k"].tolist()
        assert [peer for (peer,) in peers(count)] == sources


@given(count=st.integers(2, 7))
def test_schemes(count):
    cycle, pairwise = peers(count), peers(count, "pairwise")
    assert sum(map(len, cycle)) == count
    assert sum(map(len, pairwise)) == count * (count - 1)
    for k, found in enumerate(pairwise):
        assert sorted(found) == [j for j in range(count) if j != k]
    reached, k = set(), 0
    for _ in range(count):
        (k,) = cycle[k]
        reached.add(k)
    assert len(reached) == count


def test_two_networks_are_the_bidirectional_scheme():
    assert peers(2) == peers(2, "pairwise") == ((1,), (0,))
    both = Discriminators((3, 4, 4), 2)
    maps = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    for (peer, own), discriminator, (first, second) in zip(
        both(*maps), both.each, ((1, 0), (0, 1)), strict=True
    ):
        expected = discriminator(torch.cat([maps[first], maps[second]]))
        torch.testing.assert_close(torch.cat([peer, own]), expected)


# The modules


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 4, 4), (5, 7, 3)])
def test_discriminator_answers_between_0_and_1(shape):
    module = FeatureDiscriminator(shape)
    for maps in (torch.randn(4, *shape), torch.zeros(4, *shape), 1e6 * torch.randn(4, *shape)):
        found = module(maps)
        assert found.shape == (4,)
        assert ((found >= 0) & (found <= 1)).all()


def test_one_sample():
    assert FeatureDiscriminator((3, 1, 1)).eval()(torch.randn(1, 3, 1, 1)).shape == (1,)
    assert FeatureDiscriminator((3, 4, 4))(torch.randn(1, 3, 4, 4)).shape == (1,)
    # The peer's and the own map are two values for the normalisation; one alone has no deviation.
    (_, own), _ = Discriminators((3, 1, 1), 2)(torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1))
    assert own.shape == (1,)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FeatureDiscriminator((3, 1, 1))(torch.randn(1, 3, 1, 1))


def test_zero_maps_have_finite_gradients():
    module = Discriminators((3, 4, 4), 2)
    maps = torch.zeros(4, 3, 4, 4, requires_grad=True), torch.zeros(4, 3, 4, 4, requires_grad=True)
    sum(adversarial_loss(own) for _, own in module(*maps)).backward()
    assert all(torch.isfinite(one.grad).all() for one in maps)


def test_discriminators_reach_the_own_maps_only():
    module = Discriminators((3, 4, 4), 3)
    maps = [torch.randn(4, 3, 4, 4, requires_grad=True) for _ in range(3)]
    for k, (_, own) in enumerate(module(*maps)):
        gradients = torch.autograd.grad(adversarial_loss(own), maps, retain_graph=True, allow_unused=True)
        assert [one is not None for one in gradients] == [j == k for j in range(3)]


def test_transfer_layers_bring_maps_to_the_smallest_shape():
    layers = TransferLayers([(8, 4, 4), (16, 4, 4), (8, 8, 6)])
    assert layers.shape == (8, 4, 4)
    maps = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4), torch.randn(2, 8, 8, 6)
    found = layers(*maps)
    assert [tuple(one.shape) for one in found] == [(2, 8, 4, 4)] * 3
    assert found[0] is maps[0]
    assert [len(list(layer.parameters())) for layer in layers.layers] == [0, 1, 0]


# The training


class Net(nn.Module):
    """A convolution, a ReLU and a classifier."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, 4)
        self.runs = 0

    def forward(self, images: Tensor) -> Output:
        self.runs += 1
        maps = self.body(images)
        return Output(self.head(maps.mean((2, 3))), {"map": maps})


def make(count: int = 2, seed: int = 0, scheme: str = "cycle", channels: tuple[int, ...] = ()) -> dict:
    torch.manual_seed(seed)
    widths = channels or (3,) * count
    transfers = TransferLayers([(width, 4, 4) for width in widths])
    return {
        "networks": [Net(width) for width in widths],
        "transfers": transfers,
        "discriminators": Discriminators(transfers.shape, count, scheme=scheme, hidden=4),
        "features": ["map"] * count,
        "scheme": scheme,
    }


def batches(seed: int = 0, size: int = 12) -> Batches:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 4, 4, 1), dtype=np.uint8)
    return Batches({"images": images, "labels": generator.integers(0, 4, 24)}, batch_size=size, seed=seed)


def run(parts: dict, training=None, *, rate: float = 0.1, second: float = 0.05, epochs: int = 1, **options):
    """Train ``parts``; options may replace some of them."""
    return train_afd(
        parts["networks"],
        training or batches(),
        **{name: value for name, value in parts.items() if name != "networks"},
        epochs=epochs,
        optimizer=partial(torch.optim.SGD, lr=rate),
        adversarial_optimizer=partial(torch.optim.SGD, lr=second),
        discriminator_optimizer=partial(torch.optim.SGD, lr=0.2),
        progress=False,
        **options,
    )


def weights(networks) -> Tensor:
    return torch.cat([parameter.detach().flatten() for net in networks for parameter in net.parameters()])


def by_hand(parts: dict, update: str) -> None:
    """One mini-batch of AFD for two networks with the peer's every term written out."""
    batch = next(iter(batches(size=24).epoch(0)))
    nets, judges = parts["networks"], parts["discriminators"].each
    bodies = [list(net.body.parameters()) for net in nets]
    every = [list(net.parameters()) for net in nets]

    def descend(parameters, gradients, rate):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient

    outputs = [net(batch.images) for net in nets]
    steps = []
    for k in (0, 1):
        own, peer = outputs[k].logits, outputs[1 - k].logits.detach()
        loss = nn.functional.cross_entropy(own, batch.labels) + softened_kl(own, peer, 3.0)
        steps.append(torch.autograd.grad(loss, every[k], retain_graph=True))
    if update == "alternating":
        for k in (0, 1):
            descend(every[k], steps[k], 0.1)
        outputs = [net(batch.images) for net in nets]
    maps = [output.features["map"] for output in outputs]
    for k in (0, 1):
        found = judges[k](torch.cat([maps[1 - k], maps[k]]).detach())
        loss = (1 - found[:24]).square().mean() + found[24:].square().mean()
        descend(list(judges[k].parameters()), torch.autograd.grad(loss, list(judges[k].parameters())), 0.2)
    fooling = []
    for k in (0, 1):
        found = judges[k](torch.cat([maps[1 - k].detach(), maps[k]]))[24:]
        fooling.append(torch.autograd.grad((1 - found).square().mean(), bodies[k]))
    for k in (0, 1):
        if update == "simultaneous":
            descend(every[k], steps[k], 0.1)
        descend(bodies[k], fooling[k], 0.05)


@pytest.mark.parametrize(("update", "passes"), [("alternating", 2), ("simultaneous", 1)])
def test_a_step_is_the_algorithm_written_out(update, passes):
    ours, expected = make(), make()
    history = run(ours, batches(size=24), update=update)
    by_hand(expected, update)
    torch.testing.assert_close(weights(ours["networks"]), weights(expected["networks"]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights([ours["discriminators"]]), weights([expected["discriminators"]]))
    assert [net.runs for net in ours["networks"]] == [passes, passes]
    assert history.epochs[0].keys() == {
        f"{name}{k}" for name in ("logit", "discriminator", "adversarial") for k in (0, 1)
    }


class InDouble:
    """The batch of :func:`batches` in double precision."""

    def __len__(self):
        return 1

    def epoch(self, epoch, start=0):
        for batch in batches(size=24).epoch(epoch, start):
            yield replace(batch, images=batch.images.double())


def test_the_two_updates_differ_by_the_order_of_the_rate():
    gaps = []
    for rate in (1e-3, 1e-4):
        both = [make() for _ in range(2)]
        for parts, update in zip(both, ("alternating", "simultaneous"), strict=True):
            for module in (*parts["networks"], parts["discriminators"]):
                module.double()
            run(parts, InDouble(), rate=rate, second=1.0, update=update)
        one, other = (weights(parts["networks"]) for parts in both)
        gaps.append((one - other).norm().item())
    assert gaps[0] > 0
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.01)


def test_second_step_leaves_classifiers_alone():
    """Without a step on the predictions: bodies move, classifiers and the peers' do not."""
    parts = make()
    before = [net.head.weight.detach().clone() for net in parts["networks"]]
    bodies = [net.body[0].weight.detach().clone() for net in parts["networks"]]
    run(parts, rate=0.0)
    for net, head, body in zip(parts["networks"], before, bodies, strict=True):
        assert torch.equal(net.head.weight, head)
        assert not torch.equal(net.body[0].weight, body)


@pytest.mark.parametrize("watched", [True, False])
def test_watching_changes_no_network(watched):
    parts, plain = make(channels=(3, 5)), make(channels=(3, 5))
    if not watched:
        parts |= {"transfers": None, "discriminators": None}
    run(parts, matching=None)
    run(plain, matching=None)
    assert torch.equal(weights(parts["networks"]), weights(plain["networks"]))
    assert [net.runs for net in parts["networks"]] == [2, 2]  # once a batch


def test_alone_means_labels_only():
    parts, expected = make(), make()
    run(parts, batches(size=24), matching=None, mutual=0.0)
    batch = next(iter(batches(size=24).epoch(0)))
    for net in expected["networks"]:
        loss = nn.functional.cross_entropy(net(batch.images).logits, batch.labels)
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(weights(parts["networks"]), weights(expected["networks"]))


def test_ramp_begins_without_the_peer_and_ends_with_all_of_it():
    first = [make() for _ in range(2)]
    run(first[0], batches(size=24), matching=None, ramp=1.0, max_steps=1)
    run(first[1], batches(size=24), matching=None, mutual=0.0, max_steps=1)
    assert torch.equal(*(weights(parts["networks"]) for parts in first))
    # Half of two steps: the second has the whole weight.
    logit = [
        run(make(), batches(size=24), rate=0.0, matching=None, ramp=ramp, epochs=2).epochs[1]["logit0"]
        for ramp in (0.5, 0.0)
    ]
    assert logit[0] == pytest.approx(logit[1], rel=1e-6)


def test_l1_matching_moves_each_map_to_the_peers():
    gaps = []
    for rate in (0.0, 0.5):
        parts = make()
        run(parts, batches(size=24), rate=0.0, second=rate, matching="l1", epochs=20)
        batch = next(iter(batches(size=24).epoch(0)))
        maps = [net(batch.images).features["map"] for net in parts["networks"]]
        gaps.append((maps[0] - maps[1]).abs().mean().item())
    assert gaps[1] < 0.7 * gaps[0]


def test_pairwise_averages_over_the_peers():
    parts = make(3, scheme="pairwise")
    logits = [net(next(iter(batches(size=24).epoch(0))).images).logits for net in make(3)["networks"]]
    labels = next(iter(batches(size=24).epoch(0))).labels
    history = run(parts, batches(size=24))
    expected = sum(mutual_logit_loss(logits[0], logits[j], labels) for j in (1, 2)) / 2
    assert history.epochs[0]["logit0"] == pytest.approx(expected.item(), rel=1e-5)
    assert len(parts["discriminators"].each) == 6


@pytest.mark.parametrize("matching", ["adversarial", "l1", None])
def test_members_are_runs_alone(matching):
    alone = [make(seed=seed, channels=(3, 5)) for seed in (0, 1)]
    copies = [make(seed=seed, channels=(3, 5)) for seed in (0, 1)]
    histories = [run(parts, batches(seed), matching=matching) for seed, parts in enumerate(alone)]
    stacked = {
        "networks": [Members([parts["networks"][k] for parts in copies]) for k in (0, 1)],
        "transfers": Members([parts["transfers"] for parts in copies]),
        "discriminators": Members([parts["discriminators"] for parts in copies]),
        "features": ["map"] * 2,
        "scheme": "cycle",
    }
    together = run(stacked, MemberBatches([batches(0), batches(1)]), matching=matching)
    for m, (parts, history) in enumerate(zip(alone, histories, strict=True)):
        members = [net.unstacked()[m] for net in stacked["networks"]]
        torch.testing.assert_close(weights(members), weights(parts["networks"]), rtol=1e-4, atol=1e-5)
        for name, value in history.epochs[0].items():
            assert together.epochs[0][f"{name}[{m}]"] == pytest.approx(value, rel=1e-4)


def test_resumed_training_ends_with_the_same_bits(tmp_path):
    options = {
        "epochs": 2,
        "ramp": 0.5,
        "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    }
    whole, broken = make(), make()
    run(whole, **options)

    def stop(state, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, checkpoint=tmp_path / "c", checkpoint_every=0.0, evaluate=stop, **options)
    resumed = make(seed=7)
    run(resumed, checkpoint=tmp_path / "c", evaluate=lambda state, epoch: {}, **options)
    assert torch.equal(weights(resumed["networks"]), weights(whole["networks"]))
    assert torch.equal(weights([resumed["discriminators"]]), weights([whole["discriminators"]]))


def test_training_names_mistakes(unchecked):
    parts = make()
    for changed, message in {
        (("features", ("map",)),): "features: expected 2 names",
        (("matching", "l2"),): "matching: expected one of",
        (("update", "both"),): "update: expected one of",
        (("ramp", 1.5),): "ramp: expected a share",
        (("mutual", -1.0),): "mutual: expected a number",
        (("temperature", 0.0),): "temperature: expected",
        (("discriminators", None),): "discriminators: expected Discriminators",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(parts | dict(changed))


def test_what_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match="logit0"):
        run(make(), rate=1e30, epochs=3)


def test_discriminator_compiles_without_breaks(unchecked, compiler):
    module, maps = FeatureDiscriminator((3, 4, 4)).eval(), torch.randn(2, 3, 4, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps), module(maps))
