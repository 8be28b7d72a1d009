"""All runs of dense tasks, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.dense_tasks.data import DenseData, cityscapes, nyuv2
from experiments.dense_tasks.tasks import Task
from experiments.dense_tasks.train_run import DenseFit, DenseRun, DenseSettings
from experiments.training.methods import SINGLE_TASK
from experiments.training.progress import Notify
from experiments.training.sizes import Size
from experiments.training.study import checkpoint_of, delta_m, grouped, write_report

ROOM_SIZES = {"small": (96, 128), "large": (288, 384)}


@dataclass(frozen=True)
class Dataset:
    """Where a dataset comes from, and what it is trained with unless told otherwise.

    Attributes:
        read: reads it from its folder; None: it is drawn.
        width: channels of the network's first layer.
        epochs, halve, batch, lr: of a run; the learning rate is halved each ``halve`` epochs.
        crops: whether it is trained on scaled crops.
    """

    read: Callable[[Path], DenseData] | None
    width: int
    epochs: int
    halve: int
    batch: int
    lr: float
    crops: bool


DATASETS = {
    "rooms3": Dataset(None, width=8, epochs=12, halve=8, batch=8, lr=1e-3, crops=False),
    "nyuv2": Dataset(nyuv2, width=64, epochs=200, halve=100, batch=4, lr=1e-4, crops=True),
    "cityscapes": Dataset(cityscapes, width=64, epochs=200, halve=100, batch=16, lr=1e-4, crops=False),
}


def train_all(
    todo: Sequence[DenseSettings],
    data: DenseData,
    device: torch.device,
    folder: Path,
    resume: bool,
    workers: int,
    compiled: bool,
    shown: Tensor,
    notify: Notify,
) -> tuple[list[DenseFit], dict[str, dict[str, Tensor]]]:
    """Trains what is not trained yet; the checkpoint of each run lies in ``folder``.

    Returns:
        The runs, and what the first seed of each method predicts of the pictures ``shown``, ``[N, 3, H, W]``.

    Raises:
        ResumeError: a checkpoint is of other settings.
    """
    fits: list[DenseFit] = []
    predictions: dict[str, dict[str, Tensor]] = {}
    for index, settings in enumerate(todo):
        path = checkpoint_of(settings, folder)
        run = DenseRun(settings, data, device, path, resume=resume, workers=workers, compiled=compiled)
        fits.append(run.run(notify(index)))
        if settings.name not in predictions:
            predictions[settings.name] = run.predictions(shown)
    return fits, predictions


@dataclass(frozen=True)
class MethodScores:
    """The seeds of one method and multiplier.

    Attributes:
        scores: the metrics of each task: the means of the seeds.
        delta_m: of each seed, against the mean of the single-task networks; None without these.
    """

    name: str
    method: str
    scores: dict[str, list[float]]
    delta_m: tuple[float, ...] | None


def change(tasks: Mapping[str, Task], scores: Mapping[str, list[float]], single: Mapping[str, list[float]]) -> float:
    """delta_m%: the mean over the tasks of the mean change of their metrics against single-task networks."""
    changes = [
        delta_m(scores[name], single[name], [metric.less_is_better for metric in task.metrics])
        for name, task in tasks.items()
    ]
    return statistics.fmean(changes)


def summaries(tasks: Mapping[str, Task], fits: Sequence[DenseFit]) -> dict[str, MethodScores]:
    """One for each method and multiplier, by name."""
    finals = {name: [fit.final() for fit in group] for name, group in grouped(fits).items()}
    means = {
        name: {
            task: [statistics.fmean(values) for values in zip(*(final[task] for final in group), strict=True)]
            for task in tasks
        }
        for name, group in finals.items()
    }
    single = means.get(SINGLE_TASK)
    return {
        name: MethodScores(
            name,
            group[0].settings.method,
            means[name],
            None if single is None else tuple(change(tasks, final, single) for final in finals[name]),
        )
        for name, group in grouped(fits).items()
    }


def write_json(
    path: Path, data: DenseData, fits: Sequence[DenseFit], sizes: Mapping[str, Size], device: torch.device
) -> None:
    """Everything that was found; creates the folder."""
    report = {
        "source": data.source,
        "tasks": {name: [metric.name for metric in task.metrics] for name, task in data.tasks.items()},
        "summaries": [asdict(summary) for summary in summaries(data.tasks, fits).values()],
        "sizes": {name: asdict(size) for name, size in sizes.items()},
        "runs": [
            asdict(fit.settings) | {"history": [asdict(epoch) for epoch in fit.history], "final": fit.final()}
            for fit in fits
        ],
    }
    write_report(path, report, device)
