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
        ctx.save_for_forward(x, weight, mean, var)

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

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
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
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        """E models of T tasks are one model of E*T tasks: still one call."""
        models = info.batch_size

        def batched(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(models, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        given = (x, weight, bias, mean, var)
        x, *vectors = (batched(tensor, dim) for tensor, dim in zip(given, in_dims[:5], strict=True))  # type: ignore[assignment]
        joined = stacking
        if stacking == "sample_major":
            x, joined = x.unflatten(1, (-1, num_tasks)).transpose(1, 2), "task_axis"
        x = layout.supported(x.flatten(0, 1), joined)
        vectors = [None if vector is None else vector.flatten(0, 1) for vector in vectors]
        results = apply(x, *vectors, models * num_tasks, eps, gate, joined, backend)
        y, *statistics = (result.unflatten(0, (models, -1)) for result in results)
        if stacking == "sample_major":
            y = y.transpose(1, 2).flatten(1, 2)
        return (y, *statistics), (0, 0, 0)


class ForwardModeTaskBatchNorm(TaskBatchNorm):
    """The same with a forward-mode derivative, which ``torch.compile`` does not take in an ``autograd.Function``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Forward-mode derivative by the reference's formula.

        The Jacobian of y with respect to x is symmetric, so it maps a tangent of x as the backward maps dy; y is linear
        in the gate's value and the bias.
        """
        dx, dweight, dbias, *_ = tangents
        x, weight, mean, var = ctx.saved_tensors
        num_tasks, eps, gate, stacking = ctx.options
        tangent = None
        if dx is not None:
            options = num_tasks, eps, gate, stacking, ctx.training
            tangent, *_ = reference.backward(dx, x, weight, mean, var, *options, True, False, False)
        if dweight is not None or dbias is not None:
            slope = reference.gate_slope(weight, gate) * (torch.zeros_like(weight) if dweight is None else dweight)
            linear_options = num_tasks, eps, "identity", stacking
            if ctx.training:
                linear, *_ = reference.forward_training(x, slope, dbias, *linear_options)
            else:
                linear = reference.forward_eval(x, slope, dbias, mean, var, *linear_options)
            tangent = linear if tangent is None else tangent + linear
        return tangent, None, None


# The classes' own apply() binds its arguments to forward's signature on every call, which costs more than all else that
# it does. All of ours are given by position, so there is nothing to bind.
_POSITIONAL = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])
TaskBatchNorm.forward.__signature__ = _POSITIONAL  # type: ignore[attr-defined]


def apply(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the layer, differentiable; the inputs are those of :meth:`TaskBatchNorm.forward`."""
    function = TaskBatchNorm if torch.compiler.is_compiling() else ForwardModeTaskBatchNorm
    y, mean, var = function.apply(*inputs)
    return y, mean, var
