"""The operators of :class:`tsbn_kernels.definition.options.MixedLayerBackend` by the Triton kernels.

They are for rows of which a program holds two: :func:`tsbn_kernels.backends.plan.mixed_layer_norm.fits`.
"""

from __future__ import annotations

from torch import Tensor

from tsbn_kernels.backends.plan.mixed_layer_norm import plan, work_of
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.backends.triton.passes_mixed_layer_norm import MixedLayerBackward, MixedLayerForward
from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition.layout import contiguous
from tsbn_kernels.definition.options import (
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)


def mixed_layer_norm(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    options: LayerOptions,
) -> LayerNormalized:
    x, weight, index = x.contiguous(), weight.contiguous(), task_of_sample.contiguous()
    bias, residual = contiguous(bias), contiguous(residual)
    key = "mixed_layer_norm", *map(ops.class_of, (x, residual, weight, bias)), options
    run = ops.forwards.get(key)
    if run is None:
        work = work_of(x, weight, options, bias=bias is not None, residual=residual is not None)
        run = ops.forwards[key] = MixedLayerForward(plan(work, ops.device_of(x.device)), options)
    found = reference.empty_outputs(x, weight, residual, options)
    with ops.on_device(x.device):
        run(x, index, weight, bias, residual, found)
    return found


def mixed_layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    saved: LayerSaved,
    task_of_sample: Tensor,
    needs: LayerNeeds,
    options: LayerOptions,
) -> LayerGradients:
    if not any(needs):
        return LayerGradients()
    saved, dy, ds = saved.contiguous(), dy.contiguous(), contiguous(ds)
    x, weight, _, _ = saved
    key = "mixed_layer_norm", *map(ops.class_of, (dy, ds, x, weight)), needs, options
    run = ops.backwards.get(key)
    if run is None:
        work = work_of(x, weight, options, needs, residual=ds is not None)
        run = ops.backwards[key] = MixedLayerBackward(plan(work, ops.device_of(x.device)), options)
    found = reference.empty_gradients(x, weight, needs)
    with ops.on_device(x.device):
        run(dy, ds, saved, task_of_sample, found)
    return found
