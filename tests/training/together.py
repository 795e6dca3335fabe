"""Trainings whose outcome does not depend on how many processes share them.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.training.together FOLDER

does each of them and writes what came of it to ``FOLDER/<name>.safetensors``; without ``torch.distributed.run`` in one
process.
"""

import json
import os
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdrefs.data.batches import Batches
from kdrefs.methods.afd import Discriminators, TransferLayers, train_afd
from kdrefs.methods.darkrank import hard_darkrank_loss, soft_darkrank_loss
from kdrefs.methods.pkt import pkt_loss
from kdrefs.methods.qmi import quadratic_mutual_information
from kdrefs.nets import Output
from kdrefs.training import (
    Members,
    cosine,
    data_parallel,
    fit,
    gather_rows,
    save_tensors,
    update,
    whole_batch,
)
from kdrefs.training.parallel import leads

# 19 samples in batches of 6: three that two processes share evenly and one sample that both have.
SAMPLES, BATCH, EPOCHS = 19, 6, 3


def batches(batch_size=BATCH, channels=2):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (SAMPLES, 8, 8, channels), generator=generator, dtype=torch.uint8)
    labels = torch.arange(SAMPLES) % 3
    return Batches(
        images, labels, batch_size=batch_size, seed=1, mean=[0.5] * channels, std=[0.25] * channels
    )


def network(norm=False, dtype=torch.float64, width=5):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=not norm), *([nn.BatchNorm2d(4)] if norm else []), nn.Tanh()]
    # The last layer has a bias that no loss of features reaches.
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, width)).to(dtype)


def train(loss, net, folder, *, batch_size=BATCH, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    dtype = next(net.parameters()).dtype

    def step(state, batch):
        value = loss(state["net"](batch.images.to(dtype)), batch.labels)
        update(state["optimizer"], value)
        state["schedule"].step()
        return {"loss": value, "samples": float(len(whole_batch(batch.labels)))}

    state = {"net": net, "optimizer": optimizer, "schedule": cosine(optimizer, 100)}
    one = batches(batch_size)
    history = fit(
        step, state, one, epochs=EPOCHS, checkpoint=folder / "checkpoint.safetensors", **options,
        evaluate=lambda state, epoch: {"norm": sum(p.norm().item() for p in net.parameters())},
    )  # fmt: skip
    means = torch.tensor([[epoch[name] for name in ("loss", "samples")] for epoch in history.epochs])
    norms = torch.tensor([values["norm"] for values in history.evaluations])
    return {**net.state_dict(), "means": means, "norms": norms}


def cross_entropy(folder):
    return train(F.cross_entropy, network(), folder)


def uneven_batches(folder):
    """Batches of 5: three rows for the one process, two for the other."""
    return train(F.cross_entropy, network(), folder, batch_size=5)


def batch_norm(folder):
    return train(F.cross_entropy, network(norm=True), folder, batch_size=6)


def uneven_batch_norm(folder):
    return train(F.cross_entropy, network(norm=True), folder, batch_size=5)


def single_precision(folder):
    return train(F.cross_entropy, network(norm=True, dtype=torch.float32), folder, batch_size=6)


def adam(folder):
    net = network()
    return train(F.cross_entropy, net, folder, optimizer=torch.optim.Adam(net.parameters(), 1e-3))


def of_pairs(loss):
    """Train with a loss of all rows beside one of each, as the columns do."""

    def training(folder):
        weights = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)

        def value(features, labels):
            # What the teacher would say: any function of the sample that has other distances than the features.
            said = (features.detach() @ weights + F.one_hot(labels, 3)).sin()
            rows = whole_batch(features), whole_batch(said), whole_batch(labels)
            return F.cross_entropy(features, labels) + loss(*rows)

        return train(value, network(), folder, batch_size=5)

    return training


pkt = of_pairs(lambda s, t, labels: 10 * pkt_loss(s, t))
soft_darkrank = of_pairs(
    lambda s, t, labels: soft_darkrank_loss(s, t, list_length=3) if len(s) > 1 else 0 * s.sum()
)
hard_darkrank = of_pairs(lambda s, t, labels: hard_darkrank_loss(s, t) if len(s) > 1 else 0 * s.sum())
qmi = of_pairs(lambda s, t, labels: -quadratic_mutual_information(s, labels, 2.0, classes=3))


class WithMaps(nn.Module):
    """A network that returns its logits and its map."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        maps = self.body(images.double())
        return Output(self.head(maps.mean((2, 3))), {"map": maps})


def alternating(folder):
    """AFD: two networks and two discriminators in turn, gradients that do not come from ``backward``."""
    torch.manual_seed(0)
    networks = [WithMaps().double() for _ in range(2)]
    transfers = TransferLayers([(3, 6, 6)] * 2)
    discriminators = Discriminators(transfers.shape, 2, hidden=4).double()
    sgd = [partial(torch.optim.SGD, lr=rate) for rate in (0.1, 0.05, 0.2)]
    history = train_afd(
        networks, batches(5), features=["map"] * 2, epochs=2, transfers=transfers, discriminators=discriminators,
        optimizer=sgd[0], adversarial_optimizer=sgd[1], discriminator_optimizer=sgd[2], progress=False,
    )  # fmt: skip
    means = torch.tensor(list(history.epochs[-1].values()))
    return {**nn.ModuleList([*networks, discriminators]).state_dict(), "means": means}


def broken_off(folder):
    """Stopped in the second epoch, and gone on with."""
    steps = []

    def value(logits, labels):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, labels)

    with suppress(KeyboardInterrupt):
        train(value, network(), folder, checkpoint_every=0 if leads() else 1e9)
    if leads():
        shutil.copyfile(folder / "checkpoint.safetensors", folder / "half.safetensors")
    return train(F.cross_entropy, network(), folder)


def own_loop(folder):
    """A training loop with DistributedDataParallel and rows that are gathered, as README shows."""
    net = network()
    several = dist.is_initialized()
    parallel = DistributedDataParallel(net) if several else net
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        for batch in batches().epoch(epoch):
            if len(batch) < BATCH:
                continue
            rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3) if several else slice(None)
            images = batch.images[rows].double()
            features = parallel(images)
            targets = images.flatten(1)[:, ::17].cos()
            optimizer.zero_grad()
            pkt_loss(gather_rows(features), gather_rows(targets)).backward()
            optimizer.step()
    return net.state_dict()


NAMES = (
    "cross_entropy", "uneven_batches", "batch_norm", "uneven_batch_norm", "single_precision", "adam", "pkt",
    "soft_darkrank", "hard_darkrank", "qmi", "alternating", "broken_off", "own_loop",
)  # fmt: skip


def refusals():
    """What must not go through unnoticed, as the messages that came."""
    net, one = network(), batches()

    def attempt(step, state, **options):
        try:
            fit(step, state, one, epochs=1, **options)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def drifting(state, batch):
        with torch.no_grad():
            state["net"][0].bias[0] += batch.images.double().mean()
        return {}

    def plain(state, batch):
        return {}

    return {
        "drift": attempt(drifting, {"net": net}),
        "members": attempt(plain, {"net": Members([net])}),
        "graph": attempt(plain, {"net": net}, graph=True),
    }


def main(folder):
    torch.set_num_threads(1)
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    leads = not several or dist.get_rank() == 0
    for name in NAMES:
        (folder / name).mkdir(exist_ok=True, parents=True)
        with data_parallel():
            found = globals()[name](folder / name)
            save_tensors(folder / f"{name}.safetensors", found)
    if several:
        with data_parallel():
            messages = refusals()
        if leads:
            (folder / "refusals.json").write_text(json.dumps(messages))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
