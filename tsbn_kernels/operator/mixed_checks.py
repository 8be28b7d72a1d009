"""What a call of a mixed batch must satisfy; each error says what came, what was expected, how to mend it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import Options
from tsbn_kernels.operator import checks


def check_alone(**options: Any) -> None:
    """Raises ValueError where an option is set that does not go with an index: how streams are stacked, or of which."""
    for name, (given, alone) in options.items():
        if given != alone:
            raise ValueError(
                f"task_of_sample tells the tasks of a batch [N, ...], and takes no {name}; got {name}={given!r:.40}"
            )


def check_index(task_of_sample: Any, x: Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError where an index is no int64 ``[N]`` on the device of x, a tensor."""
    checks.check_tensor("task_of_sample", task_of_sample)
    if task_of_sample.dtype != torch.int64:
        raise TypeError(f"task_of_sample must be int64, got {task_of_sample.dtype}; convert it with .long()")
    if task_of_sample.dim() != 1 or x.dim() == 0 or task_of_sample.shape[0] != x.shape[0]:
        raise ValueError(
            f"task_of_sample must have shape [N] with a task for each sample of x of shape {list(x.shape)}, got "
            f"{list(task_of_sample.shape)}"
        )
    checks.check_device("task_of_sample", task_of_sample, x)


def samples_of(task_of_sample: Any, x: Any, num_tasks: int) -> Tensor:
    """How many samples each task has, int64 ``[T]``.

    Which tasks the index names is looked at on the CPU alone: on other devices it would wait for them, and their
    indexing checks it without.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`check_index` does, or the index names no task.
    """
    checks.check_tensor("x", x)
    check_index(task_of_sample, x)
    num_tasks = checks.count("num_tasks", num_tasks)
    if not _readable(task_of_sample):
        return reference.samples_of(task_of_sample, num_tasks)
    if len(task_of_sample) and not (int(task_of_sample.min()) >= 0 and int(task_of_sample.max()) < num_tasks):
        wrong = ((task_of_sample < 0) | (task_of_sample >= num_tasks)).nonzero()[0]
        raise ValueError(
            f"task_of_sample must be tasks from 0 to num_tasks-1={num_tasks - 1}, got "
            f"{int(task_of_sample[wrong])} for sample {int(wrong)}"
        )
    return torch.bincount(task_of_sample, minlength=num_tasks)


def check_values(values: Tensor, shape: Any) -> None:
    """Raises ValueError where a task has one value per channel in training; other devices raise an error themselves.

    ``values`` are those of a channel of each task, ``[T]``.
    """
    if not _readable(values):
        reference.check_values(values)
    elif alone := (values == 1).nonzero().flatten().tolist():
        raise ValueError(
            f"Expected more than 1 value per task and channel when training, got input size {list(shape)} with one "
            f"sample of task {checks.some(map(str, alone))}; use more samples of it, evaluate_single=True or eval()"
        )


def check_samples(task_of_sample: Tensor, x: Tensor, options: Options, training: bool) -> None:
    """Raises ValueError where the index names no task, or one with one value per channel in training."""
    samples = samples_of(task_of_sample, x, options.num_tasks)
    if training:
        check_values(samples * (x.numel() // (x.shape[0] * x.shape[1])), x.shape)


def may_be_alone(values: Tensor) -> bool:
    """Whether a task has one value per channel; also where only a device that would have to be waited for knows."""
    return not _readable(values) or bool((values == 1).any())


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, and there are some."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
