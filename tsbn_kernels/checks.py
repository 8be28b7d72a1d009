"""What a call of the functional form must satisfy; each error says what came, what was expected, how to mend it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from tsbn_kernels import layout, recovery
from tsbn_kernels.activations import ACTIVATIONS, NONE, TABLE

GATES = ("sigmoid", "identity")
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def count(name: str, value: Any) -> int:
    """``value`` as an int of 1 or more; raises TypeError or ValueError."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = index(name, value)
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    if value >= 1 << 31:
        raise ValueError(f"{name} must be below 2**31, got {value}")
    return value  # type: ignore[no-any-return]


def index(name: str, value: Any) -> int:
    """``value`` as an int; raises TypeError."""
    try:
        return value.__index__() if isinstance(value, SupportsIndex) else _no_integer(name, value)
    except TypeError:  # of a tensor that is no integer
        return _no_integer(name, value)


def _no_integer(name: str, value: Any) -> int:
    raise TypeError(f"{name} must be an integer, got {value!r}") from None


def number(name: str, value: Any, least: float | None = None) -> float:
    """``value`` as a finite float, of ``least`` or more; raises TypeError or ValueError."""
    if type(value) is not float and not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    largest: Any = sys.float_info.max
    if not abs(value) <= largest or (least is not None and float(value) < least):
        bound = "" if least is None else f" of {least} or more"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r:.40}")
    return float(value)


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError where a value is neither True nor False."""
    if type(value) is not bool and not isinstance(value, torch.SymBool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_module(name: str, value: Any) -> None:
    """Raises TypeError where a value is no module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {value!r:.80}")


def check_dtype(dtype: Any) -> None:
    """Raises TypeError where parameters cannot have a dtype."""
    if dtype is not None and dtype not in _FLOATING:
        raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype!r}")


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError where a value is no dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one; convert it with .to_dense()")


def eps_value(eps: Any, training: bool) -> float:
    """Eps as a float: in training positive, as in ``functional.batch_norm``, else 0 or more; raises as ``number``."""
    value = number("eps", eps, 0.0)
    if training and value == 0:
        raise ValueError("eps must be positive in training, got 0.0; a constant channel would be divided by 0")
    return value


def check_options(gate: str, stacking: str, activation: str | None) -> None:
    """Raises ValueError where an option is unknown."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if stacking not in layout.STACKINGS:
        raise ValueError(f"stacking must be one of {', '.join(layout.STACKINGS)}, got {stacking!r}")
    check_activation(activation)


def check_layer_stacking(stacking: str) -> None:
    """Raises ValueError where a layer cannot have a stacking; a task axis it sees by the dimensions of its input."""
    if stacking not in ("task_major", "sample_major"):
        raise ValueError(f"stacking must be 'task_major' or 'sample_major', got {stacking!r}")


def check_activation(activation: str | None) -> None:
    """Raises ValueError where an activation is unknown."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_recovery(activation: str | None, negative_slope: float, with_more: bool, synchronized: bool) -> None:
    """Raises ValueError where the input cannot be had from the output; ``with_more``: a residual or fan-out."""
    if synchronized:
        raise ValueError("recover_input=True does not work with a process_group; use recompute_outputs()")
    if not recovery.invertible(activation or NONE, negative_slope):
        invertible = " or ".join(repr(name) for name, row in TABLE.items() if row.invertible)
        raise ValueError(
            f"recover_input=True needs an output that can be inverted: activation None, or {invertible} with a "
            f"positive negative_slope; got {activation!r}. For others use recompute_outputs()"
        )
    if with_more:
        raise ValueError(
            "recover_input=True takes neither a residual nor fan_out: the output then does not tell the input; use "
            "recompute_outputs()"
        )


def check_input(x: Tensor, num_tasks: int, stacking: str, fan_out: bool, training: bool) -> None:
    """Raises TypeError for a dtype, ValueError for a shape."""
    check_tensor("x", x)
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
    check_tensor(name, vector)
    if vector.shape != (num_tasks, channels):
        raise ValueError(
            f"{name} must have shape [num_tasks, channels] = {[num_tasks, channels]} for x of shape {list(x.shape)}, "
            f"got {list(vector.shape)}"
        )
    if vector.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {vector.dtype}")
    _check_device(name, vector, x)


def check_written(name: str, running: Tensor) -> None:
    """Raises ValueError or RuntimeError where running statistics cannot be updated in place."""
    if torch.compiler.is_compiling() or _is_plain_buffer(running):
        return
    if running.requires_grad and running.is_leaf and torch.is_grad_enabled():
        raise ValueError(f"{name} is updated in training and must not require a gradient; pass it detached")
    if _overlaps(running):
        raise ValueError(
            f"{name} is updated in training, and its elements must not share memory; got strides "
            f"{list(running.stride())} for shape {list(running.shape)}, pass a contiguous copy"
        )
    if running.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} was made in inference_mode and cannot be updated outside of it; pass a clone")


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a dimension steps less than those inside it extend."""
    extent = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if step < extent:
            return True
        extent += step * (size - 1)
    return False


def _is_plain_buffer(running: Tensor) -> bool:
    """The usual case: nothing of it needs a closer look."""
    return running.is_contiguous() and not running.requires_grad and not running.is_inference()


def momentum_value(momentum: Any, x: Tensor, num_tasks: int, channels: int) -> float | Tensor:
    """A finite float, or a tensor that broadcasts over ``[T, C]``; raises ValueError, TypeError or RuntimeError."""
    if not isinstance(momentum, Tensor):
        return number("momentum", momentum)
    check_tensor("momentum", momentum)
    if momentum.dtype not in _FLOATING:
        raise TypeError(f"momentum must be a number or a floating point tensor, got {momentum.dtype}")
    sizes = [1] * (2 - momentum.dim()) + list(momentum.shape)
    if len(sizes) != 2 or sizes[0] not in (1, num_tasks) or sizes[1] not in (1, channels):
        raise ValueError(
            f"momentum must broadcast over [num_tasks, channels] = {[num_tasks, channels]}, got shape "
            f"{list(momentum.shape)}"
        )
    _check_device("momentum", momentum, x)
    return momentum


def check_tasks(tasks: Tensor, num_tasks: int, like: Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError where a tensor does not name different tasks.

    Which ones it names is looked at on the CPU alone: on other devices it would wait for them.
    """
    if tasks.dtype != torch.int64 or tasks.layout is not torch.strided:
        raise TypeError(f"tasks must be a dense int64 tensor, or a sequence of integers, got {tasks.dtype}")
    if tasks.dim() != 1 or len(tasks) == 0:
        raise ValueError(f"tasks must have shape [K] with K of 1 or more, got {list(tasks.shape)}")
    _check_device("tasks", tasks, like)
    if type(tasks) is Tensor and tasks.device.type == "cpu" and not torch.compiler.is_compiling():
        check_indices(tasks.tolist(), num_tasks)


def check_indices(tasks: Sequence[int], num_tasks: int) -> None:
    """Raises ValueError where these are not different tasks."""
    if not tasks or len(set(tasks)) != len(tasks) or not all(0 <= task < num_tasks for task in tasks):
        raise ValueError(f"tasks must be different indices below num_tasks={num_tasks}, got {list(tasks)}")


def check_residual(residual: Tensor, x: Tensor, num_tasks: int, stacking: str, fan_out: bool) -> None:
    """Raises ValueError, TypeError or RuntimeError where a residual does not fit the output."""
    check_tensor("residual", residual)
    expected = layout.output_shape(x, num_tasks, stacking, fan_out)
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
