"""Distributions: where gates went, and in how many pairs of tasks gradients are in conflict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tsbn_kernels.analysis import Conflicts, Source, importance
from tsbn_kernels.plots.style import ACCENT, COLORS, INK, SMALL, figure, plain

_BINS = 40
_TITLE = 26  # letters that a panel has room for; the end of a name tells more than its start
_PANELS = 6  # pairs of tasks that have one of their own


def gate_histograms(runs: Mapping[str, Source | Sequence[Source]]) -> Figure:
    """Draws how the importance of all filters is distributed, a panel for each entry.

    Args:
        runs: a source, as :func:`~tsbn_kernels.analysis.importance` takes it, or several that are taken together, by
            the title of their panel: the multiplier of the gates' learning rate, a seed, or a checkpoint.
    """
    values = {}
    for title, found in runs.items():
        sources: Any = found if isinstance(found, (list, tuple)) else [found]
        values[title] = torch.cat([importance(source).matrix.flatten() for source in sources]).numpy()
    columns = min(4, len(values))
    rows = math.ceil(len(values) / columns)
    drawn = figure(2.9 * rows + 0.2, max(4.5, 2.6 * columns))
    grid = drawn.subplots(rows, columns, sharey=True, squeeze=False)
    top = max(1.0, *(float(each.max()) for each in values.values()))
    edges = np.linspace(0, top, _BINS + 1)
    for axes, (title, each) in zip(grid.flat, values.items(), strict=False):
        share = np.histogram(each, edges)[0] / len(each)
        axes.bar(edges[:-1], share, top / _BINS, align="edge", color=ACCENT, zorder=2)
        axes.set_title(title if len(title) <= _TITLE else f"…{title[1 - _TITLE :]}", fontsize=10)
        axes.set_xlim(0, top)
        axes.set_xticks((0, top / 2, top), ("0", f"{top / 2:.3g}", f"{top:.3g}"))
        axes.set_yscale("log")
        axes.set_ylim(5e-4, 1)
        axes.set_yticks((0.001, 0.01, 0.1, 1), ("0.1 %", "1 %", "10 %", "100 %"))
        plain(axes)
    for axes in grid.flat[len(values) :]:
        axes.remove()
    drawn.supxlabel("importance", fontsize=10)
    drawn.supylabel("share of the gates (log)", fontsize=10)
    return drawn


def conflict_histograms(methods: Mapping[str, Sequence[Conflicts]]) -> Figure:
    """Draws how the cosines of the gradients of pairs of tasks are distributed over steps.

    Up to four tasks have a panel for each pair; of more all pairs are in one.

    Args:
        methods: what :func:`~tsbn_kernels.analysis.gradient_conflicts` found at some steps, by the name of the method.
    """
    tasks = next(iter(methods.values()))[0].tasks
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    if not pairs:
        raise ValueError("one task has no pair that could be in conflict")
    found = {name: torch.stack([step.cosine for step in steps]).numpy() for name, steps in methods.items()}
    every = np.triu_indices(len(tasks), 1)
    panels = {"all pairs of tasks": every}
    if len(pairs) <= _PANELS:
        panels = {f"{tasks[one]}, {tasks[other]}": (np.array([one]), np.array([other])) for one, other in pairs}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = figure(2.8 * rows + 0.6, max(6.5, 3.2 * columns))
    grid = drawn.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, (title, (one, other)) in zip(grid.flat, panels.items(), strict=False):
        _conflicts(axes, {name: cosines[:, one, other].flatten() for name, cosines in found.items()})
        axes.set_title(title, fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    drawn.supxlabel("cosine of two tasks' gradients; left of the line they are in conflict", fontsize=10)
    drawn.supylabel("share", fontsize=10)
    one, other = every
    names = [f"{name} ({(each[:, one, other] < 0).mean():.0%} in conflict)" for name, each in found.items()]
    handles = grid.flat[0].get_legend_handles_labels()[0]
    drawn.legend(handles, names, loc="outside upper left", ncols=1 if len(names) > 2 else 2, frameon=False)
    return drawn


def _conflicts(axes: Axes, found: Mapping[str, np.ndarray]) -> None:
    bins = min(_BINS, max(8, min(map(len, found.values())) // 4))  # of few values broad ones
    edges = np.linspace(-1, 1, bins + 1)
    for (name, cosines), color, style in zip(
        found.items(), itertools.cycle(COLORS), itertools.cycle(("-", "--", ":", "-.")), strict=False
    ):
        share = np.histogram(cosines, edges)[0] / len(cosines)
        axes.stairs(share, edges, color=color, linestyle=style, linewidth=1.6, label=name)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.tick_params(labelsize=SMALL)
    plain(axes)
