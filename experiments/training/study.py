"""Several runs: their checkpoints, their groups by seeds, and the change against single-task networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from experiments.training.methods import TASK_SPECIFIC
from experiments.training.run import Settings
from tsbn_kernels import parameter_groups


class HasSettings(Protocol):
    """A result of a run."""

    @property
    def settings(self) -> Any:
        """What was trained: :class:`~experiments.training.run.Settings` or more."""


Result = TypeVar("Result", bound=HasSettings)


def multiplied(
    methods: Sequence[str], multipliers: Mapping[str, Sequence[float]], seeds: int
) -> list[tuple[str, float, int]]:
    """Method, multiplier and seed of every run: all methods of the first seed, then of the next one."""
    return [
        (method, multiplier, seed)
        for seed in range(seeds)
        for method in methods
        for multiplier in (multipliers[method] if method in TASK_SPECIFIC else (1.0,))
    ]


def checkpoint_of(settings: Settings, folder: Path) -> Path:
    """The file that holds a run."""
    return folder / f"{settings.name.replace(' ', '-')}-seed{settings.seed}.pt"


def grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The seeds of each method and multiplier, by its name."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.settings.name, []).append(result)
    return groups


def delta_m(
    scores: Sequence[float], single_task: Sequence[float], less_is_better: Sequence[bool] | None = None
) -> float:
    """Mean of the changes against single-task networks, in percent; a change for the better is positive.

    NaN where a single-task network scores 0.

    Args:
        scores, single_task: of each task or metric.
        less_is_better: of each; None: of none.
    """
    signs = [-1 if less else 1 for less in less_is_better or [False] * len(scores)]
    changes = [
        sign * (ours - theirs) / theirs if theirs else math.nan
        for sign, ours, theirs in zip(signs, scores, single_task, strict=True)
    ]
    return 100 * math.fsum(changes) / len(changes)


def optimizer_of(network: nn.Module, lr: float, multiplier: float) -> torch.optim.Optimizer:
    """Adam, in one pass over all parameters; gates, and weights in their place, at ``multiplier * lr``."""
    groups = parameter_groups(network, lr, gate_lr_multiplier=multiplier, layer_norm_lr_multiplier=multiplier)
    return torch.optim.Adam(groups, fused=True)


def on_device(samples: Tensor, device: torch.device) -> Tensor:
    """A batch where a network takes it; images in channels_last."""
    memory_format = torch.channels_last if samples.dim() == 4 else torch.preserve_format
    return samples.to(device, memory_format=memory_format, non_blocking=True)
