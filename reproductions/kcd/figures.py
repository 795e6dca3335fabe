"""Figures of the KCD chapter; each function draws one from what runs of the column kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from kdrefs.methods.kcd import augment, strengths
from reproductions.harness.runs import Context, Result
from reproductions.kcd.condensation import Trace, condensed
from reproductions.kcd.stages import ARMS, STRENGTH
from reproductions.protocols import figures
from reproductions.protocols.classification import Config
from reproductions.protocols.pairs import PAIRS, load_pair_data
from reproductions.protocols.settings import Setting, setting_of

ARM_TITLES = {
    "teacher": "teacher",
    "student": "student alone",
    "kd": "KD, all images",
    "kd_short": "KD, all images, fewer steps",
    "kcd": "KCD",
    "kcd_plain": "KCD, nothing blended",
    "random": "as many at random",
    "anti": "the lowest instead",
    "pkt": "PKT, all images",
    "kc_pkt": "KC-PKT",
}


def accuracy_figure(results: Sequence[Result], setting: Setting) -> Figure:
    """Test accuracy of every arm: one dot a seed, mean and 95 % interval."""
    return figures.arms_figure(results, setting, ARM_TITLES, highlight=("kcd",))


def traces_of(results: Sequence[Result], config: Config, arm: str) -> dict[int, Trace]:
    """What became of the points of every seed of an arm."""
    found: dict[int, Trace] = {}
    for result in results:
        run, seeds = result.run, list(result.provenance.seeds or (result.run.seed,))
        if run.arm == arm and run.seed not in found:
            _, traces = condensed(arm, seeds, setting_of(run, config).recipe, Context.of(result))
            found |= dict(zip(seeds, traces, strict=True))
    return found


def dropped_figure(trace: Trace, config: Config, data: str, columns: int = 14) -> Figure:
    """Images that leave the set after each stage, a row a stage: lowest scores first."""
    pair = PAIRS[next(s for s in config.settings if s.data == data).recipe.pair]
    train, _, _ = load_pair_data(pair)
    rows = leavers(trace)
    figure, panels = plt.subplots(len(rows), columns, figsize=(0.55 * columns + 0.9, 0.62 * len(rows)))
    for number, (row, points) in enumerate(zip(panels, rows, strict=True), start=1):
        for axes in row:
            axes.set_axis_off()
        for axes, point in zip(row, points.tolist(), strict=False):
            axes.imshow(train.images[point].squeeze(), cmap="gray", vmin=0, vmax=255)
        row[0].set_title(f"stage {number}", x=-0.75, y=0.25, fontsize=8)
    return figure


def leavers(trace: Trace) -> list[Tensor]:
    """Stage by stage, the points that are trained on in it and not in the next, lowest mean entropy first."""
    mean = trace.total / trace.frequency
    out = []
    for k, (now, later) in enumerate(zip(trace.kept, trace.kept[1:], strict=False)):
        points = now[~torch.isin(now, later)]
        out.append(points[mean[k, points].argsort(stable=True)])
    return out


def cost_table(results: Sequence[Result], setting: Setting) -> str:
    """What each arm's training saw and took, as a Markdown table; seconds of the arms that nobody else has trained."""
    lines = ["| Arm | Images seen, % | Steps | Seconds a run |", "|:--|--:|--:|--:|"]
    for arm in (*setting.arms, *setting.few):
        runs = [r for r in results if (r.run.data, r.run.arm) == (setting.data, arm) and "steps" in r.metrics]
        if runs:
            seen, steps = (np.mean([r.metrics[name] for r in runs]) for name in ("passes", "steps"))
            seconds = f"{np.mean([r.provenance.wall_seconds for r in runs]):.2g}" if arm in ARMS else "–"
            lines.append(f"| {ARM_TITLES[arm]} | {seen:.1f} | {steps:.0f} | {seconds} |")
    return "\n".join(lines)


