"""The launches for a batch that is spread over processes: each half of a pass that elsewhere is one.

No kernels of their own: the first launch of a split forward, and the last one of a backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.backends.plan import Plan
from tsbn_kernels.backends.triton.kernels.tiles import View
from tsbn_kernels.backends.triton.passes import BackwardPass, Pass
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Gradients, Moments, Options, Saved


class PartMoments(Pass):
    """Mean and variance of x."""

    def __init__(self, plan: Plan, x: Tensor, options: Options) -> None:
        super().__init__(plan, x, options)
        self.x, *_ = self.views
        self.first = self.launch("forward_partial")

    def __call__(self, x: Tensor) -> Moments:
        """Mean and biased variance, float64 ``[T, C]``."""
        partials = self.partials(4, self.sizes[0], x)
        self.first(View(x, *self.x), partials, *self.sizes, *self.split)
        mean, rest, squares, count = partials.double()
        return Moments(*reference.join_moments(mean + rest, squares / count, count))


class InputGradient(BackwardPass):
    """Gradients of x and residual by given means of dz and dz * xhat."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, dy, x, options, residual)
        constants = False, True, *self.formula
        if plan.work.fan_out:
            self.gather = self.launch("fan_out_gather", *constants)
            self.gradient = self.launch("fan_out_gradient")
        else:
            self.apply = self.launch("backward_apply", *constants)

    def __call__(self, dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, found: Gradients) -> None:
        """Writes the gradients that are given."""
        _, weight, bias, _, mean, var = saved
        dx, _, _, dresidual = found
        assert dx is not None
        gradient, source, added, result, beside = self.activations(dy, saved, dx, dresidual)
        vectors = weight, bias, mean, var
        rstd = torch.rsqrt(var.to(self.accumulate) + self.options.eps)
        if not self.plan.work.fan_out:  # the first split's sums are those of all
            _, samples, _, positions = self.sizes
            sums = self.partials(2, self.sizes[0], weight).zero_()
            sums[0, 0] = dz_mean * (samples * positions)
            sums[1, 0] = dz_xhat_mean * (samples * positions) / rstd
            operands = gradient, source, added, result, beside, *vectors
            self.apply(*operands, None, None, sums, *self.sizes, *self.split)
            return
        counts = *self.sizes, self.plan.splits
        gathered = View(self.workspace(dx), *self.dx)
        self.gather(gradient, source, added, gathered, beside, *vectors, None, None, None, *counts)
        scale = reference.gate_values(weight.to(self.accumulate), self.options.gate) * rstd
        terms = torch.stack((-dz_xhat_mean * rstd * scale, -dz_mean * scale)).to(self.accumulate)
        self.gradient(source, gathered, result, mean, terms, *counts)
