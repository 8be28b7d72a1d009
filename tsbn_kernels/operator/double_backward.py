"""The second derivative of batch normalisation: the backward pass as a function of autograd's, and its own backward.

Under ``create_graph=True`` the backward pass is the fused one, and what it read is kept. Its derivative is computed by
the kernels of :mod:`tsbn_kernels.definition.double_backward`. These know no activation: what comes before one is had
from dy, and ddy from what is found for it, as the gradient of a residual. Beside the results there are at most three
tensors of x's size at a time. Further derivatives are those of the definition.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tsbn_kernels.definition import batch_norm, layout, reference
from tsbn_kernels.definition.activations import EPILOGUES, NONE, activation_slope
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.double_backward import factors_of
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Options, Saved, TwiceBackend
from tsbn_kernels.operator.ops import operators

_CHUNK = 1 << 16  # values whose curvature is computed at once: what autograd keeps of them stays in a cache
_DRESIDUAL = Needs(False, False, False, True)


class Tasks(Protocol):
    """How the samples are those of tasks, and who computes the passes over them; see :class:`Backend`."""

    def defined(self) -> Tasks:
        """Gives tasks that the definition computes, which is differentiable."""

    def statistics(self, x: Tensor, options: Options) -> Moments:
        """Computes mean and variance of the tasks, differentiable."""

    def values(self, x: Tensor, options: Options) -> Tensor:
        """How many values a task has in a channel, float64, broadcasts to ``[T, C]``."""

    def backward(self, dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        """Computes the gradients that are needed."""

    def forward_eval(self, saved: Saved, options: Options) -> Tensor:
        """Normalises by given statistics."""

    def double_backward_sums(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
        """Computes the sums of a second derivative."""

    def double_backward(
        self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Computes the gradients of dy and x."""


class EqualTasks:
    """Streams of one size.

    Args:
        compute: what computes a pass.
    """

    def __init__(self, compute: TwiceBackend) -> None:
        self.forward_eval, self.backward = compute.forward_eval, compute.backward
        self.double_backward_sums, self.double_backward = compute.double_backward_sums, compute.double_backward

    def defined(self) -> EqualTasks:
        return EqualTasks(reference)

    def statistics(self, x: Tensor, options: Options) -> Moments:
        return batch_norm.statistics(x, options)

    def values(self, x: Tensor, options: Options) -> Tensor:
        return torch.full((), batch_norm.values_of(x, options), dtype=torch.float64, device=x.device)


class Twice:
    """The backward pass, differentiable; otherwise as that of a backend.

    Args:
        tasks: what computes it.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def backward(self, dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        if not any(needs):
            return Gradients()
        return Gradients._make(TaskBatchNormBackward.apply(dy, *saved, self._tasks, training, needs, options))


def by_definition() -> bool:
    """Whether derivatives are asked for that autograd's functions do not have: those of torch.func, forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_twice(backend: str | None) -> Any:
    """What has the backward pass of a backend; under ``create_graph=True`` it can be differentiated again."""
    if not torch.is_grad_enabled():
        return operators(backend)
    return reference if by_definition() else Twice(EqualTasks(operators(backend)))


