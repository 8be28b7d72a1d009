"""The definition: task-specific batch normalisation in plain PyTorch, differentiable to any order.

TS-sigma-BN (Suteu and Serban, arXiv 2512.20420, eq. 3) for task ``t`` and channel ``c`` over the ``M = N*S`` values of
the ``[T, N, C, S]`` view::

    mean[t,c] = 1/M * sum x              var[t,c] = 1/M * sum (x - mean)^2
    xhat      = (x - mean) * rstd        rstd     = 1 / sqrt(var + eps)
    y         = g(weight[t,c]) * xhat + bias[t,c]

with ``g = sigmoid`` (TS-sigma-BN) or the identity (TSBN). float16 and bfloat16 are computed in float32. Every other
backend is compared with these functions, which have the signatures of the operators in :mod:`tsbn_kernels.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.layout import from_task_view, task_view


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_values(weight: Tensor, gate: str) -> Tensor:
    """``sigmoid(weight)`` or ``weight``, shape ``[T, C]``."""
    return torch.sigmoid(weight) if gate == "sigmoid" else weight


def gate_slope(weight: Tensor, gate: str) -> Tensor:
    """Derivative of :func:`gate_values` with respect to ``weight``, shape ``[T, C]``."""
    value = gate_values(weight, gate)
    return value * (1 - value) if gate == "sigmoid" else torch.ones_like(weight)


def statistics(x: Tensor, num_tasks: int, stacking: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per task and channel, each ``[T, C]``."""
    view = task_view(x, num_tasks, stacking).to(accumulate_dtype(x.dtype))
    if view.numel() == 0:
        return view.new_zeros(view.shape[0], view.shape[2]), view.new_zeros(view.shape[0], view.shape[2])
    mean = view.mean(dim=(1, 3))
    return mean, (view - mean[:, None, :, None]).square().mean(dim=(1, 3))


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
) -> Tensor:
    """``g(weight) * (x - mean) / sqrt(var + eps) + bias`` in the shape, dtype and memory format of ``x``."""
    dtype = accumulate_dtype(x.dtype)
    view = task_view(x, num_tasks, stacking).to(dtype)
    scale = gate_values(weight.to(dtype), gate) * torch.rsqrt(var.to(dtype) + eps)
    y = (view - mean.to(dtype)[:, None, :, None]) * scale[:, None, :, None]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, :, None]
    return from_task_view(y.to(x.dtype), x, stacking)


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_tasks: int, eps: float, gate: str, stacking: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the batch's own statistics. Returns y, mean ``[T, C]`` and biased variance ``[T, C]``."""
    mean, var = statistics(x, num_tasks, stacking)
    return normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking), mean, var


forward_eval = normalize


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    training: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for each that is not needed.

    In training the statistics are functions of x, so they are computed anew: the result can be differentiated again
    with respect to dy, x and weight.
    """
    if training:
        mean, var = statistics(x, num_tasks, stacking)
    dtype = accumulate_dtype(x.dtype)
    view, grad = (task_view(tensor, num_tasks, stacking).to(dtype) for tensor in (x, dy))
    rstd = torch.rsqrt(var.to(dtype) + eps)
    xhat = (view - mean.to(dtype)[:, None, :, None]) * rstd[:, None, :, None]
    raw = weight.to(dtype)
    total, dot = grad.sum(dim=(1, 3)), (grad * xhat).sum(dim=(1, 3))

    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_dx:
        if training:
            positions = max(1, view.shape[1] * view.shape[3])
            grad = grad - (total / positions)[:, None, :, None] - xhat * (dot / positions)[:, None, :, None]
        dx = from_task_view((grad * (gate_values(raw, gate) * rstd)[:, None, :, None]).to(x.dtype), x, stacking)
    if need_dweight:
        dweight = (gate_slope(raw, gate) * dot).to(weight.dtype)
    if need_dbias:
        dbias = total.to(weight.dtype)
    return dx, dweight, dbias
