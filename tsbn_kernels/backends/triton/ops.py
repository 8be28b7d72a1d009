"""The operators of :class:`tsbn_kernels.definition.options.Backend` by the Triton kernels.

What has no values is left to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends import triton as backend
from tsbn_kernels.backends.fallback import KernelError
from tsbn_kernels.backends.plan import DEVICES, Device, Plan, devices
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.plan.work import Work, work_of
from tsbn_kernels.backends.triton.autotune import choose
from tsbn_kernels.backends.triton.passes import Backward, FanOutBackward, Forward, Pass
from tsbn_kernels.backends.triton.passes_synchronized import InputGradient, PartMoments
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import INVERSE, NONE
from tsbn_kernels.definition.batch_norm import empty_statistics
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

forwards: dict[Hashable, Any] = {}  # passes by all that they depend on
backwards: dict[Hashable, Any] = {}
_unclustered: set[tuple[Work, Device]] = set()  # what a device refused to do in clusters
_HERE = nullcontext()


@cache
def device_of(device: torch.device) -> Device:
    """The GPU; on the CPU, where the interpreter runs the kernels, one on paper."""
    return DEVICES["H100"] if device.type == "cpu" else devices.of(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device of the tensors the current one, if it is not."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return _HERE
    return torch.accelerator.device_index(device.index)


def class_of(x: Tensor | None) -> Hashable:
    """All of an activation that a compiled kernel depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def contiguous(saved: Saved) -> Saved:
    x, weight, bias, residual, mean, var = saved
    bias = bias if bias is None else bias.contiguous()
    return Saved(x, weight.contiguous(), bias, residual, mean.contiguous(), var.contiguous())


def dtypes(saved: Saved) -> Hashable:
    return saved.weight.dtype, saved.mean.dtype, saved.var.dtype, saved.bias is None or saved.bias.dtype


def kinds(running: Running) -> Hashable:
    mean, var, batches, momentum, rows = running
    of_vectors = None if mean is None else mean.dtype, None if var is None else var.dtype
    return *of_vectors, batches is None, momentum is None, rows is None


def _work(saved: Saved, training: bool, options: Options, needs: Needs | None = None) -> Work:
    x, weight, bias, residual, *_ = saved
    own = {"bias": bias is not None, "parameter_size": weight.element_size(), "residual": residual is not None}
    return work_of(x, options, needs, training=training, **own)


def _fastest(make: Callable[[Plan], Any], work: Work, device: torch.device, arguments: Callable[[Any], Any]) -> Any:
    """The pass by the rule's plan, or where that is tuned by the fastest; ``arguments`` are those of a pass's call."""

    def prepare(plan: Plan) -> Callable[[], None]:
        candidate = make(plan)
        return partial(candidate, *arguments(candidate))

    with on_device(device):
        on = device_of(device)
        return make(choose(rules.plan(work, on, (work, on) not in _unclustered), prepare))


def _runs(kept: dict[Hashable, Any], key: Hashable, run: Any, device: torch.device, *arguments: Any) -> bool:
    """Runs a pass that is kept. False: the device refuses its cluster, and what is made in its place needs none."""
    try:
        with on_device(device):
            run(*arguments)
    except KernelError as error:
        refused = run.plan.work, run.plan.device
        if run.plan.variant != "cluster" or not error.own or refused in _unclustered:
            raise
        backend.health.note(error.kernel, error)
        _unclustered.add(refused)
        del kept[key]
        return False
    return True


def _normalize(saved: Saved, training: bool, options: Options, running: Running = NOT_TRACKED) -> Tensor:
    saved = contiguous(saved)
    x, _, _, residual, *_ = saved
    key = class_of(x), class_of(residual), dtypes(saved), kinds(running), training, options
    run = forwards.get(key)
    if run is None:
        own_x, own_residual = layout.readable(x, options, residual)
        if own_x is not x or own_residual is not residual:
            return _normalize(saved._replace(x=own_x, residual=own_residual), training, options, running)
        make = partial(Forward, x=x, options=options, residual=residual)
        work = _work(saved, training, options)
        run = forwards[key] = _fastest(make, work, x.device, lambda one: (saved, one.stacked_like(x)))
    y: Tensor = run.stacked_like(x)
    if _runs(forwards, key, run, x.device, saved, y, running):
        return y
    return _normalize(saved, training, options, running)


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    if x.numel() == 0:
        return reference.forward_training(x, weight, bias, residual, options)
    return _training(x, weight, bias, residual, NOT_TRACKED, options)


