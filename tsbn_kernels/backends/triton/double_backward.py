"""The operators of a second derivative by the Triton kernels. What has no values is left to the reference."""

from __future__ import annotations

from torch import Tensor

from tsbn_kernels.backends.plan.double_backward import plan, work_of
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.backends.triton.passes_double_backward import DoubleBackward
from tsbn_kernels.definition import double_backward as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import Options

Read = tuple[Tensor, Tensor, Tensor]


def double_backward_sums(ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
    if x.numel() == 0:
        return reference.double_backward_sums(ddx, dy, x, mean, options)
    run, read = _prepare(ddx, dy, x, options)
    with ops.on_device(x.device):
        sums: Tensor = run.sums(*read, mean.contiguous())
    return sums


def double_backward(
    ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return reference.double_backward(ddx, dy, x, mean, factors, options)
    run, read = _prepare(ddx, dy, x, options)
    with ops.on_device(x.device):
        gradients: tuple[Tensor, Tensor] = run.gradients(*read, mean.contiguous(), factors.contiguous())
    return gradients


def _prepare(ddx: Tensor, dy: Tensor, x: Tensor, options: Options) -> tuple[DoubleBackward, Read]:
    """The launches for such tensors, and the tensors, or copies in the place of those that no kernel reads."""
    key = "double_backward", ops.class_of(ddx), ops.class_of(dy), ops.class_of(x), options
    run = ops.backwards.get(key)
    if run is None:
        own_x, own_ddx, own_dy = layout.readable(x, options, ddx, dy)
        if own_x is not x or own_ddx is not ddx or own_dy is not dy:
            return _prepare(own_ddx, own_dy, own_x, options)
        made = plan(work_of(x, options), ops.device_of(x.device))
        run = ops.backwards[key] = DoubleBackward(made, ddx, dy, x, options)
    return run, (ddx, dy, x)
