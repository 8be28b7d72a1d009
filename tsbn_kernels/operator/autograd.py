"""The ``autograd.Function`` that joins the forward and backward operators, and the derivatives of those in graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import NONE, activation_slope
from tsbn_kernels.definition.options import Backend, Gradients, Needs, Normalized, Options, Running, Saved
from tsbn_kernels.operator import direct
from tsbn_kernels.operator import recover_input as recovery
from tsbn_kernels.operator.double_backward import differentiable_twice
from tsbn_kernels.operator.ops import batch_norm, eager_operators, operators
from tsbn_kernels.operator.registry import library

_NEEDS = {flags: Needs(*flags) for flags in product((False, True), repeat=4)}
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def gradients(ctx: Any, dy: Tensor | None, needs: Needs) -> Gradients:
    """Gradients of what is needed of x, weight, bias and residual, from what ``setup_context`` saved."""
    if dy is None or not any(needs):
        return Gradients()
    options: Options = ctx.options
    plain = options.activation == NONE
    wanted = needs._replace(dresidual=False) if plain and needs.dresidual else needs
    compute = differentiable_twice(direct.of_later_pass(ctx.backend, dy))
    if ctx.recover_input:
        found = recovery.backward(compute, dy, recovery.Kept._make(ctx.saved_tensors), ctx.training, wanted, options)
    else:
        found = compute.backward(dy, Saved._make(ctx.saved_tensors), ctx.training, wanted, options)
    return found._replace(dresidual=dy) if plain and needs.dresidual else found


def _normalize(
    compute: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    running: Running | None,
    options: Options,
) -> Normalized:
    """Returns y and the statistics it was normalised by: the batch's where ``mean`` is None, else those given.

    Those of the batch update the ``running`` ones, where there are some.
    """
    if running is not None:
        return compute.forward_tracked(x, weight, bias, residual, running, options)
    if mean is None or var is None:
        return compute.forward_training(x, weight, bias, residual, options)
    y = compute.forward_eval(Saved(x, weight, bias, residual, mean, var), options)
    return Normalized(y, mean.detach(), var.detach())


def of_each_model(models: int, tensor: Any, dim: int | None) -> Any:
    """A tensor under ``vmap``, or None, the models first; ``dim`` is where they are, None: all share it."""
    if tensor is None:
        return None
    return tensor.expand(models, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class TaskBatchNorm(torch.autograd.Function):
    """Saves x and the ``[T, C]`` vectors, and the residual where an activation follows; y, xhat and gates are not kept.

    So are the first and the second derivative: see :mod:`tsbn_kernels.operator.double_backward`.
    """

    @staticmethod
    def forward(*inputs: Any) -> Normalized:
        """Takes what :func:`_normalize` does, whether to recover the input, and the name of a backend or None."""
        *operands, _, backend = inputs
        return _normalize(eager_operators(backend), *operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, given_mean, _, _, options, recover_input, backend = inputs
        y, mean, var = output
        ctx.options, ctx.recover_input, ctx.backend = options, recover_input, backend
        ctx.training = given_mean is None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        if options.activation == NONE:  # its derivative does not depend on them
            residual = None
            bias = bias if recover_input else None
        if recover_input:
            ctx.save_for_backward(y, weight, bias, mean, var, *recovery.keep(x, weight, bias, options))
        else:
            ctx.save_for_backward(x, weight, bias, residual, mean, var)
            ctx.save_for_forward(x, weight, bias, residual, mean, var)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, *_ = ctx.needs_input_grad
        return *gradients(ctx, dy, _NEEDS[x, weight, bias, residual]), None, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        """E models of T tasks are one model of E*T tasks: still one call."""
        *tensors, _, options, recover_input, backend = inputs
        models, num_tasks, stacking = info.batch_size, options.num_tasks, options.stacking

        def vector(tensor: Any) -> Any:
            return None if tensor is None else tensor.flatten(0, 1)

        x, weight, bias, residual, mean, var = map(partial(of_each_model, models), tensors, in_dims)
        if options.fan_out:
            x = x.unsqueeze(1).expand(-1, num_tasks, *(-1,) * (x.dim() - 1))
        else:
            x = layout.streams(x, num_tasks, stacking, dim=1)
        x = layout.supported(x.flatten(0, 1), "task_axis")
        if residual is not None:
            residual = layout.streams(residual, num_tasks, stacking, dim=1).flatten(0, 1)
            residual = layout.in_family(residual, layout.family(x, "task_axis"), "task_axis")
        of_all = options._replace(num_tasks=models * num_tasks, stacking="task_axis", fan_out=False)
        vectors = vector(weight), vector(bias), residual, vector(mean), vector(var)
        results = apply(x, *vectors, None, of_all, recover_input, backend)
        y, *statistics = (result.unflatten(0, (models, -1)) for result in results)
        return (layout.stacked(y, stacking, dim=1), *statistics), (0, 0, 0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Forward-mode derivative by the reference's formula.

        The Jacobian of the normalised x is symmetric, so it maps a tangent of x as the backward maps dy; what the
        activation is applied to is linear in the gate's value, the bias and the residual.
        """
        if ctx.recover_input:
            raise RuntimeError("recover_input=True has no forward-mode derivative: the input is not kept; set it False")
        dx, dweight, dbias, dresidual, *_ = tangents
        saved, options = Saved._make(ctx.saved_tensors), ctx.options
        x, weight, *_ = saved

        def normalized(weight: Tensor, bias: Tensor | None, gate: str, residual: Tensor | None) -> Tensor:
            m, v = reference.statistics(x, options) if ctx.training else (saved.mean, saved.var)
            linear = options._replace(gate=gate, activation=NONE)
            return reference.forward_eval(Saved(x, weight, bias, residual, m, v), linear)

        parts = []
        if dx is not None:
            plain, of_all = options._replace(activation=NONE), saved
            if options.fan_out:
                dx, x_of_all = (t.expand(options.num_tasks, *t.shape) for t in (dx, x))
                plain, of_all = plain._replace(stacking="task_axis", fan_out=False), saved._replace(x=x_of_all)
            found = reference.backward(dx, of_all, ctx.training, Needs(True, False, False, False), plain)
            assert found.dx is not None
            parts.append(layout.stacked(found.dx, options.stacking) if options.fan_out else found.dx)
        if dweight is not None or dbias is not None:
            slope = reference.gate_slope(weight, options.gate)
            change = slope * (torch.zeros_like(weight) if dweight is None else dweight)
            parts.append(normalized(change, dbias, "identity", None))
        if dresidual is not None:
            parts.append(dresidual)
        if not parts:
            return None, None, None
        tangent = sum(parts[1:], parts[0])
        if options.activation != NONE:
            z = normalized(weight, saved.bias, options.gate, saved.residual)
            tangent = tangent * activation_slope(z, options.activation, options.slope)
        return tangent, None, None


