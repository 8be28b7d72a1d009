"""What a pass of layer normalisation over a mixed batch must move, and how the Triton backend cuts it up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tsbn_kernels.backends.plan import layer_norm
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.layer_norm import LEAST, MOST, LayerPlan, LayerWork
from tsbn_kernels.backends.plan.mixed import INDEX, KEYED
from tsbn_kernels.backends.plan.triton import LINE, ceil, power
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a program can hold a row, and the sums for the gradients of parameters beside it."""
    return x.numel() > 0 and 2 * weight[0].numel() <= MOST * 4 // (8 if x.element_size() == 8 else 4)


@dataclass(frozen=True)
class MixedLayerWork(LayerWork):
    """A pass over a stream of ``samples`` in all, of ``positions`` rows each.

    Attributes:
        of_tasks: how many tasks they may be of.
    """

    of_tasks: int = 1

    @property
    def layout(self) -> str:
        """Sizes, for people."""
        return f"[N, rows, D] = {[self.samples, self.positions, self.channels]} of {self.of_tasks} tasks"

    @property
    def ragged(self) -> bool:
        """Whether tiles may have fewer rows: each task has as many samples as there are of it."""
        return self.backward

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weight, or bias."""
        return self.of_tasks * self.channels * self.parameter_size


def work_of(
    x: Tensor, weight: Tensor, options: LayerOptions, needs: LayerNeeds | None = None, **details: Any
) -> MixedLayerWork:
    """The work of a pass over ``x``: of a backward pass where the gradients are given that it ``needs``."""
    positions = x[0].numel() // weight[0].numel()
    details |= {"rms": options.rms, "parameter_size": weight.element_size(), "of_tasks": options.num_tasks}
    if needs is not None:
        details |= {"direction": "backward", **{f"needs_{name}": needed for name, needed in needs._asdict().items()}}
    return MixedLayerWork(1, x.shape[0], weight[0].numel(), positions, x.element_size(), "columns", **details)


@dataclass(frozen=True)
class MixedLayerPlan(LayerPlan):
    """A plan of the kernels of mixed batches. What they move of vectors and sums is at most what is said here.

    Attributes:
        block: backward, samples of a task that one or more programs go through.
    """

    work: MixedLayerWork
    block: int = 1

    @property
    def blocks(self) -> int:
        """The most blocks that there are."""
        return self.slabs

    @property
    def merges(self) -> bool:
        """Whether another launch adds what the programs leave of the parameters' gradients."""
        return self.work.parameters > 0

    @property
    def keys(self) -> tuple[int, int]:
        """Samples and words of a tile of the kernel that makes keys: at least one word for each thread."""
        (most, warps), device = KEYED, self.device
        b = power(max(1, self.key_bytes // INDEX))
        least = max(1, warps * device.warp // b)
        return min(most // b, max(least, power(self.work.samples // device.multiprocessors))), b

    @property
    def key_bytes(self) -> int:
        """Bytes of x and of dy that tell a sample from others of its task, beside the statistics of its rows."""
        work = self.work
        return min(LINE, work.channels * work.positions * work.item_size)

    @property
    def key_launches(self) -> int:
        """Launches that make keys: of the statistics, of x and of dy."""
        return 3 * self.merges

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return 1 + self.merges + self.key_launches

    @property
    def partial_bytes(self) -> int:
        """Bytes of the sums that programs leave."""
        work = self.work
        return self.programs * work.parameters * work.channels * work.statistics_size

    @property
    def activation_bytes_read(self) -> int:
        """Bytes of activations that the kernels load, and of what keys are made of."""
        work = self.work
        keyed = work.samples * (2 * self.key_bytes + work.positions * work.statistics_size)
        return work.bytes_to_read + self.merges * keyed

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of parameters, rows' statistics, order, keys and partial sums.

        A program of the forward pass finds the vectors in its cache that it has loaded before.
        """
        work = self.work
        row = work.channels * work.parameter_size
        if not work.backward:
            samples = 1 + ceil(self.share * self.tile[0] - 1, work.positions)  # that a program meets
            return self.programs * min(work.of_tasks, samples) * (1 + work.bias) * row + INDEX * work.samples
        order = INDEX * (6 * self.programs + work.samples * (1 + 2 * self.merges)) + 2 * INDEX * work.of_tasks
        statistics = work.row_bytes * work.reads_x
        return self.programs * row + statistics + order + work.parameter_bytes * work.needs_dweight + self.partial_bytes

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors, keys and partial sums."""
        return self.work.vector_bytes_to_write + self.key_launches * INDEX * self.work.samples + self.partial_bytes


def plan(work: MixedLayerWork, device: Device) -> MixedLayerPlan:
    """The plan for some work on a device: a function of sizes alone, so that one serves every mix."""
    (whole,) = layer_norm.plans(work, device)
    made = {field.name: getattr(whole, field.name) for field in fields(whole)}
    if not work.backward:
        # Gates of rows take registers that those of a task do not: some kernels for NVIDIA spill with as few as there.
        most = min(255, device.registers // whole.threads // 8 * 8)
        more = min(whole.registers * 7 // 5 // 8 * 8, most) if device.target.startswith("sm_") else whole.registers
        return MixedLayerPlan(**made | {"registers": more})
    rows = max(LEAST, whole.tile[0], ceil(work.values, device.multiprocessors * whole.resident_programs))
    block = min(work.samples, max(1, rows // work.positions))
    tiles = ceil(block * work.positions, whole.tile[0])
    pieces = 1 if block > 1 else ceil(work.positions, rows)
    blocks = min(work.samples, work.samples // block + work.of_tasks)  # each task may have one that is not full
    return MixedLayerPlan(**made | {"block": block, "slabs": blocks, "tiles": tiles, "splits": pieces})
