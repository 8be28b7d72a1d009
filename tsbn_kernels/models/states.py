"""States of plain models, as those of the task-specific models that they become."""

from __future__ import annotations

from typing import Any

from torch import nn

from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.operator import checks


def expand_state_dict(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state of a plain model as one of a converted model, in which every task starts from the plain layers.

    ``model.load_state_dict`` takes plain states as they are. What distributes a state before the layers see it does
    not, for it goes by their shapes: ``set_model_state_dict`` of ``torch.distributed.checkpoint`` with
    ``broadcast_from_rank0``, for example, which then takes this function's result on the first rank.

    Args:
        model: the converted model, wrapped or not, whose parameters may be sharded or on the meta device.
        state_dict: by the names of the plain model, and not changed; what is no task-specific layer's is handed on.

    Raises:
        TypeError: ``model`` is no module, or ``state_dict`` no dict.
    """
    checks.check_module("model", model)
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    expanded = dict(state_dict)
    whole = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for path, layer in whole.named_modules():
        if isinstance(layer, TaskSpecific):
            name = path.replace("_orig_mod.", "")  # of torch.compile, as distributed checkpoints leave it out
            layer._expand_plain_state(expanded, f"{name}." if name else "")
    return expanded
