"""One training run of dense tasks: their metrics on the validation pictures after each epoch."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.dense_tasks.data import DenseData, ScaledCrops
from experiments.dense_tasks.methods import make_network
from experiments.dense_tasks.tasks import total_loss
from experiments.training.run import OnStep, Run, Settings, on_device

LAST = 20  # the metrics are means over one of so many epochs, the last: no other samples are there to choose one by
AMP = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DenseSettings(Settings):
    """What a run of dense tasks depends on.

    Attributes:
        halve: epochs after which the learning rate is halved, again and again.
        crops: train on scaled crops, half of them mirrored.
        amp: a key of :data:`AMP`: the type of autocast.
    """

    halve: int
    crops: bool
    amp: str


@dataclass(frozen=True)
class DenseEpoch:
    """Mean loss of the steps, and the metrics of each task on the validation samples."""

    loss: float
    scores: dict[str, list[float]]


@dataclass
class DenseFit:
    """A run and what came of it: an entry of ``history`` for each epoch."""

    settings: DenseSettings
    history: list[DenseEpoch] = field(default_factory=list)

    def final(self) -> dict[str, list[float]]:
        """The metrics of each task: the means over the last epochs, ten of two hundred."""
        last = self.history[-max(1, len(self.history) // LAST) :]
        return {
            task: [statistics.fmean(values) for values in zip(*(epoch.scores[task] for epoch in last), strict=True)]
            for task in self.history[-1].scores
        }


class DenseRun(Run):
    """A training run of dense tasks, whose learning rate is halved in steps.

    Args:
        data: the samples.
        settings, device, checkpoint, workers: as in :class:`~experiments.training.run.Run`; the seed decides crops too.
        resume: go on from the checkpoint, if there is one.
        compiled: compile the network; the result then depends on the compiler too.

    Raises:
        ResumeError: the checkpoint is of other settings, or cannot be read.
    """

    settings: DenseSettings

    def __init__(
        self,
        settings: DenseSettings,
        data: DenseData,
        device: torch.device,
        checkpoint: Path,
        *,
        resume: bool = False,
        workers: int = 0,
        compiled: bool = False,
    ) -> None:
        self.data, self.fit = data, DenseFit(settings)
        make = partial(make_network, settings.method, data.tasks, settings.layout)
        super().__init__(settings, make, device, checkpoint, workers)
        self.halving = torch.optim.lr_scheduler.StepLR(self.optimizer, settings.halve, 0.5)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.predict: Any = torch.compile(self.network) if compiled else self.network
        self.crops = ScaledCrops(data.train, data.disparity) if settings.crops else data.train
        self.start(resume)

    @property
    def epochs_done(self) -> int:
        return len(self.fit.history)

    @property
    def score(self) -> float | None:
        """The first metric of the first task."""
        return next(iter(self.fit.history[-1].scores.values()))[0] if self.fit.history else None

    @property
    def train_samples(self) -> Any:
        return self.crops

    def run(self, notify: OnStep = lambda *_: None) -> DenseFit:
        """Trains the epochs that are missing."""
        self.train(notify)
        return self.fit

    def step(self, batch: Any) -> Tensor:
        images, truths = self._on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            predictions = self.predict(images)
        loss = total_loss(self.data.tasks, predictions, truths)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def end_epoch(self, loss: float) -> None:
        self.halving.step()
        self.fit.history.append(DenseEpoch(loss, self.evaluate()))

    @torch.inference_mode()
    def evaluate(self) -> dict[str, list[float]]:
        """The metrics of each task on the validation samples."""
        self.network.eval()
        scores = {name: task.scores() for name, task in self.data.tasks.items()}
        for batch in self.batches(self.data.validation, train=False):
            images, truths = self._on_device(batch)
            with self._autocast():
                predictions = self.network(images)
            for name, prediction in predictions.items():
                scores[name].add(prediction, truths[name])
        return {name: found.values() for name, found in scores.items()}

    @torch.inference_mode()
    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """What the network says of pictures ``[N, 3, H, W]``, on the CPU."""
        self.network.eval()
        return {name: found.cpu() for name, found in self.network(on_device(images, self.device)).items()}

    def _on_device(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, truths = batch
        moved = {name: truth.to(self.device, non_blocking=True) for name, truth in truths.items()}
        return on_device(images, self.device), moved

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AMP[self.settings.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def state(self) -> dict[str, Any]:
        return {
            "tasks": list(self.data.tasks),
            "history": [asdict(epoch) for epoch in self.fit.history],
            "halving": self.halving.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def take(self, state: dict[str, Any]) -> None:
        self.fit.history = [DenseEpoch(**epoch) for epoch in state["history"]]
        self.halving.load_state_dict(state["halving"])
        self.scaler.load_state_dict(state["scaler"])
