"""Layers as they are measured: with a dtype, a memory format, a device and inputs; and how many samples fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.records.workloads import GIVEN, ITEM_BYTES, NO_ACTIVATION, NO_FORMAT, SORTED, Layer, samples_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One layer in one dtype and memory format, with the activation that follows it."""

    layer: Layer
    tasks: int
    batch: int
    dtype: str
    memory_format: str
    device: torch.device
    activation: str = NO_ACTIVATION
    workload: str = GIVEN

    @property
    def norm(self) -> str:
        return self.layer.norm

    @property
    def record_name(self) -> str:
        """What its records have for a workload: ``segnet+relu``."""
        return self.workload + f"+{self.activation}" * (self.activation != NO_ACTIVATION)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape(self.tasks, self.batch)

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        layout = "" if self.memory_format == NO_FORMAT else f" {self.memory_format}"
        return f"{self.layer.name} {self.dtype}{layout}"

    def inputs(self) -> Inputs:
        """Random activation, gradient and gates, the same for every call."""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            tensor = torch.randn(shape, generator=generator, dtype=dtype, device=self.device)
            return tensor if tensor.dim() < 4 else tensor.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

        x = random(*self.shape).mul_(1.5).add_(0.5)
        parameters = torch.float64 if self.dtype == "float64" else torch.float32
        dy, gamma = random(*self.shape), random(self.tasks, self.layer.channels, dtype=parameters)
        return Inputs(x, dy, gamma, self.memory_format, self._tasks_of_samples(generator))

    def _tasks_of_samples(self, generator: torch.Generator) -> Tensor | None:
        """The index of a mixed batch: in a random order, but for a sorted one."""
        if not self.layer.mix:
            return None
        counts = torch.tensor(samples_of(self.layer.mix, self.tasks, self.shape[0]), device=self.device)
        index = torch.arange(self.tasks, device=self.device).repeat_interleave(counts)
        if self.layer.mix == SORTED:
            return index
        return index[torch.randperm(len(index), generator=generator, device=self.device)]


@dataclass(frozen=True)
class Inputs:
    """Task-major activation ``x`` and gradient ``dy`` of one shape, and the raw gates ``gamma`` ``[T, C]``.

    In a mixed batch ``task_of_sample`` tells the tasks, and samples lie in any order.
    """

    x: Tensor
    dy: Tensor
    gamma: Tensor
    memory_format: str
    task_of_sample: Tensor | None = None

    def samples_of_tasks(self) -> Sequence[Tensor | slice]:
        """Where in x the samples of each task are."""
        tasks = len(self.gamma)
        if self.task_of_sample is not None:
            return [(self.task_of_sample == task).nonzero().flatten() for task in range(tasks)]
        each = len(self.x) // tasks
        return [slice(task * each, (task + 1) * each) for task in range(tasks)]

    @cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """One copy of x and dy as ``[N, T*C, *]`` in their memory format, for all who want it."""
        return self._fold(self.x), self._fold(self.dy)

    def _fold(self, tensor: Tensor) -> Tensor:
        tasks, channels = self.gamma.shape
        sample_major = tensor.unflatten(0, (tasks, -1)).transpose(0, 1)
        folded = sample_major.reshape(-1, tasks * channels, *tensor.shape[2:])
        result: Tensor = folded.contiguous(
            memory_format=MEMORY_FORMATS.get(self.memory_format, torch.contiguous_format)
        )
        return result


def cases(
    layers: Sequence[Layer],
    *,
    tasks: int,
    batch: int,
    dtypes: Sequence[str],
    memory_formats: Sequence[str],
    device: torch.device,
    activation: str = NO_ACTIVATION,
    workload: str = GIVEN,
) -> list[Case]:
    """Every combination; layers without a memory format come once for each dtype."""
    return [
        Case(layer, tasks, batch, dtype, memory_format, device, activation, workload)
        for layer in layers
        for dtype in dtypes
        for memory_format in (memory_formats if layer.has_format else (NO_FORMAT,))
    ]


def batch_that_fits(
    layers: Sequence[Layer], tasks: int, dtypes: Sequence[str], available_bytes: int
) -> tuple[int, int]:
    """The most samples of each task for which the biggest layer fits, and the bytes that must be free for each.

    A verified and timed layer holds about ten tensors of its size: x and dy in two stackings, the reference's y and
    dx, and four of a peer's. They may take a third of the available memory.
    """
    item = max(4, *(ITEM_BYTES[dtype] for dtype in dtypes))
    per_sample = 3 * 10 * item * tasks * max(layer.elements for layer in layers)
    return available_bytes // per_sample, per_sample


def choose_batch(
    layers: Sequence[Layer],
    tasks: int,
    dtypes: Sequence[str],
    device: torch.device,
    available_bytes: int,
    most: int = 256,
) -> tuple[int, str]:
    """The largest power of two, at most ``most`` (on a CPU 16), for which the biggest layer fits; and why.

    Raises:
        ValueError: two samples a task, the least that every layer can be trained on, do not fit.
    """
    limit = min(most, 16) if device.type == "cpu" else most
    fitting, per_sample = batch_that_fits(layers, tasks, dtypes, available_bytes)
    if fitting < 2:
        raise ValueError(
            f"two samples for each of {tasks} tasks need {2 * per_sample / 2**30:.1f} GiB of memory, "
            f"{available_bytes / 2**30:.1f} are available; choose fewer --tasks or smaller --layers"
        )
    batch = min(limit, 2 ** int(math.log2(fitting)))
    if batch == limit:
        return batch, f"the default on {device.type}"
    return batch, f"ten tensors of the biggest layer fit in a third of the {available_bytes / 2**30:.1f} GiB available"
