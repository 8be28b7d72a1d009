"""What the shared backbone makes of the same samples for each task."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels.analysis.gates import layers
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.operator import checks


@torch.no_grad()
def task_representations(model: nn.Module, inputs: Any, layer: str | None = None) -> Tensor:
    """Runs a model, and gives a vector for each task and sample, to be drawn by t-SNE or UMAP.

    Positions of an image ``[N, C, *]`` and tokens ``[N, L, D]`` are averaged. The model runs in the mode that it is in:
    call ``model.eval()`` first.

    Args:
        model: any with task-specific layers.
        inputs: what its forward takes.
        layer: the name of the module whose output is taken, T streams ``[T*N, *]`` stacked. By default what the heads
            of a :class:`~tsbn_kernels.MultiTaskModel` get, and of another model the output of its last layer with
            gates.

    Returns:
        Float32 ``[T, N, D]`` on the CPU.

    Raises:
        ValueError: there is no such module, or the model did not call it with tensors of T streams.
    """
    checks.check_module("model", model)
    caught: dict[str, Any] = {}
    own_heads = layer is None and isinstance(model, MultiTaskModel)
    found = dict(layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer with gates")
    last = list(found)[-1]
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"the model has no module {layer!r}")
    with ExitStack() as hooks:
        if own_heads:
            for task, head in model.heads.items():  # type: ignore[operator, union-attr]
                hook = head.register_forward_pre_hook(lambda _, args, task=task: caught.update({task: args[0]}))
                hooks.callback(hook.remove)
        else:
            place = last if layer is None else layer
            hook = modules[place].register_forward_hook(lambda _, args, output: caught.update({place: output}))
            hooks.callback(hook.remove)
        model(inputs)
    vectors = [_vectors(value) for value in caught.values() if isinstance(value, Tensor) and value.dim() > 1]
    if not vectors or len(vectors) != len(caught):
        raise ValueError("the model did not run the module, or that gave no tensor [T*N, *]; name another layer")
    return torch.stack(vectors) if own_heads else _streams(vectors[0], found[last])


def _streams(vectors: Tensor, layer: Any) -> Tensor:
    """``[T, N, D]`` of stacked vectors."""
    tasks = len(layer.gates)
    if len(vectors) % tasks:
        raise ValueError(f"{len(vectors)} rows are not those of {tasks} streams; name a layer behind the fan-out")
    if getattr(layer, "stacking", "task_major") == "sample_major":
        return vectors.view(-1, tasks, vectors.shape[1]).transpose(0, 1).contiguous()
    return vectors.view(tasks, -1, vectors.shape[1])


def _vectors(features: Tensor) -> Tensor:
    """A vector for each row: of tokens ``[N, L, D]`` and positions ``[N, C, *]`` the mean."""
    features = features.detach().to("cpu", torch.float32).contiguous()
    if features.dim() == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.dim() > 3 else features.flatten(1)
