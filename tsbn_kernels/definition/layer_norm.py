"""The definition: task-specific layer normalisation in plain PyTorch, differentiable to any order.

For each row (token) of the D values of ``normalized_shape``, in the stream of task ``t``, with the addition that comes
before it in a transformer::

    s    = x + residual                  mean = 1/D * sum s         var = 1/D * sum (s - mean)^2
    xhat = (s - mean) * rstd             rstd = 1 / sqrt(var + eps)
    y    = g(weight[t]) * xhat + bias[t]

with ``g = sigmoid`` (TS-sigma-LN) or the identity (TSLN). The RMS form has no mean: ``var = 1/D * sum s^2``. float16
and bfloat16 are computed in float32; s is rounded to the dtype of x before it is normalised. Where ``fan_out`` is set,
x, residual and s are those of one input ``[N, *]`` for all tasks, and y and dy are stacked. Statistics are ``[R]``, in
the order of the rows of x. Every other backend is compared with these functions, which are a
:class:`tsbn_kernels.definition.options.LayerBackend`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import accumulate_dtype, gate_curvature, gate_slope, gate_values
from tsbn_kernels.definition.options import (
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)


def rows_of(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The sizes of ``x`` before ``normalized_shape``, of which R is the product."""
    return tuple(x.shape[: x.dim() - weight.dim() + 1])


def inner_rows(x: Tensor, weight: Tensor, options: LayerOptions) -> int:
    """How many rows follow each other before the task changes: row r of x is one of task ``r // inner % T``."""
    sizes = rows_of(x, weight)
    if options.stacking == "sample_major" or (options.stacking == "task_axis" and not options.fan_out):
        return prod(sizes[1:])
    return prod(sizes) // (1 if options.fan_out else options.num_tasks)


def empty_outputs(x: Tensor, weight: Tensor, residual: Tensor | None, options: LayerOptions) -> LayerNormalized:
    """Fresh memory for the results of a forward pass; all are contiguous."""
    rstd = x.new_empty(prod(rows_of(x, weight)), dtype=accumulate_dtype(x.dtype))
    return LayerNormalized(
        x.new_empty(layout.output_shape(x, options)),
        None if residual is None else x.new_empty(x.shape),
        None if options.rms else torch.empty_like(rstd),
        rstd,
    )


def empty_gradients(s: Tensor, weight: Tensor, needs: LayerNeeds) -> LayerGradients:
    """Fresh memory for the gradients that are needed; all are contiguous."""
    dx = s.new_empty(s.shape) if needs.dx else None
    dweight, dbias = (weight.new_empty(weight.shape) if needed else None for needed in (needs.dweight, needs.dbias))
    return LayerGradients(dx, dweight, dbias)


def statistics(s: Tensor, weight: Tensor, options: LayerOptions) -> tuple[Tensor | None, Tensor]:
    """The mean of each row (None in the RMS form) and ``rstd``, each ``[R]``."""
    wide, dims = s.to(accumulate_dtype(s.dtype)), _normalized_dims(weight)
    if options.rms:
        return None, torch.rsqrt(wide.square().mean(dims) + options.eps).flatten()
    mean = wide.mean(dims, keepdim=True)
    var = (wide - mean).square().mean(dims)
    return mean.flatten(), torch.rsqrt(var + options.eps).flatten()


def normalized(saved: LayerSaved) -> Tensor:
    """``xhat`` in the accumulate dtype and in the shape of x."""
    s, weight, mean, rstd = saved
    wide, sizes = s.to(rstd.dtype), (*rows_of(s, weight), *(1,) * (weight.dim() - 1))
    if mean is not None:
        wide = wide - mean.reshape(sizes)
    return wide * rstd.reshape(sizes)


def through_statistics(gradient: Tensor, saved: LayerSaved) -> Tensor:
    """``rstd * (v - mean(v) - xhat * mean(v * xhat))``: the Jacobian of xhat, which is symmetric, times ``v``."""
    xhat, dims = normalized(saved), _normalized_dims(saved.weight)
    centred = gradient - xhat * (gradient * xhat).mean(dims, keepdim=True)
    if saved.mean is not None:
        centred = centred - gradient.mean(dims, keepdim=True)
    sizes = (*rows_of(saved.s, saved.weight), *(1,) * (saved.weight.dim() - 1))
    return centred * saved.rstd.reshape(sizes)


def affine(xhat: Tensor, gates: Tensor, bias: Tensor | None, options: LayerOptions) -> Tensor:
    """``gates[t] * xhat + bias[t]``, stacked, of xhat in the shape of x; all in one dtype."""
    streams = _streams(xhat, options)
    y = streams * _spread(gates, streams)
    if bias is not None:
        y = y + _spread(bias, streams)
    return layout.stacked(y, options.stacking)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
) -> LayerNormalized:
    """Normalises each row of ``x + residual``. Returns y, that sum (None without a residual), mean and ``rstd``."""
    dtype = accumulate_dtype(x.dtype)
    s = None if residual is None else (x.to(dtype) + residual.to(dtype)).to(x.dtype).contiguous()
    read = x if s is None else s
    mean, rstd = statistics(read, weight, options)
    gates = gate_values(weight.to(dtype), options.gate)
    bias = None if bias is None else bias.to(dtype)
    y = affine(normalized(LayerSaved(read, weight, mean, rstd)), gates, bias, options)
    return LayerNormalized(y.to(x.dtype).contiguous(), s, mean, rstd)


