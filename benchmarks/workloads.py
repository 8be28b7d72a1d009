"""What is measured: the normalisation layers of the 40-task CelebA network, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CELEBA40_NAME = "celeba40"
NO_FORMAT = "none"  # the memory format of [N, C] layers: measured once, part of the means of every format


@dataclass(frozen=True)
class Layer:
    """Layers of one shape, measured once: ``bn2,bn3`` is one measurement that stands for two layers."""

    names: tuple[str, ...]
    channels: int
    size: int | None  # height and width; None is a 1-d layer

    @property
    def name(self) -> str:
        return ",".join(self.names)

    def shape(self, tasks: int, batch: int) -> tuple[int, ...]:
        """Shape of all tasks' activation: ``[T*N, C, H, W]`` or ``[T*N, C]``."""
        positions = () if self.size is None else (self.size, self.size)
        return (tasks * batch, self.channels, *positions)


CELEBA40 = (
    Layer(("bn1",), 64, 64),
    Layer(("bn2", "bn3"), 128, 32),
    Layer(("bn4", "bn5"), 256, 16),
    Layer(("bn6", "bn7"), 512, 8),
    Layer(("bn8", "bn9"), 512, None),
)


def select_layers(names: Sequence[str]) -> tuple[Layer, ...]:
    """The distinct shapes that the named layers have; every layer of a shape is named by it.

    Raises:
        ValueError: a name is unknown.
    """
    known = [name for layer in CELEBA40 for name in layer.names]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown layer {name!r}; known are {', '.join(known)}")
    return tuple(layer for layer in CELEBA40 if not names or set(names) & set(layer.names))


@dataclass(frozen=True)
class Case:
    """One layer in one dtype and memory format; ``relu``: with the ReLU that follows it."""

    layer: Layer
    tasks: int
    batch: int
    dtype: str
    memory_format: str
    device: torch.device
    relu: bool = False
    workload: str = CELEBA40_NAME

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape(self.tasks, self.batch)

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

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
        return Inputs(x, random(*self.shape), random(self.tasks, self.layer.channels, dtype=parameters))


@dataclass(frozen=True)
class Inputs:
    """Task-major activation ``x`` and gradient ``dy`` of one shape, and the raw gates ``gamma`` ``[T, C]``."""

    x: Tensor
    dy: Tensor
    gamma: Tensor


def cases(
    layers: Sequence[Layer],
    *,
    tasks: int,
    batch: int,
    dtypes: Sequence[str],
    memory_formats: Sequence[str],
    device: torch.device,
    relu: bool = False,
) -> list[Case]:
    """Every combination; 1-d layers have no memory format and come once for each dtype."""
    return [
        Case(layer, tasks, batch, dtype, memory_format, device, relu)
        for layer in layers
        for dtype in dtypes
        for memory_format in ((NO_FORMAT,) if layer.size is None else memory_formats)
    ]


def choose_batch(
    layers: Sequence[Layer], tasks: int, dtypes: Sequence[str], device: torch.device, available_bytes: int
) -> tuple[int, str]:
    """The largest power of two, at most 256 (on a CPU 16), for which the biggest layer fits; and why.

    A verified and timed layer holds at most ten tensors of its size: x and dy in two stackings, the reference's y and
    dx, and four of a peer's. They may take a third of the available memory.

    Raises:
        ValueError: two samples a task, the least that every layer can be trained on, do not fit.
    """
    item = max(4, *(DTYPES[dtype].itemsize for dtype in dtypes))
    per_sample = 10 * item * max(math.prod(layer.shape(tasks, 1)) for layer in layers)
    limit = 16 if device.type == "cpu" else 256
    fitting = int(available_bytes / 3 / per_sample)
    if fitting < 2:
        raise ValueError(
            f"two samples for each of {tasks} tasks need {6 * per_sample / 2**30:.1f} GiB of memory, "
            f"{available_bytes / 2**30:.1f} are available; choose fewer --tasks or smaller --layers"
        )
    batch = min(limit, 2 ** int(math.log2(fitting)))
    if batch == limit:
        return batch, f"the default on {device.type}"
    return batch, f"ten tensors of the biggest layer fit in a third of the {available_bytes / 2**30:.1f} GiB available"
