"""What the paper says of gates, conflicts and noise, tried on trained runs: measurements, without a terminal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from experiments.forty_tasks.place import Notify, Place
from experiments.forty_tasks.scores import Confusion
from experiments.forty_tasks.train_run import Fit
from experiments.training.run import Settings
from tsbn_kernels.analysis import (
    Conflicts,
    Importance,
    capacity,
    gradient_conflicts,
    importance,
    similarity,
    specialization_test,
)

FILTERS = 1 / 14.4  # that are taken away: 200 of the 2,880 of the paper's network
STEPS = 10  # batches whose gradients are compared


def trained_gates(todo: Sequence[Settings], place: Place, notify: Notify) -> dict[str, Importance]:
    """The importance of each run, by its seed."""
    runs = (place.run(settings, notify(index, len(todo))) for index, settings in enumerate(todo))
    return {f"seed {run.fit.settings.seed}": importance(run.network, place.splits.tasks) for run in runs}


def pruning(todo: Sequence[Settings], place: Place, notify: Notify) -> list[Tensor]:
    """The drops of F1 on the test images of each run, ``[T, T]``, where each task's most important filters are gone."""
    drops = []
    for index, settings in enumerate(todo):
        run = place.run(settings, notify(index, len(todo)))
        filters = importance(run.network).matrix.shape[1]
        images, labels = all_of(place.splits.test, place.device)

        def f1(network: nn.Module, images: Tensor = images, labels: Tensor = labels) -> list[float]:
            return f1_of(network, images, labels)

        drops.append(specialization_test(run.network, f1, round(FILTERS * filters)))
    return drops


def f1_of(network: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The F1 of each task, in evaluation mode."""
    confusion = Confusion(labels.shape[1])
    network.eval()
    with torch.inference_mode():
        for part, truth in zip(images.split(250), labels.split(250), strict=True):
            confusion.add(network(part).cpu(), truth.cpu())
    return confusion.f1()


def all_of(split: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of a split, and their labels."""
    images, labels = (torch.stack(parts) for parts in zip(*split, strict=True))
    return images.to(device), labels.to(device)


def conflicts(todo: Sequence[Settings], place: Place, notify: Notify) -> Iterator[list[Conflicts]]:
    """The conflicts of each run in the shared convolutions, over some batches of training images."""
    for index, settings in enumerate(todo):
        run = place.run(settings, notify(index, len(todo)))
        network = run.network.train()
        shared = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
        order = torch.Generator().manual_seed(settings.seed)
        batches = DataLoader(place.splits.train, settings.batch, shuffle=True, drop_last=True, generator=order)
        steps = []
        for images, labels in itertools.islice(batches, STEPS):
            logits, truth = network(images.to(place.device)), labels.T.to(place.device)
            losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
            steps.append(gradient_conflicts(network, dict(zip(place.splits.tasks, losses, strict=True)), shared))
        yield steps


class Corrupted(Dataset[Any]):
    """Images whose labels of one task are drawn anew, for a share of them; the same at every run."""

    def __init__(self, images: Any, task: int, share: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.task = images, task
        self.drawn = torch.rand(len(images), generator=generator) < share
        self.labels = (torch.rand(len(images), generator=generator) < 0.5).float()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.images[index]
        if self.drawn[index]:
            labels = labels.clone()
            labels[self.task] = self.labels[index]
        return image, labels


@dataclass(frozen=True)
class Noise:
    """One run with corrupted labels of one task: what became of that task."""

    share: float
    seed: int
    similarity: float  # mean cosine with the other tasks
    independent: float  # capacity
    others: float  # mean independent capacity of the other tasks
    own_f1: float  # on true labels
    f1: float  # of the other tasks, mean


def noise(todo: Sequence[Settings], place: Place, task: str, shares: Sequence[float], notify: Notify) -> list[Noise]:
    """Trains with a growing share of one task's training labels drawn at random."""
    splits, index = place.splits, place.splits.tasks.index(task)
    rest = [other for other in range(len(splits.tasks)) if other != index]
    jobs = list(itertools.product(shares, todo))
    found = []
    for number, (share, settings) in enumerate(jobs):
        where = place
        if share:
            corrupted = replace(splits, train=Corrupted(splits.train, index, share))
            where = place.varied(f"{share:.0%} of {task} at random", splits=corrupted)
        run = where.run(settings, notify(number, len(jobs)))
        gates = importance(run.network, splits.tasks)
        independent = capacity(gates).independent
        found.append(
            Noise(
                share,
                settings.seed,
                similarity=float(similarity(gates)[index][rest].mean()),
                independent=float(independent[index]),
                others=float(independent[rest].mean()),
                own_f1=run.fit.test_f1[index],
                f1=statistics.fmean(run.fit.test_f1[other] for other in rest),
            )
        )
    return found


def multipliers(todo: Sequence[Settings], place: Place, notify: Notify) -> list[Fit]:
    """The runs of all multipliers, with their scores and gates."""
    return [place.run(settings, notify(index, len(todo))).fit for index, settings in enumerate(todo)]
