"""The rules of the Triton backend: variant, tile, warps and splits from the work and the device."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import TypeVar

from tsbn_kernels.backends.plan.core import Plan, Tile, Variant
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.expect import expected
from tsbn_kernels.backends.plan.work import Direction, Work
from tsbn_kernels.definition.activations import EPILOGUES
from tsbn_kernels.definition.layout import Family

PlanT = TypeVar("PlanT", bound=Plan)

MAX_SPLITS = 256
WAVES = 8  # of split slabs, at most: many even out what the last one leaves
ALIKE = 1.02  # times that are no different
MERGED = 16  # splits whose partial sums a program of the second launch reads at a time
TILES_PER_PROGRAM = 4  # where there is nothing to reduce
LINE, SECTOR = 128, 32  # bytes: what a warp's load should fill, and the least that memory moves
TILE_OVERHEAD = 512  # values that could be loaded in the time that a tile costs beside its loads
LEAST_WARPS = 4  # of a block of a cluster


class TritonPlan(Plan):
    """A plan of the Triton kernels, and in what they differ from the rule of what is moved.

    The tile of a cluster is that of all its blocks.
    """

    backend = "triton"

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return super().launches + self._gathers

    @property
    def exchanges(self) -> int:
        """How often a program waits for sums; and for partial sums, which the second launch reads in turn.

        Forward: the mean, what it lacks and the squares; by tiles first the mean of one, around which others are read.
        In a cluster two sums do not meet at once.
        """
        work = self.work
        own = 2 + (self.variant != "resident") if work.reduces and not work.backward else super().exchanges
        if self.variant == "cluster" and work.backward:
            own += 1
        return own + (ceil(self.splits, MERGED) if self.variant == "split" else 0)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of loads that a program has under way at a time; of a cluster those of a block."""
        return super().bytes_in_flight // self.cluster

    @property
    def bytes_read_again(self) -> int:
        """Bytes that are loaded again: in a backward dresidual, where that is as good, instead of dy and residual."""
        again = super().bytes_read_again
        return 2 * self.work.activation_bytes if again and self.work.backward and self.work.keeps_gradient else again

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors and partial sums that the kernels load; in a fan-out every tile of x meets all tasks."""
        work, vectors, split = self.work, self.work.vector_bytes_to_read, self.variant == "split"
        one = work.statistics_bytes // work.tasks
        if not work.backward:  # of partial sums the first split's mean again
            loads = self.tiles if work.fan_out else self.parts
            return loads * vectors + self.parts * (self.partial_bytes + work.streams * one * split)
        if not work.fan_out:
            return super().vector_bytes_read
        read = self.tiles * vectors
        if split:  # in the launch that adds the sums
            read += vectors - work.parameter_bytes * work.reads_bias + self.partial_bytes
        if work.two_passes:  # x - mean again, and what each task adds
            read += self.splits * (one + 2 * work.statistics_bytes * split)
        return read

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors and partial sums that the kernels store, with what each task adds to dx."""
        return super().vector_bytes_written + 2 * self.work.statistics_bytes * self._gathers


def plan(work: Work, device: Device, clusters: bool = True) -> Plan:
    """The plan for some work on a device. Nothing is tuned: the same work has the same plan wherever it runs.

    Args:
        clusters: whether the device takes them.
    """
    if work.fan_out:
        return _fan_out(work, device)
    if not work.reduces:
        whole = _plan(work, device, "elementwise", _tile(work, device))
        return _split(whole, "elementwise", ceil(whole.tiles, TILES_PER_PROGRAM))
    if slab := _resident_tile(work, device):
        return _plan(work, device, "resident", slab)
    found = list(in_clusters(work, device)) if clusters else []
    found.append(in_waves(_plan(work, device, "streaming", _tile(work, device))))
    return min(found, key=lambda one: expected(one).seconds)


@cache
def compiles_clusters() -> bool:
    """Whether this Triton compiles the kernels of clusters: 3.8 and later, or one that is not here."""
    try:
        major, minor, *_ = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= (3, 8)


