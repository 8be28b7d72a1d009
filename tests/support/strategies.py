"""Random calls of the functional form, in any layout that the package accepts, and what each must give."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from support.problems import DTYPES, GATES, STACKINGS, defined
from support.tolerances import BACKWARD, FORWARD, Tolerance, assert_within
from tsbn_kernels.definition import layout
from tsbn_kernels.functional import task_batch_norm

NEEDS = [needs for needs in itertools.product((True, False), repeat=3) if any(needs)]

few = st.integers(1, 5)
sizes = st.one_of(st.integers(1, 6), st.sampled_from([7, 8, 15, 16, 17, 31, 32, 33, 63, 65]))


class Call(NamedTuple):
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    num_tasks: int
    gate: str
    stacking: str
    training: bool
    eps: float
    needs: tuple[bool, bool, bool]  # gradients of x, weight and bias


@st.composite
def strided(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, seed: int, channel: int) -> Tensor:
    """A tensor of any strides: dimensions in any order in memory, most often one of rows or columns; NaN in gaps."""
    contiguous = list(range(len(shape)))
    channels_last = [*contiguous[:channel], *contiguous[channel + 1 :], channel]
    known = draw(st.sampled_from([contiguous, channels_last, None]))
    axes = known or draw(st.permutations(contiguous))
    gaps = [draw(st.sampled_from([0, 0, 0, 1, 3])) if not known or axis <= channel else 0 for axis in axes]
    offset = draw(st.integers(0, 3))
    room = [shape[axis] + gaps[axis] for axis in axes]
    memory = torch.full((offset + torch.Size(room).numel(),), float("nan"), dtype=dtype)
    inverse = [axes.index(axis) for axis in range(len(axes))]
    window = memory[offset:].view(room).permute(inverse)[tuple(slice(0, size) for size in shape)]
    generator = torch.Generator().manual_seed(seed)
    return window.copy_(torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0])))


@st.composite
def calls(draw: st.DrawFn, samples: st.SearchStrategy[int] = few, most_vectors: int = 325) -> Call:
    T, N = draw(few), draw(samples)
    C = draw(sizes.filter(lambda size: T * size <= most_vectors))
    spatial = draw(st.lists(sizes, max_size=3).filter(lambda s: torch.Size(s).numel() <= 600))
    assume(N * torch.Size(spatial).numel() > 1)
    stacking = draw(st.sampled_from(STACKINGS))
    dtype, gate = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(GATES))
    shape = [T, N, C, *spatial] if stacking == "task_axis" else [T * N, C, *spatial]
    seed = draw(st.integers(0, 99))
    parameter_dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(seed + 1)
    weight, bias = (torch.randn((T, C), generator=generator).to(parameter_dtype) for _ in range(2))
    channel = layout.channel_axis(stacking)
    x = draw(strided(shape, dtype, seed, channel))
    if stacking == "task_axis" and draw(st.booleans()):
        x = x[:1].expand(shape)
    return Call(
        x,
        draw(strided(shape, dtype, seed + 2, channel)) / 8,
        weight,
        draw(st.sampled_from([bias, None])),
        T,
        gate,
        stacking,
        draw(st.booleans()),
        draw(st.sampled_from([1e-5, 1e-3])),
        draw(st.sampled_from(NEEDS)),
    )


def assert_equals_the_definition(call: Call) -> None:
    """The call gives what the reference in float64 gives on the same rounded input."""
    statistics = torch.zeros_like(call.weight) + 0.25, torch.ones_like(call.weight) * 0.5
    x, weight = call.x.detach().requires_grad_(call.needs[0]), call.weight.clone().requires_grad_(call.needs[1])
    bias = None if call.bias is None else call.bias.clone().requires_grad_(call.needs[2])
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
    y = task_batch_norm(
        x,
        weight,
        bias,
        *((None, None) if call.training else statistics),
        num_tasks=call.num_tasks,
        training=call.training,
        eps=call.eps,
        gate=call.gate,
        stacking=call.stacking,
    )
    gradients = iter(torch.autograd.grad(y, inputs, call.dy) if inputs else ())
    assert y.shape == x.shape
    assert y.dtype == x.dtype

    wide = [None if tensor is None else tensor.detach().double() for tensor in (call.x, call.weight, call.bias)]
    exact_x, exact_weight, exact_bias = wide
    assert exact_x is not None
    assert exact_weight is not None
    options = call.num_tasks, call.eps, call.gate, call.stacking
    if call.training:
        mean, var = defined.moments(exact_x, call.num_tasks, call.stacking)
    else:
        mean, var = (vector.double() for vector in statistics)
    expected = defined.forward_eval(exact_x, exact_weight, exact_bias, mean, var, *options)
    exact = defined.backward(
        call.dy.double(), exact_x, exact_weight, mean, var, *options, call.training, True, True, True
    )
    # Few values may lie close together, far from zero: then (x - mean) / std has fewer digits than x.
    rstd = torch.rsqrt(var + call.eps)
    condition = float((rstd * (mean.abs() + 1)).max().clamp_min(1)) if call.training else 1.0
    scale = max(1.0, float(expected.abs().max()) / 4) * condition
    assert_within(y, expected, FORWARD[call.x.dtype], scale)
    if x.requires_grad:
        scale = max(1.0, float(exact[0].abs().max()) / 4) * condition
        assert_within(next(gradients), exact[0], BACKWARD[call.x.dtype], scale)
    for parameter, wanted in ((weight, exact[1]), (bias, exact[2])):
        if parameter is not None and parameter.requires_grad:
            units = Tolerance(BACKWARD[call.x.dtype].absolute, 1)
            assert_within(next(gradients), wanted, units, max(1.0, float(wanted.abs().max())) * condition)
