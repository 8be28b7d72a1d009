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
from tsbn_kernels.activations import INVERSE, NONE, activate, activation_slope, invert_leaky_relu
from tsbn_kernels.layout import task_view


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_values(weight: Tensor, gate: str) -> Tensor:
    """``sigmoid(weight)`` or ``weight``, shape ``[T, C]``."""
    return torch.sigmoid(weight) if gate == "sigmoid" else weight


def gate_slope(weight: Tensor, gate: str) -> Tensor:
    """Derivative of :func:`gate_values` with respect to ``weight``, shape ``[T, C]``."""
    return torch.sigmoid(weight) * torch.sigmoid(-weight) if gate == "sigmoid" else torch.ones_like(weight)


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


def moments(x: Tensor, num_tasks: int, stacking: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance as :func:`statistics`, in float64: a part's, to be joined with those of other parts."""
    return statistics(x.double(), num_tasks, stacking, shared)


def join_moments(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of R parts taken together, from those of each part and how many values it has.

    ``mean`` and ``var`` are ``[R, ...]``, ``count`` broadcasts to them; a part may be empty. Deviations are taken from
    the joined mean, so nothing cancels where ``|mean| >> std`` (Chan, Golub and LeVeque, 1983).
    """
    share = count / count.sum(0).clamp_min(1)
    rough = (mean * share).sum(0)
    joined = rough + ((mean - rough) * share).sum(0)  # the first sum's rounding is as large as the mean's
    return joined, ((var + (mean - joined).square()) * share).sum(0)


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
    if training and activation != INVERSE:
        mean, var = statistics(x, num_tasks, stacking, shared)
    epilogue = bias, residual, activation, slope, shared
    dz, xhat, scale = _before_activation(dy, x, weight, mean, var, num_tasks, eps, gate, stacking, *epilogue)
    total, dot = dz.sum(dim=(1, 3)), (dz * xhat).sum(dim=(1, 3))

    nothing = x.new_empty(0)
    dx, dweight, dbias, dresidual = nothing, weight.new_empty(0), weight.new_empty(0), nothing
    if need_dresidual:
        dresidual = _stacked(dz, x, num_tasks, stacking, shared)
    if need_dx:
        if training:
            positions = max(1, dz.shape[1] * dz.shape[3])
            dz = _centred(dz, xhat, total / positions, dot / positions)
        dx = _of_input(dz * _spread(scale), x, stacking, shared)
    if need_dweight:
        dweight = (gate_slope(weight.to(dot.dtype), gate) * dot).to(weight.dtype)
    if need_dbias:
        dbias = total.to(weight.dtype)
    return dx, dweight, dbias, dresidual


def input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    dz_mean: Tensor,
    dz_xhat_mean: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
    need_dresidual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and residual where x is a part of the batch, which has the statistics ``mean`` and ``var``.

    The means ``[T, C]`` of ``dz = dy * act'(z)`` and of ``dz * xhat`` are those over the whole batch, too. An empty
    tensor for the residual's where it is not needed.
    """
    epilogue = bias, residual, activation, slope, shared
    dz, xhat, scale = _before_activation(dy, x, weight, mean, var, num_tasks, eps, gate, stacking, *epilogue)
    dresidual = _stacked(dz, x, num_tasks, stacking, shared) if need_dresidual else x.new_empty(0)
    centred = _centred(dz, xhat, dz_mean.to(dz.dtype), dz_xhat_mean.to(dz.dtype))
    return _of_input(centred * _spread(scale), x, stacking, shared), dresidual


def _before_activation(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, bias: Tensor | None, residual: Tensor | None, activation: str, slope: float, shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dz = dy * act'(z)`` and xhat as views in the accumulate dtype, and ``g(weight) * rstd``, ``[T, C]``."""
    dtype = accumulate_dtype(x.dtype)
    view, dz = _input_view(x, num_tasks, stacking, shared), _wide_view(dy, num_tasks, stacking)
    raw, mean, rstd = weight.to(dtype), mean.to(dtype), torch.rsqrt(var.to(dtype) + eps)
    if activation == INVERSE:
        dz = dz * activation_slope(view, activation, slope)
        view = invert_leaky_relu(view, slope)
    elif activation != NONE:
        added = None if residual is None else _wide_view(residual, num_tasks, stacking)
        z = _affine(view, raw, None if bias is None else bias.to(dtype), added, mean, rstd, gate)
        dz = dz * activation_slope(z, activation, slope)
    return dz, (view - _spread(mean)) * _spread(rstd), gate_values(raw, gate) * rstd


def _centred(dz: Tensor, xhat: Tensor, dz_mean: Tensor, dz_xhat_mean: Tensor) -> Tensor:
    return dz - _spread(dz_mean) - xhat * _spread(dz_xhat_mean)


def _stacked(view: Tensor, x: Tensor, num_tasks: int, stacking: str, shared: bool) -> Tensor:
    """A view of all tasks as y is stacked."""
    return layout.from_task_view(view.to(x.dtype), *layout.output_sizes(x, num_tasks, stacking, shared), stacking)


def _of_input(view: Tensor, x: Tensor, stacking: str, shared: bool) -> Tensor:
    """A view of all tasks as x is stacked; of a shared x, their sum."""
    order = layout.input_stacking(stacking, shared)
    wide = view.sum(0, keepdim=True) if shared else view
    return layout.from_task_view(wide.to(x.dtype), x.shape, layout.dense_strides(x, order), order)
