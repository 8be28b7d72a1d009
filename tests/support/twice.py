"""Calls of the operators of the second derivative, and a comparison with their definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.problems import Problem, defined, in_memory_format, problem
from support.tolerances import BACKWARD, STATISTICS, Tolerance, assert_within
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layer_norm
from tsbn_kernels.definition.options import LayerOptions, LayerSaved, Options


class Call(NamedTuple):
    """What the operators take."""

    ddx: Tensor
    dy: Tensor
    x: Tensor
    mean: Tensor
    factors: Tensor
    num_tasks: int
    stacking: str

    def sums(self, by: Any) -> Tensor:
        """The sums, by the operators of a backend with flat arguments."""
        found: Tensor = by.double_backward_sums(*self.read, self.num_tasks, self.stacking)
        return found

    def gradients(self, by: Any) -> tuple[Tensor, Tensor]:
        """The gradients of dy and x."""
        ddy, dx = by.double_backward(*self.read, self.factors, self.num_tasks, self.stacking)
        return ddy, dx

    @property
    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ddx, self.dy, self.x, self.mean


def make_call(*size: Any, **options: Any) -> Call:
    """A call for a problem of such a size."""
    return call_of(problem(*size, **options))


def call_of(p: Problem) -> Call:
    """A call with the x and dy of a problem."""
    generator = torch.Generator().manual_seed(3)
    ddx = torch.randn(p.x.shape, generator=generator).to(p.dy)
    if p.x.stride() != p.x.contiguous().stride():
        ddx = torch.empty_like(p.x).copy_(ddx)
    mean = reference.statistics(p.x, Options(p.num_tasks, p.eps, p.gate, p.stacking)).mean
    factors = torch.randn(7, *p.weight.shape, generator=generator).to(mean.dtype)
    return Call(ddx, p.dy, p.x, mean, factors, p.num_tasks, p.stacking)


def cut_out(call: Call) -> Call:
    """The call with operands that lie in three ways among NaN: their first dimensions have strides of their own."""

    def among_nan(tensor: Tensor, others: int) -> Tensor:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # the first dimension is outermost
        dense = tensor.permute(order).unsqueeze(1)
        nothing = torch.full_like(dense, torch.nan).expand(-1, others, *dense.shape[2:])
        return torch.cat([dense, nothing], 1)[:, 0].permute([order.index(axis) for axis in range(tensor.dim())])

    ddx, dy, x = (among_nan(tensor, k) for k, tensor in enumerate((call.ddx, call.dy, call.x), 1))
    assert ddx.stride()[1:] == call.ddx.stride()[1:]
    return call._replace(ddx=ddx, dy=dy, x=x)


def in_formats(call: Call, memory_format: str) -> Call:
    """The call with ddx and dy in another memory format than x."""
    ddx, dy = (in_memory_format(t, call.stacking, memory_format) for t in (call.ddx, call.dy))
    return call._replace(ddx=ddx, dy=dy)


def assert_equals_definition(call: Call, by: Any) -> None:
    """Sums and gradients are those of the definition in float64, and the gradients have the dtype of x."""
    wide = call._replace(**{name: getattr(call, name).double() for name in ("ddx", "dy", "x", "mean", "factors")})
    dtype, values = call.x.dtype, call.x.numel() // call.mean.numel()
    assert_within(call.sums(by), wide.sums(defined), Tolerance(STATISTICS[dtype], 1), scale=max(1.0, values**0.5) * 8)
    for got, wanted in zip(call.gradients(by), wide.gradients(defined), strict=True):
        assert got.dtype == dtype
        assert_within(got, wanted, BACKWARD[dtype], scale=max(1.0, float(wanted.abs().max())))


# ---- layer normalisation ---------------------------------------------------------------------------------------------


class LayerCall(NamedTuple):
    """What the operator of layer normalisation takes."""

    ddx: Tensor
    dy: Tensor
    saved: LayerSaved
    factors: Tensor
    options: LayerOptions


def layer_call(size: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, options: LayerOptions) -> LayerCall:
    """A call for some samples of a task and a ``normalized_shape``."""
    (samples, *more), shape = size
    T, one = options.num_tasks, (samples, *more, *shape)
    rows = (T, *one) if options.stacking == "task_axis" else (T * samples, *more, *shape)
    x, ddx = (torch.randn(2, *(one if options.fan_out else rows)) + 0.5).to(dtype)
    weight = torch.randn(T, *shape).to(reference.accumulate_dtype(dtype))
    saved = LayerSaved(x, weight, *layer_norm.statistics(x, weight, options))
    return LayerCall(ddx, torch.randn(rows).to(dtype), saved, torch.randn(3, *weight.shape).to(weight), options)


def assert_layer_matches_definition(found: tuple[Tensor, Tensor, Tensor], call: LayerCall) -> None:
    """The gradients and sums are those of the definition in float64, and the gradients have the dtype of x."""
    wide = LayerSaved(*(None if tensor is None else tensor.double() for tensor in call.saved))
    ddx, dy, factors = (tensor.double() for tensor in (call.ddx, call.dy, call.factors))
    *gradients, sums = layer_norm.layer_norm_double_backward(ddx, dy, wide, factors, call.options)
    dtype = call.dy.dtype
    assert_within(found[2], sums, Tolerance(STATISTICS[dtype], 1), scale=dy[..., 0].numel() ** 0.5 * 8)
    # Of the one value of a row nearly all cancels, of terms as large as the square of rstd.
    one = call.options.rms and call.saved.weight[0].numel() == 1
    canceled = float(call.saved.rstd.max()) ** 2 if one else 1.0
    for got, wanted in zip(found, gradients, strict=False):
        assert got.dtype == dtype
        assert_within(got, wanted, BACKWARD[dtype], scale=max(canceled, float(wanted.abs().max())))
