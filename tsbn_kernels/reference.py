"""The definition: task-specific batch normalisation in plain PyTorch, differentiable to any order.

TS-sigma-BN (Suteu and Serban, arXiv 2512.20420, eq. 3) for task ``t`` and channel ``c`` over the ``M = N*S`` values of
the ``[T, N, C, S]`` view, with the epilogue that follows it in a network::

    mean[t,c] = 1/M * sum x              var[t,c] = 1/M * sum (x - mean)^2
    xhat      = (x - mean) * rstd        rstd     = 1 / sqrt(var + eps)
    y         = act(g(weight[t,c]) * xhat + bias[t,c] + residual)

with ``g = sigmoid`` (TS-sigma-BN) or the identity (TSBN). float16 and bfloat16 are computed in float32. Where
``shared`` is set, x is one input ``[N, C, *]`` for all tasks, and y, residual and dy are stacked. Every other backend
is compared with these functions, which have the signatures of the operators in :mod:`tsbn_kernels.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels import layout
from tsbn_kernels.activations import activate, activation_slope, invert_leaky_relu
from tsbn_kernels.layout import task_view


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


def _wide_view(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    return task_view(x, num_tasks, stacking).to(accumulate_dtype(x.dtype))


def _input_view(x: Tensor, num_tasks: int, stacking: str, shared: bool) -> Tensor:
    """``[T, N, C, S]``, or ``[1, N, C, S]`` of a shared input."""
    return _wide_view(x, 1 if shared else num_tasks, layout.input_stacking(stacking, shared))


def _spread(vector: Tensor) -> Tensor:
    return vector[:, None, :, None]


def statistics(x: Tensor, num_tasks: int, stacking: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per task and channel, each ``[T, C]``."""
    view = _input_view(x, num_tasks, stacking, shared)
    if view.numel() == 0:
        zeros = view.new_zeros(num_tasks, view.shape[2])
        return zeros, zeros.clone()
    mean = view.mean(dim=(1, 3))
    var = (view - _spread(mean)).square().mean(dim=(1, 3))
    return (mean.repeat(num_tasks, 1), var.repeat(num_tasks, 1)) if shared else (mean, var)


def _affine(
    view: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, mean: Tensor, rstd: Tensor, gate: str
) -> Tensor:
    """``g(weight) * xhat + bias + residual``, of views and of vectors in the accumulate dtype."""
    z = (view - _spread(mean)) * _spread(gate_values(weight, gate) * rstd)
    if bias is not None:
        z = z + _spread(bias)
    return z if residual is None else z + residual


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
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
) -> Tensor:
    """``act(g(weight) * (x - mean) / sqrt(var + eps) + bias + residual)`` in the dtype and memory format of ``x``."""
    dtype = accumulate_dtype(x.dtype)
    z = _affine(
        _input_view(x, num_tasks, stacking, shared),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if residual is None else _wide_view(residual, num_tasks, stacking),
        mean.to(dtype),
        torch.rsqrt(var.to(dtype) + eps),
        gate,
    )
    y = activate(z, activation, slope).to(x.dtype)
    return layout.from_task_view(y, *layout.output_sizes(x, num_tasks, stacking, shared), stacking)


def forward_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the batch's own statistics. Returns y, mean ``[T, C]`` and biased variance ``[T, C]``."""
    mean, var = statistics(x, num_tasks, stacking, shared)
    epilogue = residual, activation, slope, shared
    return normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, *epilogue), mean, var


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
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
    need_dresidual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; an empty tensor for each that is not needed.

    In training the statistics are functions of x, so they are computed anew: the result can be differentiated again
    with respect to dy, x, weight, bias and residual.

    With ``activation="inverse_leaky_relu"`` the operand x is the leaky ReLU of what takes its place: an output that was
    kept instead of the input. Its mean and variance are then those given.
    """
    inverse = activation == "inverse_leaky_relu"
    if training and not inverse:
        mean, var = statistics(x, num_tasks, stacking, shared)
    dtype = accumulate_dtype(x.dtype)
    view, grad = _input_view(x, num_tasks, stacking, shared), _wide_view(dy, num_tasks, stacking)
    raw, mean, rstd = weight.to(dtype), mean.to(dtype), torch.rsqrt(var.to(dtype) + eps)
    if inverse:
        grad = grad * activation_slope(view, "leaky_relu", slope)
        view = invert_leaky_relu(view, slope)
    elif activation != "none":
        added = None if residual is None else _wide_view(residual, num_tasks, stacking)
        z = _affine(view, raw, None if bias is None else bias.to(dtype), added, mean, rstd, gate)
        grad = grad * activation_slope(z, activation, slope)
    xhat = (view - _spread(mean)) * _spread(rstd)
    total, dot = grad.sum(dim=(1, 3)), (grad * xhat).sum(dim=(1, 3))

    nothing = x.new_empty(0)
    dx, dweight, dbias, dresidual = nothing, weight.new_empty(0), weight.new_empty(0), nothing
    if need_dresidual:
        dresidual = layout.from_task_view(
            grad.to(x.dtype), *layout.output_sizes(x, num_tasks, stacking, shared), stacking
        )
    if need_dx:
        if training:
            positions = max(1, view.shape[1] * view.shape[3])
            grad = grad - _spread(total / positions) - xhat * _spread(dot / positions)
        streams = grad * _spread(gate_values(raw, gate) * rstd)
        wide = streams.sum(0, keepdim=True) if shared else streams
        order = layout.input_stacking(stacking, shared)
        dx = layout.from_task_view(wide.to(x.dtype), x.shape, layout.dense_strides(x, order), order)
    if need_dweight:
        dweight = (gate_slope(raw, gate) * dot).to(weight.dtype)
    if need_dbias:
        dbias = total.to(weight.dtype)
    return dx, dweight, dbias, dresidual
