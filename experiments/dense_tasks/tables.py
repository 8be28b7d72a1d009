"""The table of the training command of dense tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.table import Table

from experiments.dense_tasks.summary import MethodScores
from experiments.dense_tasks.tasks import Task
from experiments.training.methods import SINGLE_TASK
from experiments.training.sizes import Size


def scores_table(tasks: Mapping[str, Task], found: Mapping[str, MethodScores], sizes: Mapping[str, Size]) -> Table:
    """A line for each method and multiplier; sizes as multiples of those of one single-task network, and absolute."""
    table = Table(title="Metrics on the validation pictures after the last epochs, means of the seeds")
    table.add_column("method")
    for task in tasks.values():
        for metric in task.metrics:
            table.add_column(
                f"{metric.name} {'↓' if metric.less_is_better else '↑'}".replace(" ", "\n"), justify="right"
            )
    for name in ("delta_m%", "its range", "parameters", "#P", "#F"):
        table.add_column(name.replace(" ", "\n"), justify="right")
    for name, summary in found.items():
        cells = [f"{value:.4g}" for task in tasks for value in summary.scores[task]]
        deltas = summary.delta_m
        cells += (
            ["-", "-"]
            if deltas is None
            else [f"{statistics.fmean(deltas):+.2f}", f"{min(deltas):+.2f} to {max(deltas):+.2f}"]
        )
        size = sizes[summary.method]
        cells += [f"{size.parameters:,}", *size.relative(sizes[SINGLE_TASK], len(tasks))]
        table.add_row(name, *cells)
    return table
