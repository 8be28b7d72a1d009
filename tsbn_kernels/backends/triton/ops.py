"""The operators of :mod:`tsbn_kernels.ops` by the Triton kernels."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from tsbn_kernels.backends.triton.passes import Backward, Forward
from tsbn_kernels.plan import DEVICES, Device, devices
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


def _normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return torch.empty_like(x)
    dtypes = weight.dtype, None if bias is None else bias.dtype, mean.dtype, var.dtype
    key = _class(x), dtypes, num_tasks, eps, gate, stacking, training
    run = _forwards.get(key)
    if run is None:
        run = _forwards[key] = Forward(
            x, num_tasks, stacking, eps, gate, _device(x.device),
            training=training, bias=bias is not None, parameter_size=weight.element_size(),
        )  # fmt: skip
    y = run.output(x)
    with _on(x.device):
        run(x, y, weight.contiguous(), None if bias is None else bias.contiguous(), mean.contiguous(), var.contiguous())
    return y


def forward_training(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_tasks: int, eps: float, gate: str, stacking: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tsbn_kernels.reference.forward_training`."""
    make = torch.zeros if x.numel() == 0 else torch.empty
    mean, var = (make(weight.shape, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(2))
    return _normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, True), mean, var


def forward_eval(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str,
) -> Tensor:  # fmt: skip
    """See :func:`tsbn_kernels.reference.normalize`."""
    return _normalize(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, False)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, num_tasks: int, eps: float, gate: str,
    stacking: str, training: bool, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`tsbn_kernels.reference.backward`."""
    needs = need_dx, need_dweight, need_dbias
    dx, dweight, dbias = (
        x.new_empty(0),
        *(
            weight.new_zeros(weight.shape) if need and x.numel() == 0 else weight.new_empty(weight.shape if need else 0)
            for need in needs[1:]
        ),
    )
    if x.numel() == 0:
        return torch.empty_like(x) if need_dx else dx, dweight, dbias
    if any(needs):
        key = (
            _class(dy),
            _class(x),
            weight.dtype,
            mean.dtype,
            var.dtype,
            num_tasks,
            eps,
            gate,
            stacking,
            training,
            needs,
        )
        run = _backwards.get(key)
        if run is None:
            run = _backwards[key] = Backward(
                dy, x, num_tasks, stacking, eps, gate, _device(x.device),
                training=training, needs_dx=need_dx, needs_dweight=need_dweight, bias=need_dbias,
                parameter_size=weight.element_size(),
            )  # fmt: skip
        dx = run.output(x) if need_dx else dx
        outputs = (tensor if need else None for tensor, need in zip((dx, dweight, dbias), needs, strict=True))
        with _on(x.device):
            run(dy, x, weight.contiguous(), mean.contiguous(), var.contiguous(), *outputs)
    return dx, dweight, dbias
