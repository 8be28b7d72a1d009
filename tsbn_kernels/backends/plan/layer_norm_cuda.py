"""The rules by which the CUDA C++ backend cuts up layer normalisation: a group of threads holds a row in registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.layer_norm import LEAST, MOST, WAVES, LayerPlan, LayerWork
from tsbn_kernels.backends.plan.triton import ceil, power

MOST_LANES = 512  # threads of a row: kRowThreads of csrc/cuda/params.h
HELD = 128  # bytes of the accumulate type that a thread holds of a row: kRowBytes
THREADS = 256  # of a block whose rows need no more
FEW_LANES = 4  # 64 bytes side by side
FLOWING = 256  # threads of a multiprocessor whose loads keep the memory busy
MERGED = 32  # columns of a block that adds what others left


@dataclass(frozen=True, kw_only=True)
class CudaLayerPlan(LayerPlan):
    """A plan of the CUDA C++ kernels.

    Attributes:
        vector: values of a slot: 16 bytes, or one value.
        lanes: threads that share a row.
        piece: slots of a row that a block sees: all, but for sums that need no row as a whole.
        staged: tasks whose gates are in shared memory at a time.
    """

    backend = "cuda"
    vector: int
    lanes: int
    piece: int
    staged: int

    @property
    def access(self) -> str:
        """The kernels: ``"rows"`` or ``"scalar"``."""
        return "rows" if self.vector > 1 else "scalar"

    @property
    def pieces(self) -> int:
        """Pieces of a row."""
        return ceil(self.work.channels, self.vector * self.piece)

    @property
    def steps(self) -> int:
        """Slots that a thread has at most."""
        return ceil(self.piece, self.lanes)

    @property
    def merging_programs(self) -> int:
        """Blocks of the launch that adds what the splits left."""
        return ceil(self.work.tasks * self.work.channels, MERGED)

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of parameters, rows' statistics (once for each warp of a row) and partial sums."""
        work = self.work
        stagings = self.splits if self.staged == _met(work) else self.tiles
        if not work.backward:
            return stagings * (1 + work.bias) * work.parameter_bytes
        read = stagings * work.needs_dx + work.needs_dweight
        loads = work.rereads * self.pieces * max(1, self.lanes // 32)
        return read * work.parameter_bytes + loads * work.row_bytes + self.partial_bytes


def plans(work: LayerWork, device: Device, aligned: bool = True) -> tuple[CudaLayerPlan, ...]:
    """The plans that do a pass, one after the other.

    There are two where shared memory has no room for the sums of the parameters' gradients beside the gates, of all
    tasks where they have one input.

    Args:
        aligned: whether all activations begin at multiples of 16 bytes.

    Raises:
        ValueError: a row is longer than a block holds, or there are too many rows.
    """
    vector = 16 // work.item_size
    vector = vector if aligned and work.channels % vector == 0 else 1
    most = MOST * 4 // work.statistics_size
    whole = not work.backward or work.needs_dx
    if whole and work.channels > most:
        raise ValueError(f"rows of {work.channels} values are longer than the CUDA kernels hold: the most are {most}")
    if work.values >= 1 << 31:
        raise ValueError(f"{work.values} rows of a task are too many for the CUDA kernels; the most are 2^31 - 1")
    for one in _candidates(work, device, vector):
        return (one,)
    if work.needs_dx and work.parameters:
        dx = replace(work, needs_dweight=False, needs_dbias=False)
        apart = dx, replace(work, needs_dx=False)
        found = tuple(one for part in apart for one in list(_candidates(part, device, vector))[:1])
        if len(found) == len(apart):
            return found
    raise ValueError(f"{device.name} has no room for rows of {work.channels} values")


def _met(work: LayerWork) -> int:
    """Tasks that a block goes through with each row."""
    return work.tasks if work.meets_all else 1


def _candidates(work: LayerWork, device: Device, vector: int) -> Iterator[CudaLayerPlan]:
    """The plans for which there is room, the best one first."""
    held = HELD // work.statistics_size // vector
    slots = work.channels // vector
    piece = min(slots, 32 * held) if work.backward and not work.needs_dx else slots
    lanes = max(power(ceil(piece, held)), min(FEW_LANES, power(piece)))
    most = max(32, min(max(THREADS, lanes), lanes * power(work.values)))
    slabs = work.streams * ceil(slots, piece)
    while most > max(32, lanes) and slabs * ceil(work.values, most // lanes) < device.multiprocessors:
        most //= 2  # rather more blocks than there are warps in them
    staged = _met(work)
    gathers = work.gathers and work.needs_dx and work.parameters > 0
    for threads in (most, most // 2) if gathers and most // 2 >= max(32, lanes) else (most,):
        one = _plan(work, device, vector, piece, lanes, threads, staged)
        if one.shared_bytes <= device.block_shared_memory and (
            not gathers or one.resident_programs * threads >= min(FLOWING, threads * one.programs)
        ):
            yield one
    while staged > 1 and not gathers:
        staged = ceil(staged, 2)
        one = _plan(work, device, vector, piece, lanes, most, staged)
        if one.shared_bytes <= device.block_shared_memory:
            yield one


def _plan(
    work: LayerWork, device: Device, vector: int, piece: int, lanes: int, threads: int, staged: int
) -> CudaLayerPlan:
    groups = threads // lanes
    tiles = ceil(work.values, groups)
    whole = CudaLayerPlan(
        work,
        device,
        "resident",
        slabs=work.streams * ceil(work.channels, vector * piece),
        tile=(groups, piece * vector),
        tiles=tiles,
        warps=threads // 32,
        registers=register_budget(work, vector),
        shared_bytes=_shared_bytes(work, ceil(piece, lanes) * vector, lanes, threads, staged),
        vector=vector,
        lanes=lanes,
        piece=piece,
        staged=staged,
    )
    programs = device.multiprocessors * whole.resident_programs * (1 if work.parameters else WAVES)
    share = ceil(tiles, max(1, programs // whole.slabs))
    if work.parameters:
        share = max(share, ceil(LEAST, groups))
    return replace(whole, splits=ceil(tiles, share))


def _shared_bytes(work: LayerWork, values: int, lanes: int, threads: int, staged: int) -> int:
    """Bytes of the warps' sums, of gates and biases, and of the sums over rows, of ``values`` of a row in a thread."""
    gates = 0 if work.backward and not work.needs_dx else 2 if work.bias and not work.backward else 1
    sums = _met(work) * work.parameters * threads
    return (threads // 32 * 4 + (gates * staged * lanes + sums) * values) * work.statistics_size


def register_budget(work: LayerWork, vector: int) -> int:
    """The registers of a thread: those that kRowForwardThreads or kRowThreads threads can have."""
    return 80 if not work.backward and vector > 1 and work.statistics_size == 4 else 128


def numbers(plan: CudaLayerPlan, sigmoid: bool, vectors: tuple[int, ...]) -> tuple[int, ...]:
    """RowNumbers of csrc/cuda/params.h; ``vectors``: dtype, t, c of weight and bias."""
    work, inner = plan.work, plan.work.positions
    shift = (inner - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - inner)) // inner + 1
    flags = work.rms, sigmoid, work.backward and work.needs_dweight, work.backward and work.needs_dbias
    row = work.channels, plan.piece, plan.pieces, plan.lanes.bit_length() - 1, plan.steps
    tasks = work.tasks, _met(work), plan.staged, 1 if work.fan_out else work.tasks
    return *map(int, flags), *row, *tasks, work.values, inner, multiplier, shift, plan.splits, plan.share, *vectors
