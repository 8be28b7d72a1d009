"""Calls of the operators in every layout, their results, and those of the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from support.backends import HAS_POOL
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_relative, assert_within
from tsbn_kernels import memory
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.operator import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
STACKINGS = layout.STACKINGS
FORMATS = ("contiguous", "channels_last")
GATES = ("sigmoid", "identity")
defined = ops.flat(reference)  # the definition, as functions of flat arguments


def in_memory_format(x: Tensor, stacking: str, memory_format: str) -> Tensor:
    """A dense copy of ``x``; channels_last for any number of dimensions."""
    if memory_format == "contiguous":
        return x.contiguous(memory_format=torch.contiguous_format)
    axis = layout.channel_axis(stacking)
    return x.movedim(axis, -1).clone(memory_format=torch.contiguous_format).movedim(-1, axis)


def stack(streams: Tensor, stacking: str, memory_format: str = "contiguous") -> Tensor:
    """Puts streams ``[T, N, C, *]`` into a stacking and a memory format."""
    if stacking == "sample_major":
        streams = streams.transpose(0, 1)
    stacked = streams if stacking == "task_axis" else streams.reshape(-1, *streams.shape[2:])
    return in_memory_format(stacked, stacking, memory_format)


def unstack(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """The streams ``[T, N, C, *]`` of a stacked tensor."""
    if stacking == "task_axis":
        return x
    if stacking == "task_major":
        return x.unflatten(0, (num_tasks, -1))
    return x.unflatten(0, (-1, num_tasks)).transpose(0, 1)


class Problem(NamedTuple):
    """One call of the operators, with a random upstream gradient (never a constant: it would make dx zero)."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    num_tasks: int
    gate: str
    stacking: str
    eps: float = 1e-5

    @property
    def options(self) -> tuple[int, float, str, str]:
        return self.num_tasks, self.eps, self.gate, self.stacking


def problem(
    T: int = 3,
    N: int = 4,
    C: int = 5,
    spatial: tuple[int, ...] = (6, 7),
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    stacking: str = "task_major",
    memory_format: str = "contiguous",
    gate: str = "sigmoid",
    bias: bool = True,
    mean: float = 0.5,
    std: float = 1.0,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    x = (normal(T, N, C, *spatial) * std + mean * torch.linspace(-1, 1, T * C).view(T, 1, C, *(1 for _ in spatial))).to(
        dtype
    )
    dy = normal(T, N, C, *spatial).to(dtype)
    parameters = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, offset = normal(T, C).to(parameters), normal(T, C).to(parameters)
    return Problem(
        stack(x, stacking, memory_format),
        stack(dy, stacking, memory_format),
        weight,
        offset if bias else None,
        T,
        gate,
        stacking,
    )


def in_double(p: Problem) -> Problem:
    """The same numbers, as rounded, in float64: what the definition is computed on."""
    bias = None if p.bias is None else p.bias.double()
    return p._replace(x=p.x.double(), dy=p.dy.double(), weight=p.weight.double(), bias=bias)


class Results(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def run(p: Problem) -> Results:
    """Training forward and backward through the operators that the dispatcher picks."""
    y, mean, var = torch.ops.tsbn.forward_training(p.x, p.weight, p.bias, *p.options)
    return Results(
        y, mean, var, *torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3]
    )


def definition(p: Problem) -> Results:
    """The same from the reference in float64."""
    p = in_double(p)
    y, mean, var = defined.forward_training(p.x, p.weight, p.bias, *p.options)
    return Results(
        y, mean, var, *defined.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3]
    )


def assert_matches_definition(p: Problem, actual: Results) -> None:
    expected = definition(p)
    assert_within(actual.y, expected.y, FORWARD[p.x.dtype], scale=max(1.0, float(expected.y.abs().max()) / 4))
    rstd = torch.rsqrt(expected.var + p.eps)
    deviation = torch.maximum(expected.mean.abs(), 1 / rstd)
    assert_within(actual.mean, expected.mean, Tolerance(STATISTICS[p.x.dtype], 1), scale=deviation)
    assert_relative(actual.var, expected.var, STATISTICS[p.x.dtype])
    tolerance = BACKWARD[p.x.dtype]
    assert_within(actual.dx, expected.dx, tolerance, scale=max(1.0, float(expected.dx.abs().max()) / 4))
    positions = p.x.numel() // p.weight.numel()
    for got, wanted in ((actual.dweight, expected.dweight), (actual.dbias, expected.dbias)):
        exact_enough = Tolerance(STATISTICS[p.x.dtype], 1)  # sums of `positions` random terms
        assert_within(got, wanted, exact_enough, scale=max(1.0, positions**0.5) * 4)


def fill_cache_with_nan(like: Tensor, blocks: int = 3) -> None:
    """Leaves pooled blocks full of NaN behind, so that a value that a kernel does not write is seen."""
    zeros = torch.zeros(like.shape[0], like.shape[1])
    outputs = [
        torch.ops.tsbn.forward_eval(like, zeros[:1], None, zeros[:1], zeros[:1] + 1, 1, 1e-5, "sigmoid", "task_major")
        for _ in range(blocks)
    ]
    for output in outputs:
        output.fill_(float("nan"))
    del outputs
    assert not HAS_POOL or like.nbytes < 1 << 20 or memory.cache_limit() == 0 or memory.cached_bytes() >= like.nbytes
