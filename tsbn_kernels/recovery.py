"""Training with the output kept for the backward pass in place of the input.

Where the epilogue can be inverted (none, or a leaky ReLU of positive slope), ``xhat = (v - bias) / gate`` with ``v``
the inverse of y: no more of the input is needed. The convolution that follows keeps y anyway, so the input's memory is
spared.

What rounding y to its dtype (relative error ``u``) does to xhat is an error of up to ``u * (|xhat| + |bias| / gate)``.
Channels where ``|bias| > 8 * gate``, or where y may be subnormal, keep their input instead, so that everywhere::

    |error of xhat| <= u * (|xhat| + 9)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels import layout, reference
from tsbn_kernels.activations import EPILOGUES, INVERSE

MOST_BIAS = 8.0  # in gates: what is lost of xhat where the bias hides it


def invertible(activation: str, slope: float) -> bool:
    """Whether the input of an activation can be had from its output."""
    row = EPILOGUES[activation]
    return row.invertible and not (row.sloped and slope <= 0)


def _slope(activation: str, slope: float) -> float:
    """That of negative values, as a leaky ReLU has it."""
    return slope if EPILOGUES[activation].sloped else 1.0


def keep(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Sequence[Any], epilogue: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Channels that some task cannot recover, ``[K]``, and their part of x. On a GPU this waits for their number."""
    gates = reference.gate_values(weight.to(reference.accumulate_dtype(x.dtype)), options[2]).abs()
    activation, slope, _ = epilogue
    info = torch.finfo(x.dtype)
    subnormal = info.smallest_normal * info.eps
    smallest = subnormal / (info.eps / 2) / min(_slope(activation, slope), 1.0)
    smallest = max(smallest, torch.finfo(gates.dtype).tiny ** 0.5)  # its square is the variance of what is inverted
    lost = ~(gates > smallest)
    if bias is not None:
        lost |= ~(bias.abs() <= MOST_BIAS * gates)
    channels = lost.any(0).nonzero().squeeze(1)
    axis = layout.channel_axis(options[3])
    return channels, x.index_select(axis, channels) if len(channels) else x.new_empty(0)


def backward(
    compute: Callable[..., tuple[Tensor, ...]],
    dy: Tensor,
    saved: Sequence[Tensor | None],
    options: Sequence[Any],
    epilogue: Sequence[Any],
    training: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and residual from y and from the channels that :func:`keep` kept.

    Raises:
        RuntimeError: a second derivative is asked for, which needs the input.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recover_input=True keeps the output in place of the input, which a second derivative (create_graph=True) "
            "needs; build the layer with recover_input=False"
        )
    y, weight, bias, mean, var, channels, kept = saved
    assert y is not None
    assert weight is not None
    assert var is not None
    assert channels is not None
    assert kept is not None
    num_tasks, eps, gate, stacking = options
    activation, slope, _ = epilogue

    # xhat = (v - bias) / gate is the normalisation of v by mean = bias and var = gate^2. The gate of it makes
    # gate' / |gate| the factor gate * rstd of dx; dweight is that of xhat itself.
    wide = reference.accumulate_dtype(y.dtype)
    gates = reference.gate_values(weight.to(wide), gate)
    size = gates.abs().clamp_min(torch.finfo(wide).tiny ** 0.5)
    centre = torch.zeros_like(size) if bias is None else bias.to(wide)
    factor = gates * torch.rsqrt(var.to(wide) + eps) * size
    need = bool(needed[0]), bool(needed[1]), bool(needed[2])
    virtual = num_tasks, 0.0, "identity", stacking, training, *need
    dx, dweight, dbias, _ = compute(
        dy,
        y,
        factor,
        centre,
        size.square(),
        *virtual,
        None,
        None,
        INVERSE,
        _slope(activation, slope),
        False,
        False,
    )
    if need[1]:
        dweight = (dweight * gates.sign() * reference.gate_slope(weight.to(wide), gate)).to(weight.dtype)
    if need[2]:
        dbias = dbias.to(weight.dtype)
    if len(channels):
        axis = layout.channel_axis(stacking)
        rows = [None if v is None else v.index_select(1, channels) for v in (weight, mean, var, bias)]
        again = compute(
            dy.index_select(axis, channels), kept, *rows[:3], *options, training, *need, rows[3], None, activation,
            slope, False, False,
        )  # fmt: skip
        for whole, part, dim, wanted in zip((dx, dweight, dbias), again, (axis, 1, 1), need, strict=False):
            if wanted:
                whole.index_copy_(dim, channels, part)
    return dx, dweight, dbias, dy
