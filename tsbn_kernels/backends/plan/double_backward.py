"""What the two passes of a second derivative must move, and how the Triton backend cuts them up.

Both read ddx, dy and x; the first leaves sums, the second writes ddy and dx. So eight tensors of x's size are moved.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tsbn_kernels.backends.plan.core import Plan
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.triton import covering_tile, in_waves, slabs_and_tiles
from tsbn_kernels.backends.plan.work import Work
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.layout import Family
from tsbn_kernels.definition.options import Options

SUMS, FACTORS = 5, 7  # of each task and channel: see tsbn_kernels/definition/double_backward.py
VALUES = 8  # of each activation that a thread holds: beside five sums of each there are registers for no more


# The budget a thread on NVIDIA's and on AMD's GPUs, as measured: tools/compile_gate/compiled_kernels.csv.
_BUDGETS: dict[Family, tuple[int, int]] = {"rows": (112, 80), "columns": (128, 120)}


@dataclass(frozen=True)
class TwiceWork(Work):
    """Both passes."""

    @property
    def bytes_to_read(self) -> int:
        """Bytes of ddx, dy and x."""
        return 3 * self.activation_bytes

    @property
    def bytes_to_sum(self) -> int:
        """Bytes of activations that are needed again once they have been summed."""
        return self.bytes_to_read

    @property
    def bytes_to_write(self) -> int:
        """Bytes of ddy and dx."""
        return 2 * self.activation_bytes


def work_of(x: Tensor, options: Options) -> TwiceWork:
    """The work for a readable ``x``, which is stacked."""
    view = layout.task_view(x, options.num_tasks, options.stacking)
    T, N, C, S = view.shape
    family = layout.family(x, options.stacking) or "rows"
    expanded = options.num_tasks > 1 and view.stride(0) == 0
    return TwiceWork(T, N, C, S, x.element_size(), family, "backward", expanded=expanded)


class TwicePlan(Plan):
    """A plan of the kernels of a second derivative: a launch for the sums, and one for the results."""

    backend = "triton"

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return 2

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors that the kernels load: means twice, and factors."""
        return self.splits * (2 + FACTORS) * self.work.statistics_bytes

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of the sums of each split."""
        return self.splits * SUMS * self.work.statistics_bytes


def plan(work: TwiceWork, device: Device) -> TwicePlan:
    """The plan for some work on a device. A slab is split where there are too few of them for the device."""
    values, threads = VALUES * 4 // work.statistics_size, device.block_threads // 4
    a, b = tile = covering_tile(work, threads * values)
    warps = max(device.warp, min(a * b // values, threads)) // device.warp
    slabs, tiles = slabs_and_tiles(work, tile)
    shared_bytes = 2 * work.statistics_size * warps * (b if work.family == "columns" else 16)
    registers = _registers(work, device)
    return in_waves(TwicePlan(work, device, "split", slabs, tile, tiles, warps, registers, shared_bytes))


def _registers(work: Work, device: Device) -> int:
    """The budget a thread; values of eight bytes take more."""
    return _BUDGETS[work.family][device.target.startswith("gfx")] + 32 * (work.statistics_size == 8)
