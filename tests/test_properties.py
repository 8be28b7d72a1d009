"""Any input that the package accepts gives the definition's result; any other gives a documented error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import BACKWARD, DTYPES, FORWARD, GATES, STACKINGS, Tolerance, assert_within
from torch import Tensor

from tsbn_kernels import reference, use_backend
from tsbn_kernels.functional import task_batch_norm

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


@st.composite
def strided(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of any strides: dimensions in any order in memory, with gaps that hold NaN."""
    axes = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in shape]
    offset = draw(st.integers(0, 3))
    room = [shape[axis] + gaps[axis] for axis in axes]
    memory = torch.full((offset + torch.Size(room).numel(),), float("nan"), dtype=dtype)
    inverse = [axes.index(axis) for axis in range(len(axes))]
    window = memory[offset:].view(room).permute(inverse)[tuple(slice(0, size) for size in shape)]
    generator = torch.Generator().manual_seed(seed)
    return window.copy_(torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0])))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    T, N, C = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(sizes)
    spatial = draw(st.lists(sizes, max_size=3).filter(lambda s: torch.Size(s).numel() <= 600))
    assume(N * torch.Size(spatial).numel() > 1)
    stacking = draw(st.sampled_from(STACKINGS))
    dtype, gate = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(GATES))
    shape = [T, N, C, *spatial] if stacking == "task_axis" else [T * N, C, *spatial]
    seed = draw(st.integers(0, 99))
    parameter_dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(seed + 1)
    weight, bias = (torch.randn((T, C), generator=generator).to(parameter_dtype) for _ in range(2))
    x = draw(strided(shape, dtype, seed))
    if stacking == "task_axis" and draw(st.booleans()):
        x = x[:1].expand(shape)
    return Call(
        x,
        draw(strided(shape, dtype, seed + 2)) / 8,
        weight,
        draw(st.sampled_from([bias, None])),
        T,
        gate,
        stacking,
        draw(st.booleans()),
        draw(st.sampled_from([1e-5, 1e-3])),
    )


@settings(max_examples=150)
@given(calls())
def test_equals_the_definition(call: Call) -> None:
    statistics = torch.zeros_like(call.weight) + 0.25, torch.ones_like(call.weight) * 0.5
    x, weight = call.x.detach().requires_grad_(), call.weight.clone().requires_grad_()
    bias = None if call.bias is None else call.bias.clone().requires_grad_()
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
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
    gradients = torch.autograd.grad(y, inputs, call.dy)
    assert y.shape == x.shape
    assert y.dtype == x.dtype

    wide = [None if tensor is None else tensor.detach().double() for tensor in (call.x, call.weight, call.bias)]
    exact_x, exact_weight, exact_bias = wide
    assert exact_x is not None
    assert exact_weight is not None
    options = call.num_tasks, call.eps, call.gate, call.stacking
    if call.training:
        mean, var = reference.statistics(exact_x, call.num_tasks, call.stacking)
    else:
        mean, var = (vector.double() for vector in statistics)
    expected = reference.normalize(exact_x, exact_weight, exact_bias, mean, var, *options)
    exact = reference.backward(
        call.dy.double(), exact_x, exact_weight, mean, var, *options, call.training, True, True, True
    )
    # Few values may lie close together, far from zero: then (x - mean) / std has fewer digits than x.
    rstd = torch.rsqrt(var + call.eps)
    condition = float((rstd * (mean.abs() + 1)).max().clamp_min(1)) if call.training else 1.0
    scale = max(1.0, float(expected.abs().max()) / 4) * condition
    assert_within(y, expected, FORWARD[call.x.dtype], scale)
    scale = max(1.0, float(exact[0].abs().max()) / 4) * condition
    assert_within(gradients[0], exact[0], BACKWARD[call.x.dtype], scale)
    for got, wanted in zip(gradients[1:], exact[1:], strict=False):
        units = Tolerance(BACKWARD[call.x.dtype].absolute, 1)
        assert_within(got, wanted, units, max(1.0, float(wanted.abs().max())) * condition)


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=6),
    parameters=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    num_tasks=st.integers(-1, 4),
    stacking=st.sampled_from([*STACKINGS, "other"]),
    gate=st.sampled_from([*GATES, "other"]),
    dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
    training=st.booleans(),
)
def test_anything_else_is_an_error_that_says_so(
    shape: list[int],
    parameters: list[int],
    num_tasks: int,
    stacking: str,
    gate: str,
    dtype: torch.dtype,
    training: bool,
) -> None:
    """No crash, no PyTorch-internal message: ValueError or TypeError, or an output of the right shape."""
    x, weight = torch.zeros(shape).to(dtype), torch.zeros(parameters)
    options = {"num_tasks": num_tasks, "training": training, "stacking": stacking, "gate": gate}
    try:
        y = task_batch_norm(x, weight, None, weight.clone(), weight + 1, **options)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert (y == 0).all()
        return
    assert any(word in refusal for word in ("got", "expected", "not a multiple"))


@settings(max_examples=60)
@given(calls())
def test_reference_backend_accepts_the_same(call: Call) -> None:
    """The same call on the reference backend has the same strides and nearly the same values."""
    options = {"num_tasks": call.num_tasks, "eps": call.eps, "gate": call.gate, "stacking": call.stacking}
    y = task_batch_norm(call.x, call.weight, call.bias, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        other = task_batch_norm(call.x, call.weight, call.bias, **options)  # type: ignore[arg-type]
    assert y.stride() == other.stride()
    torch.testing.assert_close(y, other, rtol=2e-2, atol=2e-2)
