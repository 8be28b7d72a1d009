"""Every Triton kernel that the layers of the known networks ask for, compiled for every kind of GPU, as a table.

``python -m benchmarks compiled-kernels`` writes the table; a test keeps it true and holds the plans to it. Each row has
the fingerprint of what was compiled, so that only what has changed since is compiled again.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES
from benchmarks.profile.compile_offline import (
    COMPILER,
    Call,
    Resources,
    compile_call,
    fingerprint,
    recorded,
    resources,
    specialize,
)
from benchmarks.records.workloads import CELEBA, RESNET50, SEGNET, Layer, Workload
from tools.compile_gate import double_backward, layer_norm, mixed, mixed_layer_norm
from tools.compile_gate.double_backward import LaidOutTwice
from tools.compile_gate.layer_norm import LaidOutRows
from tools.compile_gate.mixed import LaidOutMix
from tools.compile_gate.mixed_layer_norm import LaidOutMixedRows
from tsbn_kernels.backends.plan import DEVICES, Device, Plan
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.plan.work import work_of
from tsbn_kernels.backends.triton.passes import Backward, FanOutBackward, Forward
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Options, Running, Saved

TABLE = Path(__file__).with_name("compiled_kernels.csv")

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

NARROW = (3, 32, 1024, 14, 14), (3, 32, 2048, 7, 7)  # NCHW, of a ResNet-50 at 224x224 that is not dilated

Shape = tuple[int, ...]  # of the activation: T, N, C, and height and width if it has them


class Fusion(NamedTuple):
    """What a layer does besides normalising."""

    activation: str = "none"
    residual: bool = False
    fan_out: bool = False

    def __str__(self) -> str:
        parts = "fan-out" * self.fan_out, self.activation * (self.activation != "none"), "residual" * self.residual
        return "+".join(filter(None, parts)) or "none"


PLAIN, RELU = Fusion(), Fusion("relu")
BLOCK_END = Fusion("relu", residual=True)  # the last layer of a bottleneck
STEM = Fusion("relu", fan_out=True)  # the first layer of a network
# What none of the networks asks for, but any layer may be told to do. A leaky ReLU takes what a ReLU takes, and
# hardswish takes the most of those without an exponential.
OTHERS = (
    Fusion("silu"),
    Fusion("gelu"),
    Fusion("gelu", residual=True),
    Fusion("gelu_tanh", residual=True),
    Fusion("hardswish", residual=True),
)
OTHER_STEM = Fusion("gelu", residual=True, fan_out=True)

# Of ResNet-50: channels, by how much smaller than the first layer's their activations are.
_BLOCK_ENDS = {(2, 256), (4, 512), (4, 1024), (4, 2048)}


def layers() -> Iterator[tuple[str, Shape, tuple[Fusion, ...]]]:
    """The networks' layers and what is fused with them: 40-task CelebA, SegNet on NYUv2, dilated ResNet-50 thrice."""
    usual = PLAIN, RELU, *OTHERS
    first = *usual, STEM, OTHER_STEM
    for workload in (CELEBA, SEGNET):
        for layer in workload.layers:
            yield workload.name, _shape(workload, layer), first if layer is workload.layers[0] else usual
    for workload in RESNET50:
        stem, *others = workload.layers
        yield "resnet50", _shape(workload, stem), first
        for layer in others:
            _, channels, height, _ = layer.shape(1, 1)
            ends_block = (stem.shape(1, 1)[2] // height, channels) in _BLOCK_ENDS
            yield "resnet50", _shape(workload, layer), (*usual, BLOCK_END) if ends_block else usual
        yield "resnet50", (workload.tasks, workload.batch, 256, 1, 1), usual  # of the pooling branch
    for shape in NARROW:
        yield "resnet50", shape, (PLAIN, RELU, BLOCK_END)


def _shape(workload: Workload, layer: Layer) -> Shape:
    return (workload.tasks, workload.batch, *layer.shape(1, 1)[1:])


@dataclass(frozen=True)
class LaidOut:
    """A layer of a network: how its activations lie, and what is fused with it."""

    network: str
    shape: Shape
    dtype: str
    memory_format: str
    stacking: str
    fused: Fusion

    def activation(self, *, fan_out: bool = False) -> Tensor:
        """All tasks' activation, or the one that is fanned out to them; it takes no memory."""
        tasks, samples, *sizes = self.shape
        made = torch.empty((samples if fan_out else tasks * samples, *sizes), dtype=DTYPES[self.dtype], device="meta")
        return made.to(memory_format=torch.channels_last) if self.memory_format == "channels_last" else made

    def plan(self, pass_: str, device: Device) -> Plan:
        """The plan of one of its passes."""
        back, residual = pass_ == "backward", self.fused.residual
        work = work_of(
            self.activation(fan_out=self.fused.fan_out),
            self.options(),
            direction="backward" if back else "forward",
            training=pass_ != "eval",
            residual=residual,
            needs_dresidual=back and residual,
        )
        return rules.plan(work, device)

    def options(self) -> Options:
        """What a call of it is asked for."""
        return Options(self.shape[0], 1e-5, "sigmoid", self.stacking, self.fused.activation, fan_out=self.fused.fan_out)

    def calls(self, plan: Plan) -> list[Call]:
        """The launches of such a plan."""
        activation, residual, fan_out = self.fused
        y, x = self.activation(), self.activation(fan_out=fan_out)
        vector = torch.empty((self.shape[0], self.shape[2]), device="meta")
        bias, added = vector if activation != "none" else None, y if residual else None
        options, saved = (self.options(), added), Saved(x, vector, bias, added, vector, vector)
        with recorded() as calls:
            if plan.work.direction == "backward":
                gradients = (FanOutBackward if fan_out else Backward)(plan, y, x, *options)
                dx, dresidual = gradients.input_like(x), gradients.stacked_like(y) if residual else None
                gradients(y, saved, Gradients(dx, vector, None, dresidual))
            else:
                values = Forward(plan, x, *options)
                batches = torch.empty(self.shape[0], dtype=torch.int64, device="meta")
                tracked = Running(vector, vector, batches) if plan.work.training else NOT_TRACKED
                values(saved, values.stacked_like(x), tracked)
        return calls


@dataclass(frozen=True)
class Asked:
    """A kernel that a layer asks for, and the plan that asks."""

    layer: LaidOut | LaidOutTwice | LaidOutRows | LaidOutMix | LaidOutMixedRows
    pass_: str
    plan: Plan
    call: Call


@cache
def asked(target: str) -> list[Asked]:
    """Each specialisation of a plain kernel once, with the first layer that asks for it.

    Where something is fused, the first layer of each :func:`kind` stands for all of them: to compile every
    specialisation for every epilogue would take six times as long.
    """
    found: dict[Hashable, Asked] = {}
    kinds: set[Hashable] = set()
    plain_first = sorted(_layers(), key=lambda layer: layer.fused != PLAIN)
    for layer, pass_ in product(plain_first, PASSES):
        plan = layer.plan(pass_, DEVICES[TARGETS[target]])
        if layer.fused != PLAIN:
            if (one := kind(layer, pass_, plan)) in kinds or one is None:
                continue
            kinds.add(one)
        for call in layer.calls(plan):
            key = layer.fused.fan_out, specialize(call, target).key  # a fan-out has a budget of its own
            found.setdefault(key, Asked(layer, pass_, plan, call))
    for rows, pass_ in product(layer_norm.layers(), layer_norm.PASSES):
        for plan in rows.plans(pass_, DEVICES[TARGETS[target]]):
            for call in rows.calls(plan):
                found.setdefault(specialize(call, target).key, Asked(rows, pass_, plan, call))
    for batch, pass_ in product(mixed.LAYERS, mixed.PASSES):
        whole = batch.plan(pass_, DEVICES[TARGETS[target]])
        for call in batch.calls(whole):
            found.setdefault(specialize(call, target).key, Asked(batch, pass_, whole, call))
    for twice in double_backward.LAYERS:
        both = twice.plan(DEVICES[TARGETS[target]])
        for call in twice.calls(both):
            found.setdefault(specialize(call, target).key, Asked(twice, "double backward", both, call))
    for mixed_rows, pass_ in product(mixed_layer_norm.LAYERS, mixed_layer_norm.PASSES):
        of_rows = mixed_rows.plan(pass_, DEVICES[TARGETS[target]])
        for call in mixed_rows.calls(of_rows):
            found.setdefault(specialize(call, target).key, Asked(mixed_rows, pass_, of_rows, call))
    return list(found.values())


def kind(layer: LaidOut, pass_: str, plan: Plan) -> Hashable:
    """What layers have in common of which one is compiled; None: it is not.

    Of blocks' ends and stems one for each variant, dtype and budget of registers, with masks and without. Of bare
    activations and of what no network asks for, only in the dtype that takes more registers (float32 in rows, bfloat16
    in columns), whatever the budget.
    """
    work = plan.work
    which = layer.fused, pass_, work.family, plan.variant, rules.is_even(work, plan.tile)
    if layer.fused in (BLOCK_END, STEM):
        return which, layer.dtype, plan.registers
    hardest = {"rows": "float32", "columns": "bfloat16"}[work.family]
    return which if layer.dtype == hardest else None


def _layers() -> Iterator[LaidOut]:
    for (network, shape, fused), dtype in product(layers(), KINDS):
        formats = FORMATS if len(shape) > 3 and shape not in NARROW else FORMATS[:1]
        for options in product(formats, STACKINGS[network], fused):
            yield LaidOut(network, shape, dtype, *options)


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
    fused: str
    family: str
    variant: str
    tile: str
    even: bool
    warps: int
    cluster: int
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
    fingerprint: str

    @property
    def used(self) -> Resources:
        """What the compiler gave it."""
        loads, stores = (tuple(map(int, widths.split())) for widths in (self.load_bytes, self.store_bytes))
        return Resources(self.registers, self.shared, self.spills, loads, stores)

    @property
    def key(self) -> tuple[str, ...]:
        """What tells one row from another."""
        where = self.shape, self.dtype, self.memory_format, self.stacking, self.fused, self.tile
        return self.target, self.kernel, self.pass_, *where

    @property
    def within_budget(self) -> bool:
        """Whether it does not spill, and takes no more registers and shared memory than planned."""
        return (
            self.spills == 0
            and self.registers <= self.register_budget
            and self.shared <= self.shared_budget
            and self.resident_programs >= self.planned_programs
        )


def compiled(target: str, index: int) -> Resources:
    """Compiles one of the kernels that are asked for."""
    kernel, _ = compile_call(asked(target)[index].call, target)
    return resources(kernel)


def row(target: str, index: int, used: Resources, told: str) -> Row:
    """Says what one of the kernels that are asked for takes, beside what its plan allows it; told: its fingerprint."""
    one = asked(target)[index]
    plan, layer = one.plan, one.layer
    return Row(
        target=target,
        kernel=one.call.launch.kernel,
        pass_=one.pass_,
        shape=_by(layer.shape),
        dtype=layer.dtype,
        memory_format=layer.memory_format,
        stacking=layer.stacking,
        fused=str(layer.fused),
        family=plan.work.family,
        variant=plan.variant,
        tile=_by(plan.tile),
        even=rules.is_even(plan.work, plan.tile),
        warps=plan.warps,
        cluster=plan.cluster,
        registers=used.registers,
        register_budget=plan.registers,
        shared=used.shared,
        shared_budget=plan.shared_bytes,
        resident_programs=replace(plan, registers=used.registers, shared_bytes=used.shared).resident_programs,
        planned_programs=plan.resident_programs,
        spills=used.spills,
        load_bytes=" ".join(map(str, used.loads)),
        store_bytes=" ".join(map(str, used.stores)),
        compiler=COMPILER,
        fingerprint=told,
    )


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def rows(
    chosen: Sequence[tuple[str, int]],
    known: Mapping[str, Resources],
    workers: int = 2,
    notify: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Makes rows of the table.

    Args:
        chosen: target and index of each kernel.
        known: what kernels take, by their fingerprint. All others are compiled, in processes of their own.
        workers: how many processes.
        notify: is told how many kernels there are still to compile.
    """
    prints = [fingerprint(asked(target)[index].call, target) for target, index in chosen]
    missing = {one: where for one, where in zip(prints, chosen, strict=True) if one not in known}
    found = dict(known)
    if missing:
        notify(len(missing))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            made = pool.map(compiled, *zip(*missing.values(), strict=True), chunksize=4)
            for left, (one, used) in zip(reversed(range(len(missing))), zip(missing, made, strict=True), strict=True):
                found[one] = used
                notify(left)
    return [row(*where, found[one], one) for one, where in zip(prints, chosen, strict=True)]


def everything() -> list[tuple[str, int]]:
    """Target and index of all that is asked for."""
    return [(target, index) for target in TARGETS for index in range(len(asked(target)))]


def write(path: Path, table: Sequence[Row]) -> None:
    """Writes the table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name.rstrip("_") for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name.rstrip("_"): value for name, value in asdict(one).items()} for one in table)


def by_fingerprint(table: Sequence[Row]) -> dict[str, Resources]:
    """Gives what kernels take, by their fingerprint."""
    return {one.fingerprint: one.used for one in table}


def read(path: Path = TABLE) -> list[Row]:
    """Reads a table that was written."""

    def value(text: str, kind: str) -> object:
        return int(text) if kind == "int" else text == "True" if kind == "bool" else text

    with path.open(newline="") as file:
        return [
            Row(*(value(line[field.name.rstrip("_")], str(field.type)) for field in fields(Row)))  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]
