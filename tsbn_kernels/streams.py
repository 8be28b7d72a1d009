"""The layer with an output for each task: a backward pass costs the tasks whose outputs it comes from, not all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels import autograd, capture, layout
from tsbn_kernels.autograd import INPUTS, TaskBatchNorm, backward_operator
from tsbn_kernels.separate import aliases, separate


class TaskStreams(TaskBatchNorm):
    """Forward as :class:`TaskBatchNorm`, all tasks in one call; y comes as T tensors ``[N, C, *]`` of one memory."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Returns the T streams and the statistics."""
        y, mean, var = TaskBatchNorm.forward(*inputs)
        num_tasks, _, _, stacking = inputs[6:10]
        return *aliases(layout.streams(y, num_tasks, stacking)), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        TaskBatchNorm.setup_context(ctx, inputs, (output[0], *output[-2:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        num_tasks, eps, gate, stacking = ctx.options
        activation, slope, shared = ctx.epilogue
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        tasks = [task for task in range(num_tasks) if gradients[task] is not None]
        if not tasks or not any(needed):
            return (None,) * INPUTS
        index = None if len(tasks) == num_tasks else capture.task_indices(tasks, x)

        def rows(stack: Tensor | None) -> Tensor | None:
            """The rows of the tasks that a gradient came for; one task's, and all, are a view."""
            if stack is None or index is None:
                return stack
            return stack[tasks[0]].unsqueeze(0) if len(tasks) == 1 else stack.index_select(0, index)

        def streams(stack: Tensor | None) -> Tensor | None:
            return None if stack is None else rows(layout.streams(stack, num_tasks, stacking))

        def spread(part: Tensor) -> Tensor:
            """Zero for the other tasks."""
            if index is None:
                return part
            return part.new_zeros(num_tasks, *part.shape[1:]).index_copy(0, index, part)

        present: list[Any] = [gradients[task] for task in tasks]
        dy = torch.stack(present) if len(present) > 1 else present[0].unsqueeze(0)
        own: Any = x if shared else streams(x)
        plain = activation == "none"
        dx, dweight, dbias, dresidual = backward_operator(ctx.backend)(
            dy, own, rows(weight), rows(mean), rows(var), len(tasks), eps, gate, "task_axis", ctx.training, *needed[:3],
            rows(bias), streams(residual), activation, slope, shared, needed[3] and not plain,
        )  # fmt: skip
        return (
            (dx if shared else layout.stacked(spread(dx), stacking)) if needed[0] else None,
            spread(dweight) if needed[1] else None,
            spread(dbias) if needed[2] else None,
            layout.stacked(spread(dy if plain else dresidual), stacking) if needed[3] else None,
            *(None,) * (INPUTS - 4),
        )

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError("streams of the tasks do not work under vmap; call the layer itself, and split its result")


def of_a_stack(y: Tensor, num_tasks: int, stacking: str) -> Sequence[Tensor]:
    """The streams of an output that is there already, as tensors of their own."""
    return separate([layout.streams(y, num_tasks, stacking).flatten(0, 1)], num_tasks)[0]


def apply(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer, differentiable; the inputs are those of :meth:`TaskBatchNorm.forward`."""
    if torch.compiler.is_compiling():  # a graph has one backward pass, of all tasks
        y, mean, var = autograd.apply(*inputs)
        num_tasks, _, _, stacking = inputs[6:10]
        return *of_a_stack(y, num_tasks, stacking), mean, var
    outputs: tuple[Tensor, ...] = TaskStreams.apply(*inputs)
    return outputs
