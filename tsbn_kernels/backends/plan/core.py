"""A plan: which kernels do a pass, how they cut it up, and what they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.work import Work

# resident: a slab stays on chip between its statistics and its result, each activation is read once; cluster: as far
# as it fits, in several blocks, which Triton takes for one program. streaming: one program a slab, which reads what
# does not stay on chip twice. split: several programs a slab, two launches. together: the same in one launch, whose
# programs run all at a time and go from slab to slab, each of which stays on chip as far as it fits. elementwise:
# nothing to reduce. evaluation: one pass, that may reduce.
Variant = Literal["resident", "cluster", "streaming", "split", "together", "elementwise", "evaluation"]
Tile = tuple[int, int]

LAUNCH_SECONDS = 3e-6  # of one kernel, from its start to the next one's: typical of CUDA devices


@dataclass(frozen=True)
class Plan:
    """How a backend does a piece of work on a device; a pure function of the two.

    Attributes:
        backend: the one whose kernels are planned.
        slabs: parts with statistics of their own: (task, channel), or (task, block of channels).
        tile: ``[A, B]`` values that a program holds at once, contiguous along B.
        tiles: of a slab.
        warps: of a program.
        registers: the budget a thread.
        shared_bytes: the budget of shared memory a program.
        splits: programs that share a slab.
        cluster: blocks of a cluster.
    """

    backend: ClassVar[str]
    work: Work
    device: Device
    variant: Variant
    slabs: int
    tile: Tile
    tiles: int
    warps: int
    registers: int
    shared_bytes: int
    splits: int = 1
    cluster: int = 1

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return 2 if self.variant == "split" else 1

    @property
    def parts(self) -> int:
        """Programs that work on one slab."""
        return self.splits * self.cluster

    @property
    def programs(self) -> int:
        """Programs (thread blocks) of each launch."""
        return self.slabs * self.parts

    @property
    def rounds(self) -> float:
        """Slabs that a program works on, one after the other, in the mean."""
        return 1.0

    @property
    def meetings(self) -> int:
        """How often a program meets others of its slab through the memory of the device."""
        return 0

    @property
    def in_step(self) -> int:
        """Programs of a multiprocessor that wait for the same sums, so that none of them works while another waits."""
        return 1

    @property
    def share(self) -> int:
        """Tiles of a split, the last one of a slab may have fewer."""
        return -(-self.tiles // self.splits)

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return self.warps * self.device.warp

    @property
    def resident_programs(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        device, threads = self.device, self.threads
        granules = -(-self.registers // 8) * 8
        by_shared = device.shared_memory // (self.shared_bytes + 1024) if self.shared_bytes else 32
        return max(1, min(device.registers // (granules * threads), device.threads // threads, by_shared, 32))

    @property
    def exchanges(self) -> int:
        """How often a program waits for sums of all its threads, one after the other, before it has its result."""
        work = self.work
        if not work.reduces or work.backward:
            return int(work.reduces)
        return 3 if self.variant == "resident" else 4  # mean, what it lacks, variance; by tiles around the first's mean

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of loads that a program has under way at a time: a tile of what it sums."""
        return self.tile[0] * self.tile[1] * self.work.item_size * (2 if self.work.backward else 1)

    # ---- what is moved: what the work must move, as often as the kernels of this plan move it ------------------------

    @property
    def on_chip(self) -> float:
        """The part of a slab's values that stays on chip between the two passes over it."""
        return float(self.variant in ("resident", "cluster"))

    @property
    def activation_bytes_read(self) -> int:
        """Bytes of x, dy and residual that the kernels load."""
        if self._gathers:  # only x again, and what was gathered
            return self.work.bytes_to_read + self.work.input_bytes + self.gathered_bytes
        return self.work.bytes_to_read + self.bytes_read_again

    @property
    def activation_bytes_written(self) -> int:
        """Bytes of y, or of dx and dresidual, that the kernels store."""
        return self.work.bytes_to_write + self.gathered_bytes * self._gathers

    @property
    def bytes_read(self) -> int:
        """All that the kernels load, with the ``[T, C]`` vectors and the splits' partial sums."""
        return self.activation_bytes_read + self.vector_bytes_read

    @property
    def bytes_written(self) -> int:
        """All that the kernels store."""
        return self.activation_bytes_written + self.vector_bytes_written

    @property
    def bytes_read_again(self) -> int:
        """Bytes of activations that are loaded again, because they did not stay on chip."""
        return 0 if self.on_chip else self.work.bytes_to_sum

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the sum of the tasks' gradients of their one input, in the dtype of the arithmetic."""
        return self.work.input_bytes // self.work.item_size * self.work.statistics_size

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors and partial sums that the kernels load: every program those of its slab."""
        loads = self.parts * (self.launches if self.work.backward else 1)
        return loads * self.work.vector_bytes_to_read + self.parts * self.partial_bytes

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors and partial sums that the kernels store."""
        return self.work.vector_bytes_to_write + self.partial_bytes

    @property
    def partial_bytes(self) -> int:
        """Bytes that the splits leave for one another: mean, rest, squares and count, or two sums a task."""
        if self.variant not in ("split", "together"):
            return 0
        sums = 2 * self.work.tasks if self.work.backward else 4 * self.work.streams
        return self.parts * sums * self.summed_channels * self.work.statistics_size

    @property
    def summed_channels(self) -> int:
        """Channels that have partial sums."""
        return self.work.channels

    @property
    def _gathers(self) -> bool:
        """Whether the tasks' gradients of their input are added up in memory before dx can be complete."""
        return self.work.gathers and self.work.two_passes and self.variant != "resident"

    def seconds(self, bandwidth: float | None = None) -> float:
        """Predicted time at a bandwidth in bytes a second (the data sheet's by default): predicted, not measured."""
        return (self.bytes_read + self.bytes_written) / (bandwidth or self.device.bandwidth) + (
            self.launches * LAUNCH_SECONDS
        )
