"""How the CUDA C++ kernels cut slabs into slots: 16 bytes, or one element where 16-byte accesses would be misaligned.

csrc/cuda/params.h says how a slab is made of slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from tsbn_kernels.backends.plan.work import Operands, Strides, Work
from tsbn_kernels.definition.activations import NONE

# Passes of csrc/cuda/launch.h.
PASSES = (
    "forward",
    "backward",
    "forward_epilogue",
    "backward_epilogue",
    "backward_fan_out",
    "forward_mixed",
    "backward_mixed",
    "mixed_keys",
)
LOG_LANES = 3  # slots of a position side by side: 128 bytes, in columns
MOST_SLOTS = 1 << 30  # of a block: its slots and their sums with an offset are 32-bit
THREADS = 256
HELD_SLOTS = 6  # of a thread's registers where blocks run together: kHeldSlots of csrc/cuda/params.h
MOST_SCRATCH = 1 << 16  # of a fan-out's block, bytes: so much that two are resident on most devices


@dataclass(frozen=True)
class Cut:
    """How slabs are cut into slots, before any choice."""

    access: Literal["rows", "columns", "scalar"]
    vector: int  # elements of a slot
    masked: bool
    log_lanes: int
    tiles: int  # slabs of a task
    slots: int  # of a slab
    divisor: int
    run: int
    operands: Operands  # the strides of slots

    @property
    def width(self) -> int:
        """Channels of a slab."""
        return (self.vector if self.access == "columns" else 1) << self.log_lanes


def pass_of(work: Work) -> str:
    """The kernels that do it: one of :data:`PASSES`."""
    if work.ragged:
        return f"{work.direction}_mixed"
    if not work.backward:
        return "forward_epilogue" if work.fuses else "forward"
    if work.fan_out:
        return "backward_fan_out"
    return "backward" if work.activation == NONE else "backward_epilogue"


def scratch_bytes(work: Work, width: int, threads: int) -> int:
    """Shared memory before the resident slots: a state for each warp, block and its factors, for each channel."""
    warps, tasks = threads // 32, work.tasks // work.streams
    states = 4 * (warps + 1 + (2 if work.recomputes or work.ragged else tasks))
    gathered = 2 * warps * tasks + 4 * tasks + 4  # two sums for each warp and task, factors of each task and of dx
    return (gathered if work.gathers else states) * width * work.statistics_size


def held_slots(work: Work) -> int:
    """Slots of each activation that a thread keeps in registers, where blocks run together: as many as do not spill."""
    return 0 if work.item_size == 8 or work.recomputes else HELD_SLOTS // work.summed_activations


@lru_cache(maxsize=4096)
def cut(work: Work, most_lanes: int = LOG_LANES) -> Cut:
    """Slots of 16 bytes where all operands can be read so, else of one element.

    In columns a slab has at most ``1 << most_lanes`` slots of a position: of fewer more positions stay on chip.
    Samples of a mixed batch follow one another in any order, and none may be cut otherwise than where it lies first:
    they are not joined, and have no masks.

    Raises:
        ValueError: a run of elements is longer than the kernels read.
    """
    N, C, S = work.samples, work.channels, work.positions
    operands = [o for o in work.operands if o is not None]
    wide = 16 // work.item_size
    joined = not work.ragged and (N == 1 or S == 1 or all(o.n == S * o.s for o in operands))
    steps = {o: o.n if S == 1 and N > 1 else o.s for o in operands}  # from a position to the next
    inner, outer = (N * S, 1) if joined else (S, N)
    masked = False
    if work.family == "rows":
        residues = [tuple(s % wide for s in (*_used(work, o, joined)[:3], o.residue)) for o in operands]
        whole = not any(map(any, residues)) and inner % wide == 0
        masked = not whole and wide > 1 and len(set(residues)) == 1 and not work.ragged
        access, vector = ("rows", wide) if whole or masked else ("scalar", 1)
        divisor = -(-(inner + wide - 1) // wide) if masked else inner // vector
        log_lanes, tiles, steps = 0, C, dict.fromkeys(operands, vector)
    else:
        whole = C % wide == 0 and not any(
            s % wide for o in operands for s in (*_used(work, o, joined)[:2], steps[o] if inner > 1 else 0, o.residue)
        )
        few = not work.fan_out or scratch_bytes(work, wide, 32) <= MOST_SCRATCH  # tasks whose sums a block can keep
        access, vector = ("columns", wide) if whole and wide > 1 and few else ("scalar", 1)
        log_lanes = min((-(-C // vector) - 1).bit_length(), most_lanes if vector > 1 else 5)
        while work.fan_out and log_lanes and scratch_bytes(work, vector << log_lanes, THREADS) > MOST_SCRATCH:
            log_lanes -= 1
        tiles = -(-C // (vector << log_lanes))
        divisor = inner
    slots = (outer * divisor) << log_lanes
    if joined and not masked:
        divisor = min(divisor, MOST_SLOTS)
    if divisor > MOST_SLOTS:
        raise ValueError(f"a run of {inner} elements is longer than the CUDA kernels read")

    placed = {o: o._replace(n=divisor * steps[o] if joined and not masked else o.n, s=steps[o]) for o in operands}
    laid: list[Any] = [None if o is None else placed[o] for o in work.operands]
    return Cut(access, vector, masked, log_lanes, tiles, slots, divisor, inner, Operands(*laid))  # type: ignore[arg-type]


def _used(work: Work, o: Strides, joined: bool) -> tuple[int, ...]:
    """The strides that addresses of slots are made of, 0 for those along which there is one step."""
    return (
        o.t if work.tasks > 1 else 0,
        o.n if work.samples > 1 and not joined else 0,
        o.c if work.channels > 1 else 0,
        o.s if work.positions > 1 or joined else 0,
    )
