"""One training run of forty tasks: F1 after each epoch, and of the best one on the test samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.network.data import Splits
from benchmarks.network.model import train_step
from experiments.forty_tasks.methods import gates, make_network
from experiments.forty_tasks.scores import Confusion
from experiments.training.run import OnStep, Run, Settings, on_device

MakeNetwork = Callable[[str, int, Any], nn.Module]  # (method, T, layout) -> network
# Forward, backward and the optimiser's step of samples and labels; gives the loss.
TrainStep = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a run may do in its own way.

    Attributes:
        make: makes the network.
        step: is done with each batch.
        memory_format: of the network's weights.
    """

    make: MakeNetwork = make_network
    step: TrainStep = train_step
    memory_format: torch.memory_format = torch.channels_last


USUAL = Recipe()


@dataclass(frozen=True)
class Epoch:
    """Mean loss of the steps, and F1 of each task on the validation samples."""

    loss: float
    validation_f1: tuple[float, ...]

    @property
    def mean_f1(self) -> float:
        return sum(self.validation_f1) / len(self.validation_f1)


@dataclass
class Fit:
    """A run and what came of it.

    Attributes:
        history: an entry for each epoch.
        best: index of the epoch with the highest mean F1 on the validation samples, the first of equals.
        test_f1: F1 of each task with the weights of that epoch; no others see the test samples. Empty until the last
            epoch is over.
        gates: ``[T, F]`` after that epoch, None for a method without.
    """

    settings: Settings
    history: list[Epoch] = field(default_factory=list)
    best: int = -1
    test_f1: tuple[float, ...] = ()
    gates: Tensor | None = None

    @property
    def mean_f1(self) -> float:
        """Mean F1 over the tasks, on the test samples."""
        return sum(self.test_f1) / len(self.test_f1)


class TrainRun(Run):
    """A run of forty tasks: the weights of the best epoch by validation are those that are tested.

    Args:
        splits: the data.
        settings, device, checkpoint, workers: as in :class:`~experiments.training.run.Run`.
        resume: go on from the checkpoint, if there is one.
        recipe: how the network is made, and what is done with each batch.

    Raises:
        ResumeError: the checkpoint is of other settings, or cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        splits: Splits,
        device: torch.device,
        checkpoint: Path,
        *,
        resume: bool = False,
        workers: int = 0,
        recipe: Recipe = USUAL,
    ) -> None:
        self.splits, self.fit, self.recipe = splits, Fit(settings), recipe
        make = partial(recipe.make, settings.method, len(splits.tasks), settings.layout)
        super().__init__(settings, make, device, checkpoint, workers, recipe.memory_format)
        self.best_weights: dict[str, Tensor] = {}  # and statistics, of the best epoch
        self.start(resume)

    @property
    def epochs_done(self) -> int:
        return len(self.fit.history)

    @property
    def score(self) -> float | None:
        return self.fit.history[-1].mean_f1 if self.fit.history else None

    @property
    def train_samples(self) -> Any:
        return self.splits.train

    def run(self, notify: OnStep = lambda *_: None) -> Fit:
        """Trains the epochs that are missing, and tests the best one."""
        self.train(notify)
        if not self.fit.test_f1:
            last = copy.deepcopy(self.network.state_dict())
            self.network.load_state_dict(self.best_weights)
            self.fit.test_f1 = self._f1(self.splits.test)
            self.network.load_state_dict(last)
            self.save()
        return self.fit

    def step(self, batch: Any) -> Tensor:
        samples, labels = (on_device(part, self.device) for part in batch)
        return self.recipe.step(self.network, self.optimizer, samples, labels)

    def end_epoch(self, loss: float) -> None:
        epoch = Epoch(loss, self._f1(self.splits.validation))
        fit = self.fit
        if fit.best < 0 or epoch.mean_f1 > fit.history[fit.best].mean_f1:
            fit.best, fit.gates = len(fit.history), gates(self.network)
            self.best_weights = copy.deepcopy(self.network.state_dict())
        fit.history.append(epoch)

    @torch.inference_mode()
    def _f1(self, samples: Any) -> tuple[float, ...]:
        self.network.eval()
        confusion = Confusion(len(self.splits.tasks))
        for batch, labels in self.batches(samples, train=False):
            confusion.add(self.network(on_device(batch, self.device)).cpu(), labels)
        return tuple(confusion.f1())

    def state(self) -> dict[str, Any]:
        return {
            "tasks": self.splits.tasks,
            "history": [asdict(epoch) for epoch in self.fit.history],
            "best": self.fit.best,
            "best_weights": self.best_weights,
            "test_f1": self.fit.test_f1,
            "gates": self.fit.gates,
        }

    def take(self, state: dict[str, Any]) -> None:
        self.fit.history = [Epoch(epoch["loss"], tuple(epoch["validation_f1"])) for epoch in state["history"]]
        self.fit.best, self.fit.gates = state["best"], state["gates"]
        self.fit.test_f1, self.best_weights = tuple(state["test_f1"]), state["best_weights"]
