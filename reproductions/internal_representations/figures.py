"""Figures of the chapter on internal representations, drawn from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kdrefs.nets.transformer import Transformer
from kdrefs.training import evaluation_mode
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result, Run
from reproductions.internal_representations.run import Config, guides_of, networks_of
from reproductions.internal_representations.students import parts
from reproductions.internal_representations.tasks import PADDING, Counting

ARM_TITLES = {
    "teacher": "teacher",
    "student": "labels alone",
    "kd": "soft labels",
    "all": "all at once",
    "pid": "progressive (PID)",
    "sid": "stacked (SID)",
    "sid_kept": "stacked, losses kept",
    "kd_copied": "soft labels, teacher's layers",
    "sid_copied": "stacked, teacher's layers",
    "kd_random": "soft labels, random layers",
}


def metric_figure(results: Sequence[Result], config: Config, metrics: dict[str, str]) -> Figure:
    """Metrics of every arm side by side: one dot a seed, mean and 95 % interval.

    Args:
        results: Of a profile.
        config: The profile.
        metrics: Name to the axis's label.
    """
    arms = ["teacher", *config.arms]
    size = (6.6, 0.42 * len(arms) + 0.8)
    figure, panels = plt.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained")
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        rows = {
            ARM_TITLES[arm]: [result.metrics[metric] for result in results if result.run.arm == arm]
            for arm in arms
        }
        interval_plot(axes, rows, label=label, highlight=[ARM_TITLES["pid"], ARM_TITLES["sid"]])
    return figure


def attention_figure(
    results: Sequence[Result], config: Config, arms: Sequence[str], number: int = 0
) -> Figure:
    """What each token of a test sequence attends to, in the matched layers, averaged over the heads.

    Args:
        results: Of a profile; the networks are those of the first seed.
        config: The profile.
        arms: Whose networks, beside the teacher's.
        number: Of the test sequence.
    """
    first = {result.run.arm: result for result in results if result.run.seed == config.seeds[0]}
    chosen = [first[arm] for arm in arms]
    networks = [_network(result, config) for result in chosen]
    guide = guides_of([chosen[0].run], config, Context.of(chosen[0]))[0]
    _, test = parts(config.recipe, Context.of(chosen[0]))
    tokens = test.tokens[number : number + 1]
    kept = int((tokens != PADDING).sum())
    matched = config.recipe.matched
    columns = [(ARM_TITLES["teacher"], guide, matched)]
    columns += [
        (ARM_TITLES[result.run.arm], network, tuple(range(1, 1 + len(matched))))
        for result, network in zip(chosen, networks, strict=True)
    ]
    shape = (len(matched), len(columns))
    size = (1.9 * shape[1] + 0.8, 1.9 * shape[0] + 0.6)
    figure, panels = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for k, (title, network, layers) in enumerate(columns):
        with evaluation_mode(network):
            features = network(tokens, tokens != PADDING).features
        for axes, layer, own in zip(panels[:, k], matched, layers, strict=True):
            attention = features[f"attention{own}"][0].float().mean(0)[:kept, :kept]
            axes.imshow(attention.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if k == 0:
                axes.set_ylabel(f"teacher's layer {layer}", fontsize=9)
        panels[0, k].set_title(title, fontsize=9)
    if isinstance(config.recipe.task, Counting):
        names = [_name(int(token), config.recipe.task) for token in tokens[0, :kept]]
        for axes in panels[-1]:
            axes.set_xticks(range(kept), names, fontsize=7)
        for axes in panels[:, 0]:
            axes.set_yticks(range(kept), names, fontsize=7)
    return figure


def _name(token: int, task: Counting) -> str:
    value = token - 2
    if value < 0:
        return "cls"
    return str(value) if value < task.values else f"*{value - task.values}"


def _network(result: Result, config: Config) -> Transformer:
    """The network of one result; those of its seed's partners are loaded with it."""
    run = result.run
    seeds = result.provenance.seeds or (run.seed,)
    runs = [Run(run.column, run.profile, run.data, run.arm, seed) for seed in seeds]
    return networks_of(runs, config, Context.of(result))[list(seeds).index(run.seed)]
