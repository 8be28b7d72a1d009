"""The rules by which the CUDA C++ backend cuts up mixed batches of short samples, whatever the mix is.

What a pass must move, where no order of the batch may change a bit: x is read once for the keys of its samples, once
for the sums and once for y, which is written once. Backward x and dy (and a residual) are read once for the keys, once
for the sums and once for dx, which is written once. That is what it moves. In evaluation there are neither keys nor,
without gradients of parameters, sums. Beside it go an order of the batch, and what the blocks of a task leave of sums,
which each of them reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from tsbn_kernels.backends.plan.cuda import CudaPlan, register_budget
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.mixed import INDEX, MixedWork
from tsbn_kernels.backends.plan.slots import THREADS, cut, scratch_bytes
from tsbn_kernels.backends.plan.triton import ceil, power

MOST_BLOCKS = 64  # of one task: each reads the sums of all
STEPS = 4  # slots of a thread, where there are enough of them
WARP = 32


@dataclass(frozen=True, kw_only=True)
class MixedCudaPlan(CudaPlan):
    """A plan of the kernels of mixed batches. What they move of vectors and sums is at most what is said here.

    Attributes:
        block: samples of a thread block, all of one task.
    """

    work: MixedWork
    block: int

    @property
    def blocks(self) -> int:
        """The most blocks of samples that there are: each task may have one that is not full."""
        return self.splits

    @property
    def values(self) -> int:
        """Values of a channel of one sample."""
        return self.work.positions

    @property
    def of_samples(self) -> tuple[int, int, int]:
        """Samples of the batch, those of a block at most, and tasks."""
        return self.work.samples, self.block, self.work.tasks

    @property
    def key_launches(self) -> int:
        """Launches that make keys: one for each activation that is summed."""
        return self.work.summed_activations * self.work.reduces

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other, beside those of PyTorch that order the batch."""
        return self.key_launches + len(self.phases)

    @property
    def activation_bytes_read(self) -> int:
        """Bytes of x, dy and residual that the kernels load: for the keys, the sums and the result."""
        work = self.work
        keyed = work.bytes_to_read if work.backward else work.input_bytes
        return super().activation_bytes_read + keyed * work.reduces

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors, keys, the mix and partial sums: every block its own, and the sums of its task, at most."""
        work, launches = self.work, len(self.phases)
        vectors = self.blocks * launches * ceil(work.vector_bytes_to_read, work.tasks)
        most = ceil(work.samples, self.block)
        sums = (most * most + work.tasks) * self.partial_bytes // self.blocks
        mix = launches * INDEX * (self.programs * 6 + work.samples * self.slabs)
        return vectors + sums + mix + max(0, self.key_launches - 1) * INDEX * work.samples

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors, keys and partial sums."""
        return super().vector_bytes_written + self.key_launches * INDEX * self.work.samples

    @property
    def partial_bytes(self) -> int:
        """Bytes that the blocks leave for the second launch: mean, rest, squares and count, or two sums."""
        work = self.work
        sums = 2 if work.backward else 4
        return work.reduces * self.blocks * sums * self.summed_channels * work.statistics_size


def plan(work: MixedWork, device: Device) -> MixedCudaPlan:
    """The plan for some work on a device: a function of sizes alone, so that one serves every mix."""
    pieces = cut(work)
    of_sample = pieces.divisor << pieces.log_lanes
    least, most = ceil(THREADS, of_sample), ceil(STEPS * THREADS, of_sample)
    filling = work.samples * pieces.tiles // (2 * device.multiprocessors)
    block = max(ceil(work.samples, MOST_BLOCKS), min(most, max(least, filling)))
    blocks = min(work.samples, work.samples // block + work.tasks)
    if blocks * pieces.tiles >= 1 << 31:
        raise ValueError(f"{blocks * pieces.tiles} blocks are too many for one launch; the most are 2^31 - 1")
    part_slots = block * of_sample
    threads = min(THREADS, max(WARP, pieces.width, power(part_slots)))
    columns = pieces.access == "columns"
    return MixedCudaPlan(
        work=work,
        device=device,
        variant="split" if work.reduces else "evaluation",
        slabs=pieces.tiles,
        tile=(threads >> pieces.log_lanes, pieces.width) if columns else (1, threads * pieces.vector),
        tiles=ceil(part_slots, threads),
        warps=threads // WARP,
        registers=register_budget(work),
        shared_bytes=scratch_bytes(work, pieces.width, threads),
        splits=blocks,
        part_slots=part_slots,
        resident=0,
        block=block,
    )


def keyed(device: Device, samples: int, words: int) -> tuple[int, int]:
    """Threads of a sample, as a power of 2, and blocks of the launch that makes keys of so many words each."""
    log_lanes = WARP.bit_length() - 1
    while WARP << log_lanes < words * WARP // STEPS and (samples << log_lanes) < device.multiprocessors * 4 * THREADS:
        if 1 << log_lanes == THREADS:
            break
        log_lanes += 1
    return log_lanes, ceil(samples << log_lanes, THREADS)


def key_numbers(log_lanes: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of csrc/cuda/params.h for the launch that makes keys of words ``[samples, outer, inner]``."""
    samples, outer, inner = shape
    empty = (0,) * 4
    return (*empty, outer, 0, log_lanes, *(0,) * 8, inner, 0, 0, 0, samples, 0, 0, 0, *strides, *empty * 7)
