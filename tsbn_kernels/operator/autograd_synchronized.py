"""The layer over a batch that is spread over the processes of a group, as ``nn.SyncBatchNorm`` is for one task.

Equal to one process on the joined batch, with one collective for all T tasks in each direction, and for every mix of
them: a rank may have samples of some tasks, in any numbers, or none. Forward: every rank reads x for its moments, an
all-gather hands all moments to all ranks, which join them in the order of the ranks; x is read again and y is written.
Backward: x and dy are read for the local sums of ``dz = dy * act'(z)`` and ``dz * xhat``, which are the gradients of
bias and gate; an all-reduce adds them up; x and dy are read again and dx is written.

Gradients of the parameters are those of the rank's own part, for ``DistributedDataParallel`` to reduce. The gradient of
x is that of the sum of all ranks' losses.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, distributed

from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.mixed_batch_norm import samples_of
from tsbn_kernels.definition.options import Gradients, Needs, Options, Saved, of_input
from tsbn_kernels.operator import direct
from tsbn_kernels.operator.coefficients import coefficients
from tsbn_kernels.operator.mixed_ops import operators as mixed_operators
from tsbn_kernels.operator.mixed_parts import input_gradient_of_tasks, task_moments
from tsbn_kernels.operator.ops import operators

Group = Any  # a ProcessGroup; PyTorch has none where it is built without distributed
GroupLike = Group | Literal["world"] | None

_all_gather = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)


class SharedGroup:
    """Holds a process group, which cannot be copied: a copy of what holds it has the same group."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __deepcopy__(self, _: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with a process group of its own cannot be pickled; set its process_group to None or 'world' "
            "first, or save its state_dict()"
        )


def group_of(process_group: GroupLike) -> Group | None:
    """The group to synchronise over; None where there is nothing to do: no group, or one of one rank.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: this process is not in the group, or it is no process group.
    """
    if process_group is None:
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "process_group is set, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first, or set process_group=None to use the statistics of this "
            "process alone"
        )
    group = distributed.group.WORLD if process_group == "world" else process_group
    if group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in process_group; give each process a group that it belongs to")
    if not isinstance(group, distributed.ProcessGroup):
        raise ValueError(f"process_group must be None, 'world' or a torch.distributed.ProcessGroup, got {group!r}")
    return group if distributed.get_world_size(group) > 1 else None


