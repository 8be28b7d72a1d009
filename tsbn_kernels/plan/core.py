"""A plan: which kernels do a pass, how they cut it up, and what they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsbn_kernels.plan.devices import Device
from tsbn_kernels.plan.work import Work

# resident: a slab stays on chip between its statistics and its result, each activation is read once.
# streaming: one program (or cluster) a slab, which reads what does not stay on chip twice.
# split: several programs a slab, two launches. elementwise: nothing to reduce.
Tile = tuple[int, int]
Variant = Literal["resident", "streaming", "split", "elementwise"]

LAUNCH_SECONDS = 3e-6  # of one kernel, from its start to the next one's: typical of CUDA devices


@dataclass(frozen=True)
class Plan:
    """How a backend does a piece of work on a device; a pure function of the two.

    Attributes:
        slabs: parts with statistics of their own: (task, channel), or (task, block of channels).
        tile: ``[A, B]`` values that a program holds at once, contiguous along B.
        tiles: of a slab.
        warps: of a program.
        splits: programs that share a slab.
        registers: the budget a thread.
        shared: the budget of shared memory a program, bytes.
        cluster: blocks of a cluster.
        kernels: that are launched one after the other, where the backend has others than the variant has by rule.
        on_chip: the part of a slab's values that stays on chip between the two passes over it.
    """

    work: Work
    device: Device
    variant: Variant
    slabs: int
    tile: Tile
    tiles: int
    warps: int
    registers: int
    shared: int
    splits: int = 1
    cluster: int = 1
    on_chip: float = 0.0
    kernels: int = 0

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        if self.kernels:
            return self.kernels
        return 1 if self.variant != "split" else 3 if self._gathers else 2

    @property
    def programs(self) -> int:
        """Programs (thread blocks) of each launch."""
        return self.slabs * self.parts

    @property
    def share(self) -> int:
        """Tiles of a split, the last one of a slab may have fewer."""
        return -(-self.tiles // self.splits)

    @property
    def resident_programs(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        threads = self.warps * self.device.warp
        granules = -(-self.registers // 8) * 8
        by_shared = self.device.shared_memory // (self.shared + 1024) if self.shared else 32
        return max(1, min(self.device.registers // (granules * threads), self.device.threads // threads, by_shared, 32))

    @property
    def activation_bytes_read(self) -> int:
        """Bytes of x, dy and residual that the kernels load."""
        work = self.work
        twice = work.training and (work.direction == "forward" or work.needs_dx)
        if work.gathers:  # only x again, and what was gathered
            return work.bytes_to_read + self._gathers * (work.input_bytes + self._gathered_bytes)
        return work.bytes_to_read + round((1 - self.on_chip) * work.bytes_to_sum * twice)

    @property
    def activation_bytes_written(self) -> int:
        """Bytes of y, or of dx and dresidual, that the kernels store."""
        return self.work.bytes_to_write + self._gathers * self._gathered_bytes

    @property
    def _gathers(self) -> bool:
        """Whether a launch adds up the tasks' gradients of their input before dx can be complete."""
        return self.work.gathers and self.work.training and self.work.needs_dx and self.variant == "split"

    @property
    def _gathered_bytes(self) -> int:
        """Bytes of their sum, in the dtype of the arithmetic."""
        return self.work.input_bytes // self.work.item_size * self.work.statistics_size

    @property
    def bytes_read(self) -> int:
        """All that the kernels load, with the ``[T, C]`` vectors and the splits' partial sums."""
        work = self.work
        parameter, statistic = work.vectors * work.parameter_size, work.vectors * work.statistics_size
        if work.direction == "backward":
            vectors = 2 * statistic + parameter * (1 + work.reads_bias)
        else:
            vectors = parameter * (1 + work.reads_bias) + 2 * statistic * (not work.training)
        if work.fan_out:
            return self.activation_bytes_read + self._fan_out_vectors(vectors, statistic)
        if work.direction == "backward":
            vectors *= self.launches
        elif self.variant == "split":
            vectors += statistic  # the first split's mean again
        return self.activation_bytes_read + self.parts * (vectors + self.parts * self._partials * statistic)

    def _fan_out_vectors(self, vectors: int, statistic: int) -> int:
        """Bytes of vectors and partial sums alone, where every tile of x meets all tasks."""
        work = self.work
        one, split = statistic // work.tasks, self.variant == "split"
        ahead = self.tiles * vectors
        if not work.gathers:
            return ahead + (self.splits * (1 + 4 * self.splits) * one if split else 0)
        if split:  # in the launch that adds the sums
            ahead += vectors - work.vectors * work.parameter_size * work.reads_bias + self.splits * 2 * statistic
        if work.training and work.needs_dx:  # x - mean again, and what each task adds
            ahead += self.splits * (one + 2 * statistic * split)
        return ahead

    @property
    def bytes_written(self) -> int:
        """All that the kernels store."""
        work = self.work
        statistic = work.vectors * work.statistics_size
        if work.direction == "backward":
            vectors = work.vectors * work.parameter_size * (work.needs_dweight + work.bias)
            vectors += 2 * statistic * self._gathers  # what each task adds to dx
        else:
            vectors = 2 * statistic * work.training
            statistic = statistic // work.tasks * work.streams
        return self.activation_bytes_written + vectors + self.parts * self._partials * statistic

    @property
    def parts(self) -> int:
        """Programs that work on one slab."""
        return self.splits * self.cluster

    @property
    def _partials(self) -> int:
        """Values that a split leaves for each channel: mean, rest, squares and count, or two sums."""
        return {"forward": 4, "backward": 2}[self.work.direction] if self.variant == "split" else 0

    def seconds(self, bandwidth: float | None = None) -> float:
        """Predicted time at a bandwidth in bytes a second (the data sheet's by default): predicted, not measured."""
        return (self.bytes_read + self.bytes_written) / (bandwidth or self.device.bandwidth) + (
            self.launches * LAUNCH_SECONDS
        )
