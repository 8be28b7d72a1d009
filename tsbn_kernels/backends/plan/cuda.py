"""The rules of the CUDA C++ backend: which kernel does a piece of work, and how it is cut. Pure functions.

The numbers of a launch are all computed here; csrc/cuda only fills in the pointers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from tsbn_kernels.backends.plan.core import Plan, Variant
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.expect import expected
from tsbn_kernels.backends.plan.slots import (
    LOG_LANES,
    MOST_SCRATCH,
    MOST_SLOTS,
    THREADS,
    Cut,
    cut,
    held_slots,
    pass_of,
    scratch_bytes,
)
from tsbn_kernels.backends.plan.work import Strides, Work
from tsbn_kernels.definition.activations import EPILOGUES

DTYPE_CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
ACTIVATION_CODES = {name: code for code, name in enumerate(EPILOGUES)}  # by the rows of csrc/activations.h

REDUCE, SPILL, COMBINE, APPLY = 1, 2, 4, 8  # Phase of csrc/cuda/params.h
SPLITS = (2, 4, 8, 16, 32, 64)
LEAST_BLOCK = 8 << 10  # bytes of a slab that a block of a cluster has at least: with fewer it waits more than it loads
LEAST_KEPT = 0.25  # of a slab: clusters that keep less do not make up for what they wait


@dataclass(frozen=True, kw_only=True)
class CudaPlan(Plan):
    """A plan of the CUDA C++ kernels, and in what they differ from the rule of what is moved.

    Attributes:
        part_slots: slots of a block.
        resident: those that it keeps on chip, in shared memory and in registers.
        most_lanes: of its slabs, see :func:`tsbn_kernels.backends.plan.slots.cut`.
        teams: slabs that are worked on at a time, by blocks that go on to others; 0 where each has blocks of its own.
    """

    backend = "cuda"
    part_slots: int
    resident: int
    most_lanes: int = LOG_LANES
    teams: int = 0

    @property
    def cut(self) -> Cut:
        """The slots of its slabs."""
        return cut(self.work, self.most_lanes)

    @property
    def programs(self) -> int:
        """Thread blocks of each launch."""
        return (self.teams or self.slabs) * self.parts

    @property
    def rounds(self) -> float:
        """Slabs that a block works on, one after the other, in the mean."""
        return self.slabs / self.teams if self.teams else 1.0

    @property
    def meetings(self) -> int:
        """How often a block meets others of its slab through memory: with its sums, and with those that it merged."""
        return 2 if self.teams else 0

    @property
    def in_step(self) -> int:
        """Blocks of a multiprocessor that wait for the same sums: those of one team."""
        return -(-self.resident_programs // self.teams) if self.teams else 1

    @property
    def merged_bytes(self) -> int:
        """Bytes of the sums of slabs, of which each block merges some and reads all."""
        return self.partial_bytes // self.parts if self.teams else 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes of what blocks leave for others: their sums, those that are merged, and counters at which they meet."""
        return self.partial_bytes + self.merged_bytes + self._counter_bytes

    @property
    def _counter_bytes(self) -> int:
        return 4 * self.slabs if self.teams else 0

    @property
    def phases(self) -> tuple[int, ...]:
        """What is done, for each launch."""
        work = self.work
        if self.variant == "evaluation":
            return (REDUCE if work.reduces else APPLY,)
        if self.variant == "split":
            return REDUCE | SPILL, COMBINE | APPLY if work.two_passes else COMBINE
        if self.variant == "together":
            return (REDUCE | SPILL | COMBINE | (APPLY if work.two_passes else 0),)
        return (REDUCE | APPLY if work.two_passes else REDUCE,)

    @property
    def values(self) -> int:
        """Values of a channel that the kernels divide by."""
        return self.work.values

    @property
    def of_samples(self) -> tuple[int, int, int]:
        """Samples of a mixed batch, those of a block at most, and tasks; else zeros."""
        return 0, 0, 0

    def phases_of(self, half: str) -> tuple[int, ...]:
        """What is done for the sums alone, or for the result by given sums, of a plan of two launches."""
        if half == "sums":
            return (REDUCE | SPILL,)
        return (APPLY, COMBINE | APPLY) if self.work.gathers else (COMBINE | APPLY,)

    @property
    def on_chip(self) -> float:
        """The part of a block's slots that stays on chip."""
        return self.resident / self.part_slots

    @property
    def exchanges(self) -> int:
        """How often a block waits for the sums of all its threads, and for those of the blocks that it meets."""
        return self.work.reduces * (1 + (self.cluster > 1) + self.meetings)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of loads that a block has under way at a time: four slots of a thread."""
        return self.threads * 4 * self.cut.vector * self.work.item_size

    @property
    def bytes_read_again(self) -> int:
        """Bytes of activations that are loaded again; those of masked slots are counted by their share."""
        full, rest = divmod(self.cut.slots, self.part_slots)
        again = full * (self.part_slots - self.resident) + max(0, rest - self.resident)
        return self.work.bytes_to_sum * again // self.cut.slots

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the sum of the tasks' gradients; a buffer of its own holds whole slots."""
        if self.cut.masked and self.staged_bytes:
            return self.work.channels * self.cut.slots * self.cut.vector * self.work.statistics_size
        return super().gathered_bytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of the buffer for that sum, where dx has not the dtype of the arithmetic."""
        work = self.work
        if not (work.gathers and work.two_passes) or work.item_size == work.statistics_size:
            return 0
        rounds = -(-self.part_slots // self.threads)
        return self.programs * rounds * self.threads * self.cut.vector * work.statistics_size

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors and partial sums that the kernels load: a fan-out's gate again, for its gradient."""
        work = self.work
        if self.teams:  # each sum is read by the block that merges it, and what is merged by all
            return self.parts * (work.vector_bytes_to_read + self.merged_bytes) + self.partial_bytes
        return super().vector_bytes_read + work.parameter_bytes * (work.gathers and work.needs_dweight)

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors, partial sums and counters that the kernels store."""
        return super().vector_bytes_written + self.merged_bytes + self._counter_bytes

    @property
    def summed_channels(self) -> int:
        """Channels that have partial sums: those of whole slabs."""
        return self.cut.tiles * self.cut.width


def lay_out(
    work: Work,
    device: Device,
    variant: Variant,
    parts: int = 1,
    *,
    most_shared_bytes: int = 0,
    threads: int = 0,
    resident: int = -1,
    most_lanes: int = LOG_LANES,
    teams: int = 0,
) -> CudaPlan:
    """The plan of a variant in which ``parts`` blocks share a slab.

    Args:
        most_shared_bytes: of a block.
        threads: of a block; 0 chooses.
        resident: slots that a block keeps, at least those in registers; -1 for all that fit.
        most_lanes: of a slab.
        teams: of ``parts`` blocks, that go from slab to slab; for the variant "together" alone.

    Raises:
        ValueError: the variant does not exist for the work.
    """
    pieces = cut(work, most_lanes)
    if parts > 1 and (variant in ("streaming", "resident") or (variant == "evaluation" and work.reduces)):
        raise ValueError(f"{parts} blocks that sum one slab must meet: in a cluster, or in a second launch")
    if (variant == "together") != (teams > 0):
        raise ValueError(f"{teams} teams of blocks in the variant {variant}")
    if teams and pieces.access != "columns":
        raise ValueError(f"the whole device shares columns, not {pieces.access}")
    keeping = variant in ("resident", "cluster", "together")
    if work.gathers and keeping:
        raise ValueError("a fan-out's backward keeps nothing on chip: h is 1/T of what it reads")
    part_slots = -(-pieces.slots // parts)
    part_slots = -(-part_slots >> pieces.log_lanes) << pieces.log_lanes
    if part_slots > MOST_SLOTS:
        raise ValueError(f"{part_slots} slots in a block; more parts are needed")
    if not threads:
        threads = min(THREADS, max(device.warp, pieces.width, 1 << (part_slots - 1).bit_length()))
        while threads > max(device.warp, pieces.width) and scratch_bytes(work, pieces.width, threads) > MOST_SCRATCH:
            threads //= 2
    scratch = scratch_bytes(work, pieces.width, threads)
    slot_bytes = pieces.vector * work.item_size * work.summed_activations
    keeps = keeping and work.two_passes
    held = held_slots(work) * threads if keeps and teams else 0
    room = max(0, most_shared_bytes - scratch) // slot_bytes if keeps else 0
    if resident >= 0:
        room = min(room, max(0, resident - held))
    kept = min(part_slots, held + room)
    if kept < part_slots:
        kept = kept // device.warp * device.warp  # a warp's slots are all kept, or none
    columns, cluster = pieces.access == "columns", parts if variant == "cluster" else 1
    return CudaPlan(
        work,
        device,
        variant,
        slabs=work.streams * pieces.tiles,
        tile=(threads >> pieces.log_lanes, pieces.width) if columns else (1, threads * pieces.vector),
        tiles=-(-pieces.slots // threads),
        warps=threads // device.warp,
        registers=register_budget(work, variant),
        shared_bytes=scratch + max(0, kept - held) * slot_bytes,
        splits=parts // cluster,
        cluster=cluster,
        part_slots=part_slots,
        resident=kept,
        most_lanes=most_lanes,
        teams=min(teams, work.streams * pieces.tiles),
    )


def register_budget(work: Work, variant: Variant = "streaming") -> int:
    """The registers of a thread: kForwardBlocks and kBackwardBlocks of csrc/cuda/params.h."""
    wide = work.item_size == 8
    if wide and pass_of(work) in ("backward_epilogue", "backward_fan_out", "backward_mixed"):
        return 255
    return 128 if work.backward or wide or work.ragged or variant == "together" else 80


# ---- the choice --------------------------------------------------------------------------------------------------


def clusters_on_paper(plan: CudaPlan) -> int:
    """Clusters (blocks, where there are none) that a device runs at a time, if it strands no multiprocessor.

    Those of a cluster share a part of the GPU, of which a driver knows how many there are and how large.
    """
    return plan.device.multiprocessors * plan.resident_programs // plan.cluster


Clusters = Callable[[CudaPlan], int]


def seconds(plan: CudaPlan, clusters: Clusters = clusters_on_paper) -> float:
    """Predicted time, to compare plans by: bytes over bandwidth, and what keeps a plan from it.

    Blocks that must run all at a time never end where they do not.
    """
    room = clusters(plan) * plan.cluster
    return math.inf if plan.teams and plan.programs > room else expected(plan, room=room).seconds


def candidates(work: Work, device: Device) -> Iterator[CudaPlan]:
    """The plans worth comparing."""
    slots = cut(work).slots
    if not work.reduces:
        for parts in (1, *SPLITS):
            if slots // parts < MOST_SLOTS:
                yield lay_out(work, device, "evaluation", parts)
        return
    if slots <= MOST_SLOTS:
        yield lay_out(work, device, "streaming" if work.training else "evaluation")
    keeps = work.two_passes and not work.gathers
    slab_bytes = work.values * cut(work).width * work.item_size
    limits = {min(device.block_shared_memory, device.shared_memory // blocks - 1024) for blocks in (1, 2, 3)}
    for limit in sorted(limits) if keeps else (0,):
        if keeps and slots <= MOST_SLOTS:
            resident = lay_out(work, device, "resident", most_shared_bytes=limit)
            if resident.resident > 0:
                yield resident
        for size in () if work.gathers else device.clusters:
            if slab_bytes >= size * LEAST_BLOCK and slots // size < MOST_SLOTS:
                cluster = lay_out(work, device, "cluster", size, most_shared_bytes=limit)
                if cluster.on_chip >= LEAST_KEPT or not keeps:
                    yield cluster
    for parts in SPLITS:
        if slots >= parts * 4 * THREADS and slots // parts < MOST_SLOTS:
            yield lay_out(work, device, "split", parts)
    if keeps and cut(work).access == "columns":
        yield from together(work, device)


def together(work: Work, device: Device) -> Iterator[CudaPlan]:
    """Plans in which the whole device shares columns: as many blocks have a slab as keep it, or all that there are.

    Slabs may be half as wide: 64 bytes of a position, which memory still reads at once.
    """
    for most_lanes in (LOG_LANES, LOG_LANES - 1):
        pieces = cut(work, most_lanes)
        slabs, slab_bytes = work.streams * pieces.tiles, work.values * pieces.width * work.item_size
        scratch = scratch_bytes(work, pieces.width, THREADS)
        slot_bytes = pieces.vector * work.item_size * work.summed_activations
        for blocks in range(1, 1 + device.registers // (register_budget(work, "together") * THREADS)):
            limit = min(device.block_shared_memory, device.shared_memory // blocks - 1024)
            kept = held_slots(work) * THREADS + max(0, limit - scratch) // (slot_bytes * device.warp) * device.warp
            if not kept:
                continue
            room = blocks * device.multiprocessors
            least = min(room, -(-pieces.slots // kept))
            rounds = -(-slabs // (room // least))
            teams = -(-slabs // rounds)  # no more than are needed for so many rounds
            parts = min(room // teams, slab_bytes // LEAST_BLOCK)
            if parts < 2 or pieces.slots // parts >= MOST_SLOTS:
                continue
            options = {"most_shared_bytes": limit, "most_lanes": most_lanes, "teams": teams}
            plan = lay_out(work, device, "together", parts, **options)
            if plan.on_chip >= LEAST_KEPT:
                yield plan


def half(work: Work, device: Device) -> CudaPlan:
    """The best plan of two launches, of which one alone will be made; a slab may be one part."""
    slots = cut(work).slots
    parts = [n for n in (1, *SPLITS) if n == 1 or slots >= n * 4 * THREADS]
    return min((lay_out(work, device, "split", n) for n in parts if slots // n < MOST_SLOTS), key=seconds)


@lru_cache(maxsize=4096)
def plan(
    work: Work, device: Device, clusters: Clusters = clusters_on_paper, variant: Variant | None = None
) -> CudaPlan:
    """The plan with the least predicted time; of equal ones the simplest.

    Args:
        clusters: how many clusters of a plan run at a time; none where it returns 0.
        variant: the best of one kind alone.

    Raises:
        ValueError: the work has no such variant, or the device no room for any.
    """
    found = [one for one in candidates(work, device) if variant in (None, one.variant)]
    if not found:
        raise ValueError(f"{device.name} has no {variant} kernel for this work")
    fitting = [one for one in found if one.shared_bytes <= device.block_shared_memory]
    if not fitting:
        raise ValueError(f"{device.name} has no room for {work.tasks} tasks of {work.channels} channels in this layout")
    return min(fitting, key=lambda one: (seconds(one, clusters), one.launches, one.parts))


def numbers(plan: CudaPlan, phases: int, sigmoid: bool, vectors: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of csrc/cuda/params.h for one launch; ``vectors``: dtype, t, c of weight, bias, mean and var."""
    work, pieces = plan.work, plan.cut
    shift = (pieces.divisor - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - pieces.divisor)) // pieces.divisor + 1
    strides = (value for o in pieces.operands for value in (o or Strides(0, 0, 0, 0))[:4])
    waits = work.two_passes if work.backward else work.training
    flags = phases, int(waits), int(sigmoid), int(pieces.masked)
    slabs = work.channels, pieces.tiles, pieces.log_lanes, plan.parts, plan.slabs * plan.parts
    slots = pieces.slots, plan.part_slots, plan.resident
    places = pieces.divisor, multiplier, shift, pieces.run, plan.values
    tasks = ACTIVATION_CODES[work.activation], work.tasks // work.streams, *plan.of_samples
    return *flags, *slabs, *slots, *places, *tasks, *strides, *vectors
