"""What a call of the functional form must satisfy; each error says what came, what was expected, how to mend it."""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels import layout, recovery
from tsbn_kernels.activations import ACTIVATIONS

GATES = ("sigmoid", "identity")
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_options(num_tasks: int, gate: str, stacking: str, activation: str | None) -> None:
    """Raises ValueError where an option is unknown."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if stacking not in layout.STACKINGS:
        raise ValueError(f"stacking must be one of {', '.join(layout.STACKINGS)}, got {stacking!r}")
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be 1 or more, got {num_tasks}")
    check_activation(activation)


def check_activation(activation: str | None) -> None:
    """Raises ValueError where an activation is unknown."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_recovery(activation: str | None, negative_slope: float, with_more: bool, synchronized: bool) -> None:
    """Raises ValueError where the input cannot be had from the output; ``with_more``: a residual or fan-out."""
    if synchronized:
        raise ValueError("recover_input=True does not work with a process_group; use recompute_outputs()")
    if not recovery.invertible(activation or "none", negative_slope):
        raise ValueError(
            f"recover_input=True needs an output that can be inverted: activation None, or 'leaky_relu' with a "
            f"positive negative_slope; got {activation!r}. For others use recompute_outputs()"
        )
    if with_more:
        raise ValueError(
            "recover_input=True takes neither a residual nor fan_out: the output then does not tell the input; use "
            "recompute_outputs()"
        )


def check_input(x: Tensor, num_tasks: int, stacking: str, fan_out: bool, training: bool) -> None:
    """Raises TypeError for a dtype, ValueError for a shape."""
    if x.dtype not in _FLOATING:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}; convert it with x.float()")
    axis = layout.channel_axis(layout.input_stacking(stacking, fan_out))
    if x.dim() <= axis:
        shape = "[N, C, ...]" if fan_out else "[T, N, C, ...]" if axis == 2 else "[T*N, C, ...]"
        raise ValueError(f"x must have at least {axis + 1} dimensions {shape}, got shape {list(x.shape)}")
    if fan_out:
        streams = 1
    elif stacking == "task_axis":
        streams = num_tasks
        if x.shape[0] != num_tasks:
            raise ValueError(
                f"x of shape {list(x.shape)} has {x.shape[0]} tasks along its first dimension, expected "
                f"num_tasks={num_tasks}; for a stacked batch pass stacking='task_major' or 'sample_major'"
            )
    else:
        streams = num_tasks
        if x.shape[0] % num_tasks:
            raise ValueError(
                f"the first dimension of x, {x.shape[0]}, is not a multiple of num_tasks={num_tasks}; "
                f"stack one batch of equal size for each task"
            )
    if training and x.numel() == streams * x.shape[axis] > 0:
        raise ValueError(
            f"Expected more than 1 value per task and channel when training, got input size {list(x.shape)} with "
            f"num_tasks={num_tasks}; use a larger batch or eval()"
        )


def check_vector(name: str, vector: Tensor, x: Tensor, num_tasks: int, channels: int) -> None:
    """Raises ValueError, TypeError or RuntimeError where a ``[T, C]`` vector does not fit x."""
    if vector.shape != (num_tasks, channels):
        raise ValueError(
            f"{name} must have shape [num_tasks, channels] = {[num_tasks, channels]} for x of shape {list(x.shape)}, "
            f"got {list(vector.shape)}"
        )
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {vector.dtype}")
    _check_device(name, vector, x)


def check_residual(residual: Tensor, x: Tensor, num_tasks: int, stacking: str, fan_out: bool) -> None:
    """Raises ValueError, TypeError or RuntimeError where a residual does not fit the output."""
    expected, _ = layout.output_sizes(x, num_tasks, stacking, fan_out)
    if residual.shape != torch.Size(expected):
        raise ValueError(f"residual must have the shape of the output, {list(expected)}, got {list(residual.shape)}")
    if residual.dtype not in _FLOATING:
        raise TypeError(
            f"residual must be float32, float64, float16 or bfloat16, got {residual.dtype}; convert it with "
            f".to(x.dtype)"
        )
    _check_device("residual", residual, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"{name} is on {tensor.device} and x on {x.device}; move one of them with .to()")
