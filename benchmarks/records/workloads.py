"""What is measured: the normalisation layers of known networks, of given shapes, and in series."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # of the dtypes that are measured
BATCH_NORM, LAYER_NORM, MIXED_BATCH_NORM = NORMS = ("batch_norm", "layer_norm", "mixed_batch_norm")
SORTED, BALANCED, ZIPF, ONE_SIDED = MIXES = ("sorted", "balanced", "zipf", "one_sided")  # of mixed batches
LEAST_OF_A_TASK, MOST_OF_A_TASK = 4, 0.9  # samples, and share of them, in a mix
NO_ACTIVATION = "none"
NO_FORMAT = "none"  # of [N, C] layers and of layer normalisation: measured once, part of the means of every format


@dataclass(frozen=True)
class Layer:
    """Layers of one shape, measured once: ``bn2,bn3`` stands for two layers, ``512@36x48 x3`` for three.

    Attributes:
        channels: how many gates a task has; of layer normalisation the length D of a row.
        size: height and width; None is a 1-d layer. Of layer normalisation the number of tokens, each a row.
        times: how many layers have this shape, where they have no names of their own.
        mix: of a mixed batch, how many samples each task has (:func:`samples_of`).
    """

    names: tuple[str, ...]
    channels: int
    size: tuple[int, ...] | None
    times: int = 1
    norm: str = BATCH_NORM
    mix: str = ""

    @classmethod
    def of(cls, channels: int, size: tuple[int, ...], times: int = 1, norm: str = BATCH_NORM) -> Layer:
        """Named by its shape; the size is height and width, or empty."""
        name = "@".join([str(channels), *["x".join(map(str, size))] * bool(size)])
        return cls((name,), channels, size or None, times, norm)

    @classmethod
    def of_rows(cls, width: int, tokens: int, times: int = 1) -> Layer:
        """Layer normalisation of so many tokens of this width, named by its shape: ``384@1024``."""
        return cls.of(width, (tokens,), times, LAYER_NORM)

    @classmethod
    def of_mix(cls, channels: int, size: tuple[int, ...], mix: str) -> Layer:
        """Batch normalisation of a mixed batch, named by its shape and mix: ``64@16x16 zipf``."""
        plain = cls.of(channels, size)
        return replace(plain, names=(f"{plain.name} {mix}",), norm=MIXED_BATCH_NORM, mix=mix)

    @property
    def name(self) -> str:
        return ",".join(self.names) + f" x{self.times}" * (self.times > 1)

    @property
    def elements(self) -> int:
        """Values of one sample of one task."""
        return math.prod(self.shape(1, 1))

    def shape(self, tasks: int, batch: int) -> tuple[int, ...]:
        """Shape of all tasks' activation: ``[T*N, C, H, W]`` or ``[T*N, C]``; rows are ``[T*N, L, D]``."""
        sizes = [self.channels, *(self.size or ())]
        return (tasks * batch, *(sizes[::-1] if self.norm == LAYER_NORM else sizes))

    @property
    def has_format(self) -> bool:
        """Whether its activation may lie in one memory format or another."""
        return self.norm != LAYER_NORM and self.size is not None


def samples_of(mix: str, tasks: int, samples: int) -> list[int]:
    """How many of the samples of a mixed batch each task has; the first has most.

    Those that have any have four, or their equal share: deviations of two or three values may be so small that rounding
    hides what is wrong.

    Args:
        mix: "sorted" and "balanced": equally many; "zipf": more of a task by 1/1, 1/2, 1/3, ...; "one_sided": the first
            task has 90 %, and tasks for which there are no four have none.
    """
    least = min(LEAST_OF_A_TASK, samples // tasks)
    if mix == ONE_SIDED:
        left = samples - int(MOST_OF_A_TASK * samples)
        present = min(tasks - 1, max(1, left // least))
        others = [max(least, left // max(1, present))] * present + [0] * (tasks - 1 - present)
    else:
        weights = [1 / (task + 1) if mix == ZIPF else 1.0 for task in range(tasks)]
        others = [least + int((samples - least * tasks) * weight / sum(weights)) for weight in weights[1:]]
    return [samples - sum(others), *others]


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
# A ViT-S/16 at 512x512 as the paper trains it on PascalContext, and BERT base: before the attention and the MLP of each
# of 12 blocks, and behind or before all of them. The batches are not those of papers.
VIT_S16 = Workload("vit_s16_512", 5, 8, (Layer.of_rows(384, 1024, 25),), NO_ACTIVATION)
BERT_BASE = Workload("bert_base", 8, 32, (Layer.of_rows(768, 512, 25),), NO_ACTIVATION)
# Mixed batches, few and many tasks; [N, C] is what a head normalises.
MIXED_LAYERS = (
    *(Layer.of_mix(512, (), mix) for mix in MIXES),
    *(Layer.of_mix(64, (16, 16), mix) for mix in MIXES),
)
MIXED = tuple(Workload(f"mixed_{tasks}", tasks, 16, MIXED_LAYERS, "relu") for tasks in (2, 8, 40))
CELEBA = Workload("celeba40", 40, 256, CELEBA40, "relu")
WORKLOADS = {
    workload.name: workload for workload in (CELEBA, SEGNET, *RESNET50, VIT_FUSION, VIT_S16, BERT_BASE, *MIXED)
}

# Series: one layer for more and more tasks, one number of tasks and channels for larger and larger activations, and
# layer normalisation of longer and longer rows in activations of one size.
SWEEP_TASKS, SWEEP_SLAB, SWEEP_WIDTH = SWEEPS = ("sweep_tasks", "sweep_slab", "sweep_width")
TASK_COUNTS = tuple(2**power for power in range(8))
TASKS_LAYER = Layer.of(128, (16, 16))
SERIES_TASKS, SERIES_BATCH = 8, 8  # of the other two
SLAB_LAYERS = tuple(Layer.of(64, (2**power, 2**power)) for power in range(1, 9))
WIDTH_LAYERS = tuple(Layer.of_rows(2**power, 2 ** (17 - power)) for power in range(4, 15, 2))
LEAST_WIDTH = 16
GIVEN = "shape"  # the workload of what a user gives


def parse_shape(text: str) -> tuple[int, int, Layer]:
    """Tasks, samples of each and layer of ``TxN,C,H,W`` or ``TxN,C``, or of layer normalisation ``TxN,L,D``.

    Raises:
        ValueError: the text is no such shape.
    """
    found = re.fullmatch(r"(\d+)x(\d+)((?:,\d+){1,3})", text)
    sizes = [int(size) for size in re.findall(r"\d+", text)] if found else [0]
    if 0 in sizes:
        raise ValueError(
            f"{text!r} is no shape; expected TASKSxSAMPLES,CHANNELS[,HEIGHT,WIDTH], such as 40x16,64,32,32, or "
            "for layer normalisation TASKSxSAMPLES,TOKENS,WIDTH, such as 5x8,1024,384"
        )
    tasks, samples, channels, *size = sizes
    if len(size) == 1:
        if size[0] < LEAST_WIDTH:
            raise ValueError(
                f"{text!r} has rows of {size[0]}; of random rows below {LEAST_WIDTH} values some have so small a "
                "deviation that rounding hides what is wrong"
            )
        return tasks, samples, Layer.of_rows(size[0], channels)
    if samples * math.prod(size) < 2:
        raise ValueError(f"{text!r} has a single value for each task and channel; statistics need two")
    return tasks, samples, Layer.of(channels, tuple(size))


def activation_named(workload: str) -> str:
    """The activation in a :attr:`Case.record_name`."""
    return workload.partition("+")[2] or NO_ACTIVATION
