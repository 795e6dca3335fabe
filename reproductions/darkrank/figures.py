"""Figures of the DarkRank chapter; each function draws one from networks or numbers that a run produced."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.kernels import inner_products, unit_rows
from reproductions.darkrank import heldout
from reproductions.darkrank.run import Config, networks_of
from reproductions.harness.plotting import interval_plot
from reproductions.harness.runs import Context, Result, Run

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, T = 4",
    "soft": "soft transfer",
    "hard": "hard transfer",
    "soft_kd": "soft transfer and KD",
    "soft_alone": "soft transfer, no labels",
    "soft_official": "the authors' soft transfer",
}


def metric_figure(results: Sequence[Result], config: Config, metrics: dict[str, str]) -> Figure:
    """Metrics of every arm side by side: one dot a seed, mean and 95 % interval.

    Args:
        results: Of a profile.
        config: The profile.
        metrics: Name to the axis's label.
    """
    arms = [*config.arms, *config.few]
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(6.6, 0.42 * len(arms) + 0.8), sharey=True, layout="constrained"
    )
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        shown = {
            ARM_TITLES[arm]: [result.metrics[metric] for result in results if result.run.arm == arm]
            for arm in arms
        }
        interval_plot(axes, shown, label=label, highlight=[ARM_TITLES["soft"], ARM_TITLES["hard"]])
    return figure


def neighbours_figure(
    results: Sequence[Result], config: Config, arms: Sequence[str], queries: Sequence[int], count: int = 8
) -> Figure:
    """What each network finds nearest to a few images of unseen classes; other classes have a red frame.

    Args:
        results: Of a profile; the networks are those of the first seed.
        config: The profile.
        arms: Whose networks.
        queries: Numbers among the queries.
        count: Images found, from near to far.
    """
    first = {result.run.arm: result for result in results if result.run.seed == config.seeds[0]}
    results = [first[arm] for arm in arms]
    context = Context.of(results[0])
    parts = heldout.parts_of(config.recipe, context)
    lines = len(queries) * len(results)
    figure, panels = plt.subplots(
        lines, count + 1, figsize=(0.62 * (count + 1) + 1.2, 0.66 * lines), squeeze=False
    )
    found = [_embeddings(result, config, context) for result in results]
    for number, query in enumerate(queries):
        for k, (result, (database, asked)) in enumerate(zip(results, found, strict=True)):
            row = panels[number * len(results) + k]
            scores = inner_products(unit_rows(asked[query : query + 1]), unit_rows(database))
            nearest = scores.topk(count, dim=1).indices[0].tolist()
            own = parts.queries.labels[query]
            _show(row[0], parts.queries.images[query], "black")
            row[0].set_ylabel(ARM_TITLES[result.run.arm], rotation=0, ha="right", va="center", fontsize=8)
            for axes, index in zip(row[1:], nearest, strict=True):
                right = parts.database.labels[index] == own
                _show(axes, parts.database.images[index], "0.8" if right else "tab:red")
    return figure


def _show(axes: plt.Axes, image: Tensor, frame: str) -> None:
    axes.imshow(image.squeeze(), cmap="gray", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2)


def _embeddings(result: Result, config: Config, context: Context) -> tuple[Tensor, Tensor]:
    """Database and queries as a result's network embeds them; its seed's partners are loaded with it."""
    run, recipe = result.run, config.recipe
    seeds = result.provenance.seeds or (run.seed,)
    runs = [Run(run.column, run.profile, run.data, run.arm, seed) for seed in seeds]
    network = networks_of(runs, config, Context.of(result))[list(seeds).index(run.seed)]
    feature = (recipe.pair.teacher if run.arm == "teacher" else recipe.pair.student).feature
    parts = heldout.parts_of(recipe, context)
    database, queries = (
        heldout.embedded(network, feature, recipe, split, context)
        for split in (parts.database, parts.queries)
    )
    return database, queries
