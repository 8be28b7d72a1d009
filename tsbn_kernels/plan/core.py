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

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return 2 if self.variant == "split" else 1

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
        """Bytes of x and dy that the kernels load."""
        once = self.work.tensors_read * self.work.activation_bytes
        twice = self.work.reduces and self.work.training and self.work.tensors_written > 0
        return once + round((1 - self.on_chip) * once) if twice else once

    @property
    def activation_bytes_written(self) -> int:
        """Bytes of y or dx that the kernels store."""
        return self.work.tensors_written * self.work.activation_bytes

    @property
    def bytes_read(self) -> int:
        """All that the kernels load, with the ``[T, C]`` vectors and the splits' partial sums."""
        work = self.work
        parameter, statistic = work.vectors * work.parameter_size, work.vectors * work.statistics_size
        if work.direction == "backward":
            vectors = self.launches * (2 * statistic + parameter)
        elif work.training:
            vectors = parameter * (1 + work.bias) + statistic * (
                self.variant == "split"
            )  # the first split's mean again
        else:
            vectors = parameter * (1 + work.bias) + 2 * statistic
        return self.activation_bytes_read + self.parts * (vectors + self.parts * self._partials * statistic)

    @property
    def bytes_written(self) -> int:
        """All that the kernels store."""
        work = self.work
        statistic = work.vectors * work.statistics_size
        if work.direction == "backward":
            vectors = work.vectors * work.parameter_size * (work.needs_dweight + work.bias)
        else:
            vectors = 2 * statistic * work.training
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
