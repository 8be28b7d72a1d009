"""The pictures of the training command and of the studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.forty_tasks.comparisons import Outcome
from experiments.forty_tasks.shrink import Shrunk
from experiments.forty_tasks.studies import Noise
from experiments.forty_tasks.train_run import Fit
from experiments.training.methods import PAPER_MULTIPLIER
from experiments.training.pictures import colors_of, draw_curves, of_seeds
from experiments.training.study import grouped
from tsbn_kernels import plots
from tsbn_kernels.plots.style import COLORS, INK, OWN, SHARED, plain
from tsbn_kernels.plots.style import figure as plots_figure


def learning_curves(fits: Sequence[Fit]) -> Figure:
    """Draws the mean F1 on the validation samples by epoch: the mean of the seeds, and a band from worst to best."""
    groups = grouped(fits)
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    scores = {name: [[epoch.mean_f1 for epoch in fit.history] for fit in group] for name, group in groups.items()}
    draw_curves(axes, scores, colors_of({name: group[0].settings for name, group in groups.items()}))
    axes.set_ylabel("F1 on validation samples, mean over tasks")
    axes.set_title(f"{fits[0].settings.source}: {of_seeds(groups)}")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def gate_histograms(fits: Sequence[Fit]) -> Figure:
    """Draws a panel for each multiplier of the method that has gates: these, of all tasks, layers and seeds."""
    groups = [group for group in grouped(fits).values() if group[0].settings.method in PAPER_MULTIPLIER]
    groups.sort(key=lambda group: group[0].settings.multiplier)
    panels = {
        f"multiplier {group[0].settings.multiplier:g}": [fit.gates for fit in group if fit.gates is not None]
        for group in groups
    }
    return plots.gate_histograms(panels)


def outcome_points(found: Sequence[Outcome], labels: Mapping[str, str]) -> Figure:
    """Draws delta_m% of every run, by method, and the mean of those with one label.

    Args:
        found: the runs.
        labels: what the legend says of each ``otherwise``; several may have one label.
    """
    names = list(dict.fromkeys(one.name for one in found))
    shown = list(dict.fromkeys(labels.values()))
    figure = plots_figure(3.6)
    axes = figure.subplots()
    for place, (label, color, marker) in enumerate(zip(shown, COLORS, "oD^sv", strict=False)):
        offset = 0.7 * ((place + 0.5) / len(shown) - 0.5)
        for column, name in enumerate(names):
            values = [one.delta_m for one in found if one.name == name and labels[one.otherwise] == label]
            across = column + offset + np.linspace(-0.04, 0.04, len(values))
            axes.plot(across, values, marker, color=color, markersize=5, alpha=0.8, label=label if not column else None)
            axes.hlines(np.mean(values), column + offset - 0.07, column + offset + 0.07, color=INK, linewidth=1.5)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("delta_m %; each point a run")
    plain(axes)
    figure.legend(loc="outside upper right", ncols=len(shown), frameon=False)
    return figure


def noise_lines(task: str, found: Sequence[Noise]) -> Figure:
    """Draws what becomes of a task, and of the others, with the share of its labels that are drawn at random."""
    others = "mean of others"
    panels: dict[str, dict[str, Callable[[Noise], float]]] = {
        "cosine with other tasks": {task: lambda one: one.similarity},
        "independent capacity": {task: lambda one: one.independent, others: lambda one: one.others},
        "F1 on test samples": {task: lambda one: one.own_f1, others: lambda one: one.f1},
    }
    shares = sorted({one.share for one in found})
    figure = plots_figure(3.2)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (label, value), color, marker in zip(lines.items(), (OWN, SHARED), "os", strict=False):
            values = [[value(one) for one in found if one.share == share] for share in shares]
            axes.plot(shares, [np.mean(each) for each in values], color=color, marker=marker, label=label)
            axes.fill_between(shares, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        plain(axes)
    label = f"share of the labels of {task} that are random; the band is from the lowest to the highest seed"
    figure.supxlabel(label, fontsize=10)
    handles, names = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
    return figure


def shrink_curves(groups: Mapping[str, Sequence[Shrunk]]) -> Figure:
    """Draws F1 against the share of filters that are gone, for all tasks together and for each: mean and range."""
    figure = plots_figure(4.0)
    together, alone = figure.subplots(1, 2, sharey=True)
    for (name, runs), color in zip(groups.items(), (INK, *COLORS), strict=False):
        for axes, points in ((together, [run.together for run in runs]), (alone, [run.alone for run in runs])):
            gone, scores = 100 * np.array(points).transpose(2, 0, 1)  # each [seeds, amounts]
            axes.plot(gone.mean(0), scores.mean(0), color=color, marker="o", markersize=3, label=name)
            axes.fill_between(gone.mean(0), scores.min(0), scores.max(0), color=color, alpha=0.15, linewidth=0)
    together.set_title("gone for all tasks: the least used of any task", fontsize=10)
    alone.set_title("gone for each task: the least used of that task", fontsize=10)
    together.set_ylabel("F1 on test images, mean over tasks, %")
    for axes in (together, alone):
        axes.set_xlabel("filters that are gone, %")
        axes.set_ylim(0, 100)
        plain(axes)
    alone.legend(frameon=False, loc="lower left")
    return figure
