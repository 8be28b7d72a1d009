"""The ``autograd.Function`` that joins the forward and backward operators, and the derivatives of those in graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels import layout, recovery, reference
from tsbn_kernels.activations import activation_slope
from tsbn_kernels.ops import library, operators

_TENSORS, INPUTS = 6, 15  # of forward: those that may be tensors, and all
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def backward_operator(backend: str | None) -> Callable[..., tuple[Tensor, ...]]:
    """The fused one; the reference's formula, which can be differentiated again, under ``create_graph=True``."""
    return reference.backward if torch.is_grad_enabled() else operators(backend).backward


def gradients(ctx: Any, dy: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of what is ``needed`` of x, weight, bias and residual, from what ``setup_context`` saved."""
    if dy is None or not any(needed):
        return (None,) * 4
    activation = ctx.epilogue[0]
    compute = backward_operator(ctx.backend)
    if ctx.recover_input:
        grads = recovery.backward(compute, dy, ctx.saved_tensors, ctx.options, ctx.epilogue, ctx.training, needed)
    else:
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        flags = ctx.training, *needed[:3]
        grads = compute(
            dy, x, weight, mean, var, *ctx.options, *flags, bias, residual, *ctx.epilogue,
            needed[3] and activation != "none",
        )  # fmt: skip
    if activation == "none":
        grads = *grads[:3], dy  # of the residual
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


class TaskBatchNorm(torch.autograd.Function):
    """Saves x and the ``[T, C]`` vectors, and the residual where an activation follows; y, xhat and gates are not kept.

    The first derivative is the fused operator; with ``create_graph=True`` it is the reference's formula, which can be
    differentiated again.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        num_tasks: int,
        eps: float,
        gate: str,
        stacking: str,
        activation: str,
        slope: float,
        shared: bool,
        recover_input: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y and the statistics it was normalised by: the batch's where ``mean`` is None, else those given."""
        compute = operators(backend)
        options = num_tasks, eps, gate, stacking, residual, activation, slope, shared
        if mean is None or var is None:
            y, mean, var = compute.forward_training(x, weight, bias, *options)
            return y, mean, var
        return compute.forward_eval(x, weight, bias, mean, var, *options), mean.detach(), var.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, given_mean, _, *options, ctx.recover_input, ctx.backend = inputs
        y, mean, var = output
        ctx.options, ctx.epilogue = options[:4], options[4:]
        ctx.training = given_mean is None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        if ctx.epilogue[0] == "none":  # its derivative does not depend on them
            residual = None
            bias = bias if ctx.recover_input else None
        if ctx.recover_input:
            kept = recovery.keep(x, weight, bias, ctx.options, ctx.epilogue)
            ctx.save_for_backward(y, weight, bias, mean, var, *kept)
        else:
            ctx.save_for_backward(x, weight, bias, residual, mean, var)
            ctx.save_for_forward(x, weight, bias, residual, mean, var)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy, ctx.needs_input_grad[:4]), *(None,) * (INPUTS - 4)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        """E models of T tasks are one model of E*T tasks: still one call."""
        models = info.batch_size
        num_tasks, eps, gate, stacking, activation, slope, shared, *rest = inputs[_TENSORS:]

        def batched(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(models, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        x, weight, bias, residual, mean, var = map(batched, inputs[:_TENSORS], in_dims[:_TENSORS])
        assert x is not None
        if shared:
            x = x.unsqueeze(1).expand(-1, num_tasks, *(-1,) * (x.dim() - 1))
        else:
            x = layout.streams(x, num_tasks, stacking, dim=1)
        x = layout.supported(x.flatten(0, 1), "task_axis")
        if residual is not None:
            residual = layout.streams(residual, num_tasks, stacking, dim=1).flatten(0, 1)
            residual = layout.in_family(residual, layout.family(x, "task_axis"), "task_axis")
        vectors = [None if vector is None else vector.flatten(0, 1) for vector in (weight, bias, mean, var)]
        results = apply(
            x, *vectors[:2], residual, *vectors[2:], models * num_tasks, eps, gate, "task_axis", activation, slope,
            False, *rest,
        )  # fmt: skip
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
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        num_tasks, eps, gate, stacking = ctx.options
        activation, slope, shared = ctx.epilogue

        def normalized(weight: Tensor, bias: Tensor | None, gate: str, residual: Tensor | None) -> Tensor:
            m, v = reference.statistics(x, num_tasks, stacking, shared) if ctx.training else (mean, var)
            epilogue = residual, "none", 0.0, shared
            return reference.normalize(x, weight, bias, m, v, num_tasks, eps, gate, stacking, *epilogue)

        parts = []
        if dx is not None:
            order = "task_axis" if shared else stacking
            if shared:
                x_of_all, dx = (t.expand(num_tasks, *t.shape) for t in (x, dx))
            else:
                x_of_all = x
            options = num_tasks, eps, gate, order, ctx.training
            part, *_ = reference.backward(dx, x_of_all, weight, mean, var, *options, True, False, False)
            parts.append(layout.stacked(part, stacking) if shared else part)
        if dweight is not None or dbias is not None:
            change = reference.gate_slope(weight, gate) * (torch.zeros_like(weight) if dweight is None else dweight)
            parts.append(normalized(change, dbias, "identity", None))
        if dresidual is not None:
            parts.append(dresidual)
        if not parts:
            return None, None, None
        tangent = sum(parts[1:], parts[0])
        if activation != "none":
            tangent = tangent * activation_slope(normalized(weight, bias, gate, residual), activation, slope)
        return tangent, None, None


class EagerTaskBatchNorm(TaskBatchNorm):
    """The layer for eager code: one call without a signature that arguments are bound to, at half the cost on the host.

    ``torch.func`` takes no function whose forward is given the context.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = TaskBatchNorm.forward(*inputs)
        TaskBatchNorm.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context  # as a class that has none of its own


def apply(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the layer, differentiable; the inputs are those of :meth:`TaskBatchNorm.forward`."""
    transforms = torch._C._are_functorch_transforms_active()
    if not torch.compiler.is_compiling():
        if transforms and torch._C._functorch.peek_interpreter_stack().key() == _FUNCTIONALIZE:
            return _below_functionalize(*inputs)
        y, mean, var = (TaskBatchNorm if transforms else EagerTaskBatchNorm).apply(*inputs)
        return y, mean, var
    # A graph holds the operators themselves, which bring their derivatives along: an autograd.Function would be cut off
    # by torch.export, and Dynamo does not take one that has a forward mode. The transforms of torch.func do not know
    # these derivatives, but they know those of the reference.
    if transforms:
        inputs = *inputs[:-1], "reference"
    y, mean, var = TaskBatchNorm.forward(*inputs)
    return y, mean.detach(), var.detach()


def _below_functionalize(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the layer under ``torch.func.functionalize``, which takes no ``autograd.Function``."""
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
    y, mean, var = (torch._C._functorch._wrap_functional_tensor(output, level) for output in outputs)
    return y, mean, var


# ---- the derivatives of the operators --------------------------------------------------------------------------------


def _register(name: str, statistics: int) -> None:
    """Makes an operator differentiable; its arguments are x, weight, bias, this many statistics, and the options."""
    count, residual = 11 + statistics, 7 + statistics

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, *options = inputs
        given, options = options[:statistics] or (None, None), options[statistics:]
        results = (output, *given) if statistics else output
        ordered = x, weight, bias, options[4], *given, *options[:4], *options[5:], False, None
        TaskBatchNorm.setup_context(ctx, ordered, results)

    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        needed = *needed[:3], len(needed) > residual and needed[residual]  # defaults are left out
        dx, dweight, dbias, dresidual = gradients(ctx, dy, needed)
        result: list[Tensor | None] = [dx, dweight, dbias, *(None,) * (count - 3)]
        result[residual] = dresidual
        return tuple(result)

    torch.library.register_autograd(f"tsbn::{name}", backward, setup_context=setup_context, lib=library)


_register("forward_training", statistics=0)
_register("forward_eval", statistics=2)
