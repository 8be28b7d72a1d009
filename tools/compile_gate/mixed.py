"""What the compile gate asks for of mixed batches: vectors, and samples of few positions, in the dtype that takes most.

GELU after a residual takes the most of what may be fused; a layer alone is compiled for vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES
from benchmarks.profile.compile_offline import Call, recorded
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan.mixed import MixedPlan, plan, work_of
from tsbn_kernels.backends.triton.passes_mixed import MixedBackward, MixedForward
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Needs, Options, Running, Saved

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class LaidOutMix:
    """A layer and how it is called; its attributes have the names of the table's columns. The shape is T, N, C, ..."""

    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    fused: str
    stacking: str = "mixed"

    @property
    def options(self) -> Options:
        """What a call of it is asked for."""
        return Options(self.shape[0], 1e-5, "sigmoid", "task_major", self.fused.partition("+")[0])

    def activation(self) -> Tensor:
        """The batch; it takes no memory."""
        made = torch.empty(self.shape[1:], dtype=DTYPES[self.dtype], device="meta")
        return made.to(memory_format=torch.channels_last) if self.memory_format == "channels_last" else made

    def plan(self, pass_: str, device: Device) -> MixedPlan:
        """The plan of one of its passes."""
        fused = self.fused != "none"
        needs = Needs(True, True, fused, fused) if pass_ == "backward" else None
        return plan(work_of(self.activation(), self.options, needs, bias=fused, residual=fused), device)

    def calls(self, made: MixedPlan) -> list[Call]:
        """The launches of such a plan."""
        x, vector = self.activation(), torch.empty((self.shape[0], self.shape[2]), device="meta")
        index = torch.empty(self.shape[1], dtype=torch.int64, device="meta")
        bias, residual = (None, None) if self.fused == "none" else (vector, x)
        saved = Saved(x, vector, bias, residual, vector, vector)
        run: Any
        with recorded() as calls:
            if made.work.backward:
                run = MixedBackward(made, x, self.options)
                run(x, saved, index, Gradients(x, vector, bias, residual))
            else:
                run = MixedForward(made, x, self.options)
                batches = torch.empty(self.shape[0], dtype=torch.int64, device="meta")
                run(saved, index, x, Running(vector, vector, batches) if made.work.reduces else NOT_TRACKED)
        return calls


LAYERS = (
    LaidOutMix((8, 4096, 512), "bfloat16", "contiguous", "none"),
    LaidOutMix((8, 4096, 512), "bfloat16", "contiguous", "gelu+residual"),
    LaidOutMix((40, 512, 256, 4, 4), "bfloat16", "channels_last", "gelu+residual"),
    LaidOutMix((40, 512, 256, 5, 5), "float32", "contiguous", "gelu+residual"),
)
