"""The task-specific layers of a model that is to be changed as a whole."""

from __future__ import annotations

from torch import nn

from tsbn_kernels.layers.late_fan_out import LateFanOut
from tsbn_kernels.layers.task_specific import TaskSpecific


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
