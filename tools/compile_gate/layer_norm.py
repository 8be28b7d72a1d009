"""What the compile gate asks for of layer normalisation: two transformers' layers, and rows of every length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES
from benchmarks.profile.compile_offline import Call, recorded
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan import layer_double_backward as twice
from tsbn_kernels.backends.plan.layer_norm import LayerPlan, plans, work_of
from tsbn_kernels.backends.triton.passes_layer_norm import LayerBackward, LayerDoubleBackward, LayerForward
from tsbn_kernels.definition.options import LayerGradients, LayerNeeds, LayerNormalized, LayerOptions, LayerSaved

PASSES = ("forward", "backward", "double backward")


class Form(NamedTuple):
    """What a layer has besides its gates, and what is fused with it."""

    rms: bool = False
    bias: bool = False
    residual: bool = False
    fan_out: bool = False

    def __str__(self) -> str:
        return "+".join(name.replace("_", "-") for name, has in self._asdict().items() if has) or "none"


BARE, RMS, FULL = Form(), Form(rms=True), Form(bias=True, residual=True)
SHARED = Form(bias=True, residual=True, fan_out=True)
# T, N, tokens and D. Of the others one form stands for all: none takes more than that with a bias and a residual.
LAYERS = {
    (5, 8, 1024, 384): (BARE, FULL, SHARED),  # ViT-S/16 at 512 x 512
    (8, 16, 512, 768): (BARE, RMS, FULL),  # BERT base
    **dict.fromkeys([(2, 64, 256, size) for size in (1, 64, 197, 2048, 4096, 8192, 16384)], (FULL,)),
}
# Those whose second derivatives are compiled: even rows, several in a tile and one, and uneven ones.
TWICE = {
    ((5, 8, 1024, 384), BARE),
    ((5, 8, 1024, 384), SHARED),
    ((8, 16, 512, 768), RMS),
    ((2, 64, 256, 197), FULL),
    ((2, 64, 256, 4096), FULL),
}


@dataclass(frozen=True)
class LaidOutRows:
    """A layer and how it is called; its attributes have the names of the table's columns."""

    shape: tuple[int, ...]
    dtype: str
    fused: Form
    memory_format: str = "contiguous"
    stacking: str = "task_major"

    def activation(self, *, fan_out: bool = False) -> Tensor:
        """All tasks' activation, or the one that is fanned out to them; it takes no memory."""
        tasks, samples, *sizes = self.shape
        return torch.empty((samples if fan_out else tasks * samples, *sizes), dtype=DTYPES[self.dtype], device="meta")

    def options(self) -> LayerOptions:
        """What a call of it is asked for."""
        return LayerOptions(self.shape[0], 1e-5, "sigmoid", self.stacking, self.fused.rms, self.fused.fan_out)

    def parameter(self) -> Tensor:
        """Weight or bias, ``[T, D]``."""
        return torch.empty((self.shape[0], self.shape[-1]), device="meta")

    def plans(self, pass_: str, device: Device) -> tuple[LayerPlan, ...]:
        """The plans of one of its passes."""
        x, has = self.activation(fan_out=self.fused.fan_out), self.fused
        if pass_ == "double backward":
            asked = (self.shape, has) in TWICE
            return (twice.plan(twice.work_of(x, self.parameter(), self.options()), device),) if asked else ()
        needs = LayerNeeds(True, True, has.bias) if pass_ == "backward" else None
        work = work_of(x, self.parameter(), self.options(), needs, bias=has.bias, residual=has.residual)
        return plans(work, device)

    def calls(self, plan: LayerPlan) -> list[Call]:
        """The launches of such a plan."""
        has, options = self.fused, self.options()
        y, x, vector = self.activation(), self.activation(fan_out=has.fan_out), self.parameter()
        bias, residual = vector if has.bias else None, x if has.residual else None
        rstd = torch.empty(x.numel() // self.shape[-1], device="meta")
        mean = None if has.rms else rstd
        saved = LayerSaved(x, vector, mean, rstd)
        with recorded() as calls:
            if isinstance(plan, twice.LayerTwicePlan):
                factors = torch.empty((twice.FACTORS, *vector.shape), device="meta")
                LayerDoubleBackward(plan, options)(x, y, saved, factors)
            elif plan.work.direction == "backward":
                LayerBackward(plan, options)(y, residual, saved, LayerGradients(x, vector, bias))
            else:
                LayerForward(plan, options)(x, vector, bias, residual, LayerNormalized(y, residual, mean, rstd))
        return calls


def layers() -> Iterator[LaidOutRows]:
    """All of them, in both dtypes."""
    for (shape, forms), dtype in product(LAYERS.items(), ("float32", "bfloat16")):
        for form in forms:
            yield LaidOutRows(shape, dtype, form)
