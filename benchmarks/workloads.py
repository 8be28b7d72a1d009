"""What is measured: normalisation layers of known networks, of given shapes and in series, and their inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NO_ACTIVATION = "none"
NO_FORMAT = "none"  # the memory format of [N, C] layers: measured once, part of the means of every format


@dataclass(frozen=True)
class Layer:
    """Layers of one shape, measured once: ``bn2,bn3`` stands for two layers, ``512@36x48 x3`` for three.

    Attributes:
        size: height and width; None is a 1-d layer.
        times: how many layers have this shape, where they have no names of their own.
    """

    names: tuple[str, ...]
    channels: int
    size: tuple[int, int] | None
    times: int = 1

    @classmethod
    def of(cls, channels: int, size: tuple[int, ...], times: int = 1) -> Layer:
        """Named by its shape; the size is height and width, or empty."""
        name = f"{channels}@{size[0]}x{size[1]}" if size else str(channels)
        return cls((name,), channels, (size[0], size[1]) if size else None, times)

    @property
    def name(self) -> str:
        return ",".join(self.names) + f" x{self.times}" * (self.times > 1)

    @property
    def elements(self) -> int:
        """Values of one sample of one task."""
        return math.prod(self.shape(1, 1))

    def shape(self, tasks: int, batch: int) -> tuple[int, ...]:
        """Shape of all tasks' activation: ``[T*N, C, H, W]`` or ``[T*N, C]``."""
        return (tasks * batch, self.channels, *(self.size or ()))


def layers_named(name: str) -> int:
    """How many layers of the network a :attr:`Layer.name` stands for."""
    names, _, times = name.partition(" x")
    return (names.count(",") + 1) * int(times or 1)


@dataclass(frozen=True)
class Workload:
    """The normalisation layers of a network, and how it is trained.

    Attributes:
        name: of its records.
        tasks: T.
        batch: samples of each task.
        activation: what follows its layers.
    """

    name: str
    tasks: int
    batch: int
    layers: tuple[Layer, ...]
    activation: str


