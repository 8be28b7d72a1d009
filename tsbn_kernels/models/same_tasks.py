"""The task-specific layers of a model that is to be changed as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tsbn_kernels.layers.late_fan_out import LateFanOut
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.operator import checks


def layers_of_same_tasks(model: nn.Module, done: str) -> dict[str, TaskSpecific]:
    """Finds the task-specific layers of a model by their names.

    Args:
        model: any module.
        done: what is to be done with them, as in "cannot be sharded".

    Raises:
        ValueError: there is none, or they have different numbers of tasks.
        TypeError: the model has a :class:`~tsbn_kernels.LateFanOut`.
    """
    if late := [name for name, module in model.named_modules() if isinstance(module, LateFanOut)]:
        raise TypeError(f"{late[0]!r} is a LateFanOut, which cannot be {done}; use a layer with fan_out=True")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TaskSpecific)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer; convert it with convert_model()")
    counts = {layer.num_tasks: name for name, layer in layers.items()}
    if len(counts) > 1:
        found = " and ".join(f"{count} of {name!r}" for count, name in counts.items())
        raise ValueError(f"all layers must have the same number of tasks, got {found}")
    return layers


def row_of(argument: str, task: int | str, num_tasks: int, names: Sequence[str]) -> int:
    """The row of a task, which is given by its index or by one of the names that the tasks have, if they have any.

    Raises:
        ValueError: no task has that name.
        IndexError: there is no such task.
        TypeError: it is neither a name nor an integer.
    """
    if isinstance(task, str):
        if task not in names:
            known = ", ".join(names) or "the indices, for there are no names"
            raise ValueError(f"{argument} must be one of {known}, got {task!r}")
        return names.index(task)
    index = checks.index(argument, task)
    if not -num_tasks <= index < num_tasks:
        raise IndexError(f"{argument} {index} is out of range for num_tasks={num_tasks}")
    return index % num_tasks
