"""The ``autograd.Function`` of mixed batches, and the derivatives of their operators in graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition import reference as all_references
from tsbn_kernels.definition.activations import NONE
from tsbn_kernels.definition.options import (
    Gradients,
    MixedBackend,
    Moments,
    Needs,
    Normalized,
    Options,
    Saved,
    TwiceBackend,
)
from tsbn_kernels.operator import direct, ops
from tsbn_kernels.operator.double_backward import Twice, by_definition
from tsbn_kernels.operator.mixed_ops import eager_operators, mixed, operators
from tsbn_kernels.operator.registry import library


def _normalize(compute: MixedBackend, *inputs: Any) -> Normalized:
    """Returns y and the statistics it was normalised by: those of the batch where none are given.

    Those of the batch update the ``running`` ones, where these are not None.
    """
    x, task_of_sample, weight, bias, residual, mean, var, running, options = inputs
    if running is not None:
        return compute.mixed_forward_tracked(x, task_of_sample, weight, bias, residual, running, options)
    if mean is None:
        return compute.mixed_forward_training(x, task_of_sample, weight, bias, residual, options)
    y = compute.mixed_forward_eval(Saved(x, weight, bias, residual, mean, var), task_of_sample, options)
    return Normalized(y, mean.detach(), var.detach())


def _keep(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, var: Tensor, backend: str | None) -> None:
    x, task_of_sample, weight, bias, residual, given_mean, _, _, options = inputs
    ctx.options, ctx.backend, ctx.training = options, backend, given_mean is None
    ctx.set_materialize_grads(False)
    if options.activation == NONE:  # its derivative does not depend on them
        bias = residual = None
    ctx.save_for_backward(task_of_sample, x, weight, bias, residual, mean, var)


class MixedTasks:
    """The passes over the samples of a mixed batch, for its second derivative; each sample is read as a task.

    Args:
        task_of_sample: the task of each sample, int64 ``[N]``.
        compute, of_samples: what computes them, and those of equal tasks.
    """

    def __init__(self, task_of_sample: Tensor, compute: MixedBackend, of_samples: TwiceBackend) -> None:
        self._index, self._compute, self._of_samples = task_of_sample, compute, of_samples

    def defined(self) -> MixedTasks:
        return MixedTasks(self._index, reference, all_references)

    def statistics(self, x: Tensor, options: Options) -> Moments:
        return reference.mixed_statistics(x, self._index, options.num_tasks)

    def values(self, x: Tensor, options: Options) -> Tensor:
        samples = reference.samples_of(self._index, options.num_tasks).double().unsqueeze(1)
        return samples * (x.numel() // max(1, x.shape[0] * x.shape[1]))

    def backward(self, dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        return self._compute.mixed_backward(dy, saved, self._index, training, needs, options)

    def forward_eval(self, saved: Saved, options: Options) -> Tensor:
        return self._compute.mixed_forward_eval(saved, self._index, options)

    def double_backward_sums(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
        mean, own = mean.index_select(0, self._index), options._replace(num_tasks=len(self._index))
        sums = self._of_samples.double_backward_sums(ddx, dy, x, mean, own)
        return sums.new_zeros(len(sums), options.num_tasks, x.shape[1]).index_add(1, self._index, sums)

    def double_backward(
        self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        mean, factors = mean.index_select(0, self._index), factors.index_select(1, self._index)
        own = options._replace(num_tasks=len(self._index))
        return self._of_samples.double_backward(ddx, dy, x, mean, factors, own)


def _gradients(ctx: Any, dy: Tensor | None, needs: Needs) -> Gradients:
    """The gradients that are needed; under ``create_graph=True`` they can be differentiated."""
    if dy is None or not any(needs):
        return Gradients()
    task_of_sample, *tensors = ctx.saved_tensors
    options: Options = ctx.options
    backend = direct.of_later_pass(ctx.backend, dy)
    tasks = MixedTasks(task_of_sample, operators(backend), ops.operators(backend))
    plain = options.activation == NONE and needs.dresidual
    wanted = needs._replace(dresidual=False) if plain else needs
    compute: MixedTasks | Twice = tasks
    if torch.is_grad_enabled():
        compute = tasks.defined() if by_definition() else Twice(tasks)
    found = compute.backward(dy, Saved._make(tensors), ctx.training, wanted, options)
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
    if by_definition():
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
        operands = (
            *(given[n] for n in ("x", "task_of_sample", "weight", "bias", "residual", "mean", "var")),
            None,
            options,
        )
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
