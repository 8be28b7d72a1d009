"""Every Triton kernel that the layers of the known networks ask for, compiled for every kind of GPU, as a table.

``python -m benchmarks compiled-kernels`` writes the table; a test keeps it true and holds the plans to it.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.offline import Call, compile_call, recorded, resources, specialize
from benchmarks.workloads import CELEBA40, DTYPES
from tsbn_kernels.backends.triton.fan_out_passes import FanOutBackward, FanOutForward
from tsbn_kernels.backends.triton.passes import Backward, Forward, work_of
from tsbn_kernels.plan import DEVICES, Device, Plan
from tsbn_kernels.plan import triton as rules

TABLE = Path(__file__).with_name("compiled_kernels.csv")
COMPILER = f"Triton {triton.__version__}"

# The GPU whose plans a target's kernels are compiled for.
TARGETS = {
    "sm_80": "A100",
    "sm_86": "RTX3090",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "RTX5090",
    "gfx90a": "MI250X",
    "gfx942": "MI300X",
}
PASSES = ("forward", "eval", "backward")
KINDS = ("float32", "bfloat16")
FORMATS = ("contiguous", "channels_last")
STACKINGS = {"celeba40": ("task_major", "sample_major"), "segnet": ("task_major",), "resnet50": ("task_major",)}

Shape = tuple[int, ...]  # of the activation: T, N, C, and height and width if it has them

# Channels by how much smaller than the input their activations are.
_SEGNET = {1: (64,), 2: (64, 128), 4: (128, 256), 8: (256, 512), 16: (512,)}
_RESNET50 = {2: (64,), 4: (64, 128, 256), 8: (128, 256, 512, 1024, 2048)}


def layers() -> Iterator[tuple[str, Shape]]:
    """The shapes of the networks' layers: 40-task CelebA, SegNet on NYUv2, dilated ResNet-50 in three settings."""
    for layer in CELEBA40:
        yield "celeba40", (40, *Shape((256, *layer.shape(1, 1)[1:])))
    for scale, widths in _SEGNET.items():
        yield from (("segnet", (3, 4, channels, 288 // scale, 384 // scale)) for channels in widths)
    for tasks, samples, height, width in ((3, 4, 256, 256), (3, 4, 288, 384), (2, 16, 128, 256)):
        for scale, widths in _RESNET50.items():
            yield from (("resnet50", (tasks, samples, c, height // scale, width // scale)) for c in widths)
        yield "resnet50", (tasks, samples, 256, 1, 1)  # of the pooling branch


@dataclass(frozen=True)
class Asked:
    """A kernel that a layer asks for, and the plan that asks."""

    network: str
    shape: Shape
    dtype: str
    memory_format: str
    stacking: str
    pass_: str
    plan: Plan
    call: Call


def passes(
    shape: Shape, dtype: str, memory_format: str, stacking: str, device: Device, activation: str = "none",
    residual: bool = False, shared: bool = False,
) -> Iterator[tuple[str, Plan, list[Call]]]:  # fmt: skip
    """The launches of the passes over a layer, with what is fused, on tensors that take no memory."""
    tasks, samples, *sizes = shape

    def stacked(samples: int) -> Tensor:
        made = torch.empty((samples, *sizes), dtype=DTYPES[dtype], device="meta")
        return made.to(memory_format=torch.channels_last) if memory_format == "channels_last" else made

    y = stacked(tasks * samples)
    x, added = stacked(samples) if shared else y, y if residual else None
    vector = torch.empty((tasks, sizes[0]), device="meta")
    fused = {"activation": activation, "residual": residual, "fan_out": shared}
    bias = vector if activation != "none" else None
    options = tasks, stacking, 1e-5, "sigmoid", added
    for name in PASSES:
        back = name == "backward"
        work = work_of(
            x, tasks, stacking, direction="backward" if back else "forward", training=name != "eval",
            needs_dresidual=back and residual, **fused,
        )  # fmt: skip
        plan = rules.plan(work, device)
        with recorded() as calls:
            if back:
                gradients = (FanOutBackward if shared else Backward)(plan, y, x, *options)
                dx, dresidual = gradients.input_like(x), gradients.stacked_like(y) if residual else None
                gradients(y, x, vector, bias, vector, vector, added, dx, vector, None, dresidual)
            else:
                values = (FanOutForward if shared else Forward)(plan, x, *options)
                values(x, values.stacked_like(x), vector, bias, vector, vector, added)
        yield name, plan, calls


@cache
def asked(target: str) -> list[Asked]:
    """Each specialisation of a kernel once, with the first layer that asks for it."""
    found: dict[Hashable, Asked] = {}
    for network, shape in layers():
        for dtype in KINDS:
            formats = FORMATS if len(shape) > 3 else FORMATS[:1]
            for memory_format, stacking in product(formats, STACKINGS[network]):
                for name, plan, calls in passes(shape, dtype, memory_format, stacking, DEVICES[TARGETS[target]]):
                    for call in calls:
                        one = Asked(network, shape, dtype, memory_format, stacking, name, plan, call)
                        found.setdefault(specialize(call, target).key, one)
    return list(found.values())


@dataclass(frozen=True)
class Row:
    """A compiled kernel: which, for what; what the plan allows it, and what it takes."""

    target: str
    kernel: str
    pass_: str
    shape: str
    dtype: str
    memory_format: str
    stacking: str
    family: str
    variant: str
    tile: str
    even: bool
    warps: int
    registers: int
    register_budget: int
    shared: int
    shared_budget: int
    resident_programs: int
    planned_programs: int
    spills: int
    load_bytes: str  # widths of the loads and stores that move activations
    store_bytes: str
    compiler: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells one row from another."""
        return self.target, self.kernel, self.pass_, self.shape, self.dtype, self.memory_format, self.stacking

    @property
    def within_budget(self) -> bool:
        """Whether it does not spill, and takes no more registers and shared memory than planned."""
        return (
            self.spills == 0 and self.registers <= self.register_budget and self.shared <= self.shared_budget
            and self.resident_programs >= self.planned_programs
        )  # fmt: skip


def row(target: str, index: int) -> Row:
    """Compiles one of the kernels that are asked for."""
    one = asked(target)[index]
    plan = one.plan
    compiled, _ = compile_call(one.call, target)
    used = resources(compiled)
    return Row(
        target, one.call.launch.kernel, one.pass_, _by(one.shape), one.dtype, one.memory_format, one.stacking,
        plan.work.family, plan.variant, _by(plan.tile), rules.is_even(plan.work, plan.tile), plan.warps,
        used.registers, plan.registers, used.shared, plan.shared,
        replace(plan, registers=used.registers, shared=used.shared).resident_programs, plan.resident_programs,
        used.spills, " ".join(map(str, used.loads)), " ".join(map(str, used.stores)), COMPILER,
    )  # fmt: skip


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def rows(chosen: Sequence[tuple[str, int]], workers: int = 2, notify: Callable[[Row], None] | None = None) -> list[Row]:
    """Compiles several, in processes of their own."""
    made = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for one in pool.map(row, *zip(*chosen, strict=True), chunksize=4):
            made.append(one)
            if notify:
                notify(one)
    return made


def everything() -> list[tuple[str, int]]:
    """Target and index of all that is asked for."""
    return [(target, index) for target in TARGETS for index in range(len(asked(target)))]


def write(path: Path, table: Sequence[Row]) -> None:
    """Writes the table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name.rstrip("_") for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name.rstrip("_"): value for name, value in asdict(one).items()} for one in table)


def read(path: Path = TABLE) -> list[Row]:
    """Reads a table that was written."""

    def value(text: str, kind: str) -> object:
        return int(text) if kind == "int" else text == "True" if kind == "bool" else text

    with path.open(newline="") as file:
        return [
            Row(*(value(line[field.name.rstrip("_")], str(field.type)) for field in fields(Row)))  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]