class TaskBatchNormBackward(torch.autograd.Function):
    """The backward pass. Saves what it reads."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *inputs: Any) -> Gradients:
        """Takes dy, the fields of ``Saved``, tasks, and what else :meth:`Twice.backward` does."""
        *saved, ctx.tasks, ctx.training, needs, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, *saved)
        found: Gradients = ctx.tasks.backward(dy, Saved._make(saved), ctx.training, needs, ctx.options)
        return found

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *saved = ctx.saved_tensors
        call = dy, Saved._make(saved), ctx.training, ctx.options
        dtwice, gradients = double_backward(ctx.tasks, Gradients._make(given), *call)
        return dtwice, *gradients, *(None,) * 6


def double_backward(
    tasks: Tasks, given: Gradients, dy: Tensor, saved: Saved, training: bool, options: Options
) -> tuple[Tensor | None, Gradients]:
    """The gradient of dy, and those of x, weight, bias and residual; ``given`` are those of what a backward returns."""
    if options.fan_out:
        return _fanned_out(tasks, given, dy, saved, training, options)
    if torch.is_grad_enabled():
        tasks = tasks.defined()
        if training:
            mean, var = tasks.statistics(saved.x, options)
            saved = saved._replace(mean=mean, var=var)
    x, weight, bias, residual, mean, var = saved
    plain = options._replace(activation=NONE, slope=0.0)
    no_activation = options.activation == NONE
    dz = dy if no_activation else tasks.backward(dy, saved, training, _DRESIDUAL, options).dresidual
    ddx = torch.zeros_like(x) if given.dx is None else given.dx
    assert dz is not None
    sums = tasks.double_backward_sums(ddx, dz, x, mean, plain)
    factors, dweight = factors_of(
        sums, tasks.values(x, options), weight, var, given.dweight, given.dbias, training, plain
    )
    ddz, dx = tasks.double_backward(ddx, dz, x, mean, factors.to(accumulate_dtype(x.dtype)), plain)
    del dz, ddx
    if no_activation:
        return ddz, Gradients(dx, dweight)
    if given.dresidual is not None:
        ddz = ddz + given.dresidual
    ddy = tasks.backward(ddz, saved, training, _DRESIDUAL, options).dresidual
    row = EPILOGUES[options.activation]
    if row.selects or row.homogeneous:  # piecewise linear
        return ddy, Gradients(dx, dweight)
    bent = through_curvature(ddz, dy, tasks.forward_eval(saved, plain), options)
    del ddz
    needs = Needs(True, True, bias is not None, False)
    more_dx, more_dweight, dbias, _ = tasks.backward(bent, saved, training, needs, plain)
    assert more_dx is not None
    assert more_dweight is not None
    return ddy, Gradients(dx + more_dx, dweight + more_dweight, dbias, None if residual is None else bent)


def _fanned_out(
    tasks: Tasks, given: Gradients, dy: Tensor, saved: Saved, training: bool, options: Options
) -> tuple[Tensor | None, Gradients]:
    """An input that all tasks share is read as a stream of each, and its gradients are added up."""
    num_tasks, stacking = options.num_tasks, options.stacking

    def of_all(shared: Any) -> Any:
        return None if shared is None else shared.expand(num_tasks, *shared.shape)

    def streams(stacked: Any) -> Any:
        return None if stacked is None else layout.streams(stacked, num_tasks, stacking)

    own = options._replace(stacking="task_axis", fan_out=False)
    given = given._replace(dx=of_all(given.dx), dresidual=streams(given.dresidual))
    saved = saved._replace(x=of_all(saved.x), residual=streams(saved.residual))
    ddy, found = double_backward(tasks, given, streams(dy), saved, training, own)
    assert ddy is not None
    assert found.dx is not None
    dresidual = None if found.dresidual is None else layout.stacked(found.dresidual, stacking)
    return layout.stacked(ddy, stacking), found._replace(dx=found.dx.sum(0), dresidual=dresidual)


def through_curvature(ddz: Tensor, dy: Tensor, z: Tensor, options: Options) -> Tensor:
    """Computes ``ddz * dy * act''(z)``: in the place of z, part by part, where no graph is made."""
    dtype = accumulate_dtype(z.dtype)

    def bent(ddz: Tensor, dy: Tensor, z: Tensor, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            z = z.to(dtype) if z.requires_grad else z.to(dtype).detach().requires_grad_()
            slope = activation_slope(z, options.activation, options.slope)
        return torch.autograd.grad(slope, z, ddz.to(dtype) * dy.to(dtype), create_graph=create_graph)[0]

    if torch.is_grad_enabled():
        return bent(ddz, dy, z, True).to(z.dtype)
    rows = max(1, _CHUNK * z.shape[0] // max(1, z.numel()))
    for above, upstream, part in zip(ddz.split(rows), dy.split(rows), z.split(rows), strict=True):
        part.copy_(bent(above, upstream, part, False))
    return z
