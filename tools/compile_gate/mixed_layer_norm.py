"""What the compile gate asks for of layer normalisation of mixed batches: vectors, and the tokens of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES
from benchmarks.profile.compile_offline import Call, recorded
from tools.compile_gate.layer_norm import FULL, Form
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan.mixed_layer_norm import MixedLayerPlan, plan, work_of
from tsbn_kernels.backends.triton.passes_mixed_layer_norm import MixedLayerBackward, MixedLayerForward
from tsbn_kernels.definition.options import LayerGradients, LayerNeeds, LayerNormalized, LayerOptions, LayerSaved

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class LaidOutMixedRows:
    """A layer and how it is called; its attributes have the names of the table's columns. The shape is T, N, ..., D."""

    shape: tuple[int, ...]
    dtype: str
    fused: Form = FULL
    memory_format: str = "contiguous"
    stacking: str = "mixed"

    @property
    def options(self) -> LayerOptions:
        """What a call of it is asked for."""
        return LayerOptions(self.shape[0], 1e-5, "sigmoid", "task_major")

    def activation(self) -> Tensor:
        """The batch; it takes no memory."""
        return torch.empty(self.shape[1:], dtype=DTYPES[self.dtype], device="meta")

    def parameter(self) -> Tensor:
        """Weight or bias, ``[T, D]``."""
        return torch.empty((self.shape[0], self.shape[-1]), device="meta")

    def plan(self, pass_: str, device: Device) -> MixedLayerPlan:
        """The plan of one of its passes."""
        needs = LayerNeeds(True, True, True) if pass_ == "backward" else None
        work = work_of(self.activation(), self.parameter(), self.options, needs, bias=True, residual=True)
        return plan(work, device)

    def calls(self, made: MixedLayerPlan) -> list[Call]:
        """The launches of such a plan, but those that make keys: the gate has them of other mixed batches."""
        x, vector = self.activation(), self.parameter()
        index = torch.empty(self.shape[1], dtype=torch.int64, device="meta")
        statistic = torch.empty(x.numel() // self.shape[-1], device="meta")
        run: Any
        with recorded() as calls:
            if made.work.backward:
                run = MixedLayerBackward(made, self.options)
                saved = LayerSaved(x, vector, statistic, statistic)
                run(x, x, saved, index, LayerGradients(x, vector, vector))
            else:
                run = MixedLayerForward(made, self.options)
                run(x, index, vector, vector, x, LayerNormalized(x, x, statistic, statistic))
        return [call for call in calls if call.launch.kernel != "mixed_keys"]


LAYERS = (
    LaidOutMixedRows((8, 4096, 512), "bfloat16"),
    LaidOutMixedRows((8, 128, 197, 768), "float32"),
    LaidOutMixedRows((40, 512, 16, 8192), "float32"),
)
