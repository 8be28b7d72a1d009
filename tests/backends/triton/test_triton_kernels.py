"""The Triton kernels in Triton's interpreter: any input, by every plan. test_numerics runs on them, too."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.problems import (
    FORMATS,
    STACKINGS,
    Problem,
    assert_matches_definition,
    defined,
    in_double,
    problem,
    run,
    unstack,
)
from support.strategies import Call, assert_equals_the_definition, calls
from support.tolerances import BACKWARD, FORWARD, assert_relative, assert_same_bits, assert_within

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from support.interpreter import Function, device, dispatched, interpreted, passes  # noqa: E402

from tools.ptxvm import compile_triton  # noqa: E402
from tsbn_kernels.backends.plan import Device  # noqa: E402
from tsbn_kernels.backends.triton.kernels.tiles import Tile  # noqa: E402
from tsbn_kernels.backends.triton.passes import Pass, reach_of  # noqa: E402

# A block of these devices has so few threads that a slab of more than 128 to 512 values is streamed, in tiles of 64;
# where there are many multiprocessors for few slabs, it is split.
FEW, MANY = device(threads=16, multiprocessors=2), device(threads=16, multiprocessors=8)
BLOCKS = pytest.mark.parametrize("toy", [FEW, MANY], ids=["few", "many"])


# ---- every plan ------------------------------------------------------------------------------------------------------

FAMILIES, DIRECTIONS = ("rows", "columns"), ("forward", "backward")
REDUCTIONS = "resident", "streaming", "split"
ALL_KINDS: set[Hashable] = {
    *product(REDUCTIONS, FAMILIES, DIRECTIONS, (True,)),
    *product(REDUCTIONS, FAMILIES, ("backward",), (False,)),  # the gradients of weight and bias
    *product(("elementwise",), FAMILIES, DIRECTIONS, (False,)),
    *product(REDUCTIONS, FAMILIES, DIRECTIONS, ("even", "uneven")),
    *product(REDUCTIONS, FAMILIES, DIRECTIONS, (torch.float32, torch.float64)),
    *product(REDUCTIONS, FAMILIES, DIRECTIONS, ("tasks inner",)),
}
# T, N, C, spatial: whole tiles, and others.
PLANNED = [(3, 4, 2, (8,)), (3, 5, 3, (7,)), (2, 3, 3, (5,)), (2, 8, 2, (80,)), (2, 3, 2, (193,))]


def kinds(run: Pass) -> set[Hashable]:
    """What is to be reached: variants, and what their kernels are specialised for."""
    plan, work = run.plan, run.plan.work
    tile = Tile(*(getattr(value, "value", value) for value in run.tile))
    assert (work.family == "columns", plan.tile) == (tile.COLUMNS, (tile.A, tile.B))
    assert (tl.float64 == tile.ACC) == (run.accumulate == torch.float64)
    special = ["even" if tile.EVEN else "uneven", run.accumulate, *(["tasks inner"] if tile.TASKS_INNER else [])]
    variant = plan.variant, work.family, work.direction
    return {(*variant, work.training), *((*variant, kind) for kind in special)}


def test_every_plan_is_reached() -> None:
    reached: set[Hashable] = set()
    # The float64 input is one that all tasks share.
    for toy, size, memory_format, dtype in product((FEW, MANY), PLANNED, FORMATS, (torch.float32, torch.float64)):
        shared = dtype == torch.float64
        p = problem(*size, dtype=dtype, memory_format=memory_format, stacking="task_axis")
        p = p._replace(x=p.x[:1].expand_as(p.x) if shared else p.x)
        with dispatched(toy):
            assert_matches_definition(p, run(p))
            assert_evaluation_matches_definition(p)
            reached.update(*map(kinds, passes()))
    assert reached >= ALL_KINDS, ALL_KINDS - reached


def assert_evaluation_matches_definition(p: Problem) -> None:
    """Y by given statistics, and its gradients: all of them, and those of x alone, which need no sums."""
    mean, var = p.weight / 2, p.weight.abs() + 0.5
    exact = in_double(p)
    vectors = exact.weight, mean.double(), var.double()
    y = torch.ops.tsbn.forward_eval(p.x, p.weight, p.bias, mean, var, *p.options)
    expected = defined.forward_eval(exact.x, vectors[0], exact.bias, *vectors[1:], *p.options)
    assert_within(y, expected, FORWARD[p.x.dtype], scale=max(1.0, float(expected.abs().max()) / 4))
    for parameters in (True, False):
        needs = False, True, parameters, parameters
        got = torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, *needs)
        wanted = defined.backward(exact.dy, exact.x, *vectors, *p.options, *needs)
        for actual, gradient in zip(got, wanted, strict=True):
            if gradient.numel():
                size = max(1.0, float(gradient.abs().max()) / 4)
                assert_within(actual, gradient, BACKWARD[p.x.dtype], scale=size)


# ---- any input -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(calls(samples=st.sampled_from([1, 2, 3, 4, 5, 16, 31]), most_vectors=12), st.sampled_from([FEW, MANY]))
def test_any_input(call: Call, toy: Device) -> None:
    """Sizes, strides, dtypes, gates, eps and the gradients that are asked for, at random; no offset overflows."""
    assume(call.x.numel() <= 6000)
    with dispatched(toy, overflow=True):
        assert_equals_the_definition(call)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@BLOCKS
@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_for_every_stacking_and_alignment(memory_format: str, toy: Device) -> None:
    layouts = {name: problem(2, 5, 3, (107,), stacking=name, memory_format=memory_format) for name in STACKINGS}
    first, *others = layouts.values()
    memory = torch.empty(first.x.numel() + 1)
    shifted = first._replace(x=memory.as_strided(first.x.shape, first.x.stride(), 1).copy_(first.x))
    with dispatched(toy):
        expected = run(first)
        for p in (first, *others, shifted):
            results = run(p)
            for got, wanted in zip(results[1:3] + results[4:], expected[1:3] + expected[4:], strict=True):
                assert_same_bits(got, wanted)
            for got, wanted in zip((results.y, results.dx), (expected.y, expected.dx), strict=True):
                assert_same_bits(*(unstack(t, 2, q.stacking).contiguous() for t, q in ((got, p), (wanted, first))))


@BLOCKS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_that_are_not_asked_for(memory_format: str, training: bool, toy: Device) -> None:
    """They are empty, and the others keep their bits."""
    p = problem(3, 5, 2, (53,), memory_format=memory_format)
    mean, var = p.weight / 2, p.weight.abs() + 0.5
    with dispatched(toy):
        everything = torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, training, True, True, True)
        for needs in product((True, False), repeat=3):
            some = torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, training, *needs)
            for got, wanted, need in zip(some[:3], everything, needs, strict=False):
                assert_same_bits(got, wanted if need else wanted.new_empty(0))


# ---- the interpreter itself ------------------------------------------------------------------------------------------


def add_one(x, y, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + k, tl.load(x + k, mask=k < n, other=0.0) + 1.0, mask=k < n)


def convert(x, y, total, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    values = tl.load(x + tl.arange(0, SIZE))
    tl.store(y + tl.arange(0, SIZE), values.to(y.dtype.element_ty))
    tl.store(total, tl.sum(values.to(tl.float32), 0))


def far(x, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, SIZE) * 0 + n * 65536 * 0, tl.zeros((SIZE,), tl.float32))


def snapshot() -> list[dict[str, object]]:
    """All that an interpreter may have changed in triton.language."""
    return [dict(vars(part)) for part in (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)]


def test_the_language_is_as_it_was_afterwards() -> None:
    """The same process compiles kernels."""
    before = snapshot()
    x = torch.arange(10.0)
    y = torch.empty(10)
    for _ in range(2):  # what is patched is looked for once
        Function(add_one)[(3, 1, 1)](x, y.zero_(), 10, 4)
        assert torch.equal(y, x + 1)
    for now, then in zip(snapshot(), before, strict=True):
        names = {name for name in now.keys() | then.keys() if now.get(name) is not then.get(name)}
        assert all(name.startswith("__") or name not in then for name in names), names
    assert not triton.knobs.runtime.interpret
    compiled, _ = compile_triton(triton.jit(add_one), [x, y, 10], SIZE=4)
    assert "st.global" in compiled.asm["ptx"]


def products(y, n, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(y, (n.to(tl.int64) if wide else n) * 4)
    tl.store(y + 1, n.to(tl.int64) + (n - 2 + n if wide else n + n))


def test_a_narrow_sum_or_product_that_overflows_is_found() -> None:
    y = torch.empty(2, dtype=torch.int64)
    for n, wide, found in (
        (1 << 28, False, False),
        (1 << 29, False, True),
        (1 << 30, True, False),
        (1 << 30, False, True),
    ):
        with interpreted(FEW, overflow=True), pytest.raises(Exception, match="overflow") if found else nullcontext():
            Function(products)[(1, 1, 1)](y, n, wide)
        if not found:
            assert y.tolist() == [4 * n, 3 * n - 2 * wide]


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_conversion_to_bfloat16_rounds_to_the_nearest(source: torch.dtype) -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x00008000, 0x7F7FFFFF, 0x7F800000]).int()
    x = torch.cat((ties.view(torch.float32), torch.randn(120), torch.tensor([float("nan"), -0.0]))).to(source)
    for target in (torch.bfloat16, torch.float16):
        y, total = torch.empty(128, dtype=target), torch.empty(1)
        Function(convert)[(1, 1, 1)](x, y, total, 128)
        assert_same_bits(y[:-2], x.to(target)[:-2])
        assert y[-2].isnan()
        back = torch.empty(128, dtype=source)
        Function(convert)[(1, 1, 1)](y, back, total, 128)
        assert_same_bits(back[:-2], y.to(source)[:-2])


def test_offsets_and_runs() -> None:
    """Offsets are of 64 bits where 32 do not reach, whatever the task; runs are aligned as the odd one of the views."""
    dense = (1 << 40, 49 << 11, 49, 1)
    assert reach_of("rows", (2, 32, 2048, 49), [dense]) == (tl.uint32, 1)
    assert reach_of("rows", (2, 32, 1024, 196), [(1 << 40, 196 << 10, 196, 1)]) == (tl.uint32, 4)
    assert reach_of("rows", (2, 2, 64, 4096), [(0, (1 << 32) - 4095, 4096, 1)]) == (tl.int64, 1)
    assert reach_of("rows", (2, 2, 64, 4096), [(0, (1 << 32) - 4096, 4096, 1)]) == (tl.uint32, 16)
    assert reach_of("columns", (2, 512, 24, 1), [(1 << 20, 24, 1, 1), (1 << 20, 28, 1, 1)]) == (tl.int64, 4)
    assert reach_of("columns", (1, 2, 24, 1), [(3, 32, 1, 1)]) == (tl.int64, 8)


def test_sums_keep_their_digits() -> None:
    x = torch.rand(1 << 14)
    y, total = torch.empty_like(x), torch.empty(1)
    Function(convert)[(1, 1, 1)](x, y, total, 1 << 14)
    assert_relative(total, x.double().sum()[None], 2e-7)


def test_what_a_gpu_would_not_tell() -> None:
    x, y = torch.arange(8.0), torch.empty(8)
    with pytest.raises(AssertionError, match="2 addresses outside of all tensors are read"):
        Function(add_one)[(2, 1, 1)](x[:6], y, 8, 4)
    with pytest.raises(AssertionError, match="2 addresses outside of all tensors are written"):
        Function(add_one)[(2, 1, 1)](x, y[:6], 8, 4)
    with pytest.raises(AssertionError, match="an address is written twice"):
        Function(far)[(1, 1, 1)](x, 1, 4)
    with interpreted(FEW, overflow=True), pytest.raises(AssertionError, match="overflow"):
        Function(far)[(1, 1, 1)](x, 65536, 4)
