"""Training with the output kept for the backward pass in place of the input.

Where the epilogue can be inverted (none, or a leaky ReLU of positive slope), ``xhat = (v - bias) / gate`` with ``v``
the inverse of y: no more of the input is needed. The convolution that follows keeps y anyway, so the input's memory is
spared.

What rounding y to its dtype (relative error ``u``) does to xhat is an error of up to ``u * (|xhat| + |bias| / gate)``.
Channels where ``|bias| > 8 * gate``, or where y may be subnormal, keep their input instead, so that everywhere::

    |error of xhat| <= u * (|xhat| + 9)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import EPILOGUES, INVERSE
from tsbn_kernels.definition.options import Backend, Gradients, Needs, Options, Saved

MOST_BIAS = 8.0  # in gates: what is lost of xhat where the bias hides it


def invertible(activation: str, slope: float) -> bool:
    """Whether the input of an activation can be had from its output."""
    row = EPILOGUES[activation]
    return row.invertible and not (row.sloped and slope <= 0)


def _slope(options: Options) -> float:
    """That of negative values, as a leaky ReLU has it."""
    return options.slope if EPILOGUES[options.activation].sloped else 1.0


class Kept(NamedTuple):
    """What a backward pass reads beside dy: y, vectors ``[T, C]``, and the part of x that y does not tell."""

    y: Tensor
    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    channels: Tensor  # [K]: those that some task cannot recover
    part: Tensor  # their values of x


def keep(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Channels that some task cannot recover, ``[K]``, and their part of x. On a GPU this waits for their number."""
    gates = reference.gate_values(weight.to(reference.accumulate_dtype(x.dtype)), options.gate).abs()
    info = torch.finfo(x.dtype)
    subnormal = info.smallest_normal * info.eps
    smallest = subnormal / (info.eps / 2) / min(_slope(options), 1.0)
    smallest = max(smallest, torch.finfo(gates.dtype).tiny ** 0.5)  # its square is the variance of what is inverted
    lost = ~(gates > smallest)
    if bias is not None:
        lost |= ~(bias.abs() <= MOST_BIAS * gates)
    channels = lost.any(0).nonzero().squeeze(1)
    axis = layout.channel_axis(options.stacking)
    return channels, x.index_select(axis, channels) if len(channels) else x.new_empty(0)


def backward(compute: Backend, dy: Tensor, kept: Kept, training: bool, needs: Needs, options: Options) -> Gradients:
    """Gradients of x, weight and bias from y and from the channels that :func:`keep` chose.

    Raises:
        RuntimeError: a second derivative is asked for, which needs the input.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recover_input=True keeps the output in place of the input, which a second derivative (create_graph=True) "
            "needs; build the layer with recover_input=False"
        )
    y, weight, bias, mean, var, channels, part = kept

    # xhat = (v - bias) / gate is the normalisation of v by mean = bias and var = gate^2. The gate of it makes
    # gate' / |gate| the factor gate * rstd of dx; dweight is that of xhat itself.
    wide = reference.accumulate_dtype(y.dtype)
    gates = reference.gate_values(weight.to(wide), options.gate)
    size = gates.abs().clamp_min(torch.finfo(wide).tiny ** 0.5)
    centre = torch.zeros_like(size) if bias is None else bias.to(wide)
    factor = gates * torch.rsqrt(var.to(wide) + options.eps) * size
    inverse = options._replace(eps=0.0, gate="identity", activation=INVERSE, slope=_slope(options))
    virtual = Saved(y, factor, None, None, centre, size.square())
    dx, dweight, dbias, _ = compute.backward(dy, virtual, training, needs, inverse)
    if dweight is not None:
        dweight = (dweight * gates.sign() * reference.gate_slope(weight.to(wide), options.gate)).to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(weight.dtype)
    found = Gradients(dx, dweight, dbias)
    if len(channels):
        axis = layout.channel_axis(options.stacking)
        vectors: Any = (v if v is None else v.index_select(1, channels) for v in (weight, bias, None, mean, var))
        saved = Saved(part, *vectors)
        again = compute.backward(dy.index_select(axis, channels), saved, training, needs, options)
        for whole, own, dim in zip(found, again, (axis, 1, 1, 0), strict=True):
            if whole is not None and own is not None:
                whole.index_copy_(dim, channels, own)
    return found
