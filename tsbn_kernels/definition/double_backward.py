"""The definition of the second derivative: what a gradient of the backward pass's results makes of its operands.

Of one task and channel with M values, where u, p and q are the gradients of dx, dweight and dbias, dz is what the
backward pass normalises, and P is what the statistics make of it (in evaluation ``P v = v``)::

    P v     = v - mean(v) - xhat * mean(v * xhat)                     (rstd * P is the Jacobian of xhat)
    ddz     = g(w) * rstd * P u + g'(w) * p * xhat + q
    h       = g'(w) * p * dz - g(w) * rstd * (u * mean(dz * xhat) + dz * mean(u * xhat))
    dx      = rstd * P h - g(w) * rstd^2 * A * xhat                   with A = mean(dz * P u)
    dweight = M * (g'(w) * rstd * A + g''(w) * p * mean(dz * xhat))

So five sums over u, dz and x tell all but ddz and dx, which are then linear in these three, with factors for each task
and channel. Kernels make the sums in one pass and both results in a second one: u, dz and x are read twice, eight
tensors are moved in all. The functions are differentiable to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.definition.batch_norm import (
    accumulate_dtype,
    gate_curvature,
    gate_slope,
    gate_values,
    spread,
    stacked,
    wide_view,
)
from tsbn_kernels.definition.options import Options


def double_backward_sums(ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
    """Sums of ddx, dy, ``ddx * d``, ``dy * d`` and ``ddx * dy`` with ``d = x - mean``, float64 ``[5, T, C]``."""
    u, dz, d = _read(ddx, dy, x, mean, options)
    return torch.stack([values.sum(dim=(1, 3)) for values in (u, dz, u * d, dz * d, u * dz)]).double()


def double_backward(
    ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Gradients of dy and of x: ``ddx * f0 + d * f1 + f2`` and ``ddx * f3 + dy * f4 + d * f5 + f6``.

    ``factors`` are ``[7, T, C]``, see :func:`factors_of`.
    """
    u, dz, d = _read(ddx, dy, x, mean, options)
    f = [spread(factor) for factor in factors.to(d.dtype)]
    return stacked(u * f[0] + (d * f[1] + f[2]), x, options), stacked(
        u * f[3] + dz * f[4] + (d * f[5] + f[6]), x, options
    )


def factors_of(
    sums: Tensor,
    values: Tensor,
    weight: Tensor,
    var: Tensor,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    training: bool,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """What :func:`double_backward` takes, float64 ``[7, T, C]``, and the gradient of the weight.

    Args:
        sums: see :func:`double_backward_sums`.
        values: how many each sum is of, float64, broadcasts to ``[T, C]``.
        weight, var: ``[T, C]``.
        ddweight, ddbias: gradients of dweight and dbias; None: zero.
    """
    raw, nothing = weight.double(), torch.zeros_like(sums[0])
    gate, slope = gate_values(raw, options.gate), gate_slope(raw, options.gate)
    rstd = torch.rsqrt(var.double() + options.eps)
    scale = gate * rstd
    p = nothing if ddweight is None else ddweight.double()
    q = nothing if ddbias is None else ddbias.double()
    u, dz, u_xhat, dz_xhat, u_dz = sums / values.clamp_min(1)
    u_xhat, dz_xhat = u_xhat * rstd, dz_xhat * rstd
    of_curvature = gate_curvature(raw, options.gate) * p * dz_xhat
    if not training:
        u = dz = u_xhat = dz_xhat = nothing
    along = u_dz - u * dz - u_xhat * dz_xhat
    dweight = torch.where(values > 0, values * (slope * rstd * along + of_curvature), 0).to(weight.dtype)
    of_xhat = slope * p - scale * u_xhat
    of_u, of_dz = -scale * rstd * dz_xhat, rstd * of_xhat
    of_d = of_u * u_xhat + of_dz * dz_xhat + (scale * rstd * along if training else 0)
    in_dx = of_u, of_dz, -rstd * of_d, -(of_u * u + of_dz * dz)
    return torch.stack((scale, of_dz, q - scale * u, *in_dx)), dweight


def _read(ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Views of ddx, dy and ``x - mean`` in the accumulate dtype."""
    u, dz, view = (wide_view(tensor, options) for tensor in (ddx, dy, x))
    return u, dz, view - spread(mean.to(accumulate_dtype(x.dtype)))
