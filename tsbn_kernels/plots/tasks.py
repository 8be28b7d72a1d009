"""Tasks as points: their representations by t-SNE, and a graph of who is alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from tsbn_kernels.analysis import Source, cluster_tasks, importance, similarity
from tsbn_kernels.plots.style import ACCENT, COLORS, FEW, INK, SEQUENTIAL, SMALL, figure

_POINTS = 4000  # that t-SNE places in a minute


def task_points(representations: Tensor, tasks: Sequence[str], seed: int = 0) -> Figure:
    """Draws the representations of all tasks in a plane, by t-SNE; it needs scikit-learn.

    Tasks of which each has its own cloud see the samples differently; where clouds lie on each other, they see the
    same.

    Args:
        representations: ``[T, N, D]`` from :func:`~tsbn_kernels.analysis.task_representations`; of many samples every
            n-th is drawn.
        tasks: their names.
        seed: of t-SNE.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer than three points, or another number of names.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise ImportError("task_points needs scikit-learn: python -m pip install 'tsbn-kernels[plots]'") from error
    if representations.dim() != 3 or len(representations) != len(tasks):
        raise ValueError(
            f"expected representations [T, N, D] of the {len(tasks)} tasks, got shape {list(representations.shape)}"
        )
    count = representations.shape[0] * representations.shape[1]
    step = -(-count // _POINTS)
    chosen = representations[:, ::step]
    points = chosen.flatten(0, 1).numpy()
    if len(points) < 3:
        raise ValueError(f"t-SNE needs three points or more, got {len(points)}")
    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(points)
    clouds = placed.reshape(len(tasks), -1, 2)
    few = len(tasks) <= FEW
    drawn = figure(6.5, 7.5 if few else 10.5)
    axes = drawn.subplots()
    for index, (task, cloud) in enumerate(zip(tasks, clouds, strict=True)):
        color = COLORS[index] if few else colormaps["turbo"](0.05 + 0.9 * index / (len(tasks) - 1))
        marker = "os^DvP*X"[index % 8]
        label = task if few else f"{index + 1}  {task}"
        axes.scatter(cloud[:, 0], cloud[:, 1], s=12, color=color, marker=marker, linewidths=0, alpha=0.7, label=label)
        if not few:  # more colours than anyone tells apart
            x, y = np.median(cloud, 0)
            axes.text(x, y, str(index + 1), ha="center", va="center", color=INK, bbox=_BOX)
    if few:
        drawn.legend(loc="outside upper left", ncols=4, frameon=False, markerscale=2)
    else:
        drawn.legend(loc="outside right center", ncols=-(-len(tasks) // 25), frameon=False, fontsize=SMALL)
    axes.set_xticks([])
    axes.set_yticks([])
    return drawn


_BOX = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


def task_graph(source: Source, edges: int | None = None) -> Figure:
    """Draws the tasks on a circle, neighbours where they are alike, and lines between the pairs most alike.

    Args:
        source: as :func:`~tsbn_kernels.analysis.importance` takes it, of three tasks or more. It needs SciPy.
        edges: how many lines; by default twice as many as tasks.

    Raises:
        ValueError: there are fewer tasks.
    """
    found = importance(source)
    count = len(found.tasks)
    if count < 3:
        raise ValueError(f"a graph needs three tasks or more, got {count}")
    cosine = similarity(found)
    order = cluster_tasks(found).order
    angle = torch.empty(count)
    angle[order] = 2 * torch.pi * torch.arange(count) / count
    place = torch.stack([angle.cos(), angle.sin()], 1).numpy()
    one, other = torch.triu_indices(count, count, 1)
    values = cosine[one, other]
    strongest = values.argsort(descending=True, stable=True)[: 2 * count if edges is None else edges]
    lines = [(place[one[pair]], place[other[pair]]) for pair in strongest.flip(0).tolist()]
    weight = values[strongest.flip(0)].numpy()
    low, high = weight.min(), weight.max()
    part = (weight - low) / max(high - low, 1e-12)
    drawn = figure(6.6, 7.4)
    axes = drawn.subplots()
    drawing = LineCollection(lines, cmap=f"{SEQUENTIAL}_r", array=weight, linewidths=0.6 + 2.6 * part, zorder=1)
    axes.add_collection(drawing)
    axes.scatter(place[:, 0], place[:, 1], s=40, color=ACCENT, zorder=2)
    for task, (x, y), turn in zip(found.tasks, place, np.degrees(angle.numpy()), strict=True):
        leftwards = 90 < turn % 360 < 270
        axes.text(
            1.06 * x,
            1.06 * y,
            task,
            fontsize=SMALL + (count <= FEW),
            rotation=turn - 180 if leftwards else turn,
            rotation_mode="anchor",
            ha="right" if leftwards else "left",
            va="center",
        )
    # Inches of the longest name against those of the radius: the picture has 3 from its centre to its edge.
    reach = 1.1 / (1 - min(0.068 * max(map(len, found.tasks)) / 3, 0.6))
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.axis("off")
    drawn.colorbar(drawing, ax=axes, label=f"cosine of the {len(lines)} pairs most alike", fraction=0.035, pad=0.02)
    return drawn