def select_layers(names: Sequence[str], layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The distinct shapes that the named layers have, all without names; every layer of a shape is named by it.

    Raises:
        ValueError: a name is unknown.
    """
    known = [name for layer in layers for name in layer.names]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown layer {name!r}; known are {', '.join(known)}")
    return tuple(layer for layer in layers if not names or set(names) & set(layer.names))


CELEBA40 = (
    Layer(("bn1",), 64, (64, 64)),
    Layer(("bn2", "bn3"), 128, (32, 32)),
    Layer(("bn4", "bn5"), 256, (16, 16)),
    Layer(("bn6", "bn7"), 512, (8, 8)),
    Layer(("bn8", "bn9"), 512, None),
)

# Channels and how many layers have them, by how much smaller than the input their activations are.
_SEGNET = {
    1: {64: 4},
    2: {64: 2, 128: 2},
    4: {128: 3, 256: 3},
    8: {256: 3, 512: 3},
    16: {512: 6},
}
_RESNET50 = {  # dilated: the last two stages keep the size of the one before them
    2: {64: 1},
    4: {64: 6, 128: 1, 256: 4},
    8: {128: 7, 256: 12, 512: 11, 1024: 7, 2048: 4},
}


def _pyramid(counts: Mapping[int, Mapping[int, int]], height: int, width: int) -> tuple[Layer, ...]:
    return tuple(
        Layer.of(channels, (height // scale, width // scale), times)
        for scale, widths in counts.items()
        for channels, times in widths.items()
    )


# SegNet on NYUv2, encoder and decoder; ResNet-50 as it is trained on Cityscapes and NYUv2; and the module that fuses
# the features of a ViT-S/16 on PascalContext (convolution, this layer, GELU), whose batch of 8 is not the paper's.
SEGNET = Workload("segnet", 3, 4, _pyramid(_SEGNET, 288, 384), "relu")
RESNET50 = tuple(
    Workload(f"resnet50_{height}x{width}", tasks, batch, _pyramid(_RESNET50, height, width), "relu")
    for tasks, batch, height, width in ((3, 4, 256, 256), (3, 4, 288, 384), (2, 16, 128, 256))
)
VIT_FUSION = Workload("vit_fusion", 5, 8, (Layer.of(512, (32, 32)),), "gelu")
CELEBA = Workload("celeba40", 40, 256, CELEBA40, "relu")
WORKLOADS = {workload.name: workload for workload in (CELEBA, SEGNET, *RESNET50, VIT_FUSION)}

# Series: one layer for more and more tasks, and one number of tasks and channels for larger and larger activations.
SWEEP_TASKS, SWEEP_SLAB = "sweep_tasks", "sweep_slab"
SWEEPS = (SWEEP_TASKS, SWEEP_SLAB)
TASK_COUNTS = tuple(2**power for power in range(8))
TASKS_LAYER = Layer.of(128, (16, 16))
SLAB_TASKS, SLAB_BATCH = 8, 8
SLAB_LAYERS = tuple(Layer.of(64, (2**power, 2**power)) for power in range(1, 9))
GIVEN = "shape"  # the workload of what a user gives


def parse_shape(text: str) -> tuple[int, int, Layer]:
    """Tasks, samples of each and layer of ``TxN,C,H,W`` or ``TxN,C``.

    Raises:
        ValueError: the text is no such shape.
    """
    found = re.fullmatch(r"(\d+)x(\d+),(\d+)(?:,(\d+),(\d+))?", text)
    sizes = [int(size) for size in found.groups(default="1")] if found else [0]
    if found is None or 0 in sizes:
        raise ValueError(
            f"{text!r} is no shape; expected TASKSxSAMPLES,CHANNELS[,HEIGHT,WIDTH], such as 40x16,64,32,32"
        )
    tasks, samples, channels, *size = sizes
    if samples * math.prod(size) < 2:
        raise ValueError(f"{text!r} has a single value for each task and channel; statistics need two")
    return tasks, samples, Layer.of(channels, tuple(size) if found[4] else ())


def activation_named(workload: str) -> str:
    """The activation in a :attr:`Case.record_name`."""
    return workload.partition("+")[2] or NO_ACTIVATION


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
    def record_name(self) -> str:
        """What its records have for a workload: ``segnet+relu``."""
        return self.workload + f"+{self.activation}" * (self.activation != NO_ACTIVATION)

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
        dy, gamma = random(*self.shape), random(self.tasks, self.layer.channels, dtype=parameters)
        return Inputs(x, dy, gamma, self.memory_format)


@dataclass(frozen=True)
class Inputs:
    """Task-major activation ``x`` and gradient ``dy`` of one shape, and the raw gates ``gamma`` ``[T, C]``."""

    x: Tensor
    dy: Tensor
    gamma: Tensor
    memory_format: str

    @cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Of x and dy one copy as ``[N, T*C, *]`` in their memory format, for all who want it."""
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
    """Every combination; 1-d layers have no memory format and come once for each dtype."""
    return [
        Case(layer, tasks, batch, dtype, memory_format, device, activation, workload)
        for layer in layers
        for dtype in dtypes
        for memory_format in ((NO_FORMAT,) if layer.size is None else memory_formats)
    ]


def batch_that_fits(
    layers: Sequence[Layer], tasks: int, dtypes: Sequence[str], available_bytes: int
) -> tuple[int, int]:
    """The most samples of each task for which the biggest layer fits, and the bytes that must be free for each.

    A verified and timed layer holds about ten tensors of its size: x and dy in two stackings, the reference's y and
    dx, and four of a peer's. They may take a third of the available memory.
    """
    item = max(4, *(DTYPES[dtype].itemsize for dtype in dtypes))
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
