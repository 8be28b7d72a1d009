"""The launches of a backward pass to one input ``[N, C, *]`` that all tasks share."""

from __future__ import annotations

from torch import Tensor

from tsbn_kernels.backends.plan import Plan
from tsbn_kernels.backends.triton.passes import BackwardPass, view_of
from tsbn_kernels.definition.options import Gradients, Options, Saved


class FanOutBackward(BackwardPass):
    """Gradients of x (the sum over the tasks), weight, bias and residual, those that are asked for."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, dy, x, options, residual)
        self.gather = self.launch("fan_out_gather", plan.work.reduces, plan.work.training, *self.formula)
        self.sums = self.launch("fan_out_sums", *self.formula, programs=plan.slabs * options.num_tasks)
        self.gradient = self.launch("fan_out_gradient")

    def __call__(self, dy: Tensor, saved: Saved, found: Gradients) -> None:
        """Writes the gradients that are given."""
        _, weight, bias, _, mean, var = saved
        dx, dweight, dbias, dresidual = found
        work, counts = self.plan.work, (*self.sizes, self.plan.splits)
        split = self.plan.variant == "split"
        incomplete = split and work.training and dx is not None
        gathered = self.workspace(dx) if dx is not None and incomplete else dx
        partials = self.partials(2, work.tasks, weight) if split else None
        now = (None, None, partials) if split else (dweight, dbias, None)
        activations = self.activations(dy, saved, gathered, dresidual)
        self.gather(*activations, weight, bias, mean, var, *now, *counts)
        if split:
            terms = weight.new_empty((2, *weight.shape), dtype=self.accumulate) if incomplete else None
            self.sums(weight, mean, var, dweight, dbias, partials, terms, *counts)
            if incomplete:
                _, source, _, sums, _ = activations
                self.gradient(source, sums, view_of(dx, self.dx), mean, terms, *counts)
