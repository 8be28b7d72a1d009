"""Calls of the operators of the second derivative, and a comparison with their definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.problems import Problem, defined, in_memory_format, problem
from support.tolerances import BACKWARD, STATISTICS, Tolerance, assert_within
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Options


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
