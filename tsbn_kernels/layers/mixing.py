"""The task of each sample, for layers in a backbone that passes on its input alone.

Nothing of a call lives on a module. What a thread runs inside of :func:`task_index` is kept for that thread, and read
when a layer is called: for a compiled graph the index is an input. Activation checkpointing calls layers again in a
backward pass, in any thread: the graph that is being differentiated remembers the index of the forward pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.operator import checks
from tsbn_kernels.operator.runs import executing, graph_below

_KEY = "tsbn_task_of_sample"
used = False  # whether this process has routed an index; until then no layer asks


class _Routed(threading.local):
    def __init__(self) -> None:  # in each thread: Dynamo's guards take no default of the class for it
        self.index: Tensor | None = None
        self.found: tuple[int, int, Tensor | None] = (-1, -1, None)  # of the last node of a backward pass that asked


_routed = _Routed()


@contextmanager
def task_index(task_of_sample: Tensor) -> Iterator[None]:
    """Inside of this context the task-specific layers of any backbone get a mixed batch.

    ``with task_index(index): y = backbone(x)`` calls each layer with ``task_of_sample=index``. A layer that gets k rows
    for each sample, one after the other, takes each task k times: windows or tokens of an image.

    Args:
        task_of_sample: int64 ``[N]``, the task of each sample of the batch.

    Raises:
        TypeError: it is no int64 tensor.
    """
    global used
    checks.check_tensor("task_of_sample", task_of_sample)
    if task_of_sample.dtype != torch.int64 or task_of_sample.dim() != 1:
        raise TypeError(
            f"task_of_sample must be int64 of shape [N], got {task_of_sample.dtype} of shape "
            f"{list(task_of_sample.shape)}"
        )
    used = True
    before, _routed.index = _routed.index, task_of_sample
    try:
        yield
    finally:
        _routed.index = before


def routed() -> Tensor | None:
    """The index of the batch that a layer is called with now; None where nothing routes one."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        found = _of_the_pass_that_is_repeated()
        if found is not None:
            return found
    return _routed.index


def of_rows(task_of_sample: Tensor, x: Tensor) -> Tensor:
    """The task of each row of ``x``, of which a sample may have several."""
    rows, samples = x.shape[0] if x.dim() else 0, task_of_sample.shape[0]
    if samples in (0, rows) or rows % samples:
        return task_of_sample
    return task_of_sample.unsqueeze(1).expand(samples, rows // samples).flatten()


def remember(y: Tensor) -> None:
    """Lets what repeats the call that gave ``y`` find the index that was routed to it, as all layers get it."""
    if torch.compiler.is_compiling():
        return
    task_of_sample = routed()
    if y.grad_fn is not None:
        node: Any = y.grad_fn
        node.metadata[_KEY] = task_of_sample
    elif not torch.is_grad_enabled():  # a re-entrant checkpoint has no graph of what it runs, but a node of its own
        frame: Any = sys._getframe(1)
        while frame is not None:
            node = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
            if "Checkpoint" in type(node).__name__:
                setattr(node, _KEY, task_of_sample)
            frame = frame.f_back


def _of_the_pass_that_is_repeated() -> Tensor | None:
    for node in executing():
        if (kept := getattr(node, _KEY, None)) is not None:
            return kept  # type: ignore[no-any-return]
        here = torch._C._current_graph_task_id(), node._sequence_nr()
        if _routed.found[:2] != here:
            known = [below for below in graph_below([node]) if below is not None and _KEY in below.metadata]
            last = max(known, key=lambda below: below._sequence_nr(), default=None)
            _routed.found = (*here, None if last is None else last.metadata[_KEY])
        if _routed.found[2] is not None:
            return _routed.found[2]
    return None
