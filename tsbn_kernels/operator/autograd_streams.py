"""The layer with an output for each task: a backward pass costs the tasks whose outputs it comes from, not all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends import capture
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import Gradients, Needs, Options, Saved
from tsbn_kernels.operator import autograd
from tsbn_kernels.operator.autograd import TaskBatchNorm, differentiable_twice
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
        given = {task: dy for task, dy in enumerate(gradients) if dy is not None}
        x, weight, bias, residual, *_ = ctx.needs_input_grad
        found = Gradients()
        if given and (x or weight or bias or residual):
            found = _gradients(ctx, given, Needs(x, weight, bias, residual))
        return *found, None, None, None, None, None

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError("streams of the tasks do not work under vmap; call the layer itself, and split its result")


def _gradients(ctx: Any, given: dict[int, Tensor], needs: Needs) -> Gradients:
    """What is needed of the gradients, from those of some tasks' streams."""
    options: Options = ctx.options
    num_tasks, stacking, plain = options.num_tasks, options.stacking, options.activation == "none"
    saved, tasks = Saved._make(ctx.saved_tensors), list(given)
    index = None if len(tasks) == num_tasks else capture.task_indices(tasks, saved.x)

    def rows(stack: Any) -> Any:
        """The rows of the tasks that a gradient came for; one task's, and all, are a view."""
        if stack is None or index is None:
            return stack
        return stack[tasks[0]].unsqueeze(0) if len(tasks) == 1 else stack.index_select(0, index)

    def streams(stack: Any) -> Any:
        return None if stack is None else rows(layout.streams(stack, num_tasks, stacking))

    def spread(part: Tensor | None) -> Tensor | None:
        """Zero for the other tasks."""
        if part is None or index is None:
            return part
        return part.new_zeros(num_tasks, *part.shape[1:]).index_copy(0, index, part)

    def stacked(part: Tensor | None) -> Tensor | None:
        part = spread(part)
        return None if part is None else layout.stacked(part, stacking)

    dys = list(given.values())
    dy = torch.stack(dys) if len(dys) > 1 else dys[0].unsqueeze(0)
    own = Saved(
        saved.x if options.fan_out else streams(saved.x),
        rows(saved.weight),
        rows(saved.bias),
        streams(saved.residual),
        rows(saved.mean),
        rows(saved.var),
    )
    dx, dweight, dbias, dresidual = differentiable_twice(ctx.backend).backward(
        dy,
        own,
        ctx.training,
        needs._replace(dresidual=needs.dresidual and not plain),
        options._replace(num_tasks=len(tasks), stacking="task_axis"),
    )
    if plain and needs.dresidual:
        dresidual = dy
    return Gradients(dx if options.fan_out else stacked(dx), spread(dweight), spread(dbias), stacked(dresidual))


def of_a_stack(y: Tensor, options: Options) -> Sequence[Tensor]:
    """The streams of an output that is there already, as tensors of their own."""
    streams = layout.streams(y, options.num_tasks, options.stacking)
    return separate([streams.flatten(0, 1)], options.num_tasks)[0]


def apply(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer, differentiable; the inputs are those of :meth:`TaskBatchNorm.forward`."""
    outputs: tuple[Tensor, ...] = TaskStreams.apply(*inputs)
    return outputs


def apply_in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer in a graph that is traced: it has one backward pass, of all tasks."""
    y, mean, var = autograd.apply_in_graph(*inputs)
    *_, options, _, _ = inputs
    return *of_a_stack(y, options), mean, var
