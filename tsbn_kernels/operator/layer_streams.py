"""Layer normalisation with an output for each task: a backward pass costs the tasks that it comes from, not all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved
from tsbn_kernels.operator import direct, layer_autograd
from tsbn_kernels.operator.autograd_streams import Chosen, TaskStreams, of_a_stack
from tsbn_kernels.operator.layer_autograd import TaskLayerNorm
from tsbn_kernels.operator.separate import aliases


class TaskLayerStreams(TaskLayerNorm):
    """Forward as :class:`TaskLayerNorm`, without a residual; y comes as T tensors ``[N, *]`` of one memory."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Returns the T streams and the statistics."""
        y, *statistics = TaskLayerNorm.forward(*inputs)
        *_, options, _ = inputs
        return *aliases(layout.streams(y, options.num_tasks, options.stacking)), *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, options, _ = inputs
        TaskLayerNorm.setup_context(ctx, inputs, (output[0], *output[options.num_tasks :]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        options: LayerOptions = ctx.options
        given = {task: dy for task, dy in enumerate(gradients[: options.num_tasks]) if dy is not None}
        needs = LayerNeeds(*ctx.needs_input_grad[:3])
        nothing = (None,) * 6
        if not given or not any(needs):
            return nothing
        saved = LayerSaved._make(ctx.saved_tensors)
        chosen = Chosen(list(given), options.num_tasks, saved.s)
        sizes = reference.rows_of(saved.s, saved.weight)

        def of_rows(statistic: Any) -> Any:
            if statistic is None or options.fan_out:
                return statistic
            return chosen.streams(statistic.view(sizes), options.stacking).flatten()

        own = LayerSaved(
            saved.s if options.fan_out else chosen.streams(saved.s, options.stacking),
            chosen.rows(saved.weight),
            of_rows(saved.mean),
            of_rows(saved.rstd),
        )
        of_chosen = options._replace(num_tasks=len(given), stacking="task_axis")
        dy = chosen.stack(list(given.values()))
        backend = direct.of_later_pass(ctx.backend, dy)
        dx, dweight, dbias = layer_autograd.backward(own, dy, None, needs, of_chosen, backend)
        dx = dx if options.fan_out else chosen.stacked(dx, options.stacking)
        return dx, chosen.spread(dweight), chosen.spread(dbias), *nothing[3:]

    vmap = staticmethod(TaskStreams.vmap)  # type: ignore[assignment]


apply: Callable[..., tuple[Tensor, ...]] = TaskLayerStreams.apply


def apply_in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer in a graph that is traced: it has one backward pass, of all tasks."""
    y, *statistics = layer_autograd.apply_in_graph(*inputs)
    *_, options, _ = inputs
    return *of_a_stack(y, options), *statistics
