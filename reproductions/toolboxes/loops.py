"""Training loops of public toolboxes beside what they are meant to do, on a network of two layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reproductions.harness.errata import Evidence, draw

EPOCHS, BATCHES = 5, 8


def small_network() -> nn.Sequential:
    """A linear layer, batch normalisation, a rectifier, a linear layer; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def train(*, mode_every_epoch: bool) -> tuple[int, float]:
    """Train for :data:`EPOCHS` epochs with an evaluation after each.

    Args:
        mode_every_epoch: Whether training mode is set at the start of each epoch, or once before the first.

    Returns:
        How many batches the normalisation has seen, and how far its means are from those of its inputs at the end, in
        standard deviations, root mean square.
    """
    network = small_network()
    inputs = draw(BATCHES, 32, 8, seed=2).float() + 1
    labels = torch.arange(32) % 4
    parameters = list(network.parameters())
    network.train()
    for _ in range(EPOCHS):
        if mode_every_epoch:
            network.train()
        for batch in inputs:
            slopes = torch.autograd.grad(F.cross_entropy(network(batch), labels), parameters)
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter.sub_(slope, alpha=0.1)
        network.eval()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        seen = network[0](inputs.flatten(0, 1))
    off = (norm.running_mean - seen.mean(0)) / seen.std(0)
    return int(norm.num_batches_tracked), float(off.square().mean().sqrt())


def check_mode() -> Evidence:
    """A student that trains in evaluation mode from its second epoch on."""
    (right, near), (theirs, far) = train(mode_every_epoch=True), train(mode_every_epoch=False)
    return Evidence(
        holds=right == EPOCHS * BATCHES and theirs == BATCHES and far > 2 * near,
        summary=(
            f"After {EPOCHS} epochs of {BATCHES} batches the normalisation has seen {theirs} batches instead of "
            f"{right}; its means are off by {far:.2f} standard deviations instead of {near:.2f}. Dropout is off too."
        ),
        values={"batches seen": theirs, "batches": right},
    )


def distillation_step(*, teacher_graph: bool) -> tuple[int, int]:
    """Take one step of distillation.

    Args:
        teacher_graph: Whether the teacher runs with gradients on and its output is used as it comes.

    Returns:
        Bytes kept for the backward pass beside the parameters, and how many of the teacher's parameters got a gradient.
    """
    student, teacher = small_network(), small_network().eval()
    own = {parameter.data_ptr() for network in (student, teacher) for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    images = draw(256, 8, seed=3).float()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.set_grad_enabled(teacher_graph):
            target = teacher(images)
        loss = F.mse_loss(student(images), target)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return size, sum(parameter.grad is not None for parameter in teacher.parameters())


def input_gradient_nodes(*, create_graph: bool) -> int:
    """Nodes of the graph that hangs on the gradient of a teacher's logit with respect to its input."""
    images = draw(4, 8, seed=4).float().requires_grad_()
    logit = small_network().eval()(images)[:, 0].sum()
    (gradient,) = torch.autograd.grad(logit, images, create_graph=create_graph)
    found: set[torch.autograd.graph.Node] = set()
    waiting = [gradient.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(found)


def expected_maximum(count: int) -> float:
    r"""Expected largest of ``count`` standard normal numbers, :math:`\int x \, d\Phi(x)^n` by the trapezoidal rule."""
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = count * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(x) ** (count - 1)
    return float(torch.trapezoid(x * density, x))


def check_teacher_graph() -> Evidence:
    """A teacher that is differentiated although nothing trains it."""
    (right, none), (theirs, reached) = (distillation_step(teacher_graph=flag) for flag in (False, True))
    nodes, free = (input_gradient_nodes(create_graph=flag) for flag in (True, False))
    return Evidence(
        holds=theirs > 1.4 * right
        and none == 0
        and reached == len(list(small_network().parameters()))
        and nodes > 0 == free,
        summary=(
            f"Teacher and student of one size, 256 samples: a step keeps {theirs / 1000:.0f} kB for its backward pass, "
            f"{right / 1000:.0f} kB with the teacher outside the graph, and fills the gradients of all {reached} "
            "parameters of the teacher, which no optimiser reads or clears. The input gradient of this teacher "
            f"carries a graph of {nodes} nodes, {free} without `create_graph`."
        ),
        values={"bytes, teacher in the graph": theirs, "bytes": right, "nodes": nodes},
    )


def check_best_epoch() -> Evidence:
    """The best of many test scores, reported as the score."""
    counts = (1, 30, 240)
    scores = draw(4000, max(counts), seed=5)
    simulated = {n: float(scores[:, :n].amax(1).mean()) for n in counts}
    expected = {n: expected_maximum(n) for n in counts}
    gap = (0.3 - 0.1) * expected[30]
    return Evidence(
        holds=all(abs(simulated[n] - expected[n]) < 0.05 for n in counts) and expected[30] > 2 and gap > 0.4,
        summary=(
            "Test scores that fluctuate independently about one value: the best of "
            + " and ".join(f"{n} is {expected[n]:.2f}" for n in counts[1:])
            + f" standard deviations above it (simulated: {simulated[30]:.2f} and {simulated[240]:.2f}). Two "
            "methods of equal accuracy, one fluctuating by 0.1 and one by 0.3 points over 30 epochs, are reported "
            f"{gap:.1f} points apart."
        ),
        values={f"best of {n}": value for n, value in expected.items()},
    )
