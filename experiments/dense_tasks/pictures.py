"""Pictures of the training command of dense tasks: learning curves, and maps of truth and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from benchmarks.report.plot import save
from experiments.dense_tasks.tasks import DEPTH, MISSING, SEGMENTATION, Task
from experiments.dense_tasks.train_run import DenseFit
from experiments.training.pictures import colors_of, draw_curves
from experiments.training.study import grouped

_CLASSES = colormaps["tab20"]


def learning_curves(path: Path, tasks: Mapping[str, Task], fits: Sequence[DenseFit]) -> None:
    """The first metric of each task by epoch, a panel each: the mean of the seeds, and their range."""
    groups = grouped(fits)
    colors = colors_of({name: group[0].settings for name, group in groups.items()})
    figure = Figure(figsize=(4.6 * len(tasks), 4.4), layout="constrained")
    for axes, (task, kind) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        scores = {name: [[e.scores[task][0] for e in fit.history] for fit in group] for name, group in groups.items()}
        draw_curves(axes, scores, colors)
        metric = kind.metrics[0]
        axes.set_title(f"{task}: {metric.name} ({'less' if metric.less_is_better else 'more'} is better)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    seeds = max(len(group) for group in groups.values())
    figure.suptitle(f"{fits[0].settings.source}, validation pictures: mean of {seeds} seeds, and their range")
    save(path, figure)


def _shown(name: str, x: Tensor, farthest: float) -> np.ndarray:
    """A map ``[C, H, W]``, or labels ``[H, W]``, as colors ``[H, W, 3]``; what is missing is black."""
    if name == SEGMENTATION:
        labels = x.numpy() if x.dim() == 2 else x.argmax(0).numpy()
        colors = _CLASSES(labels % _CLASSES.N)[..., :3]
        colors[labels == MISSING] = 0
    elif name == DEPTH:
        colors = colormaps["viridis"](x[0].numpy() / farthest)[..., :3]
        colors[x[0].numpy() == 0] = 0
    else:
        unit = functional.normalize(x, dim=0)
        colors = ((unit.movedim(0, -1) + 1) / 2 * (unit != 0).any(0)[..., None]).numpy()
    return np.asarray(colors)


def maps(
    path: Path, samples: Sequence[tuple[Tensor, dict[str, Tensor]]], predictions: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Pictures, the truth of their tasks, and below it what each method says.

    Args:
        path: of the PNG.
        samples: of the validation pictures.
        predictions: of each method and task, ``[N, outputs, H, W]`` of these samples.
    """
    tasks = list(samples[0][1])
    rows = ["truth", *predictions]
    figure = Figure(figsize=(2.1 * (1 + len(tasks)) * len(samples), 1.65 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), (1 + len(tasks)) * len(samples), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, truth) in enumerate(samples):
        columns = grid[:, index * (1 + len(tasks)) : (index + 1) * (1 + len(tasks))]
        columns[0, 0].imshow(image.clamp(0, 1).movedim(0, -1).numpy())
        columns[0, 0].set_title("image", fontsize=9)
        for row, name in enumerate(rows[1:], 1):
            columns[row, 0].text(0.5, 0.5, name, ha="center", va="center", fontsize=9)
        farthest = float(truth[DEPTH].max()) or 1.0
        for column, task in enumerate(tasks, 1):
            found = [truth[task], *(method[task][index] for method in predictions.values())]
            for row, x in enumerate(found):
                columns[row, column].imshow(_shown(task, x, farthest))
            columns[0, column].set_title(f"{task}, truth", fontsize=9)
    save(path, figure)
