"""What the second derivative of layer normalisation must move, and how the Triton backend cuts it up.

One pass reads ddx, dy and x and writes ddy and ds, five tensors of x's size, and leaves two sums of each task.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.layer_norm import LayerPlan, LayerWork, plan_of, sizes_of
from tsbn_kernels.backends.plan.triton import power
from tsbn_kernels.definition.options import LayerOptions

SUMS, FACTORS = 2, 3  # of each task and channel: see layer_norm_double_backward of definition/layer_norm.py


@dataclass(frozen=True)
class LayerTwiceWork(LayerWork):
    """The pass. One input for all tasks is read for each of them."""

    @property
    def meets_all(self) -> bool:
        """No: each task has programs of its own."""
        return False

    @property
    def values_per_thread(self) -> int:
        """Values of each activation that a thread holds, beside two sums and three factors of each."""
        return 32 // self.statistics_size

    @property
    def bytes_to_read(self) -> int:
        """Bytes of ddx, dy and x."""
        return 2 * self.rereads * self.input_bytes + self.activation_bytes

    @property
    def bytes_to_write(self) -> int:
        """Bytes of ddy and ds."""
        return 2 * self.activation_bytes


def work_of(x: Tensor, weight: Tensor, options: LayerOptions) -> LayerTwiceWork:
    """The work for the rows of x."""
    sizes = sizes_of(x, weight, options)
    return LayerTwiceWork(*sizes, "columns", "backward", needs_dbias=True, rms=options.rms, fan_out=options.fan_out)


@dataclass(frozen=True)
class LayerTwicePlan(LayerPlan):
    """A plan of the kernel."""

    work: LayerTwiceWork

    @property
    def merges(self) -> bool:
        """No: an operation of PyTorch's adds what the programs leave."""
        return False

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of factors, and of rows' statistics."""
        return self.splits * FACTORS * self.work.statistics_bytes + self.work.rereads * self.work.row_bytes

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of the sums of each split."""
        return self.splits * SUMS * self.work.statistics_bytes

    def budgets(self) -> tuple[int, int]:
        """Registers a thread and bytes of shared memory, as measured: tools/compile_gate/compiled_kernels.csv."""
        work, amd = self.work, self.device.target.startswith("gfx")
        registers = (208, 144) if work.channels * work.item_size % 16 else (128, 128)
        wide = work.statistics_size // 4
        most = min(255, self.device.registers // self.threads // 8 * 8)
        return min(registers[amd] * wide, most), self.threads * 32 * wide


def fits(work: LayerTwiceWork, device: Device) -> bool:
    """Whether a program holds a row: of float32 up to 4,096 values, of float64 half of that."""
    return power(work.channels) <= work.values_per_thread * device.block_threads // 2


def plan(work: LayerTwiceWork, device: Device) -> LayerTwicePlan:
    """The plan of a pass over rows that fit."""
    return plan_of(work, device, LayerTwicePlan)
