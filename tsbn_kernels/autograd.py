"""The ``autograd.Function`` that joins the forward and backward operators."""

from __future__ import annotations

import inspect
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
    def forward(
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
        compute = operators(backend)
        if mean is None or var is None:
            y, mean, var = compute.forward_training(x, weight, bias, num_tasks, eps, gate, stacking)
            return y, mean, var
        y = compute.forward_eval(x, weight, bias, mean, var, num_tasks, eps, gate, stacking)
        return y, mean.detach(), var.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, given_mean, _, *ctx.options, ctx.backend = inputs
        _, mean, var = output
        ctx.training = given_mean is None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, mean, var)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if dy is None or not any(needed):
            return (None,) * 10
        x, weight, mean, var = ctx.saved_tensors
        *_, stacking = ctx.options
        compute = operators(ctx.backend).backward
        if torch.is_grad_enabled():
            compute = reference.backward
        else:
            dy = layout.gradient_like(dy, x, stacking)
        grads = compute(dy, x, weight, mean, var, *ctx.options, ctx.training, *needed)
        return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 7


# apply() binds its arguments to forward's signature on every call, which costs more than all else that it does. All of
# ours are given by position, so there is nothing to bind.
_POSITIONAL = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])
TaskBatchNorm.forward.__signature__ = _POSITIONAL  # type: ignore[attr-defined]
