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
    given: LayerGradients, dy: Tensor, saved: LayerSaved, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dy, s and weight from those of dx, dweight and dbias.

    With u, p and q the given ones, ``dz = g(w) * dy`` and P of a row as in
    :mod:`tsbn_kernels.definition.double_backward`, of which the RMS form subtracts no mean::

        ddy     = g(w) * rstd * P u + g'(w) * p * xhat + q
        v       = g'(w) * p * dy - dz * rstd * mean(u * xhat)
        ds      = rstd * P v - rstd * (mean(dz * xhat) * rstd * P u + mean(dz * rstd * P u) * xhat)
        dweight = sum over the rows of dy * (g'(w) * rstd * P u + g''(w) * p * xhat)

    They are in the dtype of the statistics.
    """
    s, raw, mean, rstd = saved
    dtype, dims = rstd.dtype, _normalized_dims(raw)
    weight, xhat, dys = raw.to(dtype), normalized(saved), _task_streams(dy.to(dtype), options)
    scale, over = rstd.reshape(*rows_of(s, raw), *(1,) * (raw.dim() - 1)), tuple(range(1, dys.dim() - raw.dim() + 1))
    slope, gates = gate_slope(weight, options.gate), _spread(gate_values(weight, options.gate), dys)
    u = torch.zeros_like(xhat) if given.dx is None else given.dx.to(dtype)

    def of_input(streams: Tensor) -> Tensor:
        return streams.sum(0) if options.fan_out else layout.stacked(streams, options.stacking)

    def row_mean(values: Tensor) -> Tensor:
        return values.mean(dims, keepdim=True)

    def through(values: Tensor, dot: Tensor) -> Tensor:
        if mean is not None:
            values = values - row_mean(values)
        return torch.addcmul(values, xhat, dot, value=-1) * scale

    u_dot = row_mean(u * xhat)
    rest = through(u, u_dot)
    of_u, of_xhat = _streams(rest, options), _streams(xhat, options)
    dz = of_input(dys * gates)
    v = dz * (-scale * u_dot)
    ddy, dweight = of_u * gates, slope * (dys * of_u).sum(over)
    if given.dweight is not None:
        p = given.dweight.to(dtype)
        factor = _spread(slope * p, dys)
        ddy, v = torch.addcmul(ddy, of_xhat, factor), v + of_input(dys * factor)
        dweight = dweight + gate_curvature(weight, options.gate) * p * (dys * of_xhat).sum(over)
    if given.dbias is not None:
        ddy = ddy + _spread(given.dbias.to(dtype), dys)
    ds = torch.addcmul(through(v, row_mean(v * xhat)), rest, scale * row_mean(dz * xhat), value=-1)
    ds = torch.addcmul(ds, xhat, scale * row_mean(dz * rest), value=-1)
    return layout.stacked(ddy, options.stacking), ds, dweight


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
