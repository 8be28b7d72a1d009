"""The definition: task-specific batch normalisation in plain PyTorch, differentiable to any order.

TS-sigma-BN (Suteu and Serban, arXiv 2512.20420, eq. 3) for task ``t`` and channel ``c`` over the ``M = N*S`` values of
the ``[T, N, C, S]`` view, with the epilogue that follows it in a network::

    mean[t,c] = 1/M * sum x              var[t,c] = 1/M * sum (x - mean)^2
    xhat      = (x - mean) * rstd        rstd     = 1 / sqrt(var + eps)
    y         = act(g(weight[t,c]) * xhat + bias[t,c] + residual)

with ``g = sigmoid`` (TS-sigma-BN) or the identity (TSBN). float16 and bfloat16 are computed in float32. Where
``fan_out`` is set, x is one input ``[N, C, *]`` for all tasks, and y, residual and dy are stacked. Every other backend
is compared with these functions, which are a :class:`tsbn_kernels.definition.options.Backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import INVERSE, NONE, activate, activation_slope
from tsbn_kernels.definition.layout import task_view
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Normalized, Options, Running, Saved, of_input


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_statistics(weight: Tensor, x: Tensor) -> Moments:
    """Fresh memory for the statistics of x; where the weight has their dtype at half the cost on the host."""
    dtype = accumulate_dtype(x.dtype)
    if weight.dtype == dtype:
        mean = torch.empty_like(weight, memory_format=torch.contiguous_format)
    else:
        mean = weight.new_empty(weight.shape, dtype=dtype)
    return Moments(mean, torch.empty_like(mean))


def gate_values(weight: Tensor, gate: str) -> Tensor:
    """``sigmoid(weight)`` or ``weight``, shape ``[T, C]``."""
    return torch.sigmoid(weight) if gate == "sigmoid" else weight


def gate_slope(weight: Tensor, gate: str) -> Tensor:
    """Derivative of :func:`gate_values` with respect to ``weight``, shape ``[T, C]``."""
    return torch.sigmoid(weight) * torch.sigmoid(-weight) if gate == "sigmoid" else torch.ones_like(weight)


def gate_curvature(weight: Tensor, gate: str) -> Tensor:
    """Second derivative of :func:`gate_values` with respect to ``weight``, shape ``[T, C]``."""
    return -gate_slope(weight, gate) * torch.tanh(weight / 2) if gate == "sigmoid" else torch.zeros_like(weight)


def wide_view(x: Tensor, options: Options) -> Tensor:
    """A stacked tensor as ``[T, N, C, S]`` in the accumulate dtype."""
    return task_view(x, options.num_tasks, options.stacking).to(accumulate_dtype(x.dtype))


def spread(vector: Tensor) -> Tensor:
    """A vector ``[T, C]`` as a factor of a ``[T, N, C, S]`` view."""
    return vector[:, None, :, None]


def statistics(x: Tensor, options: Options) -> Moments:
    """Mean and biased variance per task and channel, each ``[T, C]``."""
    view = wide_view(x, of_input(options))
    if view.numel() == 0:
        zeros = view.new_zeros(options.num_tasks, view.shape[2])
        return Moments(zeros, zeros.clone())
    mean = view.mean(dim=(1, 3))
    var = (view - spread(mean)).square().mean(dim=(1, 3))
    if options.fan_out:
        mean, var = mean.repeat(options.num_tasks, 1), var.repeat(options.num_tasks, 1)
    return Moments(mean, var)


def moments(x: Tensor, options: Options) -> Moments:
    """Mean and variance as :func:`statistics`, in float64: a part's, to be joined with those of other parts."""
    return statistics(x.double(), options)


