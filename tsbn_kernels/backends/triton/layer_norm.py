"""The operators of :class:`tsbn_kernels.definition.options.LayerBackend` by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from tsbn_kernels.backends.plan import layer_double_backward as twice
from tsbn_kernels.backends.plan.layer_norm import plans, work_of
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.backends.triton.passes_layer_norm import LayerBackward, LayerDoubleBackward, LayerForward
from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition.layout import contiguous
from tsbn_kernels.definition.options import (
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
) -> LayerNormalized:
    """Raises ValueError where a row is longer than a program holds."""
    if x.numel() == 0:
        return reference.layer_norm(x, weight, bias, residual, options)
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual = contiguous(bias), contiguous(residual)
    key = "layer_norm", *map(ops.class_of, (x, residual, weight, bias)), options
    run = ops.forwards.get(key)
    if run is None:
        work = work_of(x, weight, options, bias=bias is not None, residual=residual is not None)
        (plan,) = plans(work, ops.device_of(x.device))
        run = ops.forwards[key] = LayerForward(plan, options)
    found = reference.empty_outputs(x, weight, residual, options)
    with ops.on_device(x.device):
        run(x, weight, bias, residual, found)
    return found


def layer_norm_backward(
    dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
) -> LayerGradients:
    """Raises ValueError where a row is longer than a program holds, and the gradient of x is needed."""
    if saved.s.numel() == 0:
        return reference.layer_norm_backward(dy, ds, saved, needs, options)
    if not any(needs):
        return LayerGradients()
    saved, dy, ds = saved.contiguous(), dy.contiguous(), contiguous(ds)
    x, weight, _, _ = saved
    key = "layer_norm", *map(ops.class_of, (dy, ds, x, weight)), needs, options
    runs = ops.backwards.get(key)
    if runs is None:
        work = work_of(x, weight, options, needs, residual=ds is not None)
        chosen = plans(work, ops.device_of(x.device))
        runs = ops.backwards[key] = tuple(LayerBackward(plan, options) for plan in chosen)
    found = reference.empty_gradients(x, weight, needs)
    with ops.on_device(x.device):
        for run in runs:
            run(dy, ds, saved, found)
    return found


def layer_norm_double_backward(
    ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves rows that are longer than a program holds to the reference."""
    if saved.s.numel() == 0:
        return reference.layer_norm_double_backward(ddx, dy, saved, factors, options)
    saved, ddx, dy, factors = saved.contiguous(), ddx.contiguous(), dy.contiguous(), factors.contiguous()
    x, weight, _, _ = saved
    key = "layer_norm_double_backward", *map(ops.class_of, (ddx, dy, x)), weight.shape, options
    run = ops.backwards.get(key)
    if run is None:
        work, device = twice.work_of(x, weight, options), ops.device_of(x.device)
        if not twice.fits(work, device):
            return reference.layer_norm_double_backward(ddx, dy, saved, factors, options)
        run = ops.backwards[key] = LayerDoubleBackward(twice.plan(work, device), options)
    with ops.on_device(x.device):
        found: tuple[Tensor, Tensor, Tensor] = run(ddx, dy, saved, factors)
    return found