def apply(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Applies the layer, differentiable once; the inputs are those of :meth:`SynchronizedTaskBatchNorm.forward`."""
    function = SynchronizedTaskBatchNorm if torch.compiler.is_compiling() else WithoutForwardMode
    y, mean, var, count = function.apply(*inputs)
    return y, mean, var, count


def joined_moments(
    x: Tensor, task_of_sample: Tensor | None, options: Options, group: Group, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, float64 ``[T, C]``, of all ranks' parts, and how many values a channel has.

    The values are those of each task of a mixed batch, ``[T]``; else they are equal, ``[1]``.

    Raises:
        RuntimeError: another rank has another number of tasks or channels, as far as this can be seen: on the CPU.
    """
    num_tasks = options.num_tasks
    if task_of_sample is None:
        mean, var = operators(backend).moments(x, of_input(options))  # with fan-out of one row
        values = mean.new_full((1,), x.numel() // max(1, mean.numel()))
    else:
        mean, var = task_moments(operators(backend), x, task_of_sample, options)
        values = samples_of(task_of_sample, num_tasks) * mean.new_full((), x.numel() // max(1, x.shape[0] * x.shape[1]))
    sizes = num_tasks, mean.shape[1]
    message = torch.cat((*(mean.new_full((1,), size) for size in sizes), values, mean.flatten(), var.flatten()))
    ranks = distributed.get_world_size(group)
    gathered = message.new_empty(ranks * len(message))
    assert _all_gather is not None
    _all_gather(gathered, message, group=group)
    gathered = gathered.view(ranks, -1)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        for rank, theirs in enumerate(gathered[:, :2].tolist()):
            if tuple(theirs) != sizes:
                raise RuntimeError(
                    f"rank {rank} of process_group normalises {theirs[0]:g} tasks of {theirs[1]:g} channels where this "
                    f"rank has {num_tasks} of {mean.shape[1]}; all ranks must run the same layers in the same order, "
                    f"with as many tasks"
                )
    _, counts, moments = gathered.split((2, len(values), 2 * mean.numel()), dim=1)
    means, variances = moments.view(ranks, 2, *mean.shape).unbind(1)
    mean, var = reference.join_moments(means, variances, counts.unsqueeze(2))
    if options.fan_out:
        mean, var = mean.repeat(num_tasks, 1), var.repeat(num_tasks, 1)
    return mean, var, counts.sum(0)


class SynchronizedTaskBatchNorm(torch.autograd.Function):
    """Saves what :class:`tsbn_kernels.operator.autograd.TaskBatchNorm` saves."""

    @staticmethod
    def forward(
        x: Tensor,
        task_of_sample: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
        group: Group,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns y, and what :func:`joined_moments` does; ``task_of_sample`` is that of a mixed batch."""
        mean, var, values = joined_moments(x, task_of_sample, options, group, backend)
        given, plain = coefficients(Saved(x, weight, bias, residual, mean, var), options)
        if task_of_sample is None:
            return operators(backend).forward_eval(given, plain), mean, var, values
        return mixed_operators(backend).mixed_forward_eval(given, task_of_sample, plain), mean, var, values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, task_of_sample, weight, bias, residual, ctx.options, ctx.group, ctx.backend = inputs
        _, *statistics = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        if ctx.options.activation == "none":  # its derivative does not depend on them
            bias = residual = None
        ctx.save_for_backward(task_of_sample, x, weight, bias, residual, *statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, _index, dweight, dbias, dresidual, *_rest = ctx.needs_input_grad
        needs, gradients = Needs(dx, dweight, dbias, dresidual), Gradients()
        if dy is not None and any(needs):
            task_of_sample, *tensors, values = ctx.saved_tensors
            saved = Saved(*tensors)
            with torch.no_grad():
                gradients = _gradients(ctx, dy, saved, task_of_sample, values, needs)
            if torch.is_grad_enabled():
                operands = saved.x, saved.weight, saved.bias, saved.residual
                gradients = Gradients._make(FirstDerivative.apply(dy, *operands, *gradients))
        dx_found, *more = gradients
        return dx_found, None, *more, None, None, None

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError(
            "statistics that are synchronised over processes do not work under vmap; loop over the models"
        )


class WithoutForwardMode(SynchronizedTaskBatchNorm):
    """The layer over processes, whose ``jvp`` is a clear error: ``torch.compile`` takes no ``jvp``."""

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise RuntimeError(
            "statistics that are synchronised over processes have no forward-mode derivative; use process_group=None"
        )


def _gradients(
    ctx: Any, dy: Tensor, saved: Saved, task_of_sample: Tensor | None, values: Tensor, needs: Needs
) -> Gradients:
    backend = direct.of_later_pass(ctx.backend, dy)
    options, compute, plain = ctx.options, operators(backend), ctx.options.activation == "none"
    dy = layout.in_family(dy, layout.family(saved.x, of_input(options).stacking), options.stacking)
    given, identity = coefficients(saved, options)
    wanted = Needs(
        dx=False,
        dweight=needs.dx or needs.dweight,
        dbias=needs.dx or needs.dbias,
        dresidual=needs.dresidual and not plain and not needs.dx,
    )
    if task_of_sample is None:
        _, dot, total, dresidual = compute.backward(dy, given, False, wanted, identity)
    else:
        mixed = mixed_operators(backend)
        _, dot, total, dresidual = mixed.mixed_backward(dy, given, task_of_sample, False, wanted, identity)
    dx = dweight = dbias = None
    if needs.dx and total is not None and dot is not None:
        sums = torch.stack((total, dot))
        distributed.all_reduce(sums, group=ctx.group)
        mean, dot_mean = (sums / values.clamp_min(1).to(sums.dtype).unsqueeze(1)).unbind()
        of_residual = needs.dresidual and not plain
        if task_of_sample is None:
            dx, *_, dresidual = compute.input_gradient(dy, given, mean, dot_mean, of_residual, identity)
        else:
            dx, dresidual = input_gradient_of_tasks(
                compute, dy, given, task_of_sample, mean, dot_mean, of_residual, identity
            )
    if needs.dweight and dot is not None:
        dweight = (reference.gate_slope(saved.weight.to(given.weight.dtype), options.gate) * dot).to(saved.weight.dtype)
    if needs.dbias and total is not None:
        dbias = total.to(saved.weight.dtype)
    return Gradients(dx, dweight, dbias, dy if plain and needs.dresidual else dresidual)


class FirstDerivative(torch.autograd.Function):
    """Gradients as they are, with a clear error where they are to be differentiated again."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        """Takes what the gradients depend on, five tensors or None, and the gradients or None; returns these."""
        _, _, _, _, _, *gradients = inputs
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "statistics that are synchronised over processes have no second derivative; use process_group=None, or "
            "leave the layer out of what is differentiated twice"
        )
