"""Which learning rates a student survives, and how well it follows its teacher at the best of them.

All rates of a seed train together. For SGD with momentum and without weight decay a loss times c is a learning rate
times c, so each member's loss is multiplied instead of its rate. A member whose loss explodes is no longer trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrefs.data.batches import Batch
from kdrefs.methods.logit_regression import LogitStatistics, logit_regression_loss
from kdrefs.nets import Output
from kdrefs.training import MemberBatches, Members, each, fit, update
from kdrefs.training.optimizers import fused
from reproductions.harness.provenance import source_digest
from reproductions.harness.runs import Context
from reproductions.logit_regression.shallow import ARMS, Recipe, inputs_of, new_student, pair_of, scores
from reproductions.protocols.pairs import load_pair_data, load_weights, save_weights

EXPLODED = 1e6  # times the loss of a student that knows the means of the logits only


@dataclass(frozen=True)
class Sweep:
    """Rates and lengths; ``arms`` by name: the student of which arm, and how many times the steps."""

    rates: tuple[float, ...]
    steps: int
    arms: tuple[tuple[str, tuple[str, float]], ...]

    def arm(self, name: str) -> tuple[str, int]:
        """The student's arm in :data:`~reproductions.logit_regression.shallow.ARMS`, and its number of steps."""
        of, factor = dict(self.arms)[name]
        return of, round(self.steps * factor)


def swept(
    recipe: Recipe, sweep: Sweep, name: str, seeds: Sequence[int], context: Context
) -> dict[int, list[list[float]]]:
    """By seed and rate, the mean training loss of each epoch, over that of knowing the means only; made once."""
    return {
        int(seed): curves
        for seed, curves in json.loads(
            (_folder(recipe, sweep, name, seeds, context) / "curves.json").read_text()
        ).items()
    }


def measures(
    recipe: Recipe, sweep: Sweep, name: str, seeds: Sequence[int], context: Context
) -> list[dict[str, float]]:
    """For each seed the largest stable rate, and how the student of the best rate follows its teacher.

    Stable: after the last epoch the loss is below that of a student that knows the means only. Best: of the lowest
    training loss in the last epoch.
    """
    curves = swept(recipe, sweep, name, seeds, context)
    folder = _folder(recipe, sweep, name, seeds, context)
    _, test, _ = load_pair_data(pair_of(recipe), probe=context.max_steps is not None)
    found = []
    for seed in seeds:
        last = torch.tensor([curve[-1] for curve in curves[seed]])
        stable = [rate for rate, loss in zip(sweep.rates, last.tolist(), strict=True) if loss < 1]
        student = new_student(recipe, ARMS[sweep.arm(name)[0]], seed, context)
        load_weights(student, folder / f"weights{seed}.safetensors")
        largest = torch.tensor(stable or [sweep.rates[0] / 2]).max().log2().item()
        values = scores(student, recipe, test, seed, context)
        found.append(values | {"log2_rate": largest, "best_loss": last.min().item()})
    return found


def _folder(recipe: Recipe, sweep: Sweep, name: str, seeds: Sequence[int], context: Context) -> Path:
    of, steps = sweep.arm(name)
    arm, rates = ARMS[of], sweep.rates

    def make(folder: Path) -> None:
        inputs = [inputs_of(recipe, arm, seed, context) for seed in seeds]
        students = [new_student(recipe, arm, seed, context) for seed in seeds]
        for student, one in zip(students, inputs, strict=True):
            student.standardise(one.statistics)
        members = Members([student for student in students for _ in rates])
        optimizer = torch.optim.SGD(members.parameters(), lr=rates[0], momentum=0.9, **fused(context.device))
        factors = torch.tensor(rates, device=context.device).repeat(len(seeds)) / rates[0]
        classes = students[0].classifier.out_features
        alive = torch.ones(len(factors), device=context.device)
        batches = MemberBatches([one.batches for one in inputs for _ in rates])
        history = fit(
            _step(factors, classes / 2),
            {"student": members, "optimizer": optimizer, "alive": alive},
            batches,
            epochs=-(-steps // len(batches)),
            checkpoint=folder / "training.safetensors",
            max_steps=min(steps, context.max_steps or steps),
            progress=context.progress,
        )
        curves = [[epoch[f"loss[{m}]"] for epoch in history.epochs] for m in range(len(factors))]
        by_seed = {seed: curves[k * len(rates) : (k + 1) * len(rates)] for k, seed in enumerate(seeds)}
        networks = members.unstacked()
        for k, seed in enumerate(seeds):
            best = min(range(len(rates)), key=lambda r: by_seed[seed][r][-1])
            save_weights(networks[k * len(rates) + best], folder / f"weights{seed}.safetensors")
        (folder / "curves.json").write_text(json.dumps(by_seed))

    about = {
        "arm": asdict(arm), "recipe": asdict(recipe), "pair": asdict(pair_of(recipe)), "rates": rates, "steps": steps,
        "seeds": list(seeds), "max_steps": context.max_steps,
    }  # fmt: skip
    return context.artifact("rates", about, make, source=source_digest(__name__))


def _step(factors: Tensor, reference: float) -> Callable[[dict[str, Any], Batch], dict[str, Tensor]]:
    def loss(output: Output, guide: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return logit_regression_loss(output.features["outputs"], guide, statistics=LogitStatistics(mean, std))

    def step(state: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        student, alive = state["student"], state["alive"]
        network = student.network
        losses = each(loss)(student(batch.images), batch.extras["logits"], network.mean, network.std)
        seen = losses.detach() / reference
        alive.mul_(seen < EXPLODED)
        update(state["optimizer"], (torch.where(alive > 0, losses, 0.0) * factors).sum())
        shown = torch.where(alive > 0, seen, EXPLODED)
        return {f"loss[{m}]": value for m, value in enumerate(shown)}

    return step
