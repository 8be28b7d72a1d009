"""The ``autograd.Function`` of mixed batches, and the derivatives of their operators in graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.activations import NONE
from tsbn_kernels.definition.options import Gradients, MixedBackend, Needs, Normalized, Options, Saved
from tsbn_kernels.operator.mixed_ops import eager_operators, mixed, operators
from tsbn_kernels.operator.registry import library


def _normalize(compute: MixedBackend, *inputs: Any) -> Normalized:
    """Returns y and the statistics it was normalised by: those of the batch where none are given."""
    x, task_of_sample, weight, bias, residual, mean, var, options = inputs
    if mean is None:
        return compute.mixed_forward_training(x, task_of_sample, weight, bias, residual, options)
    y = compute.mixed_forward_eval(Saved(x, weight, bias, residual, mean, var), task_of_sample, options)
    return Normalized(y, mean.detach(), var.detach())


def _keep(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, var: Tensor, backend: str | None) -> None:
    x, task_of_sample, weight, bias, residual, given_mean, _, options = inputs
    ctx.options, ctx.backend, ctx.training = options, backend, given_mean is None
    ctx.set_materialize_grads(False)
    if options.activation == NONE:  # its derivative does not depend on them
        bias = residual = None
    ctx.save_for_backward(task_of_sample, x, weight, bias, residual, mean, var)


def _gradients(ctx: Any, dy: Tensor | None, needs: Needs) -> Gradients:
    """The gradients that are needed; under ``create_graph=True`` the reference's, which can be differentiated."""
    if dy is None or not any(needs):
        return Gradients()
    task_of_sample, *tensors = ctx.saved_tensors
    options: Options = ctx.options
    compute = reference if torch.is_grad_enabled() else operators(ctx.backend)
    plain = options.activation == NONE and needs.dresidual
    wanted = needs._replace(dresidual=False) if plain else needs
    found = compute.mixed_backward(dy, Saved._make(tensors), task_of_sample, ctx.training, wanted, options)
    return found._replace(dresidual=dy) if plain else found


class MixedTaskBatchNorm(torch.autograd.Function):
    """Saves x, the index and the ``[T, C]`` vectors, and the residual where an activation follows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Normalized:
        """Takes what :func:`_normalize` does, and the name of a backend or None."""
        *operands, backend = inputs
        found = _normalize(eager_operators(backend), *operands)
        ctx.mark_non_differentiable(found.mean, found.var)
        _keep(ctx, tuple(operands), found.mean, found.var, backend)
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, _index, weight, bias, residual, *rest = ctx.needs_input_grad
        dx, *more = _gradients(ctx, dy, Needs(x, weight, bias, residual))
        return dx, None, *more, *(None for _ in rest)


def apply(*inputs: Any) -> Normalized:
    """Applies the layer, differentiable; takes what :meth:`MixedTaskBatchNorm.forward` does.

    The transforms of ``torch.func`` and forward-mode derivatives go through the reference's formulas.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _normalize(reference, *inputs[:-1])
    return Normalized(*MixedTaskBatchNorm.apply(*inputs))


def apply_in_graph(*inputs: Any) -> Normalized:
    """Applies the layer in a graph that is traced: see :func:`tsbn_kernels.operator.autograd.apply_in_graph`."""
    *operands, backend = inputs
    found = _normalize(operators("reference" if torch._C._are_functorch_transforms_active() else backend), *operands)
    return Normalized(found.y, found.mean.detach(), found.var.detach())


# ---- the derivatives of the operators --------------------------------------------------------------------------------


def _register(name: str) -> None:
    """Makes an operator of the forward pass differentiable."""
    signature = mixed.signatures[name]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        given, options = signature.read(inputs)
        given = {"mean": None, "var": None, **given}
        operands = (*(given[n] for n in ("x", "task_of_sample", "weight", "bias", "residual", "mean", "var")), options)
        mean, var = output[1:] if given["mean"] is None else (given["mean"], given["var"])
        _keep(ctx, operands, mean, var, None)

    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = dict(zip(signature.names, ctx.needs_input_grad, strict=False))  # defaults are left out
        names = "x", "weight", "bias", "residual"
        found = dict(zip(names, _gradients(ctx, dy, Needs(*(needed[name] for name in names))), strict=True))
        return tuple(found.get(argument) for argument in signature.names)

    torch.library.register_autograd(f"tsbn::{name}", backward, setup_context=setup_context, lib=library)


_register("mixed_forward_training")
_register("mixed_forward_eval")
