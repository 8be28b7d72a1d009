"""The operators of :class:`tsbn_kernels.definition.options.Backend` by the CUDA C++ kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.backends.cuda import launches
from tsbn_kernels.backends.cuda.launches import Operands as Tensors
from tsbn_kernels.backends.plan import Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.slots import PASSES, pass_of
from tsbn_kernels.backends.plan.work import Operands, Strides, work_of
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import INVERSE, NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Normalized, Options, Running, Saved, of_input


class _Place(NamedTuple):
    """Where a tensor's elements lie: all that plans depend on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    residue: int


class _Call(NamedTuple):
    """What a call is asked for, beside its tensors; ``needs`` in a backward pass."""

    options: Options
    training: bool
    needs: Needs | None = None


def _place(x: Tensor | None) -> _Place | None:
    return None if x is None else _Place(x.shape, x.stride(), x.data_ptr() % 16 // x.element_size())


def _strides(place: _Place | None, options: Options) -> Strides | None:
    if place is None:
        return None
    t, n, c, s = layout.task_view(_like(place), options.num_tasks, options.stacking).stride()
    return Strides(t, n, c, s, place.residue)


def _like(place: _Place, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(place.shape, place.strides, dtype=dtype, device="meta")


@lru_cache(maxsize=4096)
def _prepare(
    call: _Call,
    dtype: torch.dtype,
    places: tuple[_Place | None, ...],
    vectors: tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...],
    device: torch.device,
) -> tuple[list[tuple[list[int], list[int]]], tuple[int, int]]:
    """The launches, each as the kernel's choice and its numbers, and the bytes of the buffers between them."""
    options = call.options
    if options.gate not in ("sigmoid", "identity"):
        raise ValueError(f"unknown gate {options.gate!r}")
    if options.activation not in rules.ACTIVATION_CODES:
        raise ValueError(f"unknown activation {options.activation!r}")
    assert places[0] is not None
    assert vectors[0] is not None
    own = of_input(options)  # as x, and the gradient of it, are read
    orders = own, options, options, options if call.needs is None else own, options
    x, dy, residual, out, dresidual = map(_strides, places, orders)
    assert x is not None
    if options.fan_out:
        x, out = x._replace(t=0), out if out is None or call.needs is None else out._replace(t=0)
    work = work_of(
        _like(places[0], dtype),
        options,
        call.needs,
        training=call.training,
        bias=vectors[1] is not None,
        parameter_size=vectors[0][0].itemsize,
        residual=residual is not None,
        strides=Operands(x, dy, out, residual, dresidual),
    )
    plan = _choose(work, dtype, device)
    numbers = [number for v in vectors for number in ((0, 0, 0) if v is None else (launches.code(v[0]), *v[1]))]
    kernels = [
        (_kernel(plan, dtype), list(rules.numbers(plan, phases, options.gate == "sigmoid", tuple(numbers))))
        for phases in plan.phases
    ]
    return kernels, (plan.partial_bytes, plan.staged_bytes)


def _kernel(plan: rules.CudaPlan, dtype: torch.dtype) -> list[int]:
    access = ("rows", "columns", "scalar").index(plan.cut.access)
    pass_ = PASSES.index(pass_of(plan.work))
    return [launches.code(dtype), access, pass_, plan.programs, plan.threads, plan.cluster, plan.shared_bytes]


@lru_cache(maxsize=64)
def clusters(dtype: torch.dtype, device: torch.device) -> rules.Clusters:
    """How many clusters of a plan run at a time: a driver knows which multiprocessors they would strand."""

    def at_a_time(plan: rules.CudaPlan) -> int:
        if plan.cluster == 1:
            return rules.clusters_on_paper(plan)
        return int(torch.ops.tsbn._cuda_active_clusters(_kernel(plan, dtype), device.index or 0))

    return at_a_time


def _choose(work: Work, dtype: torch.dtype, device: torch.device) -> rules.CudaPlan:
    return rules.plan(work, launches.device_of(device), clusters(dtype, device))


def _run(call: _Call, tensors: Tensors) -> None:
    x, dy, residual = layout.readable(tensors.x, call.options, tensors.dy, tensors.residual)
    tensors = tensors._replace(x=x, dy=dy, residual=residual)
    places = _place(x), _place(dy), _place(residual), _place(tensors.out), _place(tensors.dresidual)
    given = tensors.weight, tensors.bias, tensors.mean, tensors.var
    vectors = tuple(None if v is None else (v.dtype, v.stride()) for v in given)
    kernels, sizes = _prepare(call, x.dtype, places, vectors, x.device)
    buffers = [x.new_empty(size, dtype=torch.uint8) if size else None for size in sizes]
    tensors = tensors._replace(partial=buffers[0], staged=buffers[1])
    for kernel, numbers in kernels:
        launches.launch(PASSES[kernel[2]], kernel, numbers, call.options.eps, call.options.slope, tensors)


# ---- the operators -----------------------------------------------------------------------------------------------


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    if x.numel() == 0:
        return reference.forward_training(x, weight, bias, residual, options)
    y = layout.empty_output(x, options)
    mean, var = (weight.new_empty(weight.shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    tensors = Tensors(x, residual=residual, out=y, weight=weight, bias=bias, first=mean, second=var)
    _run(_Call(options, True), tensors)
    return Normalized(y, mean, var)


def forward_tracked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> Normalized:
    """Updates the running statistics beside the kernels."""
    found = forward_training(x, weight, bias, residual, options)
    reference.track(running, found.mean, found.var, reference.values_of(x, options))
    return found


def forward_eval(saved: Saved, options: Options) -> Tensor:
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.forward_eval(saved, options)
    y = layout.empty_output(x, options)
    tensors = Tensors(x, residual=residual, out=y, weight=weight, bias=bias, mean=mean, var=var)
    _run(_Call(options, False), tensors)
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
        _run(_Call(options, training, needs), tensors)
    return found


def moments(x: Tensor, options: Options) -> Moments:
    """See :func:`tsbn_kernels.definition.batch_norm.moments`.

    There is no kernel of its own: y is computed too, and dropped; and the digits are those of the statistics' dtype.
    """
    own = Options(of_input(options).num_tasks, 1.0, "identity", of_input(options).stacking)
    shape = own.num_tasks, x.shape[layout.channel_axis(own.stacking)]
    _, mean, var = forward_training(x, x.new_ones(shape, dtype=accumulate_dtype(x.dtype)), None, None, own)
    repeats = options.num_tasks if options.fan_out else 1
    return Moments(mean.double().repeat(repeats, 1), var.double().repeat(repeats, 1))


def input_gradient(
    dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
) -> Gradients:
    """See :func:`tsbn_kernels.definition.batch_norm.input_gradient`. There is no kernel of its own.

    ``dx = gate * rstd * dz - gate * rstd * (dz_mean + xhat * dz_xhat_mean)``: the first term is the gradient by given
    statistics, the second a normalisation of x, to which the first is the residual. Half precision rounds it twice.
    """
    found = backward(dy, saved, False, Needs(True, False, False, needs_dresidual), options)
    x, weight, _, _, mean, var = saved
    scale = -reference.gate_values(weight.to(var.dtype), options.gate) * torch.rsqrt(var + options.eps)
    slopes, offsets = scale * dz_xhat_mean, scale * dz_mean
    if options.fan_out:
        slopes, offsets = slopes.sum(0, keepdim=True), offsets.sum(0, keepdim=True)
        mean, var = mean[:1], var[:1]
    own = of_input(options)
    plain = Options(own.num_tasks, own.eps, "identity", own.stacking)
    return found._replace(dx=forward_eval(Saved(x, slopes, offsets, found.dx, mean, var), plain))
