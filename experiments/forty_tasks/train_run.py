"""One training run: epochs, the best of them, and checkpoints from which it goes on as if nothing had happened."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.network.data import Splits
from benchmarks.network.model import train_step
from experiments.forty_tasks.methods import TASK_SPECIFIC, AnyLayout, gates, make_network
from experiments.forty_tasks.scores import Confusion
from tsbn_kernels import parameter_groups


class ResumeError(Exception):
    """A checkpoint cannot be continued; the message says why."""


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a run depends on, but the machine."""

    source: str
    samples: tuple[int, int, int]  # in the splits
    layout: AnyLayout
    method: str
    multiplier: float  # of the learning rate of the gates, or of weights without; 1 for methods that have neither
    seed: int
    epochs: int
    batch: int
    lr: float

    @property
    def name(self) -> str:
        """``ts_sigma_bn x100``."""
        return f"{self.method} x{self.multiplier:g}" if self.method in TASK_SPECIFIC else self.method


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


# Told after each step: the epoch, the share of its steps that are done, the step's loss, and the mean F1 on the
# validation samples after the epoch before, None in the first.
OnStep = Callable[[int, float, float, float | None], None]


def optimizer_of(network: nn.Module, lr: float, multiplier: float) -> torch.optim.Optimizer:
    """Adam, in one pass over all parameters; gates, and weights in their place, at ``multiplier * lr``."""
    groups = parameter_groups(network, lr, gate_lr_multiplier=multiplier, layer_norm_lr_multiplier=multiplier)
    return torch.optim.Adam(groups, fused=True)


def on_device(samples: Tensor, device: torch.device) -> Tensor:
    """A batch where a network takes it; images in channels_last."""
    memory_format = torch.channels_last if samples.dim() == 4 else torch.preserve_format
    return samples.to(device, memory_format=memory_format, non_blocking=True)


class TrainRun:
    """A training run, of which an epoch is the smallest part that is kept.

    Args:
        settings: what to train. The seed decides the first weights and the order of the samples.
        splits: the data.
        device: where.
        checkpoint: file that holds the run after each epoch; replaced as a whole, never half written.
        resume: go on from the checkpoint, if there is one. On a CPU, with the same number of threads, the result is
            bitwise that of a run that was never interrupted.
        workers: processes that read samples.

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
    ) -> None:
        self.splits, self.device, self.checkpoint, self.workers = splits, device, checkpoint, workers
        self.fit = Fit(settings)
        torch.manual_seed(settings.seed)
        self.network = make_network(settings.method, len(splits.tasks), settings.layout)
        self.network = self.network.to(device).to(memory_format=torch.channels_last)
        self.optimizer = optimizer_of(self.network, settings.lr, settings.multiplier)
        self.order = torch.Generator().manual_seed(settings.seed)
        self.best_weights: dict[str, Tensor] = {}  # and statistics, of the best epoch
        if resume and checkpoint.exists():
            self._load()

    def run(self, notify: OnStep = lambda *_: None) -> Fit:
        """Trains the epochs that are missing."""
        for epoch in range(len(self.fit.history), self.fit.settings.epochs):
            f1 = self.fit.history[-1].mean_f1 if self.fit.history else None
            loss = self._train(partial(_told, notify, epoch, f1))
            self._keep(Epoch(loss, self._f1(self.splits.validation)))
            self._save()
        if not self.fit.test_f1:
            last = copy.deepcopy(self.network.state_dict())
            self.network.load_state_dict(self.best_weights)
            self.fit.test_f1 = self._f1(self.splits.test)
            self.network.load_state_dict(last)
            self._save()
        return self.fit

    def _keep(self, epoch: Epoch) -> None:
        fit = self.fit
        if fit.best < 0 or epoch.mean_f1 > fit.history[fit.best].mean_f1:
            fit.best, fit.gates = len(fit.history), gates(self.network)
            self.best_weights = copy.deepcopy(self.network.state_dict())
        fit.history.append(epoch)

    def _batches(self, samples: Any, *, train: bool) -> DataLoader[Any]:
        return DataLoader(
            samples,
            self.fit.settings.batch,
            shuffle=train,
            drop_last=train,  # statistics of a last batch of one sample would be none
            num_workers=self.workers,
            generator=self.order if train else torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )

    def _train(self, notify: Callable[[float, float], None]) -> float:
        self.network.train()
        batches = self._batches(self.splits.train, train=True)
        total = 0.0
        for index, batch in enumerate(batches, 1):
            samples, labels = (on_device(part, self.device) for part in batch)
            loss = train_step(self.network, self.optimizer, samples, labels).item()
            total += loss
            notify(index / len(batches), loss)
        return total / len(batches)

    @torch.inference_mode()
    def _f1(self, samples: Any) -> tuple[float, ...]:
        self.network.eval()
        confusion = Confusion(len(self.splits.tasks))
        for batch, labels in self._batches(samples, train=False):
            confusion.add(self.network(on_device(batch, self.device)).cpu(), labels)
        return tuple(confusion.f1())

    def _save(self) -> None:
        state = {
            "settings": asdict(self.fit.settings),
            "tasks": self.splits.tasks,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self.fit.history],
            "best": self.fit.best,
            "best_weights": self.best_weights,
            "test_f1": self.fit.test_f1,
            "gates": self.fit.gates,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError):  # PyTorch's own messages speak of other things
            raise ResumeError(f"{self.checkpoint} is no whole checkpoint; remove it to train that run again") from None
        ours = asdict(self.fit.settings)
        if other := {key: value for key, value in state["settings"].items() if value != ours.get(key)}:
            was = ", ".join(f"{key} {value} (now {ours.get(key)})" for key, value in other.items())
            raise ResumeError(
                f"{self.checkpoint} was trained with {was}; resume with the same settings, or choose another --output"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        self.fit.history = [Epoch(epoch["loss"], tuple(epoch["validation_f1"])) for epoch in state["history"]]
        self.fit.best, self.fit.gates = state["best"], state["gates"]
        self.fit.test_f1, self.best_weights = tuple(state["test_f1"]), state["best_weights"]


def _told(notify: OnStep, epoch: int, f1: float | None, share: float, loss: float) -> None:
    notify(epoch, share, loss, f1)
