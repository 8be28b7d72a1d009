"""The launches of the passes of layer normalisation, and their arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tsbn_kernels.backends.plan.layer_double_backward import SUMS
from tsbn_kernels.backends.plan.layer_norm import MERGED, LayerPlan
from tsbn_kernels.backends.plan.triton import ceil
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.backends.triton.passes import tile_of
from tsbn_kernels.definition.options import LayerGradients, LayerNormalized, LayerOptions, LayerSaved


class LayerPass:
    """A plan with the launches that carry it out."""

    def __init__(self, plan: LayerPlan, options: LayerOptions) -> None:
        work = plan.work
        self.plan = plan
        self.sizes = work.tasks, work.samples, work.positions, plan.splits, plan.share
        self.sigmoid = options.gate == "sigmoid"

    def launch(self, kernel: str, *constants: Any) -> Launch:
        """A launch of as many programs as are planned."""
        plan = self.plan
        options = {"num_warps": plan.warps} | ({"maxnreg": plan.registers} if plan.limits_registers else {})
        constants = plan.work.channels, plan.work.fan_out, *constants
        return Launch(kernel, plan.programs, options, tile_of(plan), *map(tl.constexpr, constants))


class LayerForward(LayerPass):
    """y, the sum that is normalised where there is a residual, and the rows' statistics."""

    def __init__(self, plan: LayerPlan, options: LayerOptions) -> None:
        super().__init__(plan, options)
        self.rows = self.launch("layer_norm_forward", plan.crowded, options.eps, self.sigmoid)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, found: LayerNormalized
    ) -> None:
        """Writes what is given to be found."""
        self.rows(x, residual, found.y, found.s, weight, bias, found.mean, found.rstd, *self.sizes)


class LayerBackward(LayerPass):
    """Gradients of x, weight and bias, those that are asked for."""

    def __init__(self, plan: LayerPlan, options: LayerOptions) -> None:
        super().__init__(plan, options)
        work = plan.work
        self.accumulate = torch.float64 if work.statistics_size == 8 else torch.float32
        self.rows = self.launch("layer_norm_backward", plan.merges, self.sigmoid)
        channels, warps = MERGED
        fields = tile_of(plan)._replace(B=tl.constexpr(channels))
        self.merge = Launch(
            "layer_norm_parameters",
            work.tasks * ceil(work.channels, channels),
            {"num_warps": warps},
            fields,
            *map(tl.constexpr, (work.channels, self.sigmoid)),
        )

    def __call__(self, dy: Tensor, ds: Tensor | None, saved: LayerSaved, found: LayerGradients) -> None:
        """Writes the gradients that this plan's work asks for."""
        x, weight, mean, rstd = saved
        work = self.plan.work
        dx = found.dx if work.needs_dx else None
        dweight = found.dweight if work.needs_dweight else None
        dbias = found.dbias if work.needs_dbias else None
        left = self._partial(dweight), self._partial(dbias)
        self.rows(dy, None if dx is None else ds, x, dx, weight, mean, rstd, *left, *self.sizes)
        if self.plan.merges:
            self.merge(weight, dweight, dbias, *left, work.tasks, self.plan.splits)

    def _partial(self, gradient: Tensor | None) -> Tensor | None:
        """Where the programs leave their sums: in the gradient itself where there is one program a task."""
        if gradient is None or not self.plan.merges:
            return gradient
        return gradient.new_empty((self.plan.splits, *gradient.shape), dtype=self.accumulate)


class LayerDoubleBackward(LayerPass):
    """The gradients of dy and s, and the sums for that of the weight."""

    def __init__(self, plan: LayerPlan, options: LayerOptions) -> None:
        super().__init__(plan, options)
        self.rows = self.launch("layer_norm_double_backward")

    def __call__(self, ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes contiguous operands."""
        x, weight, mean, rstd = saved
        ddy, ds = torch.empty_like(dy), torch.empty_like(dy)
        partials = rstd.new_empty((SUMS, self.plan.splits, *weight.shape))
        self.rows(ddx, dy, x, ddy, ds, mean, rstd, factors, partials, *self.sizes)
        return ddy, ds, partials.sum(1, dtype=torch.float64)
