"""One training run: epochs, and checkpoints from which it goes on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.training.methods import TASK_SPECIFIC
from tsbn_kernels import parameter_groups


class ResumeError(Exception):
    """A checkpoint cannot be continued; the message says why."""


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a run depends on, but the machine."""

    source: str
    samples: tuple[int, ...]  # in the splits
    layout: Any  # of the network: a dataclass
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


# Told after each step: the epoch, the share of its steps that are done, the step's loss, and the score after the epoch
# before, None in the first.
OnStep = Callable[[int, float, float, float | None], None]


class Run(ABC):
    """A training run, of which an epoch is the smallest part that is kept.

    A subclass has a step, what ends an epoch, and what more there is to keep. It calls :meth:`start` when it is whole.

    Args:
        settings: what to train. The seed decides the first weights and the order of the samples.
        make: makes the network.
        device: where.
        checkpoint: file that holds the run after each epoch; replaced as a whole, never half written.
        workers: processes that read samples.
        memory_format: of the network's weights.
    """

    def __init__(
        self,
        settings: Settings,
        make: Callable[[], nn.Module],
        device: torch.device,
        checkpoint: Path,
        workers: int,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.network = settings, make().to(device).to(memory_format=memory_format)
        self.optimizer = optimizer_of(self.network, settings.lr, settings.multiplier)
        self.device, self.checkpoint, self.workers = device, checkpoint, workers
        self.order = torch.Generator().manual_seed(settings.seed)

    @property
    @abstractmethod
    def epochs_done(self) -> int:
        """How many epochs are over."""

    @property
    @abstractmethod
    def score(self) -> float | None:
        """What progress tells of the last epoch; None before the first is over."""

    @property
    @abstractmethod
    def train_samples(self) -> Any:
        """The dataset to train on, with a length."""

    @abstractmethod
    def step(self, batch: Any) -> Tensor:
        """Forward, backward and the optimiser's step on a batch; returns the loss."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Evaluates the network, and keeps what it finds beside the mean loss of the epoch's steps."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimiser, random numbers and settings."""

    @abstractmethod
    def take(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""

    def start(self, resume: bool) -> None:
        """Takes the checkpoint up, if there is one and it is to be resumed.

        On a CPU, with the same number of threads, the result is bitwise that of a run that was never interrupted.

        Raises:
            ResumeError: the checkpoint is of other settings, or cannot be read.
        """
        if resume and self.checkpoint.exists():
            self._load()

    def train(self, notify: OnStep) -> None:
        """Trains the epochs that are missing."""
        for epoch in range(self.epochs_done, self.settings.epochs):
            self.end_epoch(self._epoch(partial(_told, notify, epoch, self.score)))
            self.save()

    def batches(self, samples: Any, *, train: bool) -> DataLoader[Any]:
        """Samples in batches: in the run's order to train on, in their own to evaluate."""
        return DataLoader(
            samples,
            self.settings.batch,
            shuffle=train,
            drop_last=train,  # statistics of a last batch of one sample would be none
            num_workers=self.workers,
            generator=self.order if train else torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )

    def _epoch(self, notify: Callable[[float, float], None]) -> float:
        self.network.train()
        batches = self.batches(self.train_samples, train=True)
        total = 0.0
        for index, batch in enumerate(batches, 1):
            loss = self.step(batch).item()
            total += loss
            notify(index / len(batches), loss)
        return total / len(batches)

    def save(self) -> None:
        """Writes the checkpoint."""
        state = {
            "settings": asdict(self.settings),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            **self.state(),
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
        ours = asdict(self.settings)
        if other := {key: value for key, value in state["settings"].items() if value != ours.get(key)}:
            was = ", ".join(f"{key} {value} (now {ours.get(key)})" for key, value in other.items())
            raise ResumeError(
                f"{self.checkpoint} was trained with {was}; resume with the same settings, or choose another --output"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        self.take(state)


def optimizer_of(network: nn.Module, lr: float, multiplier: float) -> torch.optim.Optimizer:
    """Adam, in one pass over all parameters; gates, and weights in their place, at ``multiplier * lr``."""
    groups = parameter_groups(network, lr, gate_lr_multiplier=multiplier, layer_norm_lr_multiplier=multiplier)
    return torch.optim.Adam(groups, fused=True)


def on_device(samples: Tensor, device: torch.device) -> Tensor:
    """A batch where a network takes it; images in channels_last."""
    memory_format = torch.channels_last if samples.dim() == 4 else torch.preserve_format
    return samples.to(device, memory_format=memory_format, non_blocking=True)


def _told(notify: OnStep, epoch: int, score: float | None, share: float, loss: float) -> None:
    notify(epoch, share, loss, score)
