"""The launches of a second derivative, and their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.backends.plan.double_backward import SUMS, TwicePlan
from tsbn_kernels.backends.triton.kernels.tiles import View
from tsbn_kernels.backends.triton.passes import Pass
from tsbn_kernels.definition.options import Options


class DoubleBackward(Pass):
    """The sums, and by what is made of them the gradients of dy and x."""

    def __init__(self, plan: TwicePlan, ddx: Tensor, dy: Tensor, x: Tensor, options: Options) -> None:
        super().__init__(plan, x, options, ddx, dy)
        self.x, self.dx, self.ddx, self.dy, self.ddy = self.views
        self.first, self.apply = self.launch("double_backward_partial"), self.launch("double_backward_apply")

    def read(self, ddx: Tensor, dy: Tensor, x: Tensor) -> tuple[View, View, View]:
        """The views of what both launches read."""
        return View(ddx, *self.ddx), View(dy, *self.dy), View(x, *self.x)

    def sums(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        """The sums, float64 ``[5, T, C]``."""
        partials = self.partials(SUMS, self.sizes[0], x)
        self.first(*self.read(ddx, dy, x), mean, partials, *self.sizes, *self.split)
        return partials.sum(1, dtype=torch.float64)

    def gradients(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of dy and x."""
        ddy, dx = self.stacked_like(x), self.input_like(x)
        results = View(ddy, *self.ddy), View(dx, *self.dx)
        self.apply(*self.read(ddx, dy, x), mean, factors, *results, *self.sizes, *self.split)
        return ddy, dx
