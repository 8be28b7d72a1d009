"""What a call of layer normalisation must satisfy; each error says what came, what was expected, how to mend it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import LayerOptions
from tsbn_kernels.operator import checks

_known: dict[Hashable, LayerOptions] = {}


def normalized_shape(value: Any) -> tuple[int, ...]:
    """An int, or several, as a tuple of one or more ints of 1 or more; raises TypeError or ValueError."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not sizes:
        raise ValueError("normalized_shape must have one dimension or more, got ()")
    return tuple(checks.count("normalized_shape", size) for size in sizes)


def checked(tensors: Sequence[Any], options: Sequence[Any]) -> LayerOptions:
    """Checks what :func:`check_call` does, once for the options, sizes, dtypes and devices; raises what it does.

    Args:
        tensors: x, weight, bias and residual.
        options: those of :class:`~tsbn_kernels.definition.options.LayerOptions`, as they were given.
    """
    x, weight, bias, residual = tensors
    key: Hashable = None
    try:
        num_tasks, _, _, _, _, fan_out = options
        types = type(num_tasks), type(fan_out)  # 1 == True == 1.0
        more = bias is None or checks.kind(bias), residual is None or checks.kind(residual)
        key = options, types, checks.kind(x), checks.kind(weight), more
        known = _known.get(key)
        if known is not None:
            return known
    except (AttributeError, RuntimeError, TypeError):  # no tensor, a nested one, or sizes that are symbols
        pass
    call = check_call(tensors, options)
    checks.remember(_known, key, call, tensors, options)
    return call


def check_call(tensors: Sequence[Any], options: Sequence[Any]) -> LayerOptions:
    """Checks all of a call; takes what :func:`checked` does.

    Raises:
        TypeError, ValueError, RuntimeError: something does not fit.
    """
    x, weight, bias, residual = tensors
    num_tasks, eps, gate, stacking, rms, fan_out = options
    num_tasks = checks.count("num_tasks", num_tasks)
    checks.check_options(gate, stacking, None)
    checks.check_flag("fan_out", fan_out)
    checks.check_floating("x", x, "; convert it with x.float()")
    checks.check_floating("weight", weight)
    checks.check_device("weight", weight, x)
    eps = _eps(x, residual) if eps is None and rms else checks.number("eps", eps, 0.0)
    call = LayerOptions(num_tasks, eps, gate, stacking, rms, fan_out)
    if weight.dim() < 2 or weight.shape[0] != num_tasks:
        raise ValueError(
            f"weight must have shape [num_tasks, *normalized_shape] with num_tasks={num_tasks}, got "
            f"{list(weight.shape)}"
        )
    _check_shape(x, weight, call)
    for name, tensor, like in (("bias", bias, weight), ("residual", residual, x)):
        if tensor is not None:
            checks.check_floating(name, tensor)
            checks.check_device(name, tensor, x)
            if tensor.shape != like.shape:
                of = "weight" if like is weight else "x"
                raise ValueError(f"{name} must have the shape of {of}, {list(like.shape)}, got {list(tensor.shape)}")
    return call


def _eps(x: torch.Tensor, residual: Any) -> float:
    """What ``nn.RMSNorm`` takes where it is given none: that of the dtype that is computed in."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.finfo(accumulate_dtype(dtype)).eps


def _check_shape(x: torch.Tensor, weight: torch.Tensor, options: LayerOptions) -> None:
    """Raises ValueError where x has no rows of ``normalized_shape``, or those of other than T streams."""
    shape = weight.shape[1:]
    axis = options.stacking == "task_axis" and not options.fan_out
    least = len(shape) + (2 if axis else 1)
    if x.dim() < least or x.shape[-len(shape) :] != shape:
        ends = ", ".join(map(str, shape))  # here alone: a compiler does not trace it of sizes that change
        begins = "N" if options.fan_out else "T, N" if axis else "T*N"
        raise ValueError(
            f"Given normalized_shape={list(shape)}, expected input with shape [{begins}, ..., {ends}], but got input "
            f"of size {list(x.shape)}"
        )
    if not options.fan_out:
        checks.check_streams(x, options.num_tasks, options.stacking)
