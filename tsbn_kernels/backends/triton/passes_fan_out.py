"""The launches of the passes over one input ``[N, C, *]`` that all tasks share."""

from __future__ import annotations

from torch import Tensor

from tsbn_kernels.backends.plan import Plan
from tsbn_kernels.backends.triton.kernels.tiles import View
from tsbn_kernels.backends.triton.passes import Pass, view_of
from tsbn_kernels.definition.options import Gradients, Options, Saved


class FanOutForward(Pass):
    """Statistics of x and every task's y, or y by the tasks' given statistics."""

    def __init__(self, plan: Plan, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, x, options)
        self.x, _, self.residual, self.y = self.views(x, residual)
        self.slab = self.launch("fan_out_slab", *self.formula)
        self.first = self.launch("forward_partial")
        self.apply = self.launch("fan_out_apply", *self.formula)

    def __call__(self, saved: Saved, y: Tensor) -> None:
        """Writes y, and mean and var where the plan reduces; reads them where it does not."""
        x, weight, bias, residual, mean, var = saved
        source = View(x, *self.x)
        tensors = source, view_of(residual, self.residual), View(y, *self.y), weight, bias, mean, var
        if self.plan.variant == "resident":
            self.slab(*tensors, *self.sizes)
            return
        partials = None
        if self.plan.variant == "split":
            _, *of_one = self.sizes
            partials = weight.new_empty((4, self.plan.splits, self.sizes[2]), dtype=self.accumulate)
            self.first(source, partials, 1, *of_one, *self.split)
        self.apply(*tensors, partials, *self.sizes, *self.split)


class FanOutBackward(Pass):
    """Gradients of x (the sum over the tasks), weight, bias and residual, those that are asked for."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, x, options)
        self.x, self.dx, self.dy, self.residual, self.dresidual = self.views(x, dy, residual)
        self.gather = self.launch("fan_out_gather", plan.work.reduces, plan.work.training, *self.formula)
        self.sums = self.launch("fan_out_sums", *self.formula, programs=plan.slabs * options.num_tasks)
        self.gradient = self.launch("fan_out_gradient")

    def __call__(self, dy: Tensor, saved: Saved, found: Gradients) -> None:
        """Writes the gradients that are given."""
        x, weight, bias, residual, mean, var = saved
        dx, dweight, dbias, dresidual = found
        work, counts = self.plan.work, (*self.sizes, self.plan.splits)
        source, result = View(x, *self.x), view_of(dx, self.dx)
        split = self.plan.variant == "split"
        incomplete = split and work.training and dx is not None
        gathered = self.workspace(dx) if dx is not None and incomplete else dx
        partials = self.partials(2, weight) if split else None
        now = (None, None, partials) if split else (dweight, dbias, None)
        gradient, added = View(dy, *self.dy), view_of(residual, self.residual)
        results = view_of(gathered, self.dx), view_of(dresidual, self.dresidual)
        self.gather(gradient, source, added, *results, weight, bias, mean, var, *now, *counts)
        if split:
            terms = weight.new_empty((2, *weight.shape), dtype=self.accumulate) if incomplete else None
            self.sums(weight, mean, var, dweight, dbias, partials, terms, *counts)
            if incomplete:
                self.gradient(source, view_of(gathered, self.dx), result, mean, terms, *counts)
