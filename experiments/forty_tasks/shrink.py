"""How small trained networks may become: filters that no task uses, and those that one task does not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.network.exported import chain_of
from experiments.forty_tasks.place import Notify, Place
from experiments.forty_tasks.studies import all_of, f1_of
from experiments.training.run import OnStep, Settings
from tsbn_kernels import Pruning, export_task, prune
from tsbn_kernels.layers.task_specific import TaskSpecific

AMOUNTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LEAST = 1  # filters that a layer keeps
ALLOWED = 0.005  # of F1 that may be lost
SHUT = -1e4  # its sigmoid is 0


@dataclass(frozen=True)
class Shrunk:
    """What became of one run, by the share of filters that was asked for; F1 is that of the test images.

    Attributes:
        penalty: by which it was trained, and its strength; empty where there was none.
        gates: of the run, ``[T, F]``.
        together: the share of filters that have gone for all tasks, and the mean F1, for each of :data:`AMOUNTS`.
        alone: the same where each task loses the filters that it uses least.
        best: the largest amount by which tasks lose no more than :data:`ALLOWED` on the validation images, in the mean.
        exported_f1: the mean F1 of the networks that are exported with it.
        parameters: how many these have, as a share of the unpruned ones, mean over the tasks.
    """

    penalty: str
    gates: Tensor
    together: list[tuple[float, float]]
    alone: list[tuple[float, float]]
    best: float
    exported_f1: float
    parameters: float


def shrink(todo: Sequence[Settings], places: Sequence[Place], notify: Notify) -> list[Shrunk]:
    """Trains what is not trained yet in each place, and takes filters away."""
    jobs = [(settings, place) for place in places for settings in todo]
    return [_shrunk(settings, place, notify(number, len(jobs))) for number, (settings, place) in enumerate(jobs)]


def _shrunk(settings: Settings, place: Place, told: OnStep) -> Shrunk:
    network = place.run(settings, told).network.eval()
    images, labels = all_of(place.splits.test, place.device)
    together = []
    for amount in AMOUNTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the last layer stays, whose features the heads multiply
            smaller = prune(network, images[:2], amount=amount, min_filters=LEAST)
        left = sum(layer.num_features for layer in _layers(smaller))
        together.append(
            (1 - left / sum(layer.num_features for layer in _layers(network)), _f1(smaller, images, labels))
        )
    closed = [closed_for_each(network, amount) for amount in AMOUNTS]
    validation = [_f1(one, *all_of(place.splits.validation, place.device)) for one in closed]
    best = max(amount for amount, f1 in zip(AMOUNTS, validation, strict=True) if f1 >= validation[0] - ALLOWED)
    pruning = Pruning(images[:2], amount=best, min_filters=LEAST)
    tasks = range(len(place.splits.tasks))
    exported = [export_task(chain_of(network, task), task, prune=pruning) for task in tasks]
    whole = export_task(chain_of(network, 0), 0)
    scores = [
        _f1(_Transposed(one), images, labels[:, task : task + 1]) for task, one in zip(tasks, exported, strict=True)
    ]
    return Shrunk(
        place.otherwise,
        torch.cat([layer.gates.detach().cpu() for layer in _layers(network)], 1),
        together,
        [(amount, _f1(one, images, labels)) for amount, one in zip(AMOUNTS, closed, strict=True)],
        best,
        _mean(scores),
        _mean([_size(one) / _size(whole) for one in exported]),
    )


class _Transposed(nn.Module):
    """Logits ``[1, N]`` of one task, as networks of all tasks give ``[T, N]``."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.chain(images).T
        return logits


def _f1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The mean over the tasks."""
    return _mean(f1_of(network, images, labels))


def closed_for_each(network: nn.Module, amount: float) -> nn.Module:
    """A copy in which every task has lost a share of the filters, those that it uses least.

    For each task it computes what the network does that is exported for it with that amount.
    """
    closed = copy.deepcopy(network)
    layers = _layers(closed)
    free = []  # which gates may close: in each layer not the most open ones of a task
    for layer in layers:
        open_ones = torch.zeros_like(layer.gates, dtype=torch.bool)
        free.append(~open_ones.scatter(1, layer.gates.topk(LEAST, 1).indices, torch.ones_like(open_ones)))
    gates = torch.cat([layer.gates for layer in layers], 1).masked_fill(~torch.cat(free, 1), torch.inf)
    gone = torch.zeros_like(gates, dtype=torch.bool)
    gone.scatter_(1, gates.argsort(dim=1, stable=True)[:, : int(amount * gates.shape[1])], torch.ones_like(gone))
    with torch.no_grad():
        for layer, part in zip(layers, gone.split([layer.num_features for layer in layers], 1), strict=True):
            layer.weight[part] = SHUT
    return closed


def _layers(network: nn.Module) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, TaskSpecific)]


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