class EagerTaskBatchNorm(TaskBatchNorm):
    """The layer for eager code: one call without a signature that arguments are bound to, at half the cost on the host.

    ``torch.func`` takes no function whose forward is given the context.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Normalized:
        output = TaskBatchNorm.forward(*inputs)
        TaskBatchNorm.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context  # as a class that has none of its own


def apply(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the layer, differentiable; takes and returns what :meth:`TaskBatchNorm.forward` does."""
    outputs: tuple[Tensor, Tensor, Tensor]
    if torch._C._are_functorch_transforms_active():
        outputs = transformed(TaskBatchNorm, apply, inputs)
    else:
        outputs = EagerTaskBatchNorm.apply(*inputs)
    return outputs


def apply_in_graph(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the layer in a graph that is traced, where no input is recovered.

    The graph holds the operators themselves, which bring their derivatives along: an ``autograd.Function`` would be cut
    off by ``torch.export``, and Dynamo does not take one that has a forward mode. The transforms of ``torch.func`` do
    not know these derivatives, but they know those of the reference.
    """
    *operands, _, backend = inputs
    compute = operators("reference" if torch._C._are_functorch_transforms_active() else backend)
    y, mean, var = _normalize(compute, *operands)
    return y, mean.detach(), var.detach()


def transformed(function: type[torch.autograd.Function], apply: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Applies a function under the transforms of ``torch.func``; ``apply`` does so under those that are further out.

    ``functionalize`` takes no ``autograd.Function``: below it there is one.
    """
    if torch._C._functorch.peek_interpreter_stack().key() != _FUNCTIONALIZE:
        return function.apply(*inputs)
    api: Any = torch

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor) or not api._is_functional_tensor(value):
            return value
        api._sync(value)
        return api._from_functional_tensor(value)

    inputs = tuple(map(plain, inputs))
    with torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack():
        outputs = apply(*inputs)
    level: Any = torch._C._functorch.maybe_current_level()
    return tuple(torch._C._functorch._wrap_functional_tensor(output, level) for output in outputs)


# ---- the derivatives of the operators --------------------------------------------------------------------------------


def _register(name: str) -> None:
    """Makes an operator of the forward pass differentiable."""
    signature = batch_norm.signatures[name]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        given, options = signature.read(inputs)
        mean, var = given.pop("mean", None), given.pop("var", None)
        TaskBatchNorm.setup_context(
            ctx,
            (given["x"], given["weight"], given["bias"], given["residual"], mean, var, None, options, False, None),
            output if mean is None else (output, mean, var),
        )

    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = dict(zip(signature.names, ctx.needs_input_grad, strict=False))  # defaults are left out
        needs = Needs(needed["x"], needed["weight"], needed["bias"], needed.get("residual", False))
        dx, dweight, dbias, dresidual = gradients(ctx, dy, needs)
        found = {"x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}
        return tuple(found.get(argument) for argument in signature.names)

    torch.library.register_autograd(f"tsbn::{name}", backward, setup_context=setup_context, lib=library)


_register("forward_training")
_register("forward_eval")
