"""Bars: the capacity of each task, and how many filters of each layer are specialised."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tsbn_kernels.analysis import Capacity, Specialized
from tsbn_kernels.plots.style import ACCENT, INK, OWN, SHARED, SMALL, WIDTH, figure, plain, rows_height, task_rows


def capacity_bars(found: Capacity) -> Figure:
    """Draws the shared and the independent part of each task's capacity, the most independent task on top.

    Args:
        found: from :func:`~tsbn_kernels.analysis.capacity`.
    """
    order = found.independent.argsort(stable=True)
    places = np.arange(len(order))
    drawn = figure(rows_height(len(order), 1.1))
    axes = drawn.subplots()
    axes.barh(places + 0.2, found.shared[order].numpy(), 0.38, color=SHARED, label="shared", zorder=2)
    axes.barh(places - 0.2, found.independent[order].numpy(), 0.38, color=OWN, label="independent", zorder=2)
    axes.plot(found.total[order].numpy(), places, "D", color=INK, markersize=4, label="total", zorder=3)
    task_rows(axes, [found.tasks[task] for task in order.tolist()])
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("capacity; total² = shared² + independent²")
    plain(axes, grid="x")
    drawn.legend(loc="outside upper right", ncols=3, frameon=False)
    return drawn


def specialized_by_depth(found: Specialized) -> Figure:
    """Draws the percent of each layer's filters that are specialised, from the first layer to the last.

    Args:
        found: from :func:`~tsbn_kernels.analysis.specialized_filters`.
    """
    names, percent = list(found.percent), list(found.percent.values())
    drawn = figure(3.4)
    axes = drawn.subplots()
    axes.bar(range(len(names)), percent, min(0.7, 0.1 * len(names) + 0.1), color=ACCENT, zorder=2)
    step = -(-len(names) // int(WIDTH / 0.2))  # each name needs a fifth of an inch
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[index] for index in shown], rotation=90 if len(names) > 4 else 0, fontsize=SMALL)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylim(0, max(5.0, 1.1 * max(percent)))
    if not any(percent):
        text = f"no filter has a task with more than {found.threshold:.0%} of its importance"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=INK)
    axes.set_ylabel("specialised filters, %")
    plain(axes)
    return drawn
