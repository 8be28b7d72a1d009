"""The ``autograd.Function`` of layer normalisation of mixed batches, and the derivative of its operator in graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition.mixed_batch_norm import task_sums
from tsbn_kernels.definition.mixed_layer_norm import Gathered, vectors_of_samples
from tsbn_kernels.definition.options import LayerGradients, LayerNeeds, LayerOptions, LayerSaved, MixedLayerBackend
from tsbn_kernels.operator import direct, layer_autograd, layer_ops
from tsbn_kernels.operator.double_backward import by_definition
from tsbn_kernels.operator.layer_autograd import present
from tsbn_kernels.operator.mixed_layer_ops import eager_operators, mixed_layer_norm, operators
from tsbn_kernels.operator.registry import library


class _Twice:
    """The operators of equal tasks with a backward pass that can be differentiated again.

    Args:
        backend: the name of the one that computes them, or None.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        compute = layer_ops.operators(backend)
        self.layer_norm, self.layer_norm_double_backward = compute.layer_norm, compute.layer_norm_double_backward

    def layer_norm_backward(
        self, dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
    ) -> LayerGradients:
        return layer_autograd.backward(saved, dy, ds, needs, options, self._backend)


def _keep(ctx: Any, saved: LayerSaved, task_of_sample: Tensor, options: LayerOptions, backend: str | None) -> None:
    ctx.options, ctx.backend = options, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(task_of_sample, *saved)


def _gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None, *needed: bool) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, those that are ``needed``.

    Under ``create_graph=True`` each sample is a task of its own, and the sums over samples can be differentiated.
    """
    x, weight, bias, residual = needed
    if dy is None:  # of x + residual alone
        return ds if x else None, None, None, ds if residual else None
    task_of_sample, *tensors = ctx.saved_tensors
    twice, backend = torch.is_grad_enabled(), direct.of_later_pass(ctx.backend, dy, ds)
    compute: MixedLayerBackend = Gathered(_Twice(backend), task_sums) if twice else operators(backend)
    needs = LayerNeeds(x or residual, weight, bias)
    dx, dweight, dbias = compute.mixed_layer_norm_backward(
        dy, ds, LayerSaved._make(tensors), task_of_sample, needs, ctx.options
    )
    return dx if x else None, dweight, dbias, dx if residual else None


class MixedTaskLayerNorm(torch.autograd.Function):
    """Saves x, or ``x + residual``, the index, the weight and the statistics of the rows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Takes x, the index, weight, bias, residual, options and the name of a backend or None; returns y (and s)."""
        x, task_of_sample, weight, _, _, options, backend = inputs
        y, s, mean, rstd = eager_operators(backend).mixed_layer_norm(*inputs[:-1])
        ctx.adds = s is not None
        _keep(ctx, LayerSaved(x if s is None else s, weight, mean, rstd), task_of_sample, options, backend)
        return (y,) if s is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        x, _, *needed, _, _ = ctx.needs_input_grad
        dx, *gradients = _gradients(ctx, dy, more[0] if ctx.adds else None, x, *needed)
        return dx, None, *gradients, None, None


def apply(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer, differentiable; takes what :meth:`MixedTaskLayerNorm.forward` does, and returns that or more.

    The transforms of ``torch.func`` and forward-mode derivatives go through the layer of equal tasks.
    """
    if not by_definition():
        outputs: tuple[Tensor, ...] = MixedTaskLayerNorm.apply(*inputs)
        return outputs
    x, task_of_sample, weight, bias, residual, options, backend = inputs
    if x.shape[0] > 0:
        weight, bias = vectors_of_samples(x, task_of_sample, weight, bias)
        options = options._replace(num_tasks=x.shape[0])
    return layer_autograd.apply(x, weight, bias, residual, options, backend)


def apply_in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer in a graph that is traced: see :func:`tsbn_kernels.operator.autograd.apply_in_graph`."""
    *operands, backend = inputs
    compute = operators("reference" if torch._C._are_functorch_transforms_active() else backend)
    return present(compute.mixed_layer_norm(*operands))


# ---- the derivative of the operator ----------------------------------------------------------------------------------

_signature = mixed_layer_norm.signatures["mixed_layer_norm"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, options = _signature.read(inputs)
    _, s, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.adds = given["residual"] is not None
    saved = LayerSaved(s if ctx.adds else given["x"], given["weight"], None if options.rms else mean, rstd)
    _keep(ctx, saved, given["task_of_sample"], options, None)


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, _index, *needed = ctx.needs_input_grad[:5]
    dx, *gradients = _gradients(ctx, dy, ds if ctx.adds else None, x, *needed)
    return dx, None, *gradients, *(None,) * (len(_signature.names) - 5)


torch.library.register_autograd("tsbn::mixed_layer_norm", _backward, setup_context=_setup_context, lib=library)