def in_clusters(work: Work, device: Device) -> Iterator[Plan]:
    """Plans by which the blocks of a cluster keep a slab in their registers, in rows."""
    if work.family != "rows" or not work.two_passes or not compiles_clusters():
        return
    tile = power(work.samples), power(work.positions)
    values = _values_per_thread(work, "resident") // (1 + _crowds(work))
    registers = _cluster_registers(work, device, tile)
    most = min(_most_threads(work, device), device.registers // registers)
    for cluster in device.clusters:
        threads = tile[0] * tile[1] // (cluster * values)
        if LEAST_WARPS * device.warp <= threads <= most:
            whole = _plan(work, device, "resident", tile, threads // device.warp)
            yield replace(whole, variant="cluster", registers=registers, cluster=cluster)


def _fan_out(work: Work, device: Device) -> Plan:
    """The plan of a pass in which a program goes through all tasks with a tile of x.

    A slab stays on chip where there are enough of them, or where it is one tile of any plan. In a backward a program
    has one tile, whose sums it writes once for each task.
    """
    whole = _plan(work, device, "split" if work.reduces else "elementwise", _tile(work, device))
    if not work.reduces:
        return _split(whole, "elementwise", whole.tiles)
    if slab := _resident_tile(work, device):
        resident = _plan(work, device, "resident", slab)
        if whole.tiles == 1 or resident.slabs >= device.multiprocessors:
            return resident
    if work.gathers:
        return _split(whole, "split", whole.tiles)
    return in_waves(whole)


def apart(work: Work, device: Device) -> Plan:
    """The plan of a pass that is half of another: the sums alone, or the output by sums that others have made."""
    return in_waves(_plan(work, device, "split", _tile(work, device)))


def in_waves(plan: PlanT) -> PlanT:
    """The plan with a program a slab, where that fills a wave, or in so many splits as fill one or a few waves.

    Of those that should take about as long as the shortest the one with the fewest programs.
    """
    wave = plan.device.multiprocessors * _split(plan, "split", plan.tiles).resident_programs
    counts = {min(MAX_SPLITS, plan.tiles, waves * wave // plan.slabs) for waves in range(1, WAVES + 1)} - {0, 1}
    whole = [plan] if plan.slabs >= wave or not counts else []
    found = [(expected(one).seconds, one) for one in (*whole, *(_split(plan, "split", n) for n in sorted(counts)))]
    shortest = min(seconds for seconds, _ in found)
    return next(one for seconds, one in found if seconds <= ALIKE * shortest)


def alternatives(plan: Plan) -> list[Plan]:
    """The plan and a few near it, with other tiles and warps: what may be faster is for a measurement to say."""
    if plan.variant == "cluster":
        return list(dict.fromkeys((plan, *in_clusters(plan.work, plan.device))))
    others, (a, b) = [(plan.tile, 0.5), (plan.tile, 2.0)], plan.tile
    if plan.variant != "resident":
        tiles = [(a * 2, b), (a // 2, b)] if a > 1 else [(a, b * 2), (a, max(1, b // 2))]
        others += [(tile, 1.0) for tile in tiles]
    found = [plan]
    for tile, factor in others:
        other = _plan(plan.work, plan.device, plan.variant, tile)
        warps = int(other.warps * factor)
        if 1 <= warps <= 32:
            other = _plan(plan.work, plan.device, plan.variant, tile, warps)
            one_tile = plan.work.gathers and plan.variant != "resident"
            found.append(_split(other, plan.variant, other.tiles if one_tile else plan.splits))
    return found


def is_full(work: Work, tile: Tile) -> tuple[bool, bool]:
    """Whether no tile of any slab ends within A, and within B."""
    a, b = (work.values, work.channels) if work.family == "columns" else (work.samples, work.positions)
    return a % tile[0] == 0 and not work.ragged, b % tile[1] == 0 and not work.ragged


def is_even(work: Work, tile: Tile) -> bool:
    """Whether every tile of every slab is full, so that no access needs a mask."""
    return all(is_full(work, tile))


def _values_per_thread(work: Work, variant: Variant) -> int:
    """Values of each activation that a thread holds: what keeps every kernel within 128 registers.

    Forward keeps x alone and has room for twice as many. In narrow rows so has a backward without much else, where
    half the threads do the same work: there it is instructions that count.
    """
    doubled = variant == "resident" and (not work.backward or _narrow(work))
    crowded = work.backward and work.reads_residual and (not work.fan_out or _is_smooth(work))
    values = 32 if doubled else 16
    if crowded and work.family == "columns" and variant != "resident":
        values = 8  # of three activations, with the addresses of each
    return values * 4 // work.statistics_size


def _narrow(work: Work) -> bool:
    """Whether rows are of no multiple of 16 values, and threads hold twice as much: half of them have room for that.

    Triton sees no wide accesses there, or narrower ones: masks and addresses take registers and instructions.
    """
    heavy = work.backward and (work.fan_out or work.reads_residual or _is_smooth(work))
    return work.family == "rows" and work.positions % 16 != 0 and not heavy


def limits_registers(plan: Plan) -> bool:
    """Whether the compiler is held to the budget: NVIDIA's takes more than it needs where it sees no reason not to.

    Not where float64 may need more than was measured, nor masks in columns forward: a spill costs more than a resident
    program. Elsewhere the compiler spills with masks where it is left to choose.
    """
    work = plan.work
    measured = work.backward or (work.family == "rows" and not work.fan_out)
    told = measured or is_even(work, plan.tile)
    return told and work.statistics_size == 4 and plan.device.target.startswith("sm_")


# The budget a thread on NVIDIA's and on AMD's GPUs, for rows and for columns, whose addresses take some more. Measured:
# what the compilers take, and with less of which some kernel spills; tools/compile_gate/compiled_kernels.csv has the
# figures.
_Budgets = dict[Family, tuple[int, int]]
_BUDGETS: dict[tuple[Direction, Variant], _Budgets] = {
    ("forward", "resident"): {"rows": (72, 72), "columns": (104, 88)},
    ("forward", "streaming"): {"rows": (80, 144), "columns": (112, 136)},
    ("forward", "split"): {"rows": (80, 128), "columns": (112, 136)},
    ("forward", "elementwise"): {"rows": (48, 72), "columns": (64, 64)},
    ("backward", "resident"): {"rows": (64, 64), "columns": (80, 80)},
    ("backward", "streaming"): {"rows": (80, 96), "columns": (112, 112)},
    ("backward", "split"): {"rows": (80, 88), "columns": (112, 88)},
    ("backward", "elementwise"): {"rows": (48, 64), "columns": (64, 64)},
}


# What an epilogue takes beside that, on NVIDIA's and on AMD's GPUs: any activation, an exponential, a residual.
_Extra = tuple[int, int, int]
_EPILOGUES: dict[tuple[Direction, Variant, Family], tuple[_Extra, _Extra]] = {
    ("forward", "resident", "rows"): ((0, 24, 8), (0, 16, 8)),
    ("forward", "resident", "columns"): ((0, 24, 8), (24, 24, 24)),
    ("forward", "elementwise", "columns"): ((0, 16, 0), (0, 0, 0)),
    ("backward", "resident", "rows"): ((0, 0, 8), (0, 24, 8)),
    ("backward", "resident", "columns"): ((0, 8, 16), (0, 32, 16)),
    ("backward", "streaming", "rows"): ((0, 16, 32), (0, 0, 24)),
    ("backward", "streaming", "columns"): ((0, 16, 0), (24, 80, 24)),
}
# Of a resident slab in narrow rows, with or without masks.
_NARROW: dict[Direction, tuple[int, int]] = {"forward": (112, 128), "backward": (128, 136)}
# What a program of a resident slab may take for the running statistics, forward, where that costs no resident program;
# half of it with a residual. With all that there are the compiler spills.
_SPARE: _Budgets = {"rows": (16, 0), "columns": (0, 8)}
# Of a program that goes through all tasks.
_FAN_OUT: dict[tuple[Direction, Variant], _Budgets] = {
    ("forward", "resident"): {"rows": (128, 128), "columns": (128, 128)},
    ("forward", "split"): {"rows": (96, 128), "columns": (96, 136)},
    ("forward", "elementwise"): {"rows": (96, 80), "columns": (96, 96)},
    ("backward", "resident"): {"rows": (128, 128), "columns": (128, 128)},
    ("backward", "split"): {"rows": (128, 128), "columns": (128, 128)},
    ("backward", "elementwise"): {"rows": (128, 128), "columns": (128, 128)},
}


def _registers(work: Work, device: Device, variant: Variant, tile: Tile, threads: int) -> int:
    """The budget a thread; the tests compile every kernel and hold it to this."""
    amd = device.target.startswith("gfx")
    crowded = tile[0] * tile[1] > threads * _values_per_thread(work, variant)
    narrow = variant == "resident" and _narrow(work)
    if work.fan_out:
        budget = _FAN_OUT[work.direction, variant][work.family][amd]
    elif crowded:  # twice as many
        budget = 136 + 32 * _is_smooth(work) if amd else 128
    else:
        kind = work.direction, "streaming" if variant == "split" else variant, work.family
        extra = _EPILOGUES.get(kind, ((0, 0, 0), (0, 0, 0)))[amd]
        has = work.activation != "none", _is_smooth(work), work.reads_residual
        budget = (_NARROW[work.direction] if narrow else _BUDGETS[work.direction, variant][work.family])[amd]
        budget += max(taken * registers for taken, registers in zip(has, extra, strict=True))
    if not is_even(work, tile) and not narrow:
        budget += 40 if _counts(work, variant) else 24
    budget += 32 * (work.statistics_size == 8)
    budget = min(budget, 255, device.registers // threads // 8 * 8)
    if variant == "resident" and not work.backward:
        programs = max(1, device.registers // (budget * threads))
        spare = _SPARE[work.family][amd] // (1 + work.reads_residual)
        budget = min(budget + spare, device.registers // (programs * threads) // 8 * 8)
    return budget


def _cluster_registers(work: Work, device: Device, tile: Tile) -> int:
    """The budget a thread of a cluster's blocks. With 64 a multiprocessor holds the most threads, and two such blocks.

    Narrow rows take more; masks with a residual; float32 with an activation forward. On other GPUs than sm_90 so do any
    float32 forward, an exponential, and a residual backward.
    """
    if _narrow(work):
        return 128 if work.backward else 96
    wide, masked = work.item_size == 4 and not work.backward, work.reads_residual and not is_even(work, tile)
    more = work.activation != "none" and (wide or masked) and not _crowds(work)
    if device.target != "sm_90":
        more = more or wide or _is_smooth(work) or (work.backward and work.reads_residual)
    return 64 + 16 * more + 32 * (work.statistics_size == 8)


def _counts(work: Work, variant: Variant) -> bool:
    """Whether, with masks, a lane of the first pass counts its values, in a register for each; columns share theirs."""
    return not work.backward and work.family == "rows" and variant in ("streaming", "split")


def _is_smooth(work: Work) -> bool:
    """Whether the activation has an exponential, whose terms take registers."""
    return EPILOGUES[work.activation].exponential


def _crowds(work: Work) -> bool:
    """Whether the epilogue leaves a full block, whose threads have 64 registers, too few for a resident slab.

    Measured, as the budgets are. Forward a thread holds twice the values of x: no room is left for the terms of an
    exponential, nor for a residual in float32. Backward x, dy and a residual leave none for those terms, nor for the
    addresses of columns.
    """
    if not work.backward:
        return _is_smooth(work) or (work.reads_residual and work.item_size == 4)
    return not work.gathers and work.reads_residual and (_is_smooth(work) or work.family == "columns")


def _resident_tile(work: Work, device: Device) -> Tile | None:
    """The tile that holds a whole slab, where the threads of one block can."""
    most = _most_threads(work, device) * _values_per_thread(work, "resident") // (1 + _crowds(work))
    if work.family == "rows":
        a, b = power(work.samples), power(work.positions)
        return (a, b) if a * b <= most else None
    a, widest, narrowest = power(work.values), *_channel_blocks(work)
    b = min(widest, most // a)
    while b > narrowest and work.streams * ceil(work.channels, b) < device.multiprocessors:
        b //= 2
    if b < narrowest:
        return None
    # Where a thread holds twice the values, no register is left for masks, nor forward for float32's many addresses.
    crowded = not is_even(work, (a, b)) or (not work.backward and work.item_size == 4)
    return None if crowded and a * b > most // 2 else (a, b)


def _tile(work: Work, device: Device) -> Tile:
    """The tile of at most a quarter of a block's threads that covers a slab with the least waste."""
    most = device.block_threads // 4 * _values_per_thread(work, "streaming")
    if work.family == "columns" and work.gathers:  # long tiles: each leaves two sums a channel and a task
        widest, narrowest = _channel_blocks(work)
        b = max(narrowest, widest // 2)
        return min(2 * most // b, power(work.values)), b
    return covering_tile(work, most)


def covering_tile(work: Work, most: int) -> Tile:
    """The tile of at most so many values that covers a slab with the least waste."""
    if work.family == "columns":
        b, _ = _channel_blocks(work)
        return min(most // b, power(work.values)), b

    def cost(tile: Tile) -> tuple[int, int]:
        a, b = tile
        return ceil(work.samples, a) * ceil(work.positions, b) * (a * b + TILE_OVERHEAD), -b

    shortest = min(power(work.positions), SECTOR // work.item_size)
    rows, positions = _powers(1, power(work.samples)), _powers(shortest, power(work.positions))
    return min(((a, b) for a, b in product(rows, positions) if a * b <= most), key=cost)


def _most_threads(work: Work, device: Device) -> int:
    """The most threads of a program: half where one needs twice the 64 registers, for sums or many values."""
    return device.block_threads // 2 if work.gathers or _narrow(work) else device.block_threads


def _channel_blocks(work: Work) -> tuple[int, int]:
    """The widest and the narrowest block of channels of a column tile."""
    channels = power(work.channels)
    return min(channels, LINE // work.item_size), min(channels, SECTOR // work.item_size)


def _plan(work: Work, device: Device, variant: Variant, tile: Tile, warps: int = 0) -> Plan:
    a, b = tile
    slabs, tiles = slabs_and_tiles(work, tile)
    # A thread of a full block has 64 registers: enough for rows, too few for columns.
    most = device.block_threads // 2 if work.family == "columns" else _most_threads(work, device)
    threads = warps * device.warp if warps else max(device.warp, min(a * b // _values_per_thread(work, variant), most))
    warps = threads // device.warp
    registers = _registers(work, device, variant, tile, threads)
    shared_bytes = max(
        2 * work.statistics_size * warps * (b if work.family == "columns" else 16),
        32 * threads * work.gathers,  # where half precision and the sum in float32 change places between threads
    )
    return TritonPlan(work, device, variant, slabs, tile, tiles, warps, registers, shared_bytes)


def slabs_and_tiles(work: Work, tile: Tile) -> tuple[int, int]:
    """The number of slabs, and of the tiles of each."""
    a, b = tile
    if work.family == "columns":
        return work.streams * ceil(work.channels, b), ceil(work.values, a)
    return work.streams * work.channels, ceil(work.samples, a) * ceil(work.positions, b)


def _split(plan: PlanT, variant: Variant, splits: int) -> PlanT:
    """The plan with ``splits`` programs a slab, or as many as have at least one tile."""
    share = ceil(plan.tiles, splits)
    splits = ceil(plan.tiles, share)
    if splits == 1 and variant == "split":
        return plan
    registers = plan.registers
    if variant != plan.variant:
        registers = _registers(plan.work, plan.device, variant, plan.tile, plan.warps * plan.device.warp)
    return replace(plan, variant=variant, splits=splits, registers=registers)


def ceil(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()


def _powers(first: int, last: int) -> list[int]:
    return [1 << e for e in range(first.bit_length() - 1, last.bit_length())]
