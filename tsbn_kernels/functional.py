"""The functional form: checks the input, runs the operator, updates the running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels import autograd, backends, layout

GATES = ("sigmoid", "identity")
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def task_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    num_tasks: int,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    gate: str = "sigmoid",
    stacking: str = "task_major",
) -> Tensor:
    """Batch normalisation with statistics, gate and bias of its own for each task.

    ``y[t] = g(weight[t]) * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias[t]`` per channel, where ``g`` is the sigmoid
    (TS-sigma-BN) or the identity (TSBN): arXiv 2512.20420, eq. 3. Statistics of float16 and bfloat16 input are
    float32.

    Args:
        x: float32, float64, float16 or bfloat16 activation of all tasks: ``[T*N, C, *]`` stacked task-major or
            sample-major, or ``[T, N, C, *]`` with ``stacking="task_axis"``. Contiguous and channels_last inputs, and
            strided views of them, are read in place.
        weight: the raw gate parameter gamma, ``[T, C]``.
        bias: ``[T, C]``, or None.
        running_mean, running_var: ``[T, C]``. Updated in place in training; read in evaluation.
        num_tasks: T.
        training: normalise by the statistics of the batch instead of the running ones.
        momentum: share of the batch in the running statistics; a tensor broadcasts over ``[T, C]``.
        eps: added to the variance.
        gate: ``"sigmoid"`` or ``"identity"``.
        stacking: ``"task_major"`` (sample n of task t at ``t*N + n``), ``"sample_major"`` (at ``n*T + t``) or
            ``"task_axis"``.

    Returns:
        y, in the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: a shape or option does not fit, or training has one value per channel.
        TypeError: a dtype is not supported.
        RuntimeError: tensors lie on different devices.
    """
    _check(x, weight, bias, running_mean, running_var, num_tasks, training, gate, stacking)
    x = layout.supported(x, stacking)
    mean, var = (None, None) if training else (running_mean, running_var)
    backend = backends.override(x.device.type)
    y, mean, var = autograd.apply(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, backend)
    if training and x.numel() > 0:
        count = x.numel() // weight.numel()
        if running_mean is not None:
            _update(running_mean, mean, 1.0, momentum)
        if running_var is not None:
            _update(running_var, var, count / (count - 1), momentum)
    return y


@torch.no_grad()
def _update(running: Tensor, batch: Tensor, factor: float, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * factor * batch``."""
    if factor != 1.0:
        batch = batch * factor
    running.lerp_(batch.to(running.dtype), momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_tasks: int,
    training: bool,
    gate: str,
    stacking: str,
) -> None:
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if stacking not in layout.STACKINGS:
        raise ValueError(f"stacking must be one of {', '.join(layout.STACKINGS)}, got {stacking!r}")
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be 1 or more, got {num_tasks}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}; convert it with x.float()")
    axis = layout.channel_axis(stacking)
    if x.dim() <= axis:
        shape = "[T, N, C, ...]" if axis == 2 else "[T*N, C, ...]"
        raise ValueError(f"x must have at least {axis + 1} dimensions {shape}, got shape {list(x.shape)}")
    if stacking == "task_axis":
        if x.shape[0] != num_tasks:
            raise ValueError(
                f"x of shape {list(x.shape)} has {x.shape[0]} tasks along its first dimension, expected "
                f"num_tasks={num_tasks}; for a stacked batch pass stacking='task_major' or 'sample_major'"
            )
    elif x.shape[0] % num_tasks:
        raise ValueError(
            f"the first dimension of x, {x.shape[0]}, is not a multiple of num_tasks={num_tasks}; "
            f"stack one batch of equal size for each task"
        )
    expected = (num_tasks, x.shape[axis])
    vectors = (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var))
    for name, vector in vectors:
        if vector is None:
            if not training and name.startswith("running"):
                raise ValueError(f"evaluation needs {name}; pass it, or training=True to use the batch's statistics")
            continue
        if vector.shape != expected:
            raise ValueError(
                f"{name} must have shape [num_tasks, channels] = {list(expected)} for x of shape {list(x.shape)}, "
                f"got {list(vector.shape)}"
            )
        if not vector.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {vector.dtype}")
        if vector.device != x.device:
            raise RuntimeError(f"{name} is on {vector.device} and x on {x.device}; move one of them with .to()")
    if training and x.numel() == num_tasks * x.shape[axis] > 0:
        raise ValueError(
            f"Expected more than 1 value per task and channel when training, got input size {list(x.shape)} with "
            f"num_tasks={num_tasks}; use a larger batch or eval()"
        )
