"""What a graph of CUDA launches can be captured of: nothing that waits for the GPU, or copies from pageable memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HOST = "cpu"  # whose tensors are made of numbers at once
_MOST = 1024  # sets of tasks that are remembered
_indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def is_capturing() -> bool:
    """Whether a graph is being captured on the current stream of a GPU."""
    for module in (torch.cuda, torch.xpu):
        asks = getattr(module, "is_current_stream_capturing", None)
        if asks is not None and module.is_initialized() and asks():
            return True
    return False


def task_indices(tasks: Sequence[int], like: Tensor) -> Tensor:
    """Indices of tasks, int64 ``[K]``, on the device of ``like``; to be read alone.

    They are copied there once, and remembered. A graph that is captured before that makes its own.
    """
    device = like.device
    if device.type == _HOST or type(like) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return torch.tensor(tasks, device=device)
    key = tuple(tasks), device
    known = _indices.get(key)
    if known is not None:
        return known
    if is_capturing():  # in memory of the graph, filled by each replay
        return torch.cat([torch.full((1,), task, device=device) for task in tasks])
    with torch.inference_mode(False):
        made = torch.tensor(tasks, device=device)  # which waits for the copy: any stream may read it
    if len(_indices) >= _MOST:
        _indices.clear()
    return _indices.setdefault(key, made)
