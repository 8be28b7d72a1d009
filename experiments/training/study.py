"""Several runs: their checkpoints, their groups by seeds, and the change against single-task networks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.timing import environment
from experiments.training.methods import TASK_SPECIFIC
from experiments.training.run import Settings


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


def write_report(path: Path, report: Mapping[str, Any], device: torch.device) -> None:
    """Writes JSON, with where it was found; creates the folder."""
    where = {"device": environment.device_name(device), "versions": environment.versions(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, **where}, indent=1) + "\n")