def forward_tracked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> Normalized:
    """Updates the running statistics in the launch that writes those of the batch.

    Those of float64 are updated beside it: a launch would round their momentum.
    """
    if x.dtype == torch.float64:
        found = forward_training(x, weight, bias, residual, options)
        reference.track(running, found.mean, found.var, reference.values_of(x, options))
        return found
    return _training(x, weight, bias, residual, running, options)


def _training(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> Normalized:
    mean, var = empty_statistics(weight, x)
    return Normalized(_normalize(Saved(x, weight, bias, residual, mean, var), True, options, running), mean, var)


def forward_eval(saved: Saved, options: Options) -> Tensor:
    return reference.forward_eval(saved, options) if saved.x.numel() == 0 else _normalize(saved, False, options)


def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
    if options.activation in (NONE, INVERSE):  # nothing depends on what went into the activation
        saved = saved._replace(bias=None, residual=None)
    if not any(needs):
        return Gradients()
    saved = contiguous(saved)
    x, weight, _, residual, *_ = saved
    if x.numel() == 0:
        return reference.backward(dy, saved, training, needs, options)
    key = class_of(dy), class_of(x), class_of(residual), dtypes(saved), training, needs, options

    def outputs(run: Pass) -> Gradients:
        return Gradients(
            run.input_like(x) if needs.dx else None,
            torch.empty_like(weight) if needs.dweight else None,
            torch.empty_like(weight) if needs.dbias else None,
            run.stacked_like(x) if needs.dresidual else None,
        )

    run = backwards.get(key)
    if run is None:
        own_x, own_dy, own_residual = layout.readable(x, options, dy, residual)
        if own_x is not x or own_dy is not dy or own_residual is not residual:
            return backward(own_dy, saved._replace(x=own_x, residual=own_residual), training, needs, options)
        kind = FanOutBackward if options.fan_out else Backward
        make = partial(kind, dy=dy, x=x, options=options, residual=residual)
        work = _work(saved, training, options, needs)
        run = backwards[key] = _fastest(make, work, x.device, lambda one: (dy, saved, outputs(one)))
    results = outputs(run)
    if _runs(backwards, key, run, x.device, dy, saved, results):
        return results
    return backward(dy, saved, training, needs, options)


def moments(x: Tensor, options: Options) -> Moments:
    if options.fan_out:
        mean, var = moments(x, of_input(options))
        return Moments(mean.repeat(options.num_tasks, 1), var.repeat(options.num_tasks, 1))
    if x.numel() == 0:
        return reference.moments(x, options)
    key = "moments", class_of(x), options
    run = forwards.get(key)
    if run is None:
        (read,) = layout.readable(x, options)
        if read is not x:
            return moments(read, options)
        plan = rules.apart(work_of(x, options), device_of(x.device))
        run = forwards[key] = PartMoments(plan, x, options)
    with on_device(x.device):
        result: Moments = run(x)
    return result


def input_gradient(
    dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
) -> Gradients:
    if options.activation == NONE:
        saved = saved._replace(bias=None, residual=None)
    x, _, _, residual, *_ = saved
    if x.numel() == 0:
        return reference.input_gradient(dy, saved, dz_mean, dz_xhat_mean, needs_dresidual, options)
    key = "input_gradient", class_of(dy), class_of(x), class_of(residual), dtypes(saved), needs_dresidual, options
    run: Any = backwards.get(key)
    if run is None:
        own_x, own_dy, own_residual = layout.readable(x, options, dy, residual)
        if own_x is not x or own_dy is not dy or own_residual is not residual:
            own = saved._replace(x=own_x, residual=own_residual)
            return input_gradient(own_dy, own, dz_mean, dz_xhat_mean, needs_dresidual, options)
        work = _work(saved, not options.fan_out, options, Needs(True, False, False, needs_dresidual))
        plan = (rules.plan if options.fan_out else rules.apart)(work, device_of(x.device))
        run = backwards[key] = InputGradient(plan, dy, x, options, residual)
    found = Gradients(run.input_like(x), dresidual=run.stacked_like(x) if needs_dresidual else None)
    with on_device(x.device):
        run(dy, contiguous(saved), dz_mean, dz_xhat_mean, found)
    return found
