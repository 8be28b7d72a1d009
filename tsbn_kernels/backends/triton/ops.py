"""The operators of :class:`tsbn_kernels.definition.options.Backend` by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends.plan import DEVICES, Device, Plan, devices
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.triton.autotune import choose
from tsbn_kernels.backends.triton.passes import Backward, Forward, Pass, work_of
from tsbn_kernels.backends.triton.passes_fan_out import FanOutBackward, FanOutForward
from tsbn_kernels.backends.triton.passes_synchronized import InputGradient, PartMoments
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import INVERSE, NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Normalized, Options, Saved, of_input

_forwards: dict[Hashable, Any] = {}  # passes by all that they depend on
_backwards: dict[Hashable, Any] = {}


@cache
def _device(device: torch.device) -> Device:
    """The GPU; on the CPU, where the interpreter runs the kernels, one on paper."""
    return DEVICES["H100"] if device.type == "cpu" else devices.of(device)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device of the tensors the current one, if it is not."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def _class(x: Tensor | None) -> Hashable:
    """All of an activation that a compiled kernel depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def _contiguous(saved: Saved) -> Saved:
    x, weight, bias, residual, mean, var = saved
    bias = bias if bias is None else bias.contiguous()
    return Saved(x, weight.contiguous(), bias, residual, mean.contiguous(), var.contiguous())


def _dtypes(saved: Saved) -> Hashable:
    return saved.weight.dtype, saved.mean.dtype, saved.var.dtype, saved.bias is None or saved.bias.dtype


def _normalize(saved: Saved, training: bool, options: Options) -> Tensor:
    x, weight, bias, residual, *_ = saved
    if x.numel() == 0:
        return layout.empty_output(x, options)
    key = _class(x), _class(residual), _dtypes(saved), training, options
    run = _forwards.get(key)
    if run is None:
        own_x, own_residual = layout.readable(x, options, residual)
        if own_x is not x or own_residual is not residual:
            return _normalize(saved._replace(x=own_x, residual=own_residual), training, options)
        work = work_of(
            x,
            options,
            training=training,
            bias=bias is not None,
            parameter_size=weight.element_size(),
            residual=residual is not None,
        )

        def make(plan: Plan) -> Forward | FanOutForward:
            return (FanOutForward if options.fan_out else Forward)(plan, x, options, residual)

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = make(plan)
            return partial(candidate, _contiguous(saved), candidate.stacked_like(x))

        with _on(x.device):
            run = _forwards[key] = make(choose(rules.plan(work, _device(x.device)), prepare))
    y: Tensor = run.stacked_like(x)
    with _on(x.device):
        run(_contiguous(saved), y)
    return y


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    """See :func:`tsbn_kernels.definition.batch_norm.forward_training`."""
    make = weight.new_zeros if x.numel() == 0 else weight.new_empty
    mean, var = (make(weight.shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return Normalized(_normalize(Saved(x, weight, bias, residual, mean, var), True, options), mean, var)


def forward_eval(saved: Saved, options: Options) -> Tensor:
    """See :func:`tsbn_kernels.definition.batch_norm.forward_eval`."""
    return _normalize(saved, False, options)


def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
    """See :func:`tsbn_kernels.definition.batch_norm.backward`."""
    if options.activation in (NONE, INVERSE):  # nothing depends on what went into the activation
        saved = saved._replace(bias=None, residual=None)
    x, weight, _, residual, *_ = saved
    if x.numel() == 0 or not any(needs):
        return Gradients(
            torch.empty_like(x) if needs.dx else None,
            weight.new_zeros(weight.shape) if needs.dweight else None,
            weight.new_zeros(weight.shape) if needs.dbias else None,
            layout.empty_output(x, options) if needs.dresidual else None,
        )
    key = _class(dy), _class(x), _class(residual), _dtypes(saved), training, needs, options

    def outputs(run: Pass) -> Gradients:
        return Gradients(
            run.input_like(x) if needs.dx else None,
            weight.new_empty(weight.shape) if needs.dweight else None,
            weight.new_empty(weight.shape) if needs.dbias else None,
            run.stacked_like(x) if needs.dresidual else None,
        )

    run = _backwards.get(key)
    if run is None:
        own_x, own_dy, own_residual = layout.readable(x, options, dy, residual)
        if own_x is not x or own_dy is not dy or own_residual is not residual:
            return backward(own_dy, saved._replace(x=own_x, residual=own_residual), training, needs, options)
        work = work_of(
            x,
            options,
            direction="backward",
            training=training,
            bias=saved.bias is not None,
            needs_dx=needs.dx,
            needs_dweight=needs.dweight,
            needs_dbias=needs.dbias,
            needs_dresidual=needs.dresidual,
            parameter_size=weight.element_size(),
            residual=residual is not None,
        )

        def make(plan: Plan) -> Backward | FanOutBackward:
            return (FanOutBackward if options.fan_out else Backward)(plan, dy, x, options, residual)

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = make(plan)
            return partial(candidate, dy, _contiguous(saved), outputs(candidate))

        with _on(x.device):
            run = _backwards[key] = make(choose(rules.plan(work, _device(x.device)), prepare))
    results = outputs(run)
    with _on(x.device):
        run(dy, _contiguous(saved), results)
    return results


def moments(x: Tensor, options: Options) -> Moments:
    """See :func:`tsbn_kernels.definition.batch_norm.moments`."""
    if options.fan_out:
        mean, var = moments(x, of_input(options))
        return Moments(mean.repeat(options.num_tasks, 1), var.repeat(options.num_tasks, 1))
    if x.numel() == 0:
        channels = x.shape[layout.channel_axis(options.stacking)]
        mean = x.new_zeros((options.num_tasks, channels), dtype=torch.float64)
        return Moments(mean, mean.clone())
    key = "moments", _class(x), options
    run = _forwards.get(key)
    if run is None:
        (read,) = layout.readable(x, options)
        if read is not x:
            return moments(read, options)
        plan = rules.apart(work_of(x, options), _device(x.device))
        run = _forwards[key] = PartMoments(plan, x, options)
    with _on(x.device):
        result: Moments = run(x)
    return result


def input_gradient(
    dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
) -> Gradients:
    """See :func:`tsbn_kernels.definition.batch_norm.input_gradient`."""
    if options.activation == NONE:
        saved = saved._replace(bias=None, residual=None)
    x, weight, _, residual, *_ = saved
    if x.numel() == 0:
        return Gradients(torch.empty_like(x), dresidual=layout.empty_output(x, options) if needs_dresidual else None)
    key = "input_gradient", _class(dy), _class(x), _class(residual), _dtypes(saved), needs_dresidual, options
    run: Any = _backwards.get(key)
    if run is None:
        own_x, own_dy, own_residual = layout.readable(x, options, dy, residual)
        if own_x is not x or own_dy is not dy or own_residual is not residual:
            own = saved._replace(x=own_x, residual=own_residual)
            return input_gradient(own_dy, own, dz_mean, dz_xhat_mean, needs_dresidual, options)
        work = work_of(
            x,
            options,
            direction="backward",
            training=not options.fan_out,
            needs_dweight=False,
            needs_dresidual=needs_dresidual,
            parameter_size=weight.element_size(),
            residual=residual is not None,
        )
        plan = (rules.plan if options.fan_out else rules.apart)(work, _device(x.device))
        run = _backwards[key] = InputGradient(plan, dy, x, options, residual)
    found = Gradients(run.input_like(x), dresidual=run.stacked_like(x) if needs_dresidual else None)
    with _on(x.device):
        run(dy, _contiguous(saved), dz_mean, dz_xhat_mean, found)
    return found
