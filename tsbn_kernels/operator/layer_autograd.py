"""The ``autograd.Function`` of layer normalisation, and the derivative of its operator in graphs."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import gate_slope, gate_values
from tsbn_kernels.definition.options import LayerGradients, LayerNeeds, LayerNormalized, LayerOptions, LayerSaved
from tsbn_kernels.operator import direct, layer_double_backward
from tsbn_kernels.operator.autograd import of_each_model, transformed
from tsbn_kernels.operator.double_backward import by_definition
from tsbn_kernels.operator.layer_double_backward import differentiable
from tsbn_kernels.operator.layer_ops import eager_operators, layer_norm, operators
from tsbn_kernels.operator.registry import library

_NEEDS = {flags: LayerNeeds(*flags) for flags in product((False, True), repeat=3)}


def present(found: LayerNormalized) -> tuple[Tensor, ...]:
    """What there is of a call's results."""
    return tuple([tensor for tensor in found if tensor is not None])


def keep(ctx: Any, saved: LayerSaved, options: LayerOptions, backend: str | None) -> None:
    """Saves what the backward pass reads."""
    ctx.options, ctx.backend = options, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)


def backward(
    saved: LayerSaved, dy: Tensor, ds: Tensor | None, needs: LayerNeeds, options: LayerOptions, backend: str | None
) -> LayerGradients:
    """The gradients that are needed; under ``create_graph=True`` they can be differentiated."""
    compute = operators(backend)
    if not torch.is_grad_enabled():
        return compute.layer_norm_backward(dy, ds, saved, needs, options)
    if by_definition():
        saved = differentiable(saved.s, saved.weight, options)
        return reference.layer_norm_backward(dy, ds, saved, needs, options)
    return layer_double_backward.backward(compute, dy, ds, saved, needs, options)


def gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None, *needed: bool) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, those that are ``needed``, from what :func:`keep` saved."""
    x, weight, bias, residual = needed
    if dy is None:  # of x + residual alone
        return ds if x else None, None, None, ds if residual else None
    needs = _NEEDS[x or residual, weight, bias]
    saved, backend = LayerSaved._make(ctx.saved_tensors), direct.of_later_pass(ctx.backend, dy, ds)
    dx, dweight, dbias = backward(saved, dy, ds, needs, ctx.options, backend)
    return dx if x else None, dweight, dbias, dx if residual else None


class TaskLayerNorm(torch.autograd.Function):
    """Saves x, or ``x + residual``, the weight and the statistics of the rows; y and xhat are not kept.

    The first derivative is the fused operator; the second: :mod:`tsbn_kernels.operator.layer_double_backward`.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions, backend: Any
    ) -> tuple[Tensor, ...]:
        """Takes the name of a backend, or None; returns what there is of ``LayerNormalized``."""
        return present(eager_operators(backend).layer_norm(x, weight, bias, residual, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, residual, options, backend = inputs
        s = x if residual is None else output[1]
        statistics = output[1:] if residual is None else output[2:]
        ctx.mark_non_differentiable(*statistics)
        mean = None if options.rms else statistics[0]
        keep(ctx, LayerSaved(s, weight, mean, statistics[-1]), options, backend)
        ctx.save_for_forward(s, weight)
        ctx.adds, ctx.statistics = residual is not None, len(statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        ds = more[0] if ctx.adds else None
        return *gradients(ctx, dy, ds, *ctx.needs_input_grad[:4]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """E models of T tasks are one model of E*T tasks: still one call."""
        *tensors, options, backend = inputs
        models, num_tasks, stacking, fan_out = info.batch_size, options.num_tasks, options.stacking, options.fan_out

        def streams(tensor: Any) -> Any:
            if tensor is None:
                return None
            if fan_out:
                tensor = tensor.unsqueeze(1).expand(-1, num_tasks, *(-1,) * (tensor.dim() - 1))
            else:
                tensor = layout.streams(tensor, num_tasks, stacking, dim=1)
            return tensor.flatten(0, 1).contiguous()

        def of_input(streams: Tensor) -> Tensor:
            streams = streams.unflatten(0, (models, num_tasks))
            return streams[:, 0] if fan_out else layout.stacked(streams, stacking, dim=1)

        x, weight, bias, residual = map(partial(of_each_model, models), tensors, in_dims)
        vectors = weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
        of_all = options._replace(num_tasks=models * num_tasks, stacking="task_axis", fan_out=False)
        x = streams(x)
        y, *more = apply_transformed(x, *vectors, streams(residual), of_all, backend)
        y = layout.stacked(y.unflatten(0, (models, num_tasks)), stacking, dim=1)
        sizes = reference.rows_of(x, vectors[0])
        outputs = [of_input(s) for s in more[: residual is not None]]
        statistics = [of_input(vector.view(sizes)).flatten(1) for vector in more[residual is not None :]]
        return (y, *outputs, *statistics), (0,) * (1 + len(more))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Forward-mode derivative by the reference's formula.

        The Jacobian of xhat is symmetric, so it maps a tangent of ``x + residual`` as the backward maps dy; y is linear
        in the gate's value and the bias.
        """
        dx, dweight, dbias, dresidual, *_ = tangents
        (s, weight, *_), options = ctx.saved_tensors, ctx.options
        saved = differentiable(s, weight, options)
        dtype, ds = saved.rstd.dtype, dx
        if dresidual is not None:
            ds = dresidual if dx is None else dx + dresidual
        parts = []
        if ds is not None:
            gates = gate_values(weight.to(dtype), options.gate)
            parts.append(reference.affine(reference.through_statistics(ds.to(dtype), saved), gates, None, options))
        if dweight is not None or dbias is not None:
            change = torch.zeros_like(weight) if dweight is None else dweight
            change = gate_slope(weight.to(dtype), options.gate) * change.to(dtype)
            offset = None if dbias is None else dbias.to(dtype)
            parts.append(reference.affine(reference.normalized(saved), change, offset, options))
        tangent = sum(parts[1:], parts[0]).to(s.dtype) if parts else None
        of_sum = (torch.zeros_like(s) if ds is None else ds,) if ctx.adds else ()  # None would be an error of PyTorch's
        return tangent, *of_sum, *(None,) * ctx.statistics


class EagerTaskLayerNorm(TaskLayerNorm):
    """The layer for eager code: one call without a signature that arguments are bound to, at half the cost on the host.

    It returns y, and the sum with a residual: what is saved need not be returned. ``torch.func`` takes no function
    whose forward is given the context, and saves inputs and outputs alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, options: LayerOptions, backend: Any
    ) -> tuple[Tensor, ...]:
        y, s, mean, rstd = eager_operators(backend).layer_norm(x, weight, bias, residual, options)
        ctx.adds, ctx.statistics = s is not None, 0
        read = x if s is None else s
        keep(ctx, LayerSaved(read, weight, mean, rstd), options, backend)
        ctx.save_for_forward(read, weight)
        return (y,) if s is None else (y, s)

    setup_context = torch.autograd.Function.setup_context  # as a class that has none of its own


def apply(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer, differentiable; takes what :meth:`TaskLayerNorm.forward` does, and returns that or less."""
    outputs: tuple[Tensor, ...]
    if torch._C._are_functorch_transforms_active():
        outputs = apply_transformed(*inputs)
    else:
        outputs = EagerTaskLayerNorm.apply(*inputs)
    return outputs


def apply_transformed(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer under the transforms of ``torch.func``, or below those; returns all of it."""
    outputs: tuple[Tensor, ...]
    if torch._C._are_functorch_transforms_active():
        outputs = transformed(TaskLayerNorm, apply_transformed, inputs)
    else:
        outputs = TaskLayerNorm.apply(*inputs)
    return outputs


def apply_in_graph(*inputs: Any) -> tuple[Tensor, ...]:
    """Applies the layer in a graph that is traced: see :func:`tsbn_kernels.operator.autograd.apply_in_graph`."""
    *operands, backend = inputs
    compute = operators("reference" if torch._C._are_functorch_transforms_active() else backend)
    return present(compute.layer_norm(*operands))


# ---- the derivative of the operator ----------------------------------------------------------------------------------

_signature = layer_norm.signatures["layer_norm"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, options = _signature.read(inputs)
    _, s, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.adds = given["residual"] is not None
    s = s if ctx.adds else given["x"]
    keep(ctx, LayerSaved(s, given["weight"], None if options.rms else mean, rstd), options, None)


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found = gradients(ctx, dy, ds if ctx.adds else None, *ctx.needs_input_grad[:4])
    return *found, *(None,) * (len(_signature.names) - len(found))


torch.library.register_autograd("tsbn::layer_norm", _backward, setup_context=_setup_context, lib=library)
