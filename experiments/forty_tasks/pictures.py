"""The pictures of the training command: learning curves, and where the gates went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.report.plot import save
from experiments.forty_tasks.train_run import Fit
from experiments.training.methods import PAPER_MULTIPLIER
from experiments.training.pictures import colors_of, draw_curves
from experiments.training.study import grouped

_BINS = 40


def learning_curves(path: Path, fits: Sequence[Fit]) -> None:
    """Mean F1 of the tasks on the validation samples by epoch: the mean of the seeds, and a band from worst to best."""
    groups = grouped(fits)
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    scores = {name: [[epoch.mean_f1 for epoch in fit.history] for fit in group] for name, group in groups.items()}
    draw_curves(axes, scores, colors_of({name: group[0].settings for name, group in groups.items()}))
    axes.set_ylabel("F1 on validation samples, mean over tasks")
    seeds = max(len(group) for group in groups.values())
    axes.set_title(f"{fits[0].settings.source}: mean of {seeds} seeds, and their range")
    figure.legend(loc="outside right upper", frameon=False)
    save(path, figure)


def gate_histograms(path: Path, fits: Sequence[Fit]) -> None:
    """A panel for each multiplier of the method that has gates: these, of all tasks, layers and seeds."""
    groups = [group for group in grouped(fits).values() if group[0].settings.method in PAPER_MULTIPLIER]
    groups.sort(key=lambda group: group[0].settings.multiplier)
    figure = Figure(figsize=(max(5.0, 3.2 * len(groups)), 3.4), layout="constrained")
    row = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    edges = np.linspace(0, 1, _BINS + 1)
    for axes, group in zip(row[0], groups, strict=True):
        values = torch.cat([fit.gates.flatten() for fit in group if fit.gates is not None]).numpy()
        share = np.histogram(values, edges)[0] / len(values)
        axes.bar(edges[:-1], share, 1 / _BINS, align="edge", color="#0b6e4f", zorder=2)
        axes.set_title(f"multiplier {group[0].settings.multiplier:g}")
        axes.set_xlabel("gate")
        axes.set_xlim(0, 1)
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "¼", "½", "¾", "1"))
        axes.set_yscale("log")
        axes.set_ylim(5e-4, 1)
        axes.set_yticks((0.001, 0.01, 0.1, 1), ("0.1 %", "1 %", "10 %", "100 %"))
        axes.grid(axis="y", color="#dddddd", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    row[0, 0].set_ylabel("share of the gates (log)")
    figure.suptitle(
        f"{fits[0].settings.source}: gates of {groups[0][0].settings.method} by the multiplier of their learning rate"
    )
    save(path, figure)
