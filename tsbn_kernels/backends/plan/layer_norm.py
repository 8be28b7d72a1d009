"""What a pass of layer normalisation must move, and the rules by which the Triton backend cuts it up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from torch import Tensor

from tsbn_kernels.backends.plan.core import Plan
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.triton import ceil, power
from tsbn_kernels.backends.plan.work import Work
from tsbn_kernels.definition.layer_norm import inner_rows, rows_of
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions

MOST = 16384  # values of a row, which a program holds as a whole
WAVES = 2  # of programs that leave no sums: the second one evens out what the first one leaves
LEAST = 16  # rows of a program that leaves sums: else these would be more than a tenth of what it reads
TILE = 2048  # values, where a row does not have more
CHANNELS = 256  # of a program that needs no row as a whole
MERGED = 32, 4  # channels and warps of a program that adds what others left


@dataclass(frozen=True)
class LayerWork(Work):
    """A pass over rows of ``channels`` values: of each task ``positions`` rows follow one another, ``samples`` times.

    Residual and, backward, the gradient of ``x + residual`` have the size of x.

    Attributes:
        rms: the rows have no mean.
    """

    rms: bool = False

    @property
    def title(self) -> str:
        """The pass, for people; what a pass in two launches gives of all gradients."""
        if not self.backward or (self.needs_dx and self.parameters):
            return self.direction
        return f"{self.direction}, {'x' if self.needs_dx else 'parameters'}"

    @property
    def layout(self) -> str:
        """Sizes, for people."""
        return f"[T, rows, D] = {[self.tasks, self.values, self.channels]}"

    @property
    def form(self) -> str:
        """Which normalisation it is, for people."""
        return "RMS norm" if self.rms else "layer norm"

    @property
    def parameters(self) -> int:
        """How many parameters' gradients are asked for."""
        return self.needs_dweight + self.needs_dbias if self.backward else 0

    @property
    def values_per_thread(self) -> int:
        """Values of each activation that a thread holds where rows are no longer than half of the most."""
        return 64 // self.statistics_size

    @property
    def meets_all(self) -> bool:
        """Whether a program goes through all tasks with a tile of their one input."""
        return self.fan_out and (not self.backward or self.needs_dx)

    @property
    def streams(self) -> int:
        """Tasks that have programs of their own."""
        return 1 if self.meets_all else self.tasks

    @property
    def reads_x(self) -> bool:
        """Whether x is read: not for the gradient of the bias alone."""
        return not self.backward or self.needs_dx or self.needs_dweight

    @property
    def row_bytes(self) -> int:
        """Bytes of the statistics of all rows of x."""
        rows = self.input_bytes // (self.item_size * self.channels)
        return rows * self.statistics_size * (2 - self.rms)

    @property
    def rereads(self) -> int:
        """How often x and its rows' statistics are read: by the parameters' gradients of one input for each task."""
        return self.reads_x * (self.tasks if self.fan_out and not self.meets_all else 1)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of activations: x, and forward the residual; backward dy, and what is added to dx."""
        residual = self.residual and (not self.backward or self.needs_dx)
        stacked = self.activation_bytes if self.backward else 0
        return self.input_bytes * (self.rereads + residual) + stacked

    @property
    def bytes_to_write(self) -> int:
        """Bytes of activations: y, and with a residual the sum that is normalised; backward dx."""
        if self.backward:
            return self.input_bytes * self.needs_dx
        return self.activation_bytes + self.input_bytes * self.residual

    @property
    def vector_bytes_to_write(self) -> int:
        """Bytes of the parameters' gradients, or of the rows' statistics."""
        return self.parameter_bytes * self.parameters if self.backward else self.row_bytes


def sizes_of(x: Tensor, weight: Tensor, options: LayerOptions) -> tuple[int, int, int, int, int]:
    """What :class:`LayerWork` begins with: tasks, samples, channels, positions, and the bytes of a value."""
    rows, inner = prod(rows_of(x, weight)), inner_rows(x, weight, options)
    groups = rows // (inner * (1 if options.fan_out else options.num_tasks))
    return options.num_tasks, groups, weight[0].numel(), inner, x.element_size()


def work_of(
    x: Tensor, weight: Tensor, options: LayerOptions, needs: LayerNeeds | None = None, **details: Any
) -> LayerWork:
    """The work of a pass over ``x``: of a backward pass where the gradients are given that it ``needs``."""
    details |= {"rms": options.rms, "fan_out": options.fan_out, "parameter_size": weight.element_size()}
    if needs is not None:
        details |= {"direction": "backward", **{f"needs_{name}": needed for name, needed in needs._asdict().items()}}
    return LayerWork(*sizes_of(x, weight, options), "columns", **details)


@dataclass(frozen=True)
class LayerPlan(Plan):
    """A plan of the kernels of layer normalisation: each row stays on chip."""

    backend = "triton"
    work: LayerWork

    @property
    def crowded(self) -> bool:
        """Whether a thread holds so much of a row that there is no room for the bias beside the gates."""
        return self.tile[0] * self.tile[1] > self.threads * self.work.values_per_thread

    @property
    def limits_registers(self) -> bool:
        """Whether the compiler is held to the budget: NVIDIA's takes more than it needs, or spills, where it is not."""
        return self.work.statistics_size == 4 and self.device.target.startswith("sm_")

    @property
    def merges(self) -> bool:
        """Whether another launch adds what the programs leave of the parameters' gradients."""
        return self.splits > 1 and self.work.parameters > 0

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return 1 + self.merges

    @property
    def exchanges(self) -> int:
        """None that is counted: of the rows of all programs some are always on their way."""
        return 0

    @property
    def partial_bytes(self) -> int:
        """Bytes of the sums that programs leave: one row of each task for each parameter and split."""
        work = self.work
        return self.merges * self.splits * work.parameters * work.tasks * work.channels * work.statistics_size

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of parameters, rows' statistics and partial sums."""
        work = self.work
        gates = self.tiles if work.meets_all else self.splits
        if not work.backward:
            return (gates + work.bias * (self.tiles if self.crowded else gates)) * work.parameter_bytes
        read = gates * work.needs_dx + work.needs_dweight
        return read * work.parameter_bytes + work.rereads * work.row_bytes + self.partial_bytes

    def budgets(self) -> tuple[int, int]:
        """Registers a thread and bytes of shared memory, as measured: tools/compile_gate/compiled_kernels.csv."""
        work, device, threads = self.work, self.device, self.threads
        amd = device.target.startswith("gfx")
        if self.crowded:
            registers = (248, 184) if work.backward else (255, 136)
        elif work.channels * work.item_size % 16:  # each value has an address and a mask of its own
            registers = (184, 160) if work.backward else (152, 104)
        elif not work.backward:
            registers = (96, 96) if work.fan_out else (80, 96)
        elif not work.needs_dx:
            registers = (80, 80)
        else:
            registers = (128, 152) if work.parameters else (128, 96)
        wide = 2 if work.statistics_size == 8 else 1
        most = min(255, device.registers // threads // 8 * 8)
        shared_bytes = threads * (64 if work.fan_out or (amd and self.tile[0] == 1) else 32) * wide
        return min(registers[amd] * wide, most), shared_bytes


PlanT = TypeVar("PlanT", bound=LayerPlan)


def plans(work: LayerWork, device: Device) -> tuple[LayerPlan, ...]:
    """The plans that do a pass, one after the other.

    There are two where a thread would have to hold too much: the sums for the parameters' gradients beside long rows,
    or those of all tasks beside their one input.

    Raises:
        ValueError: a row is longer than a program holds.
    """
    most = MOST * 4 // work.statistics_size
    whole = not work.backward or work.needs_dx
    if whole and work.channels > most:
        raise ValueError(f"rows of {work.channels} values are longer than the Triton kernels hold: the most are {most}")
    if whole and work.parameters and (work.fan_out or work.channels > most // 2):
        dx = replace(work, needs_dweight=False, needs_dbias=False)
        return plan_of(dx, device, LayerPlan), plan_of(replace(work, needs_dx=False), device, LayerPlan)
    return (plan_of(work, device, LayerPlan),)


def plan_of(work: LayerWork, device: Device, kind: type[PlanT]) -> PlanT:
    """The plan of one launch over rows of which a program holds some."""
    rows = work.values
    b = power(work.channels)
    if work.backward and not work.needs_dx:
        b = min(b, CHANNELS)
    a = min(power(rows), max(1, TILE // b))
    threads = max(device.warp, min(a * b // work.values_per_thread, device.block_threads // 2))
    tiles = ceil(rows, a)
    slabs = work.streams * ceil(work.channels, b)
    crowded = a * b > threads * work.values_per_thread
    if crowded:  # a few threads with all the registers that there are spill less than many with half of them
        threads = min(threads, device.registers // 256)
    whole = kind(work, device, "resident", slabs, (a, b), tiles, threads // device.warp, 0, 0)
    registers, shared_bytes = whole.budgets()
    whole = replace(whole, registers=registers, shared_bytes=shared_bytes)
    programs = device.multiprocessors * whole.resident_programs * (1 if work.parameters else WAVES)
    share = ceil(tiles, max(1, programs // slabs))
    if work.parameters:
        share = max(share, ceil(LEAST, a))
    return replace(whole, splits=ceil(tiles, share))
