"""The streams of a stack as tensors of their own: over its memory, and yet each may be changed in place.

Views of one stack are not that: autograd forbids to write to what ``unbind`` returns, and a write to one view counts as
a change of all the others. What ``unsafe_chunk`` returns are no views. Each part has a version counter of its own, so
that a head which writes in place disturbs no other. PyTorch's function leaves one thing to its users: what the stack's
own operators have saved of it is checked here, before the gradient of any part goes on to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tsbn_kernels.operator import runs


def separate(
    stacks: Sequence[Tensor], count: int, run: runs.Run | None = None, sizes: Sequence[int] | None = None
) -> list[Sequence[Tensor]]:
    """The ``count`` streams ``[N, *]`` of each stack ``[count * N, *]``, which is task-major.

    Where the streams differ in size, ``sizes`` tells how many samples each has, of one row or more.

    The graph of the streams says what ``run`` it belongs to. In graphs of ``torch.compile``, in forward mode and under
    the transforms of ``torch.func`` they are copies, which the compiler leaves out where nobody writes.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or torch.compiler.is_compiling():
        rows = [_views(stack, count, sizes) for stack in stacks]
        return [[part.clone() for part in row] if transformed or row[0].requires_grad else row for row in rows]
    rows = [
        stack.unsafe_chunk(count) if sizes is None else stack.unsafe_split_with_sizes(_rows(stack, sizes))
        for stack in stacks
    ]
    nodes = [row[0].grad_fn for row in rows if row[0].grad_fn is not None]
    if nodes:
        cut = _Cut([(stack, *row) for stack, row in zip(stacks, rows, strict=True)])
        for node in nodes:
            node.register_prehook(cut)
        if run is not None:
            cut.run, cut.last = run, [stack.grad_fn for stack in stacks if stack.grad_fn is not None]
            runs.remember(cut)
    return rows


def _views(stack: Tensor, count: int, sizes: Sequence[int] | None) -> Sequence[Tensor]:
    views: Sequence[Tensor]
    if sizes is None:
        views = stack.unflatten(0, (count, stack.shape[0] // count)).unbind()
    else:
        views = stack.split(_rows(stack, sizes))
    return views


def _rows(stack: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many rows of a stack each stream has."""
    each = stack.shape[0] // max(1, sum(sizes))
    return [each * size for size in sizes]


def aliases(stack: Tensor) -> list[Tensor]:
    """The parts ``stack[0]``, ``stack[1]``, ... over the same memory as tensors without a graph, views of nothing."""
    return [part.data for part in stack.unbind()]


def _counters(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors without memory that have the version counters of others."""
    nothing = tensors[0].new_empty(0)
    counters = [tensor.detach() for tensor in tensors]
    for counter in counters:
        counter.data = nothing
    return counters


class _Cut:
    """A hook of the nodes that cut stacks: a stack counts as changed in place where one of its parts has been."""

    run: runs.Run
    last: Sequence[Any]

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:  # each stack and its parts
        self._counters = [_counters(row) for row in rows if not row[0].is_inference()]
        differentiable = [row[0] for row in rows if row[0].requires_grad]
        memory = {stack.untyped_storage().data_ptr() for stack in differentiable} if len(differentiable) > 1 else ()
        self._overlap = len(differentiable) > len(memory) > 0

    def __call__(self, _: tuple[Tensor, ...]) -> None:
        for stack, *parts in self._counters:
            if any(part._version for part in parts):
                if self._overlap:
                    raise RuntimeError(
                        "a head has changed its stream in place, and other outputs of the backbone share its memory; "
                        "let the backbone return a clone() of one of them"
                    )
                torch.autograd.graph.increment_version(stack)  # what saved the stack in the backbone gets an error
