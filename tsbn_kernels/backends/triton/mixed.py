"""The operators of :class:`tsbn_kernels.definition.options.MixedBackend` by the Triton kernels.

They are for samples of few positions: :func:`tsbn_kernels.backends.plan.mixed.walks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends.plan.mixed import plan, work_of
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.backends.triton.passes_mixed import MixedBackward, MixedForward
from tsbn_kernels.definition import layout
from tsbn_kernels.definition import mixed_batch_norm as definition
from tsbn_kernels.definition.activations import NONE
from tsbn_kernels.definition.batch_norm import empty_statistics
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Needs, Normalized, Options, Running, Saved


def _normalize(
    saved: Saved, task_of_sample: Tensor, training: bool, options: Options, running: Running = NOT_TRACKED
) -> Tensor:
    saved = ops.contiguous(saved)
    x, weight, bias, residual, *_ = saved
    key = "mixed", ops.class_of(x), ops.class_of(residual), ops.dtypes(saved), ops.kinds(running), training, options
    run = ops.forwards.get(key)
    if run is None:
        own_x, own_residual = layout.readable(x, options._replace(num_tasks=1), residual)
        if own_x is not x or own_residual is not residual:
            own = saved._replace(x=own_x, residual=own_residual)
            return _normalize(own, task_of_sample, training, options, running)
        details: dict[str, Any] = {
            "training": training,
            "bias": bias is not None,
            "residual": residual is not None,
            "parameter_size": weight.element_size(),
        }
        work = work_of(x, options, **details)
        run = ops.forwards[key] = MixedForward(plan(work, ops.device_of(x.device)), x, options)
    y: Tensor = run.empty(x)
    with ops.on_device(x.device):
        run(saved, task_of_sample, y, running)
    return y


def mixed_forward_training(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    options: Options,
    running: Running = NOT_TRACKED,
) -> Normalized:
    """Updates the running statistics of a task, if any, in the launch that writes those of its samples."""
    mean, var = empty_statistics(weight, x)
    y = _normalize(Saved(x, weight, bias, residual, mean, var), task_of_sample, True, options, running)
    return Normalized(y, mean, var)


def mixed_forward_tracked(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    options: Options,
) -> Normalized:
    """Updates those of float64 beside the launch, which would round their momentum."""
    operands = x, task_of_sample, weight, bias, residual
    if x.dtype == torch.float64:
        return definition.mixed_forward_tracked(*operands, running, options, train=mixed_forward_training)
    definition.check_batch(x, task_of_sample, options.num_tasks)
    return mixed_forward_training(*operands, options, running)


def mixed_forward_eval(saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
    return _normalize(saved, task_of_sample, False, options)


def mixed_backward(
    dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
) -> Gradients:
    if options.activation == NONE:  # nothing depends on what went into it
        saved = saved._replace(bias=None, residual=None)
    if not any(needs):
        return Gradients()
    saved = ops.contiguous(saved)
    x, weight, bias, residual, *_ = saved
    activations = tuple(map(ops.class_of, (dy, x, residual)))
    key = "mixed", *activations, ops.dtypes(saved), training, needs, options
    run = ops.backwards.get(key)
    if run is None:
        own_x, own_dy, own_residual = layout.readable(x, options._replace(num_tasks=1), dy, residual)
        if own_x is not x or own_dy is not dy or own_residual is not residual:
            own = saved._replace(x=own_x, residual=own_residual)
            return mixed_backward(own_dy, own, task_of_sample, training, needs, options)
        details: dict[str, Any] = {
            "training": training,
            "bias": bias is not None,
            "residual": residual is not None,
            "parameter_size": weight.element_size(),
        }
        work = work_of(x, options, needs, **details)
        run = ops.backwards[key] = MixedBackward(plan(work, ops.device_of(x.device)), x, options)
    found = Gradients(
        run.empty(x) if needs.dx else None,
        torch.empty_like(weight) if needs.dweight else None,
        torch.empty_like(weight) if needs.dbias else None,
        run.empty(x) if needs.dresidual else None,
    )
    with ops.on_device(x.device):
        run(dy, saved, task_of_sample, found)
    return found
