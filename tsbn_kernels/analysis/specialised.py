"""Filters that one task has almost for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsbn_kernels.analysis.gates import Importance, Source, importance
from tsbn_kernels.operator import checks


@dataclass(frozen=True, eq=False)
class Specialized:
    """Which filters are specialised, and for whom.

    Attributes:
        mask: bool ``[T, F]``: the filter is specialised for the task.
        percent: how many of the filters of each layer are specialised for some task, by its name.
        importance: what it is read from.
        threshold: the share of a filter's importance that its task has more than.
    """

    mask: Tensor
    percent: dict[str, float]
    importance: Importance
    threshold: float

    def filters(self, task: int) -> list[tuple[str, int]]:
        """The filters of a task: the layer of each, and its index there."""
        return [self.importance.filter(column) for column in self.mask[task].nonzero().flatten().tolist()]


def specialized_filters(source: Source, threshold: float = 0.5) -> Specialized:
    """Finds the filters of which one task has more than a share of the importance that all tasks give to it.

    Above a threshold of one half a filter has at most one such task. A single task has all filters for itself.

    Args:
        source: see :func:`importance`.
        threshold: the share, 0 or more, below 1.

    Raises:
        ValueError: the threshold is another.
    """
    threshold = checks.number("threshold", threshold, 0.0)
    if threshold >= 1:
        raise ValueError(f"threshold must be below 1, which is all of a filter's importance, got {threshold}")
    found = importance(source)
    mask = found.matrix > threshold * found.matrix.sum(0)
    some = mask.any(0)
    percent = {layer: float(100 * some[part].to(torch.float64).mean()) for layer, part in found.slices.items()}
    return Specialized(mask, percent, found, threshold)