def blending_figure(trace: Trace, config: Config, data: str, columns: int = 8) -> Figure:
    """How much of its partner a point gets, by its rank in the first condensed set; some of them before and after."""
    pair = PAIRS[next(s for s in config.settings if s.data == data).recipe.pair]
    images = torch.from_numpy(load_pair_data(pair)[0].images)
    low, partner, kept = trace.low[1], trace.dropped[1], len(trace.kept[1])
    figure = plt.figure(figsize=(6.6, 4.4), layout="constrained")
    (above,), (below,) = figure.subfigures(2, squeeze=False, height_ratios=(1, 1.15))
    axes = above.subplots()
    rank = np.arange(kept - len(low), kept)
    axes.plot([0, rank[0]], [0, 0], color="0.4")
    axes.plot(rank, strengths(len(low), STRENGTH).numpy(), color="C0", label="0 to 0.3, both reached")
    axes.plot(
        rank,
        strengths(len(low), STRENGTH, variant="official").numpy(),
        ":",
        color="C3",
        label="official, j / L",
    )
    axes.set_xlim(rank[0] - 2.5 * len(low), kept + 0.5 * len(low))
    axes.axvspan(rank[0], kept, alpha=0.12, color="C0")
    axes.set_xlabel("rank (0: highest value); shaded: K1L")
    axes.set_ylabel("share of\nthe partner, ε")
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    mixed = augment(images[low], images[partner], maximum=STRENGTH)
    chosen = np.linspace(0, len(low) - 1, columns).round().astype(int)
    panels = below.subplots(3, columns)
    for name, row, pictures in zip(
        ("K1L", "K0", "blended"), panels, (images[low], images[partner], mixed), strict=True
    ):
        for panel, j in zip(row, chosen, strict=True):
            panel.imshow(pictures[int(j)].squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def values_figure(trace: Trace, lines: int = 60) -> Figure:
    """Mean entropy recorded so far, stage by stage: some points of each fate, and the median of all of them."""
    mean = (trace.total / trace.frequency).numpy()
    groups = fates(trace)
    figure, panels = plt.subplots(
        1, len(groups), figsize=(7.2, 2.8), sharey=True, layout="constrained", squeeze=False
    )
    stages = np.arange(1, len(mean) + 1)
    for number, (axes, (name, points)) in enumerate(zip(panels[0], groups.items(), strict=True)):
        chosen = points[:: max(1, len(points) // lines)]
        axes.plot(stages, mean[:, chosen], color=f"C{number}", alpha=0.25, linewidth=0.7)
        if len(points):
            axes.plot(stages, np.median(mean[:, points], axis=1), color="black")
        axes.set_title(f"{name}\n{100 * len(points) / mean.shape[1]:.1f} %", fontsize=9)
        axes.set_xlabel("after stage")
    panels[0][0].set_ylabel("value, nats")
    panels[0][0].set_yscale("log")
    return figure


def fates(trace: Trace) -> dict[str, np.ndarray]:
    """Numbers of the points that were always trained on, that came back, and that were dropped for good."""
    inside = torch.zeros(len(trace.kept), trace.total.shape[1], dtype=torch.bool)
    for row, points in zip(inside, trace.kept, strict=True):
        row[points] = True
    back = ((~inside).cummax(0).values & inside).any(0)
    always = inside.all(0)
    groups = {"always in": always, "came back": back, "dropped for good": ~always & ~back}
    return {name: mask.nonzero().flatten().numpy() for name, mask in groups.items()}


def entropies_figure(traces: Mapping[str, Mapping[int, Trace]]) -> Figure:
    """Entropy on the set that is trained on and on the test set, over the stages; a thin line a seed, a thick mean.

    Args:
        traces: By arm and seed, of arms with equally many stages.
    """
    figure, panels = plt.subplots(1, 2, figsize=(7.0, 3.0), sharex=True, layout="constrained")
    for number, (arm, seeds) in enumerate(traces.items()):
        curves = {
            "the set that is trained on": [recorded(trace) for trace in seeds.values()],
            "the test set": [trace.watched[:, 1].numpy() for trace in seeds.values()],
        }
        for axes, (name, lines) in zip(panels, curves.items(), strict=True):
            stages = np.arange(1, len(lines[0]) + 1)
            axes.plot(stages, np.transpose(lines), color=f"C{number}", alpha=0.25, linewidth=0.7)
            axes.plot(stages, np.mean(lines, axis=0), color=f"C{number}", marker="o", label=ARM_TITLES[arm])
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("stage")
            axes.set_yscale("log")
    panels[0].set_ylabel("mean entropy, nats")
    panels[1].legend(frameon=False, fontsize="small")
    return figure


def recorded(trace: Trace) -> np.ndarray:
    """Mean of the entropies that each stage recorded, in nats."""
    total = trace.total.sum(1).diff(prepend=torch.zeros(1, dtype=trace.total.dtype))
    count = trace.frequency.sum(1).diff(prepend=torch.zeros(1, dtype=trace.frequency.dtype))
    return (total / count).numpy()


def overlap(traces: Mapping[int, Trace]) -> list[float]:
    """Share of the points left out that two seeds have in common, mean over all pairs of seeds, stage by stage.

    Stages that leave out nothing are skipped. Independent choices would have the share that is left out at all.
    """
    samples = next(iter(traces.values())).total.shape[1]
    out = []
    for k in range(1, len(next(iter(traces.values())).kept)):
        masks = []
        for trace in traces.values():
            mask = torch.ones(samples, dtype=torch.bool)
            mask[trace.kept[k]] = False
            masks.append(mask)
        shares = [((a & b).sum() / a.sum()).item() for a, b in combinations(masks, 2)]
        out.append(sum(shares) / len(shares))
    return out


def overlap_figure(traces: Mapping[str, Mapping[int, Trace]]) -> Figure:
    """:func:`overlap` of several arms beside what chance would give."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for number, (arm, seeds) in enumerate(traces.items()):
        shares = overlap(seeds)
        stages = np.arange(2, len(shares) + 2)
        axes.plot(stages, np.multiply(100, shares), marker="os^D"[number], label=ARM_TITLES[arm])
    one = next(iter(next(iter(traces.values())).values()))
    chance = [100 * (1 - len(points) / one.total.shape[1]) for points in one.kept[1:]]
    axes.plot(np.arange(2, len(chance) + 2), chance, ":", color="0.3", label="chance")
    axes.set_xticks(np.arange(2, len(chance) + 2))
    axes.set_xlabel("stage")
    axes.set_ylabel("left out by both of two seeds, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize="small")
    return figure
