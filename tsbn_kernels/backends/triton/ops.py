"""The operators of :mod:`tsbn_kernels.ops` by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from tsbn_kernels.backends.triton.autotune import choose
from tsbn_kernels.backends.triton.passes import Backward, Forward, work_of
from tsbn_kernels.plan import DEVICES, Device, Plan, devices
from tsbn_kernels.plan import triton as rules
from tsbn_kernels.reference import accumulate_dtype

_forwards: dict[Hashable, Forward] = {}
_backwards: dict[Hashable, Backward] = {}


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


def _only_plain(epilogue: tuple[object, ...]) -> None:
    if any(argument not in (None, "none", 0.0, False) for argument in epilogue if not isinstance(argument, Tensor)):
        raise NotImplementedError("the epilogue has no Triton kernels yet")


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return torch.empty_like(x)
    dtypes = weight.dtype, None if bias is None else bias.dtype, mean.dtype, var.dtype
    key = _class(x), dtypes, num_tasks, eps, gate, stacking, training
    vectors = weight.contiguous(), None if bias is None else bias.contiguous(), mean.contiguous(), var.contiguous()
    run = _forwards.get(key)
    if run is None:
        details = {"training": training, "bias": bias is not None, "parameter_size": weight.element_size()}
        options = x, num_tasks, stacking, eps, gate

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = Forward(plan, *options)
            return partial(candidate, x, candidate.output(x), *vectors)

        plan = rules.plan(work_of(x, num_tasks, stacking, **details), _device(x.device))
        run = _forwards[key] = Forward(choose(plan, prepare), *options)
    y = run.output(x)
    with _on(x.device):
        run(x, y, *vectors)
    return y


def forward_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    *epilogue: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tsbn_kernels.reference.forward_training`."""
    _only_plain(epilogue)
    make = torch.zeros if x.numel() == 0 else torch.empty
    mean, var = (make(weight.shape, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2))
    return _normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, True), mean, var


def forward_eval(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, *epilogue: object
) -> Tensor:  # fmt: skip
    """See :func:`tsbn_kernels.reference.normalize`."""
    _only_plain(epilogue)
    return _normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, False)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool, need_dx: bool, need_dweight: bool, need_dbias: bool, *epilogue: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`tsbn_kernels.reference.backward`."""
    _only_plain(epilogue)
    needs = need_dx, need_dweight, need_dbias
    make = weight.new_zeros if x.numel() == 0 else weight.new_empty
    dweight, dbias = make(weight.shape if need_dweight else 0), make(weight.shape if need_dbias else 0)
    if x.numel() == 0 or not any(needs):
        return x.new_empty(x.shape if need_dx else 0), dweight, dbias, x.new_empty(0)
    dtypes = weight.dtype, mean.dtype, var.dtype
    key = _class(dy), _class(x), dtypes, num_tasks, eps, gate, stacking, training, needs
    vectors = weight.contiguous(), mean.contiguous(), var.contiguous()
    parameters = dweight if need_dweight else None, dbias if need_dbias else None
    run = _backwards.get(key)
    if run is None:
        details = {"training": training, "needs_dx": need_dx, "needs_dweight": need_dweight, "bias": need_dbias}
        work = work_of(x, num_tasks, stacking, direction="backward", parameter_size=weight.element_size(), **details)
        options = dy, x, num_tasks, stacking, eps, gate

        def prepare(plan: Plan) -> Callable[[], None]:
            candidate = Backward(plan, *options)
            return partial(candidate, dy, x, *vectors, candidate.output(x) if need_dx else None, *parameters)

        run = _backwards[key] = Backward(choose(rules.plan(work, _device(x.device)), prepare), *options)
    dx = run.output(x) if need_dx else None
    with _on(x.device):
        run(dy, x, *vectors, dx, *parameters)
    return x.new_empty(0) if dx is None else dx, dweight, dbias, x.new_empty(0)
