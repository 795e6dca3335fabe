"""Results, figures and networks, mostly of the columns that follow the shared table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result, Run
from reproductions.protocols.classification import Config, students_of
from reproductions.protocols.pairs import PAIRS, load_pair_data, make_batches, representations
from reproductions.protocols.rows import Method
from reproductions.protocols.settings import Setting, setting_of


class OnData(Protocol):
    """A setting of any column."""

    @property
    def data(self) -> str: ...


def arms_figure(
    results: Sequence[Result],
    setting: Setting,
    titles: Mapping[str, str],
    *,
    metric: str = "accuracy",
    label: str = "test accuracy, %",
    highlight: Sequence[str] = (),
) -> Figure:
    """A metric of every arm of a setting: one dot a seed, mean and 95 % interval."""
    rows = {
        titles[arm]: [
            result.metrics[metric]
            for result in results
            if (result.run.data, result.run.arm) == (setting.data, arm)
        ]
        for arm in (*setting.arms, *setting.few)
    }
    figure, axes = plt.subplots(figsize=(6.6, 0.42 * len(rows) + 0.8))
    interval_plot(axes, rows, label=label, highlight=[titles[arm] for arm in highlight])
    return figure


def pick(results: Sequence[Result], setting: OnData, arms: Sequence[str], seed: int = 0) -> list[Result]:
    """One result an arm, of one setting and seed, in the order of ``arms``."""
    found = {
        result.run.arm: result
        for result in results
        if (result.run.data, result.run.seed) == (setting.data, seed)
    }
    return [found[arm] for arm in arms]


def network_of(result: Result, config: Config, methods: Mapping[str, Method], module: str) -> nn.Module:
    """The network of one result in eval mode; those of its seed's partners are loaded with it.

    Args:
        result: Of a profile of a column that follows the shared table.
        config: The profile.
        methods: The column's methods on the result's data.
        module: Name of the column's module.
    """
    run = result.run
    seeds = result.provenance.seeds or (run.seed,)
    runs = [Run(run.column, run.profile, run.data, run.arm, seed) for seed in seeds]
    students, _ = students_of(runs, config, Context.of(result), methods, module)
    return students[list(seeds).index(run.seed)]


def test_features(network: nn.Module, result: Result, config: Config, *names: str) -> dict[str, Tensor]:
    """Logits and the named features of all test images."""
    pair = PAIRS[setting_of(result.run, config).recipe.pair]
    _, test, _ = load_pair_data(pair)
    batches = make_batches(pair, test, device=Context.of(result).device, training=False)
    return {name: value.cpu() for name, value in representations(network, batches, *names).items()}
