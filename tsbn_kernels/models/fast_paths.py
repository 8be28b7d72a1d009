"""PyTorch's transformer encoder has paths for inference that read the parameters of its norms, and do not call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tsbn_kernels.layers.task_specific import TaskSpecific

# What the paths ask for; 0 or False closes them.
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_BEFORE = "_before_task_specific"


def close_fast_paths(model: nn.Module) -> None:
    """Lets the encoders of a model call their task-specific norms, in evaluation too."""
    for module, switch in _encoders(model):
        if any(isinstance(inner, TaskSpecific) for inner in module.modules()) and not hasattr(module, _BEFORE):
            setattr(module, _BEFORE, getattr(module, switch))
            setattr(module, switch, 0)


def open_fast_paths(model: nn.Module) -> None:
    """Takes back what :func:`close_fast_paths` has done."""
    for module, switch in _encoders(model):
        if hasattr(module, _BEFORE):
            setattr(module, switch, getattr(module, _BEFORE))
            delattr(module, _BEFORE)


def _encoders(model: nn.Module) -> Iterator[tuple[Any, str]]:
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, switch):
                yield module, switch
