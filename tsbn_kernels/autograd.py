"""The ``autograd.Function`` that joins the forward and backward operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels import layout, reference
from tsbn_kernels.ops import operators


class TaskBatchNorm(torch.autograd.Function):
    """Saves x and the ``[T, C]`` vectors; y, xhat and the gates are not kept.

    The first derivative is the fused operator; with ``create_graph=True`` it is the reference's formula, which can be
    differentiated again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        num_tasks: int,
        eps: float,
        gate: str,
        stacking: str,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y and the statistics it was normalised by: the batch's where ``mean`` is None, else those given."""
        training = mean is None
        if mean is None or var is None:
            y, mean, var = operators(backend).forward_training(x, weight, bias, num_tasks, eps, gate, stacking)
        else:
            y = operators(backend).forward_eval(x, weight, bias, mean, var, num_tasks, eps, gate, stacking)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.options = num_tasks, eps, gate, stacking, training
        ctx.backend = backend
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[:3]
        if dy is None or not any(needed):
            return (None,) * 10
        x, weight, mean, var = ctx.saved_tensors
        num_tasks, eps, gate, stacking, training = ctx.options
        compute = operators(ctx.backend).backward
        if torch.is_grad_enabled():
            compute = reference.backward
        else:
            dy = layout.gradient_like(dy, x, stacking)
        grads = compute(dy, x, weight, mean, var, num_tasks, eps, gate, stacking, training, *needed)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 7
