"""What the compile gate asks for of second derivatives: with masks and without, in the dtype that takes most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES
from benchmarks.profile.compile_offline import Call, recorded
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan.double_backward import FACTORS, TwicePlan, plan, work_of
from tsbn_kernels.backends.triton.passes_double_backward import DoubleBackward
from tsbn_kernels.definition.options import Options


@dataclass(frozen=True)
class LaidOutTwice:
    """A layer; its attributes have the names of the table's columns. The shape is T, N, C, height and width."""

    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    stacking: str = "task_major"
    fused: str = "none"

    @property
    def options(self) -> Options:
        """What a call of it is asked for."""
        return Options(self.shape[0], 1e-5, "sigmoid", self.stacking)

    def activation(self) -> Tensor:
        """All tasks' activation; it takes no memory."""
        tasks, samples, *sizes = self.shape
        made = torch.empty((tasks * samples, *sizes), dtype=DTYPES[self.dtype], device="meta")
        return made.to(memory_format=torch.channels_last) if self.memory_format == "channels_last" else made

    def plan(self, device: Device) -> TwicePlan:
        """The plan of both launches."""
        return plan(work_of(self.activation(), self.options), device)

    def calls(self, made: TwicePlan) -> list[Call]:
        """The launches of such a plan."""
        x, vectors = self.activation(), torch.empty((FACTORS, self.shape[0], self.shape[2]), device="meta")
        run = DoubleBackward(made, x, x, x, self.options)
        with recorded() as calls:
            run.sums(x, x, x, vectors[0])
            run.gradients(x, x, x, vectors[0], vectors)
        return calls


LAYERS = tuple(
    LaidOutTwice(shape, dtype, memory_format)
    for dtype, memory_format in (("float32", "contiguous"), ("bfloat16", "channels_last"))
    for shape in ((40, 256, 64, 64, 64), (3, 5, 64, 36, 44))
)
