"""What is measured: the normalisation layers of known networks, of given shapes, and in series."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # of the dtypes that are measured
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
