"""The operators of :mod:`tsbn_kernels.ops` by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels import layout
from tsbn_kernels.activations import INVERSE, NONE
from tsbn_kernels.backends.triton.autotune import choose
from tsbn_kernels.backends.triton.fan_out_passes import FanOutBackward, FanOutForward
from tsbn_kernels.backends.triton.joined import InputGradient, Moments
from tsbn_kernels.backends.triton.passes import Backward, Forward, Pass, work_of
from tsbn_kernels.plan import DEVICES, Device, Plan, devices
from tsbn_kernels.plan import triton as rules
from tsbn_kernels.reference import accumulate_dtype

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


def _class(x: Tensor) -> Hashable:
    """All of an activation that a compiled kernel depends on."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0


def _contiguous(*vectors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool, residual: Tensor | None, activation: str, slope: float, shared: bool,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return layout.empty_output(x, num_tasks, stacking, shared)
    dtypes = weight.dtype, None if bias is None else bias.dtype, mean.dtype, var.dtype
    epilogue = None if residual is None else _class(residual), activation, slope, shared
    key = _class(x), dtypes, num_tasks, eps, gate, stacking, training, epilogue
    vectors = *_contiguous(weight, bias, mean, var), residual
    run = _forwards.get(key)
    if run is None:
        read = layout.readable(x, stacking, shared, residual)
        if read[0] is not x or read[1] is not residual:
            return _normalize(
                read[0], weight, bias, mean, var, num_tasks, eps, gate, stacking, training, read[1], activation, slope,
                shared,
            )  # fmt: skip
        work = work_of(
            x, num_tasks, stacking, training=training, bias=bias is not None, parameter_size=weight.element_size(),
            activation=activation, residual=residual is not None, fan_out=shared,
        )  # fmt: skip
        options = x, num_tasks, stacking, eps, gate, residual, slope

        def make(plan: Plan) -> Forward | FanOutForward:
            return FanOutForward(plan, *options) if shared else Forward(plan, *options)

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = make(plan)
            return partial(candidate, x, candidate.stacked_like(x), *vectors)

        with _on(x.device):
            run = _forwards[key] = make(choose(rules.plan(work, _device(x.device)), prepare))
    y = run.stacked_like(x)
    with _on(x.device):
        run(x, y, *vectors)
    return y


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_tasks: int, eps: float, gate: str, stacking: str,
    residual: Tensor | None = None, activation: str = "none", slope: float = 0.0, shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`tsbn_kernels.reference.forward_training`."""
    make = weight.new_zeros if x.numel() == 0 else weight.new_empty
    mean, var = (make(weight.shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    options = num_tasks, eps, gate, stacking, True, residual, activation, slope, shared
    return _normalize(x, weight, bias, mean, var, *options), mean, var


def forward_eval(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, residual: Tensor | None = None, activation: str = "none", slope: float = 0.0, shared: bool = False,
) -> Tensor:  # fmt: skip
    """See :func:`tsbn_kernels.reference.normalize`."""
    options = num_tasks, eps, gate, stacking, False, residual, activation, slope, shared
    return _normalize(x, weight, bias, mean, var, *options)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool, need_dx: bool, need_dweight: bool, need_dbias: bool, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none", slope: float = 0.0, shared: bool = False,
    need_dresidual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`tsbn_kernels.reference.backward`."""
    needs = need_dx, need_dweight, need_dbias, need_dresidual
    if x.numel() == 0 or not any(needs):
        dweight, dbias = (weight.new_zeros(weight.shape if needed else 0) for needed in (need_dweight, need_dbias))
        dx = torch.empty_like(x) if need_dx else x.new_empty(0)
        empty = layout.empty_output(x, num_tasks, stacking, shared) if need_dresidual else x.new_empty(0)
        return dx, dweight, dbias, empty
    if activation in (NONE, INVERSE):  # nothing depends on what went into the activation
        bias = residual = None
    dtypes = weight.dtype, mean.dtype, var.dtype, None if bias is None else bias.dtype
    epilogue = None if residual is None else _class(residual), activation, slope, shared
    key = _class(dy), _class(x), dtypes, num_tasks, eps, gate, stacking, training, needs, epilogue
    vectors = *_contiguous(weight, bias, mean, var), residual

    def outputs(run: Pass) -> tuple[Tensor | None, ...]:
        return (
            run.input_like(x) if need_dx else None, weight.new_empty(weight.shape) if need_dweight else None,
            weight.new_empty(weight.shape) if need_dbias else None, run.stacked_like(x) if need_dresidual else None,
        )  # fmt: skip

    run = _backwards.get(key)
    if run is None:
        read = layout.readable(x, stacking, shared, dy, residual)
        if any(copy is not given for copy, given in zip(read, (x, dy, residual), strict=True)):
            return backward(
                read[1], read[0], weight, mean, var, num_tasks, eps, gate, stacking, training, *needs[:3], bias,
                read[2], activation, slope, shared, need_dresidual,
            )  # fmt: skip
        work = work_of(
            x, num_tasks, stacking, direction="backward", training=training, bias=bias is not None, needs_dx=need_dx,
            needs_dweight=need_dweight, needs_dbias=need_dbias, parameter_size=weight.element_size(),
            activation=activation, residual=residual is not None, needs_dresidual=need_dresidual, fan_out=shared,
        )  # fmt: skip
        options = dy, x, num_tasks, stacking, eps, gate, residual, slope

        def make(plan: Plan) -> Backward | FanOutBackward:
            return FanOutBackward(plan, *options) if shared else Backward(plan, *options)

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = make(plan)
            return partial(candidate, dy, x, *vectors, *outputs(candidate))

        with _on(x.device):
            run = _backwards[key] = make(choose(rules.plan(work, _device(x.device)), prepare))
    results = outputs(run)
    with _on(x.device):
        run(dy, x, *vectors, *results)
    found = [like.new_empty(0) if r is None else r for r, like in zip(results, (x, weight, weight, x), strict=True)]
    return found[0], found[1], found[2], found[3]


def moments(x: Tensor, num_tasks: int, stacking: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    """See :func:`tsbn_kernels.reference.moments`."""
    if shared:
        mean, var = moments(x, 1, layout.input_stacking(stacking, shared))
        return mean.repeat(num_tasks, 1), var.repeat(num_tasks, 1)
    if x.numel() == 0:
        mean = x.new_zeros((num_tasks, x.shape[layout.channel_axis(stacking)]), dtype=torch.float64)
        return mean, mean.clone()
    key = "moments", _class(x), num_tasks, stacking
    run = _forwards.get(key)
    if run is None:
        (read,) = layout.readable(x, stacking, shared)
        if read is not x:
            return moments(read, num_tasks, stacking)
        plan = rules.apart(work_of(x, num_tasks, stacking), _device(x.device))
        run = _forwards[key] = Moments(plan, x, num_tasks, stacking)
    with _on(x.device):
        result: tuple[Tensor, Tensor] = run(x)
    return result


def input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, dz_mean: Tensor, dz_xhat_mean: Tensor,
    num_tasks: int, eps: float, gate: str, stacking: str, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none", slope: float = 0.0, shared: bool = False, need_dresidual: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`tsbn_kernels.reference.input_gradient`."""
    if x.numel() == 0:
        empty = layout.empty_output(x, num_tasks, stacking, shared) if need_dresidual else x.new_empty(0)
        return torch.empty_like(x), empty
    if activation == "none":
        bias = residual = None
    dtypes = weight.dtype, mean.dtype, var.dtype, None if bias is None else bias.dtype
    epilogue = None if residual is None else _class(residual), activation, slope, shared, need_dresidual
    key = "input_gradient", _class(dy), _class(x), dtypes, num_tasks, eps, gate, stacking, epilogue
    run: Any = _backwards.get(key)
    if run is None:
        read = layout.readable(x, stacking, shared, dy, residual)
        if any(copy is not given for copy, given in zip(read, (x, dy, residual), strict=True)):
            return input_gradient(
                read[1], read[0], weight, mean, var, dz_mean, dz_xhat_mean, num_tasks, eps, gate, stacking, bias,
                read[2], activation, slope, shared, need_dresidual,
            )  # fmt: skip
        work = work_of(
            x, num_tasks, stacking, direction="backward", training=not shared, needs_dweight=False,
            parameter_size=weight.element_size(), activation=activation, residual=residual is not None,
            needs_dresidual=need_dresidual, fan_out=shared,
        )  # fmt: skip
        plan = (rules.plan if shared else rules.apart)(work, _device(x.device))
        run = _backwards[key] = InputGradient(plan, dy, x, num_tasks, stacking, eps, gate, residual, slope)
    dx, dresidual = run.input_like(x), run.stacked_like(x) if need_dresidual else None
    with _on(x.device):
        run(dy, x, *_contiguous(weight, bias, mean, var), residual, dz_mean, dz_xhat_mean, dx, dresidual)
    return dx, x.new_empty(0) if dresidual is None else dresidual
