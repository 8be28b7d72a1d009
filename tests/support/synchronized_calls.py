"""Calls of the operators for a batch that is spread over processes, compared with the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.epilogues import Call
from support.problems import defined
from support.tolerances import BACKWARD, STATISTICS, Tolerance, assert_relative, assert_within

ops = torch.ops.tsbn


def vectors(call: Call) -> tuple[Tensor, ...]:
    """Statistics and means such as other parts of the batch might have brought about."""
    dtype = torch.float64 if call.p.x.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(3)
    mean, dz_mean, dz_xhat_mean = (torch.randn(call.p.weight.shape, generator=generator).to(dtype) for _ in range(3))
    if call.shared:  # one input has one mean
        mean = mean[:1].repeat(len(mean), 1)
    return mean, mean.square() + 0.5, dz_mean, dz_xhat_mean


def moments(call: Call, by: Any = ops) -> tuple[Tensor, Tensor]:
    mean, var = by.moments(call.p.x, call.p.num_tasks, call.p.stacking, call.shared)
    return mean, var


def gradient(call: Call, given: tuple[Tensor, ...], by: Any = ops, residual: bool = True) -> tuple[Tensor, Tensor]:
    p = call.p
    residual = residual and call.activation != "none"
    dx, dresidual = by.input_gradient(p.dy, p.x, p.weight, *given, *p.options, p.bias, *call.epilogue, residual)
    return dx, dresidual


def assert_correct(call: Call, by: Any = ops) -> None:
    """Against the definition in float64, and the fake kernels' strides."""
    dtype, tasks = call.p.x.dtype, call.p.num_tasks if call.shared else 1
    mean, var = moments(call, by)
    exact_mean, exact_var = moments(call.in_double(), defined)
    assert_within(mean, exact_mean, Tolerance(STATISTICS[dtype], 1), torch.maximum(exact_mean.abs(), exact_var.sqrt()))
    assert_relative(var, exact_var, STATISTICS[dtype])
    given = vectors(call)
    wanted = gradient(call.in_double(), tuple(vector.double() for vector in given), defined)
    for result, exact in zip(gradient(call, given, by), wanted, strict=True):
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        assert_within(result, exact, BACKWARD[dtype], scale * tasks**0.5)
        assert result.stride() == exact.stride()
