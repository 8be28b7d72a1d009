"""The operators of :class:`tsbn_kernels.definition.options.Backend` by the CUDA C++ kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsbn_kernels.backends.cuda import launches
from tsbn_kernels.backends.cuda.launches import Operands as Tensors
from tsbn_kernels.backends.plan import Work, mixed_cuda
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.mixed import MixedWork
from tsbn_kernels.backends.plan.mixed import work_of as mixed_work_of
from tsbn_kernels.backends.plan.slots import PASSES, pass_of
from tsbn_kernels.backends.plan.work import Operands, Strides, work_of
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import INVERSE, NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype, empty_statistics
from tsbn_kernels.definition.options import (
    NOT_TRACKED,
    Gradients,
    Moments,
    Needs,
    Normalized,
    Options,
    Running,
    Saved,
    of_input,
)


class _Place(NamedTuple):
    """Where a tensor's elements lie: all that plans depend on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    residue: int


class Call(NamedTuple):
    """What a call is asked for, beside its tensors.

    Attributes:
        needs: of a backward pass.
        half: one of two launches alone.
        mixed: whether the batch is mixed.
    """

    options: Options
    training: bool
    needs: Needs | None = None
    half: Literal["sums", "result"] | None = None
    mixed: bool = False


class Pass(NamedTuple):
    """A plan; its launches, each as the kernel's choice and its numbers."""

    plan: rules.CudaPlan
    kernels: list[tuple[list[int], list[int]]]

    def launch(self, options: Options, tensors: Tensors) -> None:
        """Makes the launches."""
        for kernel, numbers in self.kernels:
            launches.launch(PASSES[kernel[2]], kernel, numbers, options.eps, options.slope, tensors)
            tensors = tensors._replace(dresidual=None)  # the first one completes it