def join_moments(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of R parts taken together, from those of each part and how many values it has.

    ``mean`` and ``var`` are ``[R, ...]``, ``count`` broadcasts to them; a part may be empty. Deviations are taken from
    the joined mean, so nothing cancels where ``|mean| >> std`` (Chan, Golub and LeVeque, 1983).
    """
    share = count / count.sum(0).clamp_min(1)
    rough = (mean * share).sum(0)
    joined = rough + ((mean - rough) * share).sum(0)  # the first sum's rounding is as large as the mean's
    return joined, ((var + (mean - joined).square()) * share).sum(0)


def _affine(view: Tensor, raw: Tensor, mean: Tensor, rstd: Tensor, saved: Saved, options: Options) -> Tensor:
    """``g(weight) * xhat + bias + residual``, of a view of x and of vectors in the accumulate dtype."""
    z = (view - spread(mean)) * spread(gate_values(raw, options.gate) * rstd)
    if saved.bias is not None:
        z = z + spread(saved.bias.to(view.dtype))
    return z if saved.residual is None else z + wide_view(saved.residual, options)


def _vectors(saved: Saved, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The raw gate, mean and ``rstd`` in the accumulate dtype."""
    dtype = accumulate_dtype(saved.x.dtype)
    return saved.weight.to(dtype), saved.mean.to(dtype), torch.rsqrt(saved.var.to(dtype) + options.eps)


def forward_eval(saved: Saved, options: Options) -> Tensor:
    """``act(g(weight) * (x - mean) / sqrt(var + eps) + bias + residual)`` in the dtype and memory format of ``x``."""
    z = _affine(wide_view(saved.x, of_input(options)), *_vectors(saved, options), saved, options)
    return stacked(activate(z, options.activation, options.slope), saved.x, options)


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    """Normalises by the batch's own statistics. Returns y, mean ``[T, C]`` and biased variance ``[T, C]``."""
    mean, var = statistics(x, options)
    return Normalized(forward_eval(Saved(x, weight, bias, residual, mean, var), options), mean, var)


def forward_tracked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> Normalized:
    """Computes :func:`forward_training`, and updates the running statistics by those of the batch."""
    found = forward_training(x, weight, bias, residual, options)
    track(running, found.mean, found.var, values_of(x, options))
    return found


def values_of(x: Tensor, options: Options) -> int:
    """How many values of x a task and channel has."""
    own = of_input(options)
    return x.numel() // (own.num_tasks * x.shape[layout.channel_axis(own.stacking)])


def track(running: Running, mean: Tensor, var: Tensor, values: int) -> None:
    """Updates running statistics by those of a batch with ``values`` values a task and channel; an empty one counts."""
    momentum = advance(running, mean.dtype)
    if values > 0:
        move(running, mean, var * (values / (values - 1)), momentum)


def advance(running: Running, dtype: torch.dtype) -> float | Tensor:
    """Counts a batch. Returns its share in the running statistics, of ``dtype`` where it is ``[T, 1]``."""
    count(running)
    if running.momentum is not None:
        return running.momentum
    batches, rows = running.batches, running.rows
    assert batches is not None
    return 1.0 / (batches if rows is None else batches.index_select(0, rows)).to(dtype).unsqueeze(1)


def count(running: Running) -> None:
    """Counts a batch, where batches are counted."""
    batches, rows = running.batches, running.rows
    if batches is not None and rows is not None:
        batches.index_add_(0, rows, torch.ones_like(rows))
    elif batches is not None:
        batches.add_(1)


def move(running: Running, mean: Tensor, unbiased: Tensor, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, rounded once where ``running`` is the narrower."""
    rows, compiling = running.rows, torch.compiler.is_compiling()
    for old, found in ((running.mean, mean), (running.var, unbiased)):
        if old is None:
            continue
        dtype = torch.promote_types(old.dtype, found.dtype)
        before, batch = (old if rows is None else old.index_select(0, rows)).to(dtype), found.to(dtype)
        share = momentum.to(dtype) if isinstance(momentum, Tensor) else momentum
        if before is old and not compiling:
            old.lerp_(batch, share)
            continue
        # In a graph lerp would cost a graph for every momentum.
        after = before + (batch - before) * share if compiling else before.lerp(batch, share)
        if rows is None:
            old.copy_(after)
        else:
            old.index_copy_(0, rows, after.to(old.dtype))


def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
    """Gradients of x, weight, bias and residual, those that are needed.

    In training the statistics are functions of x, so they are computed anew: the result can be differentiated again
    with respect to dy, x, weight, bias and residual.

    With ``activation="inverse_leaky_relu"`` the operand x is the leaky ReLU of what takes its place: an output that was
    kept instead of the input. Its mean and variance are then those given.
    """
    x, weight = saved.x, saved.weight
    if training and options.activation != INVERSE:
        mean, var = statistics(x, options)
        saved = saved._replace(mean=mean, var=var)
    dz, xhat, scale = before_activation(dy, saved, options)
    total, dot = dz.sum(dim=(1, 3)), (dz * xhat).sum(dim=(1, 3))

    dx = dweight = dbias = dresidual = None
    if needs.dresidual:
        dresidual = stacked(dz, x, options)
    if needs.dx:
        if training:
            positions = max(1, dz.shape[1] * dz.shape[3])
            dz = centred(dz, xhat, total / positions, dot / positions)
        dx = _of_input(dz * spread(scale), x, options)
    if needs.dweight:
        dweight = (gate_slope(weight.to(dot.dtype), options.gate) * dot).to(weight.dtype)
    if needs.dbias:
        dbias = total.to(weight.dtype)
    return Gradients(dx, dweight, dbias, dresidual)


def input_gradient(
    dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
) -> Gradients:
    """Gradients of x and residual where x is a part of the batch, which has the statistics ``mean`` and ``var``.

    The means ``[T, C]`` of ``dz = dy * act'(z)`` and of ``dz * xhat`` are those over the whole batch, too.
    """
    dz, xhat, scale = before_activation(dy, saved, options)
    dresidual = stacked(dz, saved.x, options) if needs_dresidual else None
    dz = centred(dz, xhat, dz_mean.to(dz.dtype), dz_xhat_mean.to(dz.dtype))
    return Gradients(_of_input(dz * spread(scale), saved.x, options), dresidual=dresidual)


def before_activation(dy: Tensor, saved: Saved, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """``dz = dy * act'(z)`` and xhat as views in the accumulate dtype, and ``g(weight) * rstd``, ``[T, C]``."""
    view, dz = wide_view(saved.x, of_input(options)), wide_view(dy, options)
    raw, mean, rstd = _vectors(saved, options)
    if options.activation == INVERSE:
        dz = dz * activation_slope(view, options.activation, options.slope)
        view = torch.where(view > 0, view, view / options.slope)
    elif options.activation != NONE:
        dz = dz * activation_slope(_affine(view, raw, mean, rstd, saved, options), options.activation, options.slope)
    return dz, (view - spread(mean)) * spread(rstd), gate_values(raw, options.gate) * rstd


def centred(dz: Tensor, xhat: Tensor, dz_mean: Tensor, dz_xhat_mean: Tensor) -> Tensor:
    """``dz - mean(dz) - xhat * mean(dz * xhat)``, by means ``[T, C]``."""
    return dz - spread(dz_mean) - xhat * spread(dz_xhat_mean)


def stacked(view: Tensor, x: Tensor, options: Options) -> Tensor:
    """A view of all tasks as y is stacked."""
    return layout.from_task_view(view.to(x.dtype), *layout.output_sizes(x, options), options.stacking)


def _of_input(view: Tensor, x: Tensor, options: Options) -> Tensor:
    """A view of all tasks as x is stacked; of an x that they share, their sum."""
    order = of_input(options).stacking
    wide = view.sum(0, keepdim=True) if options.fan_out else view
    return layout.from_task_view(wide.to(x.dtype), x.shape, layout.dense_strides(x, order), order)
