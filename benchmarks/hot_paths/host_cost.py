"""What a call of the Triton backend costs on the host: all of it, with Triton's own launcher, but the driver's part.

A small layer is over on a GPU before the host has prepared the next launch, so this time is what such a layer takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.hot_paths.fake_driver import Driver
from benchmarks.records.summary import Summary
from benchmarks.records.workloads import Workload, layers_named
from benchmarks.timing.host_memory import keep_freed
from benchmarks.timing.measure import Effort, measure, summarize, training_candidate
from tsbn_kernels import FusedTSigmaBN, FusedTSigmaBN2d
from tsbn_kernels.backends import choice, cuda
from tsbn_kernels.backends.plan import DEVICES, Plan
from tsbn_kernels.backends.plan import choice as rule
from tsbn_kernels.backends.triton import launch
from tsbn_kernels.operator import direct
from tsbn_kernels.operator.layer_ops import layer_norm
from tsbn_kernels.operator.mixed_layer_ops import mixed_layer_norm
from tsbn_kernels.operator.mixed_ops import mixed
from tsbn_kernels.operator.ops import batch_norm

NORMALIZATIONS: tuple[Any, ...] = (batch_norm, layer_norm, mixed, mixed_layer_norm)
SHAPE = (2, 8, 4, 4)  # of one task: the kernels do not run, and the peers should have nothing to compute
EFFORT = Effort(min_rounds=15, max_rounds=15, min_time_s=2e-2)


def _prepared(self: launch.Launch, *arguments: object) -> None:
    """What a launch does after its first call, with a kernel that does nothing."""
    arguments + self.constants


@contextmanager
def taken_for_a_gpu() -> Iterator[None]:
    """Lets CPU tensors go the way of a GPU's where no backend was chosen, to Triton: no plan of CUDA C++ fits."""

    def plans_of_triton(backend: str, *of: Any) -> tuple[Plan, ...]:
        if backend != "triton":
            raise ValueError(f"{backend} is not measured")
        return plans_of(backend, *of)

    plans_of, remembered = rule.plans_of, (choice._batch_norm, choice._layer_norm)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(direct._OWN, {"CPU": direct.own_keys("CPU")}))
        for one in NORMALIZATIONS:
            stack.enter_context(mock.patch.dict(one.direct, {"CPU": one.direct["CUDA"]}))
        stack.enter_context(mock.patch.object(rule, "plans_of", plans_of_triton))
        stack.enter_context(mock.patch.object(cuda.launches, "device_of", return_value=DEVICES["H100"]))
        for found in remembered:
            found.cache_clear()
            stack.callback(found.cache_clear)
        yield


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Sends CPU tensors to the Triton backend, whose kernels do not run."""
    with taken_for_a_gpu(), mock.patch.object(launch.Launch, "__call__", _prepared):
        yield


@contextmanager
def fake_gpu() -> Iterator[Driver]:
    """Launches the kernels of CPU tensors by Triton's own launcher, on a driver that launches nothing.

    From then on PyTorch says in this process that there is a GPU: see :mod:`benchmarks.hot_paths.fake_driver`.
    """
    with tempfile.TemporaryDirectory() as folder, taken_for_a_gpu():
        yield Driver(Path(folder), notes=False)


Step = tuple[Callable[[], Tensor], Callable[[Tensor], tuple[Tensor, ...]]]


def _step(module: torch.nn.Module, x: Tensor, gradient: Tensor) -> Step:
    leaves = [x, *module.parameters()]
    return lambda: module(x), lambda y: torch.autograd.grad(y, leaves, gradient, allow_unused=True)


def _launches(driver: Driver, step: Step) -> int:
    """Compiles the kernels of a step, and counts the launches of the next one."""
    forward, backward = step
    backward(forward())
    before = driver.launches
    backward(forward())
    return driver.launches - before


class PlainLoop(torch.nn.Module):
    """T BatchNorms of PyTorch, one after the other: T dispatches a pass, on tensors with nothing to compute."""

    def __init__(self, num_tasks: int, channels: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(channels) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        """``[T*N, C, H, W]``, task-major."""
        return torch.cat([norm(part) for norm, part in zip(self.norms, x.chunk(len(self.norms)), strict=True)])


def host_times(driver: Driver, num_tasks: int = 40, effort: Effort = EFFORT) -> tuple[dict[str, list[Summary]], int]:
    """Seconds of a forward, and of a forward and backward, of each candidate; and the launches of the latter."""
    samples, channels, *spatial = SHAPE
    x = torch.randn(num_tasks * samples, channels, *spatial, requires_grad=True)
    gradient = torch.ones_like(x)
    modules = {
        "fused layer": FusedTSigmaBN2d(num_tasks, channels),
        "the same without running statistics": FusedTSigmaBN2d(num_tasks, channels, track_running_stats=False),
        f"loop of {num_tasks} BatchNorm2d on tiny CPU tensors": PlainLoop(num_tasks, channels),
    }
    steps = {name: _step(module, x, gradient) for name, module in modules.items()}
    launches = _launches(driver, steps["fused layer"])
    rounds = measure({name: training_candidate(*step) for name, step in steps.items()}, effort)
    return summarize(rounds), launches


def network_times(driver: Driver, workload: Workload, effort: Effort = EFFORT) -> tuple[list[float], int]:
    """Seconds of the forward, and of the forward and backward, of all layers of a network; and the launches of these.

    Each distinct layer is measured by itself. Its activations are of full size, but nobody writes to their memory.
    """
    seconds, launches = [0.0, 0.0], 0
    with keep_freed():
        for layer in workload.layers:
            x, gradient = (torch.empty(layer.shape(workload.tasks, workload.batch)) for _ in range(2))
            module = FusedTSigmaBN(workload.tasks, layer.channels, activation=workload.activation)  # type: ignore[arg-type]
            step, times = _step(module, x.requires_grad_(), gradient), layers_named(layer.name)
            launches += times * _launches(driver, step)
            (passes,) = summarize(measure({"layer": training_candidate(*step)}, effort)).values()
            seconds = [sum_ + times * one.median for sum_, one in zip(seconds, passes, strict=True)]
    return seconds, launches
