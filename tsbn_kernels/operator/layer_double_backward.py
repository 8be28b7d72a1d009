"""The second derivative of layer normalisation: the backward pass as a function of autograd's, and its own backward.

Under ``create_graph=True`` the backward pass is the fused one. Its derivative is an operator that reads ddx, dy and s
and writes the gradients of dy and s, by factors made of what has the shape of the weight. Further derivatives are those
of the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import layer_norm as definition
from tsbn_kernels.definition import layout, reference
from tsbn_kernels.definition.options import LayerBackend, LayerGradients, LayerNeeds, LayerOptions, LayerSaved


def differentiable(s: Tensor, weight: Tensor, options: LayerOptions) -> LayerSaved:
    """What is saved, with statistics that are functions of ``s``."""
    return LayerSaved(s, weight, *definition.statistics(s, weight, options))


class TaskLayerNormBackward(torch.autograd.Function):
    """The backward pass. Saves what it reads."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, ds: Tensor | None, *inputs: Any) -> LayerGradients:
        """Takes the gradients, the fields of ``LayerSaved``, what computes the pass, needs and options."""
        *saved, ctx.compute, needs, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, *saved)
        found: LayerGradients = ctx.compute.layer_norm_backward(dy, ds, LayerSaved._make(saved), needs, ctx.options)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        given, saved = LayerGradients._make(gradients), LayerSaved._make(tensors)
        ddy, ds, dweight = double_backward(ctx.compute, given, dy, saved, ctx.options)
        dds = given.dx if ctx.needs_input_grad[1] else None  # there may be no ds
        return ddy, dds, ds, dweight, *(None,) * 5


def backward(
    compute: LayerBackend,
    dy: Tensor,
    ds: Tensor | None,
    saved: LayerSaved,
    needs: LayerNeeds,
    options: LayerOptions,
) -> LayerGradients:
    """The gradients that are needed, differentiable."""
    return LayerGradients._make(TaskLayerNormBackward.apply(dy, ds, *saved, compute, needs, options))


def double_backward(
    compute: LayerBackend, given: LayerGradients, dy: Tensor, saved: LayerSaved, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of dy, s and the weight; ``given`` are those of what a backward pass returns."""
    if torch.is_grad_enabled():
        compute, saved = reference, differentiable(saved.s, saved.weight, options)
    wide = saved.weight.to(saved.rstd.dtype)
    ddweight, ddbias = (None if v is None else v.to(wide.dtype) for v in (given.dweight, given.dbias))
    factors = definition.double_backward_factors(wide, ddweight, ddbias, options.gate)
    ddx = torch.zeros_like(saved.s) if given.dx is None else given.dx
    ddy, ds, sums = compute.layer_norm_double_backward(ddx, dy, saved, factors, options)
    if options.fan_out:
        ds = layout.streams(ds, options.num_tasks, options.stacking).sum(0)
    dweight = definition.double_backward_dweight(saved.weight.double(), given.dweight, sums, options.gate)
    return ddy, ds, dweight.to(saved.weight.dtype)
