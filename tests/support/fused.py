"""Calls with an epilogue, or with one input for all tasks, and what they must give on the Triton backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.problems import Problem, defined, problem, stack, unstack
from support.tolerances import BACKWARD, FORWARD, Tolerance, assert_within
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.operator.ops import flat

Epilogue = tuple[str, bool]  # the activation, and whether there is a residual
SLOPE = 0.25


@dataclass
class Fused:
    """A problem, and what is fused with it. Statistics are given where ``training`` is false.

    Attributes:
        sums: whether gradients of weight and bias are asked for.
    """

    p: Problem
    residual: Tensor | None
    activation: str
    shared: bool
    training: bool
    sums: bool = True

    def run(self, operators: Any) -> list[Tensor]:
        """All outputs of a forward and a backward pass."""
        p, sums, end = self.p, self.sums, (self.residual, self.activation, SLOPE, self.shared)
        vectors = [p.weight / 2, p.weight.abs() + 0.5]
        if self.training:
            y, *vectors = operators.forward_training(p.x, p.weight, p.bias, *p.options, *end)
        else:
            y = operators.forward_eval(p.x, p.weight, p.bias, *vectors, *p.options, *end)
        needs = self.training, True, sums, sums and p.bias is not None
        dresidual = self.residual is not None and self.activation != "none"
        results = operators.backward(p.dy, p.x, p.weight, *vectors, *p.options, *needs, p.bias, *end, dresidual)
        return [y, *vectors, *results]

    def in_double(self) -> Fused:
        """The same numbers in float64."""
        p = self.p
        bias = None if p.bias is None else p.bias.double()
        p = p._replace(x=p.x.double(), dy=p.dy.double(), weight=p.weight.double(), bias=bias)
        residual = None if self.residual is None else self.residual.double()
        return Fused(p, residual, self.activation, self.shared, self.training, self.sums)


def fused(
    *size: Any, epilogue: Epilogue, shared: bool = False, training: bool = True, sums: bool = True, **options: Any
) -> Fused:
    """Random inputs; of a shared x, the first task's."""
    p = problem(*size, **options)
    streams = unstack(p.x, p.num_tasks, p.stacking)
    memory_format = options.get("memory_format", "contiguous")
    values = torch.randn(streams.shape, generator=torch.Generator().manual_seed(5)).to(p.x.dtype)
    if shared:
        p = p._replace(x=stack(streams[:1], "task_major", memory_format))
    residual = stack(values, p.stacking, memory_format) if epilogue[1] else None
    return Fused(p, residual, epilogue[0], shared, training, sums)


def assert_equals_reference(call: Fused) -> None:
    """In values, shapes and strides."""
    dtype = call.p.x.dtype
    names = "y", "mean", "var", "dx", "dweight", "dbias", "dresidual"
    for name, got, wanted in zip(names, call.run(flat(ops)), call.in_double().run(defined), strict=True):
        if not wanted.numel():
            assert got.shape == wanted.shape, name
            continue
        sums = Tolerance(1e-13 if dtype == torch.float64 else 1e-6, 1)
        tolerance = {"y": FORWARD[dtype], "dx": BACKWARD[dtype], "dresidual": BACKWARD[dtype]}.get(name, sums)
        assert_within(got, wanted, tolerance, scale=max(1.0, float(wanted.abs().max())) * 2)
        assert got.stride() == wanted.stride(), name