def layer_norm_backward(
    dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
) -> LayerGradients:
    """Gradients of x (and residual), weight and bias, those that are needed; ``ds`` is that of ``x + residual``.

    They are functions of dy, ds, s and weight alone, and can be differentiated again with respect to these, where the
    statistics in ``saved`` are those that :func:`statistics` gives.
    """
    s, weight, _, rstd = saved
    dtype = rstd.dtype
    dys = _task_streams(dy.to(dtype), options)
    dx = dweight = dbias = None
    if needs.dx:
        gates = gate_values(weight.to(dtype), options.gate)
        dz = dys * _spread(gates, dys)
        dz = dz.sum(0) if options.fan_out else layout.stacked(dz, options.stacking)
        dx = through_statistics(dz, saved)
        dx = (dx if ds is None else dx + ds.to(dtype)).to(s.dtype).contiguous()
    over = tuple(range(1, dys.dim() - weight.dim() + 1))
    if needs.dweight:
        dot = (dys * _streams(normalized(saved), options)).sum(over)
        dweight = (gate_slope(weight.to(dtype), options.gate) * dot).to(weight.dtype)
    if needs.dbias:
        dbias = dys.sum(over).to(weight.dtype)
    return LayerGradients(dx, dweight, dbias)


def layer_norm_double_backward(
    ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of the backward pass's results make of its operands: those of dy, of s, and two sums.

    With u = ddx, the ``factors`` g = g(w), a = g'(w) * ddweight and ddbias (``[3, T, *normalized_shape]``, in the dtype
    of the statistics), ``dz = g * dy``, and P of a row as in :mod:`tsbn_kernels.definition.double_backward`, which in
    the RMS form subtracts no mean::

        rest = rstd * P u
        ddy  = g * rest + a * xhat + ddbias
        v    = dy * (a - g * rstd * mean(u * xhat))
        ds   = rstd * P v - rstd * (mean(dz * xhat) * rest + mean(dz * rest) * xhat)
        sums = sum over the rows of dy * rest, and of dy * xhat

    Where all tasks share s, ds is stacked as dy is, and to be added up. The sums are float64
    ``[2, T, *normalized_shape]``: :func:`double_backward_dweight` makes the gradient of the weight of them.
    """
    s, weight, mean, rstd = saved
    dtype, dims = rstd.dtype, _normalized_dims(weight)
    dys = _task_streams(dy.to(dtype), options)
    gates, slopes, offsets = (_spread(factor, dys) for factor in factors)
    sizes = (*rows_of(s, weight), *(1,) * (weight.dim() - 1))
    u, xhat, scale = (_streams(t, options) for t in (ddx.to(dtype), normalized(saved), rstd.reshape(sizes)))

    def dot(values: Tensor, others: Tensor) -> Tensor:
        return (values * others).mean(dims, keepdim=True)

    def through(values: Tensor) -> Tensor:
        centred = values - xhat * dot(values, xhat)
        return scale * (centred if mean is None else centred - values.mean(dims, keepdim=True))

    rest, dz = through(u), dys * gates
    ddy = rest * gates + xhat * slopes + offsets
    v = dys * (slopes - gates * (scale * dot(u, xhat)))
    ds = through(v) - scale * (dot(dz, xhat) * rest + dot(dz, rest) * xhat)
    over = tuple(range(1, dys.dim() - weight.dim() + 1))
    sums = torch.stack([(dys * values).sum(over) for values in (rest, xhat)]).double()
    ddy, ds = (layout.stacked(t, options.stacking).to(s.dtype).contiguous() for t in (ddy, ds))
    return ddy, ds, sums


def double_backward_factors(weight: Tensor, ddweight: Tensor | None, ddbias: Tensor | None, gate: str) -> Tensor:
    """What :func:`layer_norm_double_backward` takes, in the dtype of the weight; without a gradient: zero."""
    nothing = torch.zeros_like(weight)
    slopes = nothing if ddweight is None else gate_slope(weight, gate) * ddweight
    return torch.stack((gate_values(weight, gate), slopes, nothing if ddbias is None else ddbias))


def double_backward_dweight(weight: Tensor, ddweight: Tensor | None, sums: Tensor, gate: str) -> Tensor:
    """The gradient of the weight by the sums of :func:`layer_norm_double_backward`."""
    rest, xhat = sums
    found: Tensor = gate_slope(weight, gate) * rest
    return found if ddweight is None else found + gate_curvature(weight, gate) * ddweight * xhat


def _normalized_dims(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(1 - weight.dim(), 0))


def _task_streams(stacked: Tensor, options: LayerOptions) -> Tensor:
    return layout.streams(stacked, options.num_tasks, options.stacking)


def _streams(of_input: Tensor, options: LayerOptions) -> Tensor:
    """What has the shape of x as ``[T, N, *]``, or ``[1, N, *]`` where all tasks share it."""
    return of_input.unsqueeze(0) if options.fan_out else _task_streams(of_input, options)


def _spread(vector: Tensor, streams: Tensor) -> Tensor:
    """``[T, *normalized_shape]`` as a factor of ``[T, N, *]``."""
    return vector.reshape(len(vector), *(1,) * (streams.dim() - vector.dim()), *vector.shape[1:])
