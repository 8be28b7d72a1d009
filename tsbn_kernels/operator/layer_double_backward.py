"""The second derivative of layer normalisation: the backward pass as a function of autograd's, and its own backward.

Under ``create_graph=True`` the backward pass is the fused one. Its derivative is the definition's formula for a few
rows at a time, so that its temporaries stay in a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import LayerBackend, LayerGradients, LayerNeeds, LayerOptions, LayerSaved

_CHUNK = 1 << 15  # values of dy whose rows are computed at once


def differentiable(s: Tensor, weight: Tensor, options: LayerOptions) -> LayerSaved:
    """What is saved, with statistics that are functions of ``s``."""
    return LayerSaved(s, weight, *reference.statistics(s, weight, options))


class TaskLayerNormBackward(torch.autograd.Function):
    """The backward pass. Saves what it reads."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, ds: Tensor | None, *inputs: Any) -> LayerGradients:
        """Takes the gradients, the fields of ``LayerSaved``, what computes the pass, needs and options."""
        *saved, compute, needs, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, *saved)
        found: LayerGradients = compute.layer_norm_backward(dy, ds, LayerSaved._make(saved), needs, ctx.options)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *tensors = ctx.saved_tensors
        given, saved, options = LayerGradients._make(gradients), LayerSaved._make(tensors), ctx.options
        if torch.is_grad_enabled():
            saved = differentiable(saved.s, saved.weight, options)
            ddy, ds, dweight = reference.layer_norm_double_backward(given, dy, saved, options)
            ddy, ds = ddy.to(dy.dtype), ds.to(saved.s.dtype)
        else:
            ddy, ds, dweight = by_rows(given, dy, saved, options)
        dds = given.dx if ctx.needs_input_grad[1] else None  # there may be no ds
        return ddy, dds, ds, dweight.to(saved.weight.dtype), *(None,) * 5


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


def by_rows(
    given: LayerGradients, dy: Tensor, saved: LayerSaved, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the second derivative, part by part; the gradient of the weight is in the dtype of the statistics."""
    s, weight, *statistics = saved
    sizes, num_tasks = reference.rows_of(s, weight), options.num_tasks
    own = options._replace(stacking="task_axis")

    def of_input(tensor: Any) -> Any:
        return tensor if options.fan_out or tensor is None else layout.streams(tensor, num_tasks, options.stacking)

    ddy, gradient = torch.empty_like(dy), torch.empty_like(s)
    dweight = torch.zeros_like(weight, dtype=saved.rstd.dtype)
    dys, ddys = (layout.streams(tensor, num_tasks, options.stacking) for tensor in (dy, ddy))
    rows, dx, out = of_input(s), of_input(given.dx), of_input(gradient)
    mean, rstd = (None if v is None else of_input(v.view(sizes)) for v in statistics)
    for tasks, samples in _parts(dys, options.fan_out):
        where = (samples,) if options.fan_out else (tasks, samples)

        def part(vector: Any, index: Any) -> Any:
            return None if vector is None else vector[index]

        of_part = LayerSaved(rows[where], weight[tasks], part(mean, where), part(rstd, where).flatten())
        of_part = of_part._replace(mean=None if of_part.mean is None else of_part.mean.flatten())
        cut = LayerGradients(part(dx, where), part(given.dweight, tasks), part(given.dbias, tasks))
        call = dys[tasks, samples], of_part, own._replace(num_tasks=len(weight[tasks]))
        ddys[tasks, samples], out[where], of_weight = reference.layer_norm_double_backward(cut, *call)
        dweight[tasks] += of_weight
    return ddy, gradient, dweight


def _parts(dys: Tensor, fan_out: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of the tasks and of the samples of ``[T, N, *]``; those of all tasks at once where they share rows."""
    num_tasks, samples = dys.shape[:2]
    most = max(1, _CHUNK * num_tasks * samples // max(1, dys.numel()))  # samples of one task, or of several
    tasks = num_tasks if fan_out else min(num_tasks, max(1, most // max(1, samples)))
    each = max(1, most // tasks)
    for task in range(0, num_tasks, tasks):
        for sample in range(0, samples, each):
            yield slice(task, task + tasks), slice(sample, sample + each)
