"""Runs beside the same runs trained otherwise: F1 and delta_m% of each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.forty_tasks.place import Notify, Place
from experiments.forty_tasks.train_run import Recipe
from experiments.training.methods import SINGLE_TASK
from experiments.training.run import Settings
from experiments.training.study import delta_m

SCALES = (0.5, 1.5, 2.0)  # of one task's loss; the paper's


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        name: of its method.
        seed: of the run.
        otherwise: what was done otherwise; empty where nothing was.
        f1: of each task on the test samples.
        delta_m: in percent, against the mean of the single-task networks.
    """

    name: str
    seed: int
    otherwise: str
    f1: tuple[float, ...]
    delta_m: float

    @property
    def mean_f1(self) -> float:
        """The mean over the tasks."""
        return statistics.fmean(self.f1)


def compare(todo: Sequence[Settings], place: Place, others: Sequence[Place], notify: Notify) -> list[Outcome]:
    """Trains every run, and those of networks that tasks share in other places too.

    Args:
        todo: the runs, seed by seed. Single-task networks among them are what the others are compared with.
        place: where nothing is done otherwise.
        others: the other places.
        notify: asked for each run what its steps tell.
    """
    single = [(settings, place) for settings in todo if settings.method == SINGLE_TASK]
    shared = [settings for settings in todo if settings.method != SINGLE_TASK]
    jobs = single + [(settings, place) for settings in shared]
    jobs += [(settings, other) for settings in shared for other in others]
    scores = [
        where.run(settings, notify(number, len(jobs))).fit.test_f1 for number, (settings, where) in enumerate(jobs)
    ]
    baseline = [statistics.fmean(of_task) for of_task in zip(*scores[: len(single)], strict=True)]
    return [
        Outcome(settings.name, settings.seed, where.otherwise, f1, delta_m(f1, baseline))
        for (settings, where), f1 in zip(jobs[len(single) :], scores[len(single) :], strict=True)
    ]


@dataclass(frozen=True)
class ScaledLoss:
    """A training step in which the loss of one task is multiplied.

    Attributes:
        task: the index of the task.
        scale: what its loss is multiplied by.
    """

    task: int
    scale: float

    def __call__(self, network: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor, labels: Tensor) -> Tensor:
        """Runs forward, backward and the optimiser's step; returns the loss, summed over the tasks."""
        optimizer.zero_grad(set_to_none=True)
        losses = functional.binary_cross_entropy_with_logits(network(samples), labels.T, reduction="none").mean(1)
        scales = torch.ones_like(losses)
        scales[self.task] = self.scale
        loss = losses @ scales
        loss.backward()
        optimizer.step()
        return loss.detach()


def in_turn(tasks: Sequence[str], turns: int | None) -> list[str]:
    """Chooses that many tasks, evenly over their list; all of them if None."""
    count = len(tasks) if turns is None else min(turns, len(tasks))
    return [tasks[index * len(tasks) // count] for index in range(count)]


def with_scaled_losses(place: Place, tasks: Sequence[str]) -> list[Place]:
    """Gives a place for each of these tasks and each of :data:`SCALES`."""
    return [
        place.varied(
            f"loss of {task} times {scale:g}", recipe=Recipe(step=ScaledLoss(place.splits.tasks.index(task), scale))
        )
        for task in tasks
        for scale in SCALES
    ]
