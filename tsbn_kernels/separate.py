"""The streams of a stack as tensors of their own: over its memory, and yet each may be changed in place.

Views of one stack are not that: autograd forbids to write to what ``unbind`` returns, and a write to one view counts as
a change of all the others. These are no views. Each has a version counter of its own, so that a head which writes in
place disturbs no other; what a stack's own operators have saved of it is checked when its gradient arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tsbn_kernels import runs


def separate(stacks: Sequence[Tensor], count: int, run: runs.Run | None = None) -> list[Sequence[Tensor]]:
    """The ``count`` streams ``[N, *]`` of each stack ``[count * N, *]``, which is task-major.

    The graph of the streams says what ``run`` it belongs to. In graphs of ``torch.compile``, in forward mode and under
    the transforms of ``torch.func`` they are copies, which the compiler leaves out where nobody writes.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        rows = [stack.unflatten(0, (count, stack.shape[0] // count)).unbind() for stack in stacks]
        return [[part.clone() for part in row] if row[0].requires_grad else row for row in rows]
    differentiable = [stack for stack in stacks if stack.requires_grad] if torch.is_grad_enabled() else []
    if not differentiable:
        return [_cut(stack, count) for stack in stacks]
    parts = Separate.apply(count, run, *differentiable)
    if len(stacks) == 1:
        return [parts]
    rest = iter([parts[first : first + count] for first in range(0, len(parts), count)])
    return [next(rest) if stack.requires_grad else _cut(stack, count) for stack in stacks]


def _cut(stack: Tensor, count: int) -> list[Tensor]:
    return aliases(stack.detach().unflatten(0, (count, stack.shape[0] // count)))


def aliases(stack: Tensor) -> list[Tensor]:
    """The parts ``stack[0]``, ``stack[1]``, ... over the same memory as tensors without a graph, views of nothing."""
    return [part.data for part in stack.unbind()]


def _counter(tensor: Tensor, nothing: Tensor) -> Tensor:
    """A tensor without memory that has the version counter of another."""
    counter = tensor.detach()
    counter.data = nothing
    return counter


class Separate(torch.autograd.Function):
    """Cuts stacks into parts; the gradients of the parts are put together again in one copy."""

    @staticmethod
    def forward(ctx: Any, count: int, run: runs.Run | None, *stacks: Tensor) -> tuple[Tensor, ...]:
        """Returns the parts of the first stack, then those of the second, and so on."""
        ctx.set_materialize_grads(False)
        ctx.count = count
        ctx.counters, parts = [], []
        for stack in stacks:
            row, nothing = _cut(stack, count), stack.new_empty(0)
            ctx.counters.append((_counter(stack, nothing), [_counter(part, nothing) for part in row]))
            parts += row
        ctx.overlap = len(stacks) > 1 and len({s.untyped_storage().data_ptr() for s in stacks}) < len(stacks)
        if run is not None:
            runs.remember(run, ctx)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        for stack, parts in ctx.counters:
            if any(part._version for part in parts):
                if ctx.overlap:
                    raise RuntimeError(
                        "a head has changed its stream in place, and other outputs of the backbone share its memory; "
                        "let the backbone return a clone() of one of them"
                    )
                torch.autograd.graph.increment_version(stack)  # what saved the stack in the backbone gets an error
        stacks = [gradients[first : first + ctx.count] for first in range(0, len(gradients), ctx.count)]
        return None, None, *map(_together, stacks)


def _together(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """One stack of the parts' gradients, zero where there is none."""
    if all(gradient is None for gradient in gradients):
        return None
    like = next(gradient for gradient in gradients if gradient is not None)
    return torch.cat([torch.zeros_like(like) if gradient is None else gradient for gradient in gradients])
