"""Where the studies train: runs that are there already are not trained again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.network.data import Splits
from experiments.forty_tasks.train_run import USUAL, Recipe, TrainRun
from experiments.training.run import OnStep, Settings
from experiments.training.study import checkpoint_of

Notify = Callable[[int, int], OnStep]  # (number of a run, from 0 on; number of all runs) -> what its steps tell


@dataclass(frozen=True)
class Place:
    """Where runs are trained and kept, and how.

    Attributes:
        splits: the data.
        device: where they are trained.
        folder: of their checkpoints.
        workers: processes that read samples.
        recipe: how networks are made and trained.
        otherwise: what is not as the settings of a run say; empty where all is.
    """

    splits: Splits
    device: torch.device
    folder: Path
    workers: int = 0
    recipe: Recipe = USUAL
    otherwise: str = ""

    def varied(self, otherwise: str, **changes: Any) -> Place:
        """Gives a place beside this one, where runs are trained otherwise."""
        return replace(self, folder=self.folder / otherwise.replace(" ", "-"), otherwise=otherwise, **changes)

    def run(self, settings: Settings, notify: OnStep) -> TrainRun:
        """Gives a trained run, whose network has the weights of its best epoch."""
        if self.otherwise:
            settings = replace(settings, source=f"{settings.source}, {self.otherwise}")
        path = checkpoint_of(settings, self.folder)
        run = TrainRun(settings, self.splits, self.device, path, resume=True, workers=self.workers, recipe=self.recipe)
        run.run(notify)
        run.network.load_state_dict(run.best_weights)
        return run
