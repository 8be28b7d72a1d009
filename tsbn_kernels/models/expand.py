"""States of plain models, and of models with fewer tasks, as those of a model of T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.same_tasks import layers_of_same_tasks, row_of
from tsbn_kernels.operator import checks


def expand_state_dict(
    model: nn.Module, state_dict: dict[str, Any], tasks: Sequence[int | str] | None = None
) -> dict[str, Any]:
    """The state of a plain model, or of one with fewer tasks, as that of a model of T tasks.

    Every task starts from the plain layers, or has its own of a list of them: ``bns.0.weight`` for the first task of
    the layer ``bns``. ``model.load_state_dict`` takes such states as they are. What distributes a state before the
    layers see it does not, for it goes by their shapes: ``set_model_state_dict`` of ``torch.distributed.checkpoint``
    with ``broadcast_from_rank0``, for example, which then takes this function's result on the first rank.

    Args:
        model: the converted model, wrapped or not, whose parameters may be sharded or, without ``tasks``, on the meta
            device.
        state_dict: by the names of the plain model, and not changed; what is no task-specific layer's is handed on.
        tasks: the model's tasks, by index or name, that the tasks of the state are, in their order. Other tasks keep
            what the model has for them, and so do their heads in a :class:`~tsbn_kernels.MultiTaskModel`: with
            ``tasks=range(3)`` a checkpoint of three tasks fits a model of four. None: the state has all tasks.

    Raises:
        TypeError: ``model`` is no module, or ``state_dict`` no dict.
        ValueError: ``tasks`` has an unknown name or one task twice, or the state is of other numbers of tasks.
        IndexError: there is no such task.
    """
    checks.check_module("model", model)
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    expanded = dict(state_dict)
    whole = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    models = {_prefix(path): module for path, module in whole.named_modules() if isinstance(module, MultiTaskModel)}
    rows = None
    if tasks is not None:
        count = next(iter(layers_of_same_tasks(whole, "given other tasks").values())).num_tasks
        names = next(iter(models.values())).tasks if models else ()
        rows = [row_of("each of tasks", task, count, names) for task in tasks]
        if len(set(rows)) != len(rows):
            raise ValueError(f"tasks must be different ones, got {list(tasks)}")
    for path, layer in whole.named_modules():
        if isinstance(layer, TaskSpecific):
            layer._expand_plain_state(expanded, _prefix(path), rows)
    if rows is not None:
        for prefix, module in models.items():
            for row, name in enumerate(module.tasks):
                if row not in rows and name in module.heads:
                    own = module.heads[name].state_dict(prefix=f"{prefix}heads.{name}.")
                    expanded = {**own, **expanded}
    return expanded


def _prefix(path: str) -> str:
    name = path.replace("_orig_mod.", "")  # of torch.compile, as distributed checkpoints leave it out
    return f"{name}." if name else ""
