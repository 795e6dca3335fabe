"""Entropy maps in closed form beside the authors' optimisation of the same images."""

from __future__ import annotations

from functools import partial

import torch

from kdrefs.methods.concept_quantification import entropy_map
from kdrefs.nets import build
from reproductions.concept_quantification.agreement import Counted
from tests.benchmarks.case import Case, Contest, at_least

IMAGES, PROBES, FEWER_PASSES = 4, 64, 100


def maps_contest(device: torch.device) -> Contest:
    """64 probes beside up to 80 steps of 96 draws, on a feature map of a small network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Counted(build("small_cnn", in_channels=3, channels=(8, 16, 32), feature=64, size=32)).to(device)
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    ours = partial(entropy_map, net, images, "block3", 16, probes=PROBES)
    theirs = partial(
        entropy_map, net, images, "block3", 16, method="optimise", variant="official", chunk=4 * 96
    )

    def check() -> None:
        """The official map is one on the way to the closed form's, so only passes are held against each other."""
        passes = []
        for side in (ours, theirs):
            net.images = 0
            side()
            passes.append(net.images)
        # Ours goes back once a probe, theirs once for each noisy image.
        own, other = passes[0] + PROBES * IMAGES, 2 * passes[1] - IMAGES
        assert other >= FEWER_PASSES * own, (
            f"{other} passes beside {own}, expected {FEWER_PASSES} times as many"
        )

    return Contest(ours, theirs, check, images=IMAGES)


CONCEPTS = [
    Case(
        "Entropy maps",
        "closed form beside the authors' optimisation",
        f"{IMAGES} images, 64 probes beside 80 x 96 draws",
        maps_contest,
        (at_least(20.0),),
        weight=2,
    )
]
