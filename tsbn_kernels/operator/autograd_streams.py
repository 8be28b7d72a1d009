"""The layer with an output for each task: a backward pass costs the tasks whose outputs it comes from, not all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends import capture
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import LayerOptions, Needs, Options, Saved
from tsbn_kernels.operator import autograd, direct
from tsbn_kernels.operator.autograd import TaskBatchNorm
from tsbn_kernels.operator.double_backward import differentiable_twice
from tsbn_kernels.operator.separate import aliases, separate


class TaskStreams(TaskBatchNorm):
    """Forward as :class:`TaskBatchNorm`, all tasks in one call; y comes as T tensors ``[N, C, *]`` of one memory."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Returns the T streams and the statistics."""
        y, mean, var = TaskBatchNorm.forward(*inputs)
        *_, options, _, _ = inputs
        return *aliases(layout.streams(y, options.num_tasks, options.stacking)), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        first, *_, mean, var = output
        TaskBatchNorm.setup_context(ctx, inputs, (first, mean, var))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        given = {task: dy for task, dy in enumerate(gradients) if dy is not None}
        needs, nothing = Needs(*ctx.needs_input_grad[:4]), (None,) * 10
        if not given or not any(needs):
            return nothing
        stacking, plain, saved = options.stacking, options.activation == "none", Saved._make(ctx.saved_tensors)
        chosen = Chosen(list(given), options.num_tasks, saved.x)
        dy = chosen.stack(list(given.values()))
        own = Saved(
            saved.x if options.fan_out else chosen.streams(saved.x, stacking),
            chosen.rows(saved.weight),
            chosen.rows(saved.bias),
            chosen.streams(saved.residual, stacking),
            chosen.rows(saved.mean),
            chosen.rows(saved.var),
        )
        wanted = needs._replace(dresidual=needs.dresidual and not plain)
        of_chosen = options._replace(num_tasks=len(given), stacking="task_axis")
        compute = differentiable_twice(direct.of_later_pass(ctx.backend, dy))
        dx, dweight, dbias, dresidual = compute.backward(dy, own, ctx.training, wanted, of_chosen)
        dx = dx if options.fan_out else chosen.stacked(dx, stacking)
        dresidual = chosen.stacked(dy if plain and needs.dresidual else dresidual, stacking)
        return dx, chosen.spread(dweight), chosen.spread(dbias), dresidual, *nothing[4:]

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError("streams of the tasks do not work under vmap; call the layer itself, and split its result")


class Chosen:
    """Some of T tasks, whose rows are taken out of stacks, and put back among zeros.

    Args:
        tasks: which.
        num_tasks: T.
        like: a tensor on the device of the stacks.
    """

    def __init__(self, tasks: list[int], num_tasks: int, like: Tensor) -> None:
        self._tasks, self._num_tasks = tasks, num_tasks
        self._index = None if len(tasks) == num_tasks else capture.task_indices(tasks, like)

    def rows(self, stack: Any) -> Any:
        """The rows of the tasks of ``[T, *]``; one task's, and all, are a view."""
        if stack is None or self._index is None:
            return stack
        return stack[self._tasks[0]].unsqueeze(0) if len(self._tasks) == 1 else stack.index_select(0, self._index)

    def streams(self, stack: Any, stacking: str) -> Any:
        """The streams ``[K, N, *]`` of the tasks."""
        return None if stack is None else self.rows(layout.streams(stack, self._num_tasks, stacking))

    def spread(self, part: Tensor | None) -> Tensor | None:
        """Rows ``[K, *]`` of the tasks as ``[T, *]``: zero for the others."""
        if part is None or self._index is None:
            return part
        return part.new_zeros(self._num_tasks, *part.shape[1:]).index_copy(0, self._index, part)

    def stacked(self, part: Tensor | None, stacking: str) -> Tensor | None:
        """Streams of the tasks as a stack of all."""
        part = self.spread(part)
        return None if part is None else layout.stacked(part, stacking)

    @staticmethod
    def stack(parts: list[Tensor]) -> Tensor:
        """One tensor ``[K, N, *]`` of the streams of the tasks."""
        return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def of_a_stack(y: Tensor, options: Options | LayerOptions) -> Sequence[Tensor]:
    """The streams of an output that is there already, as tensors of their own."""
    T, stacking = options.num_tasks, options.stacking
    stack = y if stacking == "task_major" else layout.streams(y, T, stacking).flatten(0, 1)
    return separate([stack], T)[0]


apply: Callable[..., tuple[Tensor, ...]] = TaskStreams.apply


def apply_in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer in a graph that is traced: it has one backward pass, of all tasks."""
    y, mean, var = autograd.apply_in_graph(*inputs)
    *_, options, _, _ = inputs
    return *of_a_stack(y, options), mean, var
