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
from experiments.training.pictures import colors_of, draw_curves, of_seeds
from experiments.training.study import grouped

_CLASSES = colormaps["tab20"]
_COLUMN = 1.9  # inches of a map's width


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
    figure.suptitle(f"{fits[0].settings.source}, validation pictures: {of_seeds(groups)}")
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
    """Pictures, and a row for each of their tasks: the truth, and what each method says.

    Args:
        path: of the PNG.
        samples: of the validation pictures.
        predictions: of each method and task, ``[N, outputs, H, W]`` of these samples.
    """
    tasks = list(samples[0][1])
    columns = ["picture", "truth", *predictions]
    height, width = samples[0][0].shape[1:]
    widths = [1.5, *[1.0] * (len(columns) - 1)]
    rows = len(samples) * len(tasks)
    size = _COLUMN * sum(widths) + 0.2, rows * (_COLUMN * height / width + 0.08)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows, len(columns), width_ratios=widths)
    for index, (image, truth) in enumerate(samples):
        first = index * len(tasks)
        shown = [(figure.add_subplot(grid[first : first + len(tasks), 0]), image.clamp(0, 1).movedim(0, -1).numpy())]
        farthest = float(truth[DEPTH].max()) or 1.0
        for row, task in enumerate(tasks, first):
            maps = [truth[task], *(method[task][index] for method in predictions.values())]
            cells = [figure.add_subplot(grid[row, column]) for column in range(1, len(columns))]
            cells[0].text(-0.06, 0.5, task, rotation=90, ha="right", va="center", transform=cells[0].transAxes)
            shown += [(axes, _shown(task, x, farthest)) for axes, x in zip(cells, maps, strict=True)]
            if row == 0:
                for (axes, _), name in zip(shown, columns, strict=True):
                    axes.set_title(name, fontsize=10)
        for axes, colors in shown:
            axes.imshow(colors, interpolation="nearest")
            axes.set_axis_off()
    save(path, figure)
