"""What a call of the functional form must satisfy; each error says what came, what was expected, how to mend it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import ACTIVATIONS, EPILOGUES, NONE, TABLE
from tsbn_kernels.definition.options import Options, Running, of_input
from tsbn_kernels.operator import recover_input as recovery

GATES = ("sigmoid", "identity")
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LARGEST: Any = sys.float_info.max
_PLAIN = {int, float, bool, str, type(None)}  # settings that keep nothing alive
_DENSE = torch.strided
MOST = 1024  # calls that are remembered


class Settings(NamedTuple):
    """What is said of a call in the functional form, and not checked: see :func:`functional.task_batch_norm`."""

    num_tasks: int
    training: bool = True
    eps: float = 1e-5
    gate: str = "sigmoid"
    stacking: str = "task_major"
    activation: str | None = None
    negative_slope: float = 0.01
    fan_out: bool = False
    recover_input: bool = False


class Checked(NamedTuple):
    """A call that is in order: its options, and the values of each task and channel in training."""

    options: Options
    channels: int
    values: int


_known: dict[Hashable, Checked] = {}


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
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def number(name: str, value: Any, least: float | None = None) -> float:
    """``value`` as a finite float, of ``least`` or more; raises TypeError or ValueError."""
    if type(value) is not float and not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(value) <= _LARGEST or (least is not None and float(value) < least):
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


def named_losses(losses: Mapping[str, Any] | Sequence[Any]) -> dict[str, Tensor]:
    """The loss of each task by name; without names, ``"task 0"`` and so on.

    Raises:
        TypeError: a loss is no tensor.
        ValueError: a loss is no scalar or has no graph.
    """
    named = dict(losses) if isinstance(losses, Mapping) else {f"task {i}": loss for i, loss in enumerate(losses)}
    for name, loss in named.items():
        check_tensor(f"the loss of {name!r}", loss)
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"the loss of {name!r} must be a scalar with a graph, got shape {list(loss.shape)} and "
                f"requires_grad={loss.requires_grad}"
            )
    return named


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


def check_floating(name: str, value: Any, remedy: str = "") -> None:
    """Raises TypeError where a value is no dense tensor, or has another dtype than layers compute in."""
    check_tensor(name, value)
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}{remedy}")


def check_options(gate: str, stacking: str, activation: str | None) -> None:
    """Raises ValueError where an option is unknown."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if stacking not in layout.STACKINGS:
        raise ValueError(f"stacking must be one of {', '.join(layout.STACKINGS)}, got {stacking!r}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_bias(bias: Any) -> None:
    """Raises ValueError where this is no kind of bias."""
    if bias not in (True, False, "frozen"):
        raise ValueError(f"bias must be True, False or 'frozen', got {bias!r}")


def check_layer_stacking(stacking: str) -> None:
    """Raises ValueError where a layer cannot have a stacking; a task axis it sees by the dimensions of its input."""
    if stacking not in ("task_major", "sample_major"):
        raise ValueError(f"stacking must be 'task_major' or 'sample_major', got {stacking!r}")


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


def checked(tensors: tuple[Any, ...], settings: tuple[Any, ...], grouped: bool, alone: bool) -> Checked:
    """Checks what :func:`check_call` does, once for the settings, sizes, dtypes and devices; raises what it does."""
    x, weight, bias, running_mean, running_var, residual = tensors
    num_tasks, training, _, _, _, _, _, fan_out, recover_input = settings
    key: Hashable = None
    try:
        types = type(num_tasks), type(training), type(fan_out), type(recover_input)  # 1 == True == 1.0
        statistics = running_mean is None or kind(running_mean), running_var is None or kind(running_var)
        more = bias is None or kind(bias), residual is None or kind(residual)
        key = settings, types, grouped, alone, kind(x), kind(weight), statistics, more
        known = _known.get(key)
        if known is not None:
            return known
    except (AttributeError, RuntimeError, TypeError):  # no tensor, a nested one, or sizes that are symbols
        pass
    call = check_call(tensors, settings, grouped, alone)
    remember(_known, key, call, tensors, settings)
    return call


def remember(
    known: dict[Hashable, Any], key: Hashable, call: Any, tensors: Iterable[Tensor | None], settings: Iterable[Any]
) -> None:
    """Keeps a checked call, where the sizes of its tensors are no symbols, and its settings keep nothing alive."""
    sizes = [size for tensor in tensors if tensor is not None for size in tensor.shape]
    if all(type(size) is int for size in sizes) and {type(value) for value in settings} <= _PLAIN:
        if len(known) >= MOST:
            known.clear()
        known[key] = call


def kind(tensor: Tensor) -> Hashable:
    """All of a tensor that a check of a call looks at."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout is _DENSE


def check_call(tensors: tuple[Any, ...], settings: tuple[Any, ...], grouped: bool, alone: bool) -> Checked:
    """Checks all of a call but what may change in a tensor that stays.

    Args:
        tensors: the six of :func:`functional.task_batch_norm`.
        settings: the values of :class:`Settings`.
        grouped: whether there is a process group.
        alone: whether the batch is that of this process alone.

    Raises:
        TypeError, ValueError, RuntimeError: something does not fit.
    """
    x, weight, bias, running_mean, running_var, residual = tensors
    num_tasks, training, eps, gate, stacking, activation, negative_slope, fan_out, recover_input = settings
    num_tasks = count("num_tasks", num_tasks)
    check_options(gate, stacking, activation)
    for name, flag in (("training", training), ("fan_out", fan_out), ("recover_input", recover_input)):
        check_flag(name, flag)
    eps, negative_slope = number("eps", eps, 0.0), number("negative_slope", negative_slope)
    if training and eps == 0:
        raise ValueError("eps must be positive in training, got 0.0; a constant channel would be divided by 0")
    name = activation or NONE
    slope = negative_slope if EPILOGUES[name].sloped else 0.0
    options = Options(num_tasks, eps, gate, stacking, name, slope, fan_out)
    check_input(x, options, training and alone)
    channels = x.shape[layout.channel_axis(of_input(options).stacking)]
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None or name == "weight":
            check_vector(name, vector, x, num_tasks, channels)
        elif not training and name.startswith("running"):
            raise ValueError(f"evaluation needs {name}; pass it, or training=True to use the batch's statistics")
    if recover_input:
        check_recovery(activation, negative_slope, fan_out or residual is not None, grouped)
    if residual is not None:
        check_residual(residual, x, options)
    values = x.numel() // (of_input(options).num_tasks * channels) if training and x.numel() > 0 else 0
    return Checked(options, channels, values)


def check_input(x: Tensor, options: Options, training: bool) -> None:
    """Raises TypeError for a dtype, ValueError for a shape."""
    check_floating("x", x, "; convert it with x.float()")
    own = of_input(options)
    axis = layout.channel_axis(own.stacking)
    if x.dim() <= axis:
        shape = "[N, C, ...]" if options.fan_out else "[T, N, C, ...]" if axis == 2 else "[T*N, C, ...]"
        raise ValueError(f"x must have at least {axis + 1} dimensions {shape}, got shape {list(x.shape)}")
    check_streams(x, own.num_tasks, own.stacking)
    if training and x.numel() == own.num_tasks * x.shape[axis] > 0:
        raise ValueError(
            f"Expected more than 1 value per task and channel when training, got input size {list(x.shape)} with "
            f"num_tasks={options.num_tasks}; use a larger batch or eval()"
        )


def check_streams(x: Tensor, num_tasks: int, stacking: str) -> None:
    """Raises ValueError where x does not have as many streams."""
    if stacking == "task_axis" and x.shape[0] != num_tasks:
        raise ValueError(
            f"x of shape {list(x.shape)} has {x.shape[0]} tasks along its first dimension, expected "
            f"num_tasks={num_tasks}; for a stacked batch pass stacking='task_major' or 'sample_major'"
        )
    if x.shape[0] % num_tasks:
        raise ValueError(
            f"the first dimension of x, {x.shape[0]}, is not a multiple of num_tasks={num_tasks}; stack one batch of "
            f"equal size for each task"
        )


def check_vector(name: str, vector: Any, x: Tensor, num_tasks: int, channels: int) -> None:
    """Raises ValueError, TypeError or RuntimeError where a ``[T, C]`` vector does not fit x."""
    check_floating(name, vector)
    if vector.shape != (num_tasks, channels):
        raise ValueError(
            f"{name} must have shape [num_tasks, channels] = {[num_tasks, channels]} for x of shape {list(x.shape)}, "
            f"got {list(vector.shape)}"
        )
    check_device(name, vector, x)


def running_of_call(running: Running, x: Tensor, options: Options, channels: int) -> Running:
    """What a call updates, with a momentum of its kind; raises ValueError, TypeError or RuntimeError."""
    mean, var, batches, momentum, _ = running
    if not torch.compiler.is_compiling():
        if mean is not None:
            check_written("running_mean", mean)
        if var is not None:
            check_written("running_var", var)
    if momentum is None and batches is not None:
        return running
    value = momentum_value(momentum, x, options.num_tasks, channels)
    return running if value is momentum else running._replace(momentum=value)


def constant(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Running statistics that evaluation reads; raises ValueError where one has a gradient, which nobody computes."""
    for name, running in (("running_mean", mean), ("running_var", var)):
        if running is not None and running.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"evaluation does not differentiate {name}, which requires a gradient; pass it detached")
    return mean, var


