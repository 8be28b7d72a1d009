"""All runs of the training command, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.network.data import Splits, celeba
from benchmarks.network.model import CELEBA, DIGITS
from experiments.forty_tasks import transformer
from experiments.forty_tasks.digits import digits40
from experiments.forty_tasks.methods import AnyLayout
from experiments.forty_tasks.train_run import Fit, TrainRun
from experiments.forty_tasks.words import words24
from experiments.training.methods import HARD_SHARING, PAPER_MULTIPLIER, SINGLE_TASK
from experiments.training.run import OnStep, Settings
from experiments.training.sizes import Size
from experiments.training.step_cost import StepCost
from experiments.training.study import checkpoint_of, delta_m, grouped, multiplied, write_report

CLOSED, OPEN = 0.05, 0.95  # gates beyond these are nearly binary


@dataclass(frozen=True)
class Dataset:
    """Where a dataset comes from, and what it is trained with unless told otherwise.

    Attributes:
        load: reads it; from a folder, if it needs one.
        layouts: of each network that takes its samples, by the network's name, the usual one first.
        epochs, batch, lr: of a run.
    """

    load: Callable[[Path], Splits]
    needs_folder: bool
    layouts: Mapping[str, AnyLayout]
    epochs: int
    batch: int
    lr: float


DATASETS = {
    "digits40": Dataset(
        lambda _: digits40(), False, {"cnn": DIGITS, "transformer": transformer.DIGITS}, epochs=8, batch=32, lr=1e-3
    ),
    "celeba": Dataset(celeba, True, {"cnn": CELEBA}, epochs=15, batch=256, lr=3e-4),  # as in the paper
    "words24": Dataset(lambda _: words24(), False, {"transformer": transformer.WORDS}, epochs=6, batch=32, lr=3e-3),
}


def all_settings(
    splits: Splits,
    layout: AnyLayout,
    methods: Sequence[str],
    multipliers: Mapping[str, Sequence[float]],
    seeds: int,
    epochs: int,
    batch: int,
    lr: float,
) -> list[Settings]:
    """Every run: all methods of the first seed, then of the next one.

    Args:
        splits: the data.
        layout: of all networks.
        methods: their names.
        multipliers: of each of the :data:`TASK_SPECIFIC` ones.
        seeds: how many, from 0 on.
        epochs, batch, lr: of every run.
    """
    samples = len(splits.train), len(splits.validation), len(splits.test)
    return [
        Settings(splits.source, samples, layout, method, multiplier, seed, epochs, batch, lr)
        for method, multiplier, seed in multiplied(methods, multipliers, seeds)
    ]


def train_all(
    todo: Sequence[Settings],
    splits: Splits,
    device: torch.device,
    folder: Path,
    resume: bool,
    workers: int,
    notify: Callable[[int], OnStep],
) -> list[Fit]:
    """Trains what is not trained yet; the checkpoint of each run lies in ``folder``.

    Raises:
        ResumeError: a checkpoint is of other settings.
    """
    fits = []
    for index, settings in enumerate(todo):
        run = TrainRun(settings, splits, device, checkpoint_of(settings, folder), resume=resume, workers=workers)
        fits.append(run.run(notify(index)))
    return fits


@dataclass(frozen=True)
class GateStatistics:
    """Where the gates of all tasks, layers and seeds are."""

    mean: float
    std: float
    quartiles: tuple[float, float, float]
    nearly_binary: float  # share below CLOSED or above OPEN


@dataclass(frozen=True)
class MethodScores:
    """The seeds of one method and multiplier, test samples."""

    name: str
    method: str
    multiplier: float
    f1: tuple[float, ...]  # mean over the tasks, of each seed
    task_f1: tuple[float, ...]  # mean over the seeds, of each task
    delta_m: float | None  # against single-task networks; None without them
    best_epochs: tuple[int, ...]  # counted from 1
    gates: GateStatistics | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.f1)

    @property
    def spread(self) -> float:
        """How far the best seed is from the worst."""
        return max(self.f1) - min(self.f1)


def summaries(fits: Sequence[Fit]) -> dict[str, MethodScores]:
    """One for each method and multiplier, by name."""
    groups = grouped(fits)
    means = {
        name: tuple(statistics.fmean(scores) for scores in zip(*(fit.test_f1 for fit in group), strict=True))
        for name, group in groups.items()
    }
    single = means.get(SINGLE_TASK)
    return {
        name: MethodScores(
            name,
            group[0].settings.method,
            group[0].settings.multiplier,
            tuple(fit.mean_f1 for fit in group),
            means[name],
            None if single is None else delta_m(means[name], single),
            tuple(fit.best + 1 for fit in group),
            _gate_statistics(group),
        )
        for name, group in groups.items()
    }


def _gate_statistics(group: Sequence[Fit]) -> GateStatistics | None:
    found = [fit.gates.flatten() for fit in group if fit.gates is not None]
    if not found or group[0].settings.method not in PAPER_MULTIPLIER:
        return None
    values = torch.cat(found).double()
    lower, median, upper = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    binary = ((values < CLOSED) | (values > OPEN)).double().mean()
    return GateStatistics(float(values.mean()), float(values.std()), (lower, median, upper), float(binary))


@dataclass(frozen=True)
class Verdict:
    """The method with gates, at the paper's multiplier, against hard sharing: mean F1 on the test samples."""

    name: str  # of the former
    difference: float
    spread: float  # the larger one of the two

    @property
    def holds(self) -> bool:
        """Whether the difference is larger than what the seeds differ by."""
        return self.difference > self.spread


def verdict(found: Mapping[str, MethodScores]) -> Verdict | None:
    """None where one of the two was not trained, or with one seed, which has no spread."""
    names = (f"{method} x{multiplier:g}" for method, multiplier in PAPER_MULTIPLIER.items())
    ours, theirs = next((found[name] for name in names if name in found), None), found.get(HARD_SHARING)
    if ours is None or theirs is None or len(ours.f1) < 2:
        return None
    return Verdict(ours.name, ours.mean - theirs.mean, max(ours.spread, theirs.spread))


def write_json(
    path: Path,
    splits: Splits,
    fits: Sequence[Fit],
    sizes: Mapping[str, Size],
    measured: Mapping[str, StepCost],
    device: torch.device,
) -> None:
    """Everything that was found, but the gates themselves; creates the folder."""
    runs = [
        asdict(fit.settings)
        | {
            "history": [asdict(epoch) for epoch in fit.history],
            "best_epoch": fit.best + 1,
            "test_f1": fit.test_f1,
            "mean_test_f1": fit.mean_f1,
        }
        for fit in fits
    ]
    report = {
        "source": splits.source,
        "tasks": splits.tasks,
        "summaries": [asdict(summary) | {"mean_f1": summary.mean} for summary in summaries(fits).values()],
        "sizes": {name: asdict(size) for name, size in sizes.items()},
        "costs": {name: asdict(cost) for name, cost in measured.items()},
        "runs": runs,
    }
    write_report(path, report, device)