def _place(x: Tensor | None) -> _Place | None:
    return None if x is None else _Place(x.shape, x.stride(), x.data_ptr() % 16 // x.element_size())


def _strides(place: _Place | None, options: Options) -> Strides | None:
    if place is None:
        return None
    t, n, c, s = layout.task_view(_like(place), options.num_tasks, options.stacking).stride()
    return Strides(t if options.num_tasks > 1 else 0, n, c, s, place.residue)


def _like(place: _Place, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(place.shape, place.strides, dtype=dtype, device="meta")


@lru_cache(maxsize=4096)
def _prepare(
    call: Call,
    dtype: torch.dtype,
    places: tuple[_Place | None, ...],
    vectors: tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...],
    device: torch.device,
) -> Pass:
    options = call.options
    if options.gate not in ("sigmoid", "identity"):
        raise ValueError(f"unknown gate {options.gate!r}")
    if options.activation not in rules.ACTIVATION_CODES:
        raise ValueError(f"unknown activation {options.activation!r}")
    assert places[0] is not None
    assert vectors[0] is not None
    stacked = options._replace(num_tasks=1) if call.mixed else options  # a mixed batch lies as that of one task
    own = of_input(stacked)  # as x, and the gradient of it, are read
    orders = own, stacked, stacked, stacked if call.needs is None else own, stacked
    x, dy, residual, out, dresidual = map(_strides, places, orders)
    assert x is not None
    if options.fan_out:
        x, out = x._replace(t=0), out if out is None or call.needs is None else out._replace(t=0)
    work = (mixed_work_of if call.mixed else work_of)(
        _like(places[0], dtype),
        options,
        call.needs,
        training=call.training,
        bias=vectors[1] is not None,
        parameter_size=vectors[0][0].itemsize,
        residual=residual is not None,
        strides=Operands(x, dy, out, residual, dresidual),
    )
    there = launches.device_of(device)
    if isinstance(work, MixedWork):
        plan: rules.CudaPlan = mixed_cuda.plan(work, there)
    else:
        plan = rules.half(work, there) if call.half else _choose(work, dtype, device)
    numbers = [number for v in vectors for number in ((0, 0, 0) if v is None else (launches.code(v[0]), *v[1]))]
    kernels = [
        (_kernel(plan, dtype), list(rules.numbers(plan, phases, options.gate == "sigmoid", tuple(numbers))))
        for phases in (plan.phases_of(call.half) if call.half else plan.phases)
    ]
    return Pass(plan, kernels)


def _kernel(plan: rules.CudaPlan, dtype: torch.dtype) -> list[int]:
    access = ("rows", "columns", "scalar").index(plan.cut.access)
    pass_ = PASSES.index(pass_of(plan.work))
    return [
        launches.code(dtype),
        access,
        pass_,
        plan.programs,
        plan.threads,
        plan.cluster,
        plan.shared_bytes,
        int(plan.teams > 0),
    ]


@lru_cache(maxsize=64)
def clusters(dtype: torch.dtype, device: torch.device) -> rules.Clusters:
    """How many clusters of a plan run at a time, or blocks that must: a driver knows what they strand."""

    def at_a_time(plan: rules.CudaPlan) -> int:
        if plan.cluster == 1 and not plan.teams:
            return rules.clusters_on_paper(plan)
        return int(torch.ops.tsbn._cuda_active_clusters(_kernel(plan, dtype), device.index or 0))

    return at_a_time


def _choose(work: Work, dtype: torch.dtype, device: torch.device) -> rules.CudaPlan:
    return rules.plan(work, launches.device_of(device), clusters(dtype, device))


def prepared(call: Call, tensors: Tensors) -> tuple[Pass, Tensors]:
    """The launches of a call, and its tensors as they read them, with memory for what is left between them."""
    x, dy, residual = layout.readable(tensors.x, call.options, tensors.dy, tensors.residual)
    tensors = tensors._replace(x=x, dy=dy, residual=residual)
    places = _place(x), _place(dy), _place(residual), _place(tensors.out), _place(tensors.dresidual)
    given = tensors.weight, tensors.bias, tensors.mean, tensors.var
    vectors = tuple(None if v is None else (v.dtype, v.stride()) for v in given)
    found = _prepare(call, x.dtype, places, vectors, x.device)
    sizes = found.plan.buffer_bytes, found.plan.staged_bytes
    partial, staged = (x.new_empty(size, dtype=torch.uint8) if size else None for size in sizes)
    return found, tensors._replace(partial=partial, staged=staged)


def _states(plan: rules.CudaPlan, tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """What the parts of slabs leave for a second launch, ``[T, tiles, parts, width, sums]``; a view."""
    assert tensors.partial is not None
    work, pieces = plan.work, plan.cut
    own = work.tasks // work.streams  # of a slab
    values = tensors.partial.view(dtype).view(work.streams, pieces.tiles, plan.parts, own, pieces.width, -1)
    return values.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)


def _run(call: Call, tensors: Tensors) -> None:
    found, tensors = prepared(call, tensors)
    found.launch(call.options, tensors)


# ---- the operators -----------------------------------------------------------------------------------------------


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    if x.numel() == 0:
        return reference.forward_training(x, weight, bias, residual, options)
    return forward_tracked(x, weight, bias, residual, NOT_TRACKED, options)


def forward_tracked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> Normalized:
    """Updates the running statistics in the launch that writes those of the batch."""
    y = layout.empty_output(x, options)
    mean, var = empty_statistics(weight, x)
    tensors = Tensors(x, residual=residual, out=y, weight=weight, bias=bias, first=mean, second=var)
    _run(Call(options, True), tensors.tracking(running))
    return Normalized(y, mean, var)


def forward_eval(saved: Saved, options: Options) -> Tensor:
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.forward_eval(saved, options)
    y = layout.empty_output(x, options)
    tensors = Tensors(x, residual=residual, out=y, weight=weight, bias=bias, mean=mean, var=var)
    _run(Call(options, False), tensors)
    return y


def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
    if needs.dresidual and options.activation in (NONE, INVERSE):
        raise ValueError("without an activation dy is the gradient of residual")
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.backward(dy, saved, training, needs, options)
    found = layout.empty_gradients(x, weight, needs, options)
    dx, dweight, dbias, dresidual = found
    if options.activation in (NONE, INVERSE):
        bias = None  # z is not computed again
    if options.activation == NONE:
        residual = None
    if any(needs):
        tensors = Tensors(x, dy, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias)
        _run(Call(options, training, needs), tensors)
    return found


def moments(x: Tensor, options: Options) -> Moments:
    """See :func:`tsbn_kernels.definition.batch_norm.moments`: the first launch of a split forward."""
    repeats, plain = options.num_tasks if options.fan_out else 1, of_input(options)
    own = Options(plain.num_tasks, 1.0, "identity", plain.stacking)
    if x.numel() == 0:
        return reference.moments(x, options)
    channels = x.shape[layout.channel_axis(own.stacking)]
    call, wide = Call(own, True, half="sums"), accumulate_dtype(x.dtype)
    found, tensors = prepared(call, Tensors(x, weight=x.new_empty(own.num_tasks, channels)))
    found.launch(call.options, tensors)
    states = _states(found.plan, tensors, wide).double().permute(2, 0, 1, 3, 4)
    count, mean, rest, squares = states.flatten(2, 3)[:, :, :channels].unbind(3)
    mean, var = reference.join_moments(mean + rest, squares / count.clamp_min(1), count)
    return Moments(mean.repeat(repeats, 1), var.repeat(repeats, 1))


def input_gradient(
    dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
) -> Gradients:
    """See :func:`tsbn_kernels.definition.batch_norm.input_gradient`: the last launch of a split backward.

    It finds the means as the sums of one part. Of a fan-out another launch before it adds up the tasks' gradients.
    """
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.input_gradient(dy, saved, dz_mean, dz_xhat_mean, needs_dresidual, options)
    if options.activation in (NONE, INVERSE):
        bias = None
    if options.activation == NONE:
        residual = None
    needs = Needs(True, False, False, needs_dresidual)
    result = layout.empty_gradients(x, weight, needs, options)
    call, wide = Call(options, True, needs, "result"), accumulate_dtype(x.dtype)
    given = Tensors(x, dy, residual, result.dx, result.dresidual, weight, bias, mean, var)
    found, tensors = prepared(call, given)
    states = _states(found.plan, tensors, wide).zero_()
    T, tiles, _, width, _ = states.shape
    sums = torch.stack((dz_mean, dz_xhat_mean * torch.sqrt(var.to(wide) + options.eps)), 2) * found.plan.work.values
    sums = functional.pad(sums, (0, 0, 0, tiles * width - sums.shape[1]))
    states[:, :, 0] = sums.view(T, tiles, width, 2)
    found.launch(call.options, tensors)
    return result
