"""The one figure that every chapter needs: per-seed values, means and intervals of several arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from reproductions.harness.statistics import mean_interval


def interval_plot(
    axes: Axes, rows: Mapping[str, Sequence[float]], *, label: str, highlight: Sequence[str] = ()
) -> None:
    """Draw each row's values as dots, its mean as a bar and its 95 % interval as a band, the first row on top.

    Args:
        axes: Where to draw.
        rows: Row label to one value a seed; a single value has no interval.
        label: Label of the value axis, with its unit.
        highlight: Rows in the accent colour.
    """
    for place, (name, values) in enumerate(rows.items()):
        colour = "C0" if name in highlight else "0.55"
        mean, low, high = mean_interval(values)
        if low is not None and high is not None:
            axes.plot(
                [low, high], [-place, -place], color=colour, linewidth=7, alpha=0.35, solid_capstyle="butt"
            )
        axes.plot(values, [-place] * len(values), "o", color=colour, markersize=3.5, alpha=0.8)
        axes.plot([mean], [-place], "|", color=colour, markersize=16, markeredgewidth=2.5)
        right = max([*values, high if high is not None else mean])
        axes.annotate(f"{mean:.1f}", (right, -place), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks([-place for place in range(len(rows))], list(rows))
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.2)
    axes.tick_params(axis="y", length=0)
