"""What a call of the Triton backend costs on the host: all of it, with Triton's own launcher, but the driver's part.

A small layer is over on a GPU before the host has prepared the next launch, so this time is what such a layer takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.hot_paths.fake_driver import Driver
from benchmarks.profile.compile_offline import triton_forced
from benchmarks.records.summary import Summary
from benchmarks.timing.measure import Effort, measure, summarize, training_candidate
from tsbn_kernels import FusedTSigmaBN2d
from tsbn_kernels.backends.triton import launch

SHAPE = (2, 8, 4, 4)  # of one task: the kernels do not run, and the peers should have nothing to compute
EFFORT = Effort(min_rounds=15, max_rounds=15, min_time_s=2e-2)


def _prepared(self: launch.Launch, *arguments: object) -> None:
    """What a launch does after its first call, with a kernel that does nothing."""
    arguments + self.constants


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Sends CPU tensors to the Triton backend, whose kernels do not run."""
    with triton_forced(), mock.patch.object(launch.Launch, "__call__", _prepared):
        yield


def _step(module: torch.nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], tuple[Tensor, ...]]]:
    gradient = torch.ones_like(x)
    leaves = [x, *module.parameters()]
    return lambda: module(x), lambda y: torch.autograd.grad(y, leaves, gradient, allow_unused=True)


class PlainLoop(torch.nn.Module):
    """T BatchNorms of PyTorch, one after the other: T dispatches a pass, on tensors with nothing to compute."""

    def __init__(self, num_tasks: int, channels: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(channels) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        """``[T*N, C, H, W]``, task-major."""
        return torch.cat([norm(part) for norm, part in zip(self.norms, x.chunk(len(self.norms)), strict=True)])


def host_times(num_tasks: int = 40, effort: Effort = EFFORT) -> tuple[dict[str, list[Summary]], int]:
    """Seconds of a forward, and of a forward and backward, of each candidate; and the launches of the latter.

    From then on PyTorch says in this process that there is a GPU: see :mod:`benchmarks.hot_paths.fake_driver`.
    """
    samples, channels, *spatial = SHAPE
    x = torch.randn(num_tasks * samples, channels, *spatial, requires_grad=True)
    fused, loop = FusedTSigmaBN2d(num_tasks, channels), PlainLoop(num_tasks, channels)
    no_statistics = FusedTSigmaBN2d(num_tasks, channels, track_running_stats=False)
    with tempfile.TemporaryDirectory() as folder, triton_forced():
        driver = Driver(Path(folder), notes=False)
        forward, backward = _step(fused, x)
        backward(forward())
        before = driver.launches
        backward(forward())
        launches = driver.launches - before
        rounds = measure(
            {
                "fused layer": training_candidate(forward, backward),
                "the same without running statistics": training_candidate(*_step(no_statistics, x)),
                f"loop of {num_tasks} BatchNorm2d on tiny CPU tensors": training_candidate(*_step(loop, x)),
            },
            effort,
        )
    return summarize(rounds), launches
