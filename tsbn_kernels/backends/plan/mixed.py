"""What a pass over a mixed batch must move, and how the Triton backend cuts it up, whatever the mix is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tsbn_kernels.backends.plan.core import Plan, Tile
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.triton import LINE, ceil, power
from tsbn_kernels.backends.plan.work import Work
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import Needs, Options

MERGED = 32, 4  # channels and warps of a program that adds what the blocks of a task left
KEYED = 2048, 8  # words, and warps, of a program that looks at samples as a whole
INDEX = 8  # bytes of an index, a count, a key


def walks(x: Tensor) -> bool:
    """Whether a program may have several samples of a task: those of a channel are no longer than a line of memory."""
    return 0 < x.numel() * x.element_size() <= LINE * x.shape[0] * x.shape[1]


@dataclass(frozen=True)
class MixedWork(Work):
    """A pass over a batch of ``samples`` in all, which are of any of the tasks."""

    @property
    def layout(self) -> str:
        """Sizes, for people."""
        return f"[N, C, S] = {[self.samples, self.channels, self.positions]} of {self.tasks} tasks"

    @property
    def ragged(self) -> bool:
        """Whether what shares statistics may have fewer values: each task has as many samples as there are of it."""
        return True

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activation."""
        return self.channels * self.values * self.item_size


def work_of(x: Tensor, options: Options, needs: Needs | None = None, **details: Any) -> MixedWork:
    """The work of a pass over a readable ``x``: of a backward pass where the gradients are given that it ``needs``."""
    if needs is not None:
        details |= {"direction": "backward", **{f"needs_{name}": needed for name, needed in needs._asdict().items()}}
    _, N, C, S = layout.task_view(x, 1, "task_major").shape
    family = layout.family(x, "task_major") or "rows"
    return MixedWork(options.num_tasks, N, C, S, x.element_size(), family, activation=options.activation, **details)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A plan of the kernels of mixed batches. What they move of vectors and sums is at most what is said here.

    Attributes:
        keyed: the tile of words of the kernel that makes keys of samples.
    """

    work: MixedWork
    keyed: Tile = (1, 1)

    @property
    def block(self) -> int:
        """Samples of a block: what a tile holds."""
        return self.tile[0] // self.work.positions if self.work.family == "columns" else self.tile[0]

    @property
    def blocks(self) -> int:
        """The most blocks that there are: each task may have one that is not full."""
        return min(self.work.samples, self.work.samples // self.block + self.work.tasks)

    @property
    def limits_registers(self) -> bool:
        """Whether the compiler is held to the budget."""
        return self.work.statistics_size == 4 and self.device.target.startswith("sm_")

    @property
    def key_launches(self) -> int:
        """Launches that make keys: one for each activation that is summed."""
        return self.work.summed_activations * self.work.reduces

    @property
    def walks(self) -> int:
        """Launches that walk the samples."""
        return 1 + self.work.two_passes

    @property
    def launches(self) -> int:
        """Kernels that are launched one after the other."""
        return self.key_launches + self.work.reduces + self.walks

    @property
    def activation_bytes_read(self) -> int:
        """Bytes of x, dy and residual that the kernels load: for the keys, the sums and the result."""
        work = self.work
        if not work.backward:
            return work.bytes_to_read + 2 * work.input_bytes * work.training
        return work.bytes_to_read * (work.reduces + self.walks)

    @property
    def partial_bytes(self) -> int:
        """Bytes that the blocks leave for the launch that adds them: mean, rest, squares and count, or two sums."""
        work = self.work
        return work.reduces * (2 if work.backward else 4) * self.blocks * work.channels * work.statistics_size

    @property
    def vector_bytes_read(self) -> int:
        """Bytes of vectors, keys, order and partial sums: every program those of its block, at most."""
        work = self.work
        row, keys = work.channels * work.statistics_size, INDEX * work.samples
        more = 2 if work.two_passes else 0  # what the task's sums gave: slopes and offsets, or the rest
        vectors = self.blocks * (work.vector_bytes_to_read // work.tasks + (2 + more) * row)
        of_sums = work.reduces * (work.tasks * (4 * row + 3 * INDEX * self._widths) + work.vector_bytes_to_read)
        order = self.walks * (keys + 6 * INDEX * self.blocks) * (self.slabs // self.blocks)
        return self.walks * vectors + of_sums + order + self.partial_bytes + max(0, self.key_launches - 1) * keys

    @property
    def vector_bytes_written(self) -> int:
        """Bytes of vectors, keys and partial sums."""
        work = self.work
        terms = work.two_passes * (2 if work.backward else 1) * work.statistics_bytes
        keys = self.key_launches * INDEX * work.samples
        return work.vector_bytes_to_write + terms + keys + self.partial_bytes

    @property
    def _widths(self) -> int:
        return ceil(self.work.channels, MERGED[0])


def plan(work: MixedWork, device: Device) -> MixedPlan:
    """The plan for some work on a device: a function of sizes alone, so that one serves every mix."""
    per_thread = (8 if work.backward and work.reads_residual else 16) * 4 // work.statistics_size
    most = device.block_threads // 4 * per_thread
    if work.family == "columns":
        b = min(power(work.channels), LINE // work.item_size)
        a = min(max(most // b, power(work.positions)), power(work.values))
        widths = ceil(work.channels, b)
    else:
        b, widths = power(work.positions), work.channels
        a = min(max(1, most // b), power(work.samples))
    warps = max(1, min(a * b // per_thread, device.block_threads // 4) // device.warp)
    registers, shared_bytes = _budgets(work, device, warps)
    made = MixedPlan(work, device, "split", 1, (a, b), 1, warps, registers, shared_bytes, keyed=_keyed(work, device))
    return replace(made, slabs=made.blocks * widths)


def _keyed(work: MixedWork, device: Device) -> Tile:
    """Samples and words of a tile: a program for each multiprocessor at least, where there are samples for them."""
    words = power(ceil(work.channels * work.positions * work.item_size, INDEX))
    b = min(words, KEYED[0] // 4)
    a = min(KEYED[0] // b, max(1, power(work.samples // device.multiprocessors)))
    return a, b


def _budgets(work: MixedWork, device: Device, warps: int) -> tuple[int, int]:
    """Registers a thread and bytes of shared memory, as measured: tools/compile_gate/compiled_kernels.csv."""
    return 128, warps * 4096
