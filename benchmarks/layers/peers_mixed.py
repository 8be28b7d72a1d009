"""The ways to run a training step of batch normalisation on a mixed batch, where an index tells each sample's task.

All do the work of :mod:`benchmarks.layers.peers`, on ``[N, C, *]`` and an int64 index ``[N]``: y is in the order of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import EPS
from benchmarks.layers.peers import MOMENTUM, Fused, Loop, Reference, activate
from benchmarks.records.workloads import MIXED_BATCH_NORM, SORTED


def _index_of(inputs: Inputs) -> Tensor:
    assert inputs.task_of_sample is not None
    return inputs.task_of_sample


class FusedMixed(Fused):
    """``FusedTSigmaBN`` with the index, and the activation inside."""

    norm = MIXED_BATCH_NORM

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.index = _index_of(inputs)

    def forward(self) -> Tensor:
        return self.module(self.x, task_of_sample=self.index)  # type: ignore[no-any-return]


class EqualTasks(Fused):
    """``FusedTSigmaBN`` without an index, where the tasks are equal and in order: what the index may cost."""

    name = "equal"
    norm = MIXED_BATCH_NORM

    @staticmethod
    def unsupported(case: Case) -> str | None:
        return None if case.layer.mix == SORTED else "its tasks have equally many samples, one after the other"


def _masked_step(norms: nn.ModuleList, x: Tensor, index: Tensor, activation: str) -> Tensor:
    y = torch.empty_like(x)
    for task, norm in enumerate(norms):
        mask = index == task
        if mask.any():
            y[mask] = norm(x[mask])
    return activate(y, activation)


class MaskedLoop(Loop):
    """T ``nn.BatchNorm2d``, each on the samples under the mask of its task: what a user writes."""

    norm = MIXED_BATCH_NORM

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.index = _index_of(inputs)
        self.step_function: Callable[..., Tensor] = _masked_step

    def forward(self) -> Tensor:
        return self.step_function(self.module.norms, self.x, self.index, self.activation)


def _sorted_step(norms: nn.ModuleList, x: Tensor, index: Tensor, activation: str) -> Tensor:
    order = index.argsort()
    counts = torch.bincount(index, minlength=len(norms)).tolist()
    slices = x.index_select(0, order).split(counts)
    y = torch.cat([norm(part) for norm, part in zip(norms, slices, strict=True) if len(part)])
    return activate(torch.empty_like(y).index_copy(0, order, y), activation)


class SortedSlices(MaskedLoop):
    """T ``nn.BatchNorm2d`` on slices of the samples sorted by task, and y put back into their order."""

    name = "sorted"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.step_function = _sorted_step


def _grouped_step(
    x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, index: Tensor, activation: str
) -> Tensor:
    wide = x.to(gamma.dtype).flatten(2) if x.dim() > 2 else x.to(gamma.dtype).unsqueeze(2)
    ones = gamma.new_full((len(x), 1), wide.shape[2])
    counts = gamma.new_zeros(len(gamma), 1).index_add(0, index, ones)
    share = MOMENTUM * (counts > 0).to(gamma.dtype)

    def means(values: Tensor) -> Tensor:
        return torch.zeros_like(gamma).index_add(0, index, values.sum(2)) / counts.clamp_min(1)

    mean = means(wide)
    centred = wide - mean.index_select(0, index).unsqueeze(2)
    var = means(centred.square())
    with torch.no_grad():
        running_mean.lerp_(mean.detach(), share.expand_as(mean))
        running_var.lerp_(var.detach() * (counts / (counts - 1).clamp_min(1)), share.expand_as(var))
    scale = torch.sigmoid(gamma) * torch.rsqrt(var + EPS)
    y = centred * scale.index_select(0, index).unsqueeze(2)
    return activate(y.to(x.dtype).view_as(x), activation)


class Grouped(Reference):
    """The moments of all tasks by ``index_add`` of the samples' sums, and the factors back by ``index_select``."""

    name = "grouped"
    norm = MIXED_BATCH_NORM

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.index = _index_of(inputs)
        self.step_function: Any = _grouped_step

    def forward(self) -> Tensor:
        running = self.running_mean, self.running_var
        return self.step_function(  # type: ignore[no-any-return]
            self.x, self.gamma, *running, self.index, self.activation
        )