def check_written(name: str, running: Tensor) -> None:
    """Raises ValueError or RuntimeError where running statistics cannot be updated in place."""
    if running.is_contiguous() and not (running.requires_grad or running.is_inference() or running.is_neg()):
        return  # the usual case: nothing of it needs a closer look
    if running.is_neg():
        raise ValueError(f"{name} is updated in training and must not be a negated view; pass {name}.resolve_neg()")
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


def momentum_value(momentum: Any, x: Tensor, num_tasks: int, channels: int) -> float | Tensor:
    """A finite float, or a tensor that broadcasts over ``[T, C]``; raises ValueError, TypeError or RuntimeError."""
    if type(momentum) is float and abs(momentum) <= _LARGEST:  # the usual case
        return momentum
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
    check_device("momentum", momentum, x)
    return momentum


def check_tasks(tasks: Tensor, num_tasks: int, like: Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError where a tensor does not name different tasks.

    Which ones it names is looked at on the CPU alone: on other devices it would wait for them.
    """
    if tasks.dtype != torch.int64 or tasks.layout is not torch.strided:
        raise TypeError(f"tasks must be a dense int64 tensor, or a sequence of integers, got {tasks.dtype}")
    if tasks.dim() != 1 or len(tasks) == 0:
        raise ValueError(f"tasks must have shape [K] with K of 1 or more, got {list(tasks.shape)}")
    check_device("tasks", tasks, like)
    if type(tasks) is Tensor and tasks.device.type == "cpu" and not torch.compiler.is_compiling():
        check_indices(tasks.tolist(), num_tasks)


def check_indices(tasks: Sequence[int], num_tasks: int) -> None:
    """Raises ValueError where these are not different tasks."""
    if not tasks or len(set(tasks)) != len(tasks) or not all(0 <= task < num_tasks for task in tasks):
        raise ValueError(f"tasks must be different indices below num_tasks={num_tasks}, got {list(tasks)}")


def check_residual(residual: Tensor, x: Tensor, options: Options) -> None:
    """Raises ValueError, TypeError or RuntimeError where a residual does not fit the output."""
    check_floating("residual", residual, "; convert it with .to(x.dtype)")
    expected = layout.output_shape(x, options)
    if residual.shape != torch.Size(expected):
        raise ValueError(f"residual must have the shape of the output, {list(expected)}, got {list(residual.shape)}")
    check_device("residual", residual, x)


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises RuntimeError where a tensor is not on the device of ``x``."""
    if tensor.device != x.device:
        raise RuntimeError(f"{name} is on {tensor.device} and x on {x.device}; move one of them with .to()")
