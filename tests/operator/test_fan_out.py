"""One shared input for T tasks: forward, backward, and what they write, against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.epilogues import (
    Call,
    assert_correct,
    assert_same_bits_for_every_number_of_threads,
    backward,
    forward,
    make_call,
    run,
)
from support.problems import DTYPES, FORMATS, STACKINGS, fill_cache_with_nan, in_memory_format, stack, unstack
from support.tolerances import assert_same_bits
from torch import Tensor

from tsbn_kernels.definition.activations import ACTIVATIONS

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)
BOTH = (False, True)


def fan_out(*size: Any, **options: Any) -> Call:
    return make_call(*size, shared=True, **{"activation": "none"} | options)


@dtypes
@formats
def test_epilogues(memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """Each activation in training and evaluation, with a residual and without, and each stacking."""
    native = kernels == "native"
    cases = list(itertools.product(("none", *ACTIVATIONS), BOTH, BOTH, STACKINGS))
    for index, (activation, residual, training, stacking) in enumerate(cases):
        if not native and index % 12 != 3 * DTYPES.index(dtype) + index // 12 % 3:
            continue
        layout = {"memory_format": memory_format, "stacking": stacking, "dtype": dtype}
        gate = {"gate": ("sigmoid", "identity")[index % 2], "bias": index % 5 != 0}
        epilogue = {"activation": activation, "residual": residual, "training": training}
        size = (3, 5, 19, (4, 5)) if native else (2, 3, 3, (5,))
        call = fan_out(*size, seed=index, **epilogue, **layout, **gate)
        assert_correct(call, run(call))


# T, N, C, spatial: one task and many, the fewest values, channels that fill no vector, one channel, several blocks of a
# sample, several samples to a block, several chunks, and 1-d layers.
SIZES = [
    (1, 3, 5, (6, 7)),
    (40, 2, 3, (4, 4)),
    (3, 1, 4, (2,)),
    (3, 2, 33, ()),
    (5, 130, 17, ()),
    (4, 3, 1, (11,)),
    (2, 2, 3, (91, 93)),
    (3, 70, 2, (15, 15)),
    (2, 600, 67, ()),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@formats
def test_sizes(size: tuple[int, int, int, tuple[int, ...]], memory_format: str, backend: str) -> None:
    T, N, C, spatial = size
    if backend == "triton":
        size = (min(T, 9), min(N, 20), min(C, 5), tuple(min(s, 33) for s in spatial))
    for dtype in (torch.float32, torch.bfloat16):
        options = {"dtype": dtype, "memory_format": memory_format, "stacking": STACKINGS[N % 3]}
        call = fan_out(*size, activation="silu", residual=N % 2 == 0, **options)
        assert_correct(call, run(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
def test_every_tail(kernels: str, memory_format: str, dtype: torch.dtype) -> None:
    native = kernels == "native"
    for size in (*range(1, 36), 47, 63, 64, 65, 79, 127, 128, 129) if native else (1, 3, 16, 33):
        channels, positions = (2, size) if memory_format == "contiguous" else (size, 3)
        options = {"dtype": dtype, "memory_format": memory_format, "seed": size}
        call = fan_out(2, 3, channels, (positions,), activation=ACTIVATIONS[size % len(ACTIVATIONS)], **options)
        assert_correct(call, run(call))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_as_many_copies_of_the_input(dtype: torch.dtype, memory_format: str, backend: str) -> None:
    """y, the statistics and the gradients of parameters are those of T streams that hold the same numbers."""
    size = (3, 4, 9, (6, 7)) if backend == "native" else (2, 2, 2, (2, 3))
    call = fan_out(*size, activation="leaky_relu", residual=True, dtype=dtype, memory_format=memory_format)
    got, T = run(call), call.p.num_tasks
    x = stack(call.p.x.expand(T, *call.p.x.shape), call.p.stacking, memory_format)
    copies = run(call._replace(shared=False, p=call.p._replace(x=x)))
    assert_same_bits(got.y, copies.y)
    exact = unstack(copies.dx, T, call.p.stacking).double().sum(0)
    close = {torch.float32: 1e-5, torch.float16: 5e-3}[dtype]  # the copies' gradients are rounded before they are added
    torch.testing.assert_close(got.dx.double(), exact, rtol=close, atol=close)
    for vector, wanted in zip(got[1:3] + got[4:6], copies[1:3] + copies[4:6], strict=True):
        torch.testing.assert_close(vector, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.mean, got.mean[:1].expand_as(got.mean))
    assert torch.equal(got.var, got.var[:1].expand_as(got.var))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", BOTH)
def test_subsets_of_gradients(training: bool, dtype: torch.dtype, memory_format: str, backend: str) -> None:
    """What is not asked for is empty, and the rest has the bits that it has among all."""
    size = (3, 4, 5, (6,)) if backend == "native" else (2, 3, 2, (5,))
    for activation, residual in (("none", False), ("relu", True)):
        options = {"training": training, "memory_format": memory_format, "dtype": dtype, "residual": residual}
        call = fan_out(*size, activation=activation, **options)
        _, *vectors = forward(call)
        everything = backward(call, *vectors)
        subsets = list(itertools.product(BOTH, repeat=4))
        for needs in subsets if backend == "native" else subsets[1::5]:
            for got, wanted, needed in zip(backward(call, *vectors, needs), everything, needs, strict=True):
                assert_same_bits(got, wanted if needed else wanted.new_empty(0))


@formats
def test_evaluation_gradient_does_not_look_at_x(memory_format: str, backend: str) -> None:
    call = fan_out(2, 3, 2, (5,), training=False, memory_format=memory_format)
    x = call.p.x.clone()
    x[0, 0, 0] = float("nan")
    assert call.given is not None
    clean = backward(call, *call.given)[0]
    assert_same_bits(backward(call._replace(p=call.p._replace(x=x)), *call.given)[0], clean)


@formats
def test_not_a_number_stays_in_its_channel(memory_format: str, backend: str) -> None:
    call = fan_out(2, 4, 3, (5,), activation="relu", residual=True, memory_format=memory_format)
    clean, x = run(call), call.p.x.clone()
    x[2, 1, 3] = float("nan")
    got = run(call._replace(p=call.p._replace(x=x)))
    for tensor, wanted in ((got.y, clean.y), (got.dx, clean.dx), (got.mean, clean.mean), (got.var, clean.var)):
        assert tensor[:, 1].isnan().all()
        assert torch.equal(tensor[:, ::2], wanted[:, ::2])


# ---- memory ------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_are_only_read(dtype: torch.dtype, memory_format: str, backend: str) -> None:
    """A residual with gaps, and an x with others; nothing that is written lies in their memory."""
    T, N, C, spatial = (2, 3, 17, (5, 6)) if backend == "native" else (2, 2, 2, (2, 3))
    layout = {"memory_format": memory_format, "dtype": dtype}
    for stacking, residual in (("task_major", True), ("sample_major", False)):
        call = fan_out(T, N, C, spatial, activation="leaky_relu", residual=True, stacking=stacking, **layout)
        assert call.residual is not None
        operands = [
            in_memory_format(tensor.repeat_interleave(gaps, 0), "task_major", memory_format)
            for tensor, gaps in ((call.p.x, 2), (call.residual, 3), (call.p.dy, 1 + residual))
        ]
        before = [operand.clone() for operand in operands]
        p = call.p._replace(x=operands[0][::2], dy=operands[2][:: 1 + residual])
        call = call._replace(p=p, residual=operands[1][1::3])
        got = run(call)
        assert_correct(call, got)
        for operand, wanted in zip(operands, before, strict=True):
            assert_same_bits(operand, wanted)
        memories = [tensor.untyped_storage().data_ptr() for tensor in (*operands, *got)]
        assert len(set(memories)) == len(memories)


# T outputs are large together, or dx alone.
LARGE = [
    (17, 2, 16, (33, 33)),  # rows off the cache lines
    (16, 2, 32, (24, 24)),  # whole lines
    (5, 3, 131, (17, 17)),  # channels that are no whole lines
    (3, 7, 512, (8, 8)),
    (2, 1, 3, (300, 301)),  # dx, too
]


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@pytest.mark.usefixtures("native")
def test_large_outputs(
    memory_format: str, dtype: torch.dtype, size: tuple[int, int, int, tuple[int, ...]], streamed: int
) -> None:
    """The bits of one task after the other; theirs are too small to be streamed but for the last size."""
    T, N, C, spatial = size
    if dtype == torch.bfloat16:
        N *= 2
    layout = {"memory_format": memory_format, "dtype": dtype, "away_from_kinks": False}
    call = fan_out(T, N, C, spatial, activation="relu", residual=True, training=C != 16, **layout)
    assert call.p.dy.nbytes >= streamed
    assert (call.p.x.nbytes >= streamed) == (size == LARGE[-1])
    fill_cache_with_nan(call.p.dy, blocks=4)
    got = run(call)
    pieces = [run(task_of(call, t)) for t in range(T)]
    for index in (0, 6):
        assert_same_bits(got[index], torch.cat([piece[index] for piece in pieces]))
    total: Tensor = sum(piece.dx.double() for piece in pieces)  # type: ignore[assignment]
    close = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(got.dx.double(), total, rtol=close, atol=T**0.5 * close)


def task_of(call: Call, t: int) -> Call:
    """The call of one task alone."""
    p, row = call.p, slice(t, t + 1)
    assert p.bias is not None
    assert call.residual is not None
    given = None if call.given is None else (call.given[0][row], call.given[1][row])
    dy, residual = (unstack(tensor, p.num_tasks, p.stacking)[t] for tensor in (p.dy, call.residual))
    alone = p._replace(dy=dy, weight=p.weight[row], bias=p.bias[row], num_tasks=1)
    return call._replace(p=alone, residual=residual, given=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@formats
@pytest.mark.parametrize("size", [(8, 3, 33, (20, 21)), (3, 3, 2, (160, 170)), (5, 700, 1, (15, 15))], ids=str)
@pytest.mark.usefixtures("native")
def test_same_bits_for_every_number_of_threads(
    size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype
) -> None:
    for training, stacking in ((True, "sample_major"), (False, "task_major")):
        options = {"training": training, "memory_format": memory_format, "dtype": dtype, "stacking": stacking}
        call = fan_out(*size, activation="silu", residual=True, **options)
        assert_same_bits_for_every_number_of_threads(call)


@formats
def test_nothing_of_nothing(memory_format: str, backend: str) -> None:
    for stacking, training in itertools.product(STACKINGS, BOTH):
        call = fan_out(2, 2, 3, (4,), training=training, stacking=stacking, memory_format=memory_format)
        dy = stack(unstack(call.p.dy, 2, stacking)[:, :0], stacking, memory_format)
        empty = run(call._replace(p=call.p._replace(x=call.p.x[:0], dy=dy)))
        assert empty.y.shape == dy.shape
        assert empty.dx.shape == (0, 3, 4)
        assert (empty.dweight == 0).all()
        assert (empty.dbias == 0).all()
