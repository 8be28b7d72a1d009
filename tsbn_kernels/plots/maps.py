"""Matrices as pictures: who uses what, who is alike, who suffers from whose loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from tsbn_kernels.analysis import Clusters, Source, cluster_tasks, importance, similarity
from tsbn_kernels.plots.style import (
    DIVERGING,
    INK,
    OWN,
    SEQUENTIAL,
    SMALL,
    figure,
    rows_height,
    task_columns,
    task_rows,
    values_inside,
)

_LABEL = 0.016  # of the width of a picture, which the turned name of a layer takes


def importance_map(source: Source) -> Figure:
    """Draws the importance of every filter for every task, the layers from left to right.

    Args:
        source: as :func:`~tsbn_kernels.analysis.importance` takes it.
    """
    found = importance(source)
    filters = found.matrix.shape[1]
    drawn = figure(rows_height(len(found.tasks), 1.6), 11.0)
    axes = drawn.subplots()
    image = axes.imshow(found.matrix.numpy(), SEQUENTIAL, aspect="auto", vmin=0, vmax=_top(found.matrix))
    task_rows(axes, found.tasks)
    named, last = [], -filters
    for layer, part in found.slices.items():
        if part.start:
            axes.axvline(part.start - 0.5, color=OWN, linewidth=1.2)
        middle = (part.start + part.stop - 1) / 2
        if middle - last >= _LABEL * filters:  # a name that stands on the one before is none
            named.append((middle, layer))
            last = middle
    above = axes.secondary_xaxis("top")
    above.set_xticks([place for place, _ in named], [name for _, name in named], fontsize=SMALL, rotation=90)
    above.tick_params(length=2)
    axes.set_xlabel(f"filters of {len(found.layers)} layers, red lines between them")
    drawn.colorbar(image, ax=axes, label="importance", pad=0.01, fraction=0.03)
    return drawn


def _top(matrix: Tensor) -> float:
    """The value of the brightest colour: 1 for sigmoids; of wider scales nearly the largest, for one may be huge."""
    return max(1.0, float(np.quantile(matrix.numpy(), 0.995)))


def similarity_map(source: Source) -> Figure:
    """Draws the cosine between all pairs of tasks, ordered by the tree of who is closest to whom; it needs SciPy.

    Args:
        source: as :func:`~tsbn_kernels.analysis.importance` takes it, of two tasks or more.
    """
    found = importance(source)
    return _with_tree(similarity(found), cluster_tasks(found), "cosine between importance vectors", "1 - cosine")


def together_map(clusters: Clusters) -> Figure:
    """Draws in how many runs two tasks are in one cluster, ordered by the tree of that.

    Args:
        clusters: of several runs, from :func:`~tsbn_kernels.analysis.cluster_tasks`.
    """
    label = f"share of {len(clusters.runs)} runs in one cluster"
    return _with_tree(clusters.together, clusters, label, "1 - share")


def _with_tree(matrix: Tensor, clusters: Clusters, label: str, distance: str) -> Figure:
    from scipy.cluster.hierarchy import dendrogram

    order = clusters.order
    tasks = [clusters.tasks[task] for task in order.tolist()]
    count = len(tasks)
    drawn = figure(max(3.6, rows_height(count, 1.6)), min(11.0, 4.4 + 0.17 * count))
    left, right = drawn.subplots(1, 2, width_ratios=(1, 3))
    shown = matrix[order][:, order].numpy()
    apart = matrix[~np.eye(count, dtype=bool)]
    most = float(apart.max()) if count > 2 else 1.0  # the diagonal, which is 1, tells nothing
    image = right.imshow(shown, SEQUENTIAL, vmin=float(apart.min()), vmax=most, aspect="auto")
    values_inside(right, image, shown, ".2f")
    task_rows(right, tasks)
    task_columns(right, tasks)
    labels = clusters.labels[order].tolist()
    for place in range(1, count):
        if labels[place] != labels[place - 1]:
            right.axhline(place - 0.5, color="white", linewidth=1.2)
            right.axvline(place - 0.5, color="white", linewidth=1.2)
    # SciPy puts the leaves at 5, 15, 25; the rows of the matrix are at 0, 1, 2.
    tree: Any = dendrogram(
        clusters.tree.numpy(), ax=left, orientation="left", no_labels=True, link_color_func=lambda _: INK
    )
    assert tree["leaves"] == order.tolist()
    left.set_ylim(10 * count, 0)
    left.spines[["top", "right", "left"]].set_visible(False)
    left.tick_params(labelsize=SMALL)
    left.set_xlabel(distance, fontsize=SMALL)
    drawn.colorbar(image, ax=right, label=label, pad=0.02, fraction=0.05)
    return drawn


def drops_map(drops: Tensor, tasks: Sequence[str], unit: str = "drop of the metric") -> Figure:
    """Draws what each task loses where the most important filters of another one are taken away.

    Args:
        drops: ``[T, T]`` from :func:`~tsbn_kernels.analysis.specialization_test`.
        tasks: their names.
        unit: of the drops.
    """
    values = drops.numpy()
    most = max(float(np.abs(values).max()), 1e-12)
    drawn = figure(max(3.4, rows_height(len(tasks), 1.8)), min(11.0, 3.6 + 0.2 * len(tasks)))
    axes = drawn.subplots()
    image = axes.imshow(values, f"{DIVERGING}_r", norm=TwoSlopeNorm(0.0, -most, most), aspect="auto")
    values_inside(axes, image, values, ".2g")
    task_rows(axes, tasks)
    task_columns(axes, tasks)
    axes.set_ylabel("filters taken from")
    axes.set_xlabel("measured on")
    drawn.colorbar(image, ax=axes, label=unit, pad=0.02, fraction=0.05)
    return drawn
