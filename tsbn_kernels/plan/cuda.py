"""Which CUDA C++ kernel runs a problem, how it is cut, what it moves: pure functions of shape, strides and device.

The numbers of a launch are all computed here; csrc/cuda only fills in the pointers. A *slot* is 16 bytes of storage, or
one element where 16-byte accesses would be misaligned; csrc/cuda/params.h says how a slab is cut into slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from tsbn_kernels.activations import EPILOGUES
from tsbn_kernels.plan.core import LAUNCH_SECONDS, Plan
from tsbn_kernels.plan.core import Variant as PlanVariant
from tsbn_kernels.plan.devices import Device
from tsbn_kernels.plan.work import Work

Variant = Literal["streaming", "resident", "cluster", "split", "evaluation"]

DTYPE_CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
DTYPE_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
DTYPE_NAMES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}

# Passes of csrc/cuda/launch.h, and activations by the rows of csrc/activations.h.
PASSES = ("forward", "backward", "forward_epilogue", "backward_epilogue", "backward_fan_out")
ACTIVATION_CODES = {name: code for code, name in enumerate(EPILOGUES)}

REDUCE, SPILL, COMBINE, APPLY = 1, 2, 4, 8  # Phase of csrc/cuda/params.h
CLUSTERS = (2, 4, 8, 16)
MOST_SLOTS = 1 << 30  # of a block: its slots and their sums with an offset are 32-bit
THREADS = 256
SPLITS = (2, 4, 8, 16, 32, 64)
MOST_SCRATCH = 1 << 16  # of a fan-out's block, bytes: so much that two are resident on most devices
BUBBLE_SECONDS = 1.5e-6  # of a block, from its last load to its first store: assumed, nobody measured it
LATENCY_SECONDS = 0.8e-6  # of a load under load: assumed


class Strides(NamedTuple):
    """The strides of a ``[T, N, C, S]`` view, in elements; ``residue`` is the address in elements modulo 16 bytes."""

    t: int
    n: int
    c: int
    s: int
    residue: int = 0


@dataclass(frozen=True)
class Problem:
    """What is to be computed; ``dy`` is None in a forward pass.

    In a fan-out x (and dx, the backward's ``out``) have no task axis: their task stride is 0.
    """

    dtype: str
    T: int
    N: int
    C: int
    S: int
    x: Strides
    out: Strides | None
    dy: Strides | None = None
    rows: bool = True
    training: bool = True
    parameter_dtype: str = "float32"
    bias: bool = False  # backward: dbias is wanted
    dweight: bool = True
    activation: str = "none"
    residual: Strides | None = None
    dresidual: Strides | None = None
    reads_bias: bool = False  # backward: z is computed again, and has one
    fan_out: bool = False

    @property
    def kernels(self) -> str:
        """The name of the kernels, one of :data:`PASSES`."""
        if not self.backward:
            plain = self.activation == "none" and self.residual is None and not self.fan_out
            return "forward" if plain else "forward_epilogue"
        if self.fan_out:
            return "backward_fan_out"
        return "backward" if self.activation == "none" else "backward_epilogue"

    @property
    def slab_tasks(self) -> int:
        """Tasks that share a slab of x."""
        return self.T if self.fan_out else 1

    @property
    def size(self) -> int:
        return DTYPE_SIZES[self.dtype]

    @property
    def accumulate_size(self) -> int:
        return 8 if self.dtype == "float64" else 4

    @property
    def backward(self) -> bool:
        return self.dy is not None

    @property
    def operands(self) -> tuple[Strides, ...]:
        return tuple(o for o in (self.x, self.dy, self.out, self.residual, self.dresidual) if o is not None)

    @property
    def sums(self) -> bool:
        """Whether anything needs sums over the slab."""
        return self.two_passes or (self.training if not self.backward else self.dweight or self.bias)

    @property
    def reads_x(self) -> bool:
        """Whether anything needs x."""
        return not self.backward or self.sums or self.activation != "none"

    @property
    def registers(self) -> int:
        """The budget a thread: kForwardBlocks and kBackwardBlocks of csrc/cuda/params.h."""
        if self.kernels in ("backward_epilogue", "backward_fan_out") and self.dtype == "float64":
            return 255
        return 128 if self.backward or self.dtype == "float64" else 80

    @property
    def two_passes(self) -> bool:
        """Whether the output needs sums over the slab first."""
        return self.training and self.out is not None


@dataclass(frozen=True)
class Cut:
    """How slabs are cut into slots, before any choice."""

    kernel: Literal["rows", "columns", "scalar"]
    vector: int  # elements of a slot
    masked: bool
    log_lanes: int
    tiles: int  # slabs of a task
    slots: int  # of a slab
    divisor: int
    run: int
    x: Strides
    dy: Strides
    out: Strides
    residual: Strides
    dresidual: Strides

    @property
    def width(self) -> int:
        """Channels of a slab."""
        return (self.vector if self.kernel == "columns" else 1) << self.log_lanes


def _used(problem: Problem, o: Strides, joined: bool) -> tuple[int, ...]:
    """The strides that addresses of slots are made of, 0 for those along which there is one step."""
    return (
        o.t if problem.T > 1 else 0,
        o.n if problem.N > 1 and not joined else 0,
        o.c if problem.C > 1 else 0,
        o.s if problem.S > 1 or joined else 0,
    )


@lru_cache(maxsize=4096)
def cut(problem: Problem) -> Cut:
    """Slots of 16 bytes where all operands can be read so, else of one element."""
    p = problem
    wide = 16 // p.size
    joined = p.N == 1 or p.S == 1 or all(o.n == p.S * o.s for o in p.operands)
    steps = {o: o.n if p.S == 1 and p.N > 1 else o.s for o in p.operands}  # from a position to the next
    inner, outer = (p.N * p.S, 1) if joined else (p.S, p.N)
    masked = False
    if p.rows:
        residues = [tuple(s % wide for s in (*_used(p, o, joined)[:3], o.residue)) for o in p.operands]
        whole = not any(map(any, residues)) and inner % wide == 0
        masked = not whole and wide > 1 and len(set(residues)) == 1
        kernel, vector = ("rows", wide) if whole or masked else ("scalar", 1)
        divisor = -(-(inner + wide - 1) // wide) if masked else inner // vector
        log_lanes, tiles, step = 0, p.C, dict.fromkeys(p.operands, vector)
    else:
        whole = p.C % wide == 0 and not any(
            s % wide for o in p.operands for s in (*_used(p, o, joined)[:2], steps[o] if inner > 1 else 0, o.residue)
        )
        few = not p.fan_out or scratch_bytes(p, wide, 32) <= MOST_SCRATCH  # tasks whose sums a block can keep
        kernel, vector = ("columns", wide) if whole and wide > 1 and few else ("scalar", 1)
        log_lanes = min((-(-p.C // vector) - 1).bit_length(), 3 if vector > 1 else 5)
        while p.fan_out and log_lanes and scratch_bytes(p, vector << log_lanes, THREADS) > MOST_SCRATCH:
            log_lanes -= 1
        tiles = -(-p.C // (vector << log_lanes))
        divisor, step = inner, steps
    slots = (outer * divisor) << log_lanes
    if joined and not masked:
        divisor = min(divisor, MOST_SLOTS)
    if divisor > MOST_SLOTS:
        raise ValueError(f"a run of {inner} elements is longer than the CUDA kernels read")
    if joined and not masked:
        placed = {o: o._replace(n=divisor * step[o], s=step[o]) for o in p.operands}
    else:
        placed = {o: o._replace(s=step[o]) for o in p.operands}
    none = Strides(0, 0, 0, 0)
    operands = (none if o is None else placed[o] for o in (p.x, p.dy, p.out, p.residual, p.dresidual))
    return Cut(kernel, vector, masked, log_lanes, tiles, slots, divisor, inner, *operands)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Launch:
    """A plan as the kernels take it."""

    variant: Variant
    kernel: str
    threads: int
    blocks: int
    cluster: int
    shared: int
    phases: tuple[int, ...]  # one for each launch
    parts: int
    part_slots: int
    resident: int
    partial_bytes: int
    staged_bytes: int
    bytes_read: int
    bytes_written: int

    @property
    def launches(self) -> int:
        return len(self.phases)


def scratch_bytes(problem: Problem, width: int, threads: int) -> int:
    """Shared memory before the resident slots: a state for each warp, block and its factors, for each channel."""
    warps, tasks = threads // 32, problem.slab_tasks
    if problem.kernels == "backward_fan_out":  # two sums for each warp and task, factors of each task and of dx
        values = 2 * warps * tasks + 4 * tasks + 4
    else:
        values = 4 * (warps + 1 + (2 if problem.kernels == "backward_epilogue" else tasks))
    return values * width * problem.accumulate_size


def lay_out(
    problem: Problem, variant: Variant, parts: int = 1, *, shared_limit: int = 0, threads: int = 0, resident: int = -1
) -> Launch:
    """The launch of a variant.

    Args:
        problem: what is to be computed.
        variant: how.
        parts: blocks that share a slab.
        shared_limit: the most shared memory of a block.
        threads: of a block; 0 chooses.
        resident: slots that a block keeps; -1 for all that fit.

    Raises:
        ValueError: the variant does not exist for the problem.
    """
    p, pieces = problem, cut(problem)
    if parts > 1 and (variant in ("streaming", "resident") or (variant == "evaluation" and p.sums)):
        raise ValueError(f"{parts} blocks that sum one slab must meet: in a cluster, or in a second launch")
    if p.kernels == "backward_fan_out" and variant in ("resident", "cluster"):
        raise ValueError("a fan-out's backward keeps nothing on chip: h is 1/T of what it reads")
    slabs = p.T // p.slab_tasks * pieces.tiles
    part_slots = -(-pieces.slots // parts)
    part_slots = -(-part_slots >> pieces.log_lanes) << pieces.log_lanes
    if part_slots > MOST_SLOTS:
        raise ValueError(f"{part_slots} slots in a block; more parts are needed")
    if not threads:
        threads = min(THREADS, max(32, pieces.width, 1 << (part_slots - 1).bit_length()))
        while threads > max(32, pieces.width) and scratch_bytes(p, pieces.width, threads) > MOST_SCRATCH:
            threads //= 2
    scratch = scratch_bytes(p, pieces.width, threads)
    slot_bytes = pieces.vector * p.size * (2 + (p.residual is not None) if p.backward else 1)
    keeps = variant in ("resident", "cluster") and p.two_passes
    room = max(0, shared_limit - scratch) // slot_bytes if keeps else 0
    kept = min(part_slots, room) if resident < 0 else min(resident, part_slots, room)
    if kept < part_slots:
        kept = kept // threads * threads  # whole steps of the block: a warp's slots are all kept, or none
    if variant == "evaluation":
        phases: tuple[int, ...] = (REDUCE,) if p.sums else (APPLY,)
    elif variant == "split":
        phases = (REDUCE | SPILL, COMBINE | APPLY if p.two_passes else COMBINE)
    else:
        phases = (REDUCE | APPLY if p.two_passes else REDUCE,)
    values = 2 * p.slab_tasks if p.backward else 4
    states = slabs * parts * pieces.width * values * p.accumulate_size if variant == "split" else 0
    staged = 0
    if p.kernels == "backward_fan_out" and p.two_passes and p.size < p.accumulate_size:
        staged = slabs * parts * -(-part_slots // threads) * threads * pieces.vector * p.accumulate_size
    read, written = _traffic(p, pieces, variant, parts, part_slots, kept)
    return Launch(
        variant, pieces.kernel, threads, slabs * parts, parts if variant == "cluster" else 1,
        scratch + kept * slot_bytes, phases, parts, part_slots, kept, states, staged,
        read + parts * states, written + states,
    )  # fmt: skip


def _traffic(p: Problem, pieces: Cut, variant: Variant, parts: int, part_slots: int, kept: int) -> tuple[int, int]:
    """Bytes of global memory read and written; between masked slots, what is kept is counted by its share."""
    tensor = p.T * p.N * p.C * p.S * p.size
    x = tensor // p.slab_tasks
    first = x if p.reads_x else 0  # of the pass that sums, or the only one
    if p.backward:
        first += tensor * (1 + (p.residual is not None))
    read, written = first, tensor * (p.dresidual is not None)
    if p.out is not None:
        written += x if p.backward else tensor
    if not p.backward and p.residual is not None:
        read += tensor
    if p.two_passes and p.kernels == "backward_fan_out":  # h is written in accumulate precision, read again, and x
        h = x // p.size * p.accumulate_size
        if pieces.masked and p.size < p.accumulate_size:
            h = p.C * pieces.slots * pieces.vector * p.accumulate_size
        read, written = read + x + h, written + h
    elif variant != "evaluation" and p.two_passes:
        lengths = [max(0, min(part_slots, pieces.slots - k * part_slots)) for k in range(parts)]
        again = sum(max(0, length - kept) for length in lengths)
        read += first * again // pieces.slots
    statistic, parameter = p.accumulate_size, DTYPE_SIZES[p.parameter_dtype]
    if p.backward:
        read += p.T * p.C * parts * (2 if variant == "split" else 1) * ((1 + p.reads_bias) * parameter + 2 * statistic)
        read += p.T * p.C * parameter * (p.fan_out and p.dweight)  # its gate again
        written += p.T * p.C * parameter * (p.dweight + p.bias)
    else:
        read += p.T * p.C * parts * ((1 + p.bias) * parameter + (0 if p.training else 2 * statistic))
        written += p.T * p.C * 2 * statistic if p.training else 0
    return read, written


# ---- the choice --------------------------------------------------------------------------------------------------


def resident_blocks(problem: Problem, launch: Launch, device: Device) -> int:
    """Blocks that a multiprocessor holds at a time."""
    by_registers = device.registers // (problem.registers * launch.threads)
    by_shared = device.shared_memory // (launch.shared + 1024)
    return max(1, min(by_registers, by_shared, device.threads // launch.threads, 32))


def clusters_on_paper(problem: Problem, launch: Launch, device: Device) -> int:
    """Clusters (blocks, where there are none) that a device runs at a time, if it strands no multiprocessor.

    Those of a cluster share a part of the GPU, of which a driver knows how many there are and how large.
    """
    return device.multiprocessors * resident_blocks(problem, launch, device) // launch.cluster


Clusters = Callable[[Problem, Launch, Device], int]


def seconds(problem: Problem, launch: Launch, device: Device, clusters: Clusters = clusters_on_paper) -> float:
    """Predicted time, to compare plans by: bytes over bandwidth, and what keeps a plan from it."""
    held = resident_blocks(problem, launch, device)
    room = clusters(problem, launch, device) * launch.cluster
    if room == 0:
        return math.inf
    waves = launch.blocks / room
    filled = waves / math.ceil(waves) if waves > 1 else 1.0
    total = launch.bytes_read + launch.bytes_written
    in_flight = min(room, launch.blocks) * launch.threads * 64  # four slots of a thread
    flowing = min(1.0, in_flight / (device.bandwidth * LATENCY_SECONDS))
    # While one block of a multiprocessor merges its sums, others load and store.
    own = total / launch.blocks * device.multiprocessors / device.bandwidth
    busy = min(1.0, held * own / (own + BUBBLE_SECONDS)) if problem.sums else 1.0
    return total / (device.bandwidth * filled * flowing * busy) + launch.launches * LAUNCH_SECONDS


def clusters_of(device: Device) -> tuple[int, ...]:
    """Sizes that a device takes: 16 only where data centres have it."""
    most = 16 if device.target in ("sm_90", "sm_100", "sm_103") else 8
    return tuple(size for size in CLUSTERS if size <= most) if device.clusters else ()


def candidates(problem: Problem, device: Device) -> Iterator[Launch]:
    """The launches worth comparing."""
    slots = cut(problem).slots
    if not problem.two_passes and not problem.sums:
        for parts in (1, *SPLITS):
            if slots // parts < MOST_SLOTS:
                yield lay_out(problem, "evaluation", parts)
        return
    streaming: Variant = "streaming" if problem.training else "evaluation"
    if slots <= MOST_SLOTS:
        yield lay_out(problem, streaming)
    keeps = problem.two_passes and problem.kernels != "backward_fan_out"
    limits = {min(device.block_shared_memory, device.shared_memory // blocks - 1024) for blocks in (1, 2, 3)}
    for limit in sorted(limits) if keeps else (0,):
        if keeps and slots <= MOST_SLOTS:
            resident = lay_out(problem, "resident", shared_limit=limit)
            if resident.resident > 0:
                yield resident
        for size in clusters_of(device) if problem.kernels != "backward_fan_out" else ():
            if slots >= size * 32 and slots // size < MOST_SLOTS:
                yield lay_out(problem, "cluster", size, shared_limit=limit)
    for parts in SPLITS:
        if slots >= parts * 4 * THREADS and slots // parts < MOST_SLOTS:
            yield lay_out(problem, "split", parts)


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, clusters: Clusters = clusters_on_paper) -> Launch:
    """The launch with the least predicted time; of equal ones the simplest.

    Args:
        problem: what is to be computed.
        device: where.
        clusters: how many of a launch run at a time; none where it returns 0.

    Raises:
        ValueError: the device has no room for any.
    """
    fitting = [launch for launch in candidates(problem, device) if launch.shared <= device.block_shared_memory]
    if not fitting:
        raise ValueError(f"{device.name} has no room for {problem.T} tasks of {problem.C} channels in this layout")
    return min(fitting, key=lambda launch: (seconds(problem, launch, device, clusters), launch.launches, launch.parts))


def dense(work: Work) -> Problem:
    """The problem of a dense, task-major tensor."""
    T, N, C, S = work.tasks, work.samples, work.channels, work.positions
    rows = work.family == "rows"
    t = N * C * S
    out = Strides(t, C * S, S if rows else 1, 1 if rows else C)
    x = out._replace(t=0) if work.shared_input or work.fan_out else out
    backward = work.direction == "backward"
    through = not backward or work.activation != "none"  # whether the pass computes z
    like = x if backward and work.fan_out else out
    dtype = {8: "float64", 4: "float32", 2: "bfloat16"}[work.item_size]
    return Problem(
        dtype, T, N, C, S, x, None if backward and not work.needs_dx else like, out if backward else None, rows=rows,
        training=work.training, bias=work.bias, dweight=work.needs_dweight,
        parameter_dtype={8: "float64", 4: "float32", 2: "bfloat16"}[work.parameter_size],
        activation=work.activation, residual=out if work.residual and through else None,
        dresidual=out if work.needs_dresidual and through and backward else None,
        reads_bias=work.bias and through and backward, fan_out=work.fan_out,
    )  # fmt: skip


def plan(work: Work, device: Device, variant: Variant | None = None) -> Plan:
    """The plan for some work, by rule or (``variant``) the best of one kind, for people and comparisons.

    Raises:
        ValueError: the work or the device has no such variant.
    """
    problem = dense(work)
    if variant is None:
        launch = choose(problem, device)
    else:
        found = [launch for launch in candidates(problem, device) if launch.variant == variant]
        if not found:
            raise ValueError(f"{device.name} has no {variant} kernel for this work")
        launch = min(found, key=lambda one: seconds(problem, one, device))
    return as_plan(problem, launch, work, device)


def as_plan(problem: Problem, launch: Launch, work: Work, device: Device) -> Plan:
    """A launch in the terms that the backends share."""
    pieces = cut(problem)
    kept = min(1.0, launch.resident / launch.part_slots)
    names: dict[Variant, PlanVariant] = {"split": "split", "evaluation": "elementwise"}
    whole: PlanVariant = "resident" if kept == 1 else "streaming"
    tile = (launch.threads >> pieces.log_lanes, pieces.width) if pieces.kernel == "columns" else (
        1, launch.threads * pieces.vector
    )  # fmt: skip
    return Plan(
        work, device, names.get(launch.variant, whole), launch.blocks // launch.parts, tile,
        -(-pieces.slots // launch.threads), launch.threads // 32, problem.registers, launch.shared,
        splits=1 if launch.cluster > 1 else launch.parts, cluster=launch.cluster, on_chip=kept,
        kernels=launch.launches,
    )  # fmt: skip


def numbers(problem: Problem, launch: Launch, phases: int, sigmoid: bool, vectors: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of csrc/cuda/params.h for one launch; ``vectors``: dtype, t, c of weight, bias, mean and var."""
    p, pieces = problem, cut(problem)
    shift = (pieces.divisor - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - pieces.divisor)) // pieces.divisor + 1
    operands = (pieces.x, pieces.dy, pieces.out, pieces.residual, pieces.dresidual)
    strides = (value for o in operands for value in o[:4])
    waits = p.two_passes if p.backward else p.training
    return (
        phases, int(waits), int(sigmoid), int(pieces.masked), p.C, pieces.tiles, pieces.log_lanes, launch.parts,
        pieces.slots, launch.part_slots, launch.resident, pieces.divisor, multiplier, shift, pieces.run, p.N * p.S,
        ACTIVATION_CODES[p.activation], p.slab_tasks, *strides, *vectors,
    )  # fmt: skip
