"""The CUDA C++ kernels, compiled by nvcc and run in the PTX machine, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_machine import Backward, Forward, backward, forward, parameters
from cuda_source import ptx
from support.nonstationary import NONSTATIONARY
from support.problems import (
    DTYPES,
    FORMATS,
    HALVES,
    STACKINGS,
    Problem,
    Results,
    assert_matches_definition,
    defined,
    definition,
    in_memory_format,
    problem,
)
from support.tolerances import (
    BACKWARD,
    FORWARD,
    STATISTICS,
    Tolerance,
    assert_relative,
    assert_same_bits,
    assert_within,
)
from torch import Tensor

from tools.ptxvm import Out, find_nvcc, launch, memory
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.work import Operands, Strides
from tsbn_kernels.definition.layout import Family

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)
variants = pytest.mark.parametrize(
    ("variant", "parts"), [("streaming", 1), ("resident", 1), ("cluster", 4), ("split", 3), ("together", 3)], ids=str
)
SCHEDULES = ["forward", "reversed", 1, 2]


def both(p: Problem, variant: str, parts: int = 1, **options: Any) -> tuple[Forward, Backward]:
    there = forward(p, variant, parts, **options)
    return there, backward(p, there.mean, there.var, variant, parts, **options)


def check(p: Problem, variant: str, parts: int = 1, **options: Any) -> tuple[Forward, Backward]:
    there, back = both(p, variant, parts, **options)
    assert back.dx is not None and back.dweight is not None and back.dbias is not None
    assert_matches_definition(p, Results(there.y, there.mean, there.var, back.dx, back.dweight, back.dbias))
    return there, back


# T, N, C, spatial: slots whole and not, runs shorter than a slot, ones, primes, more channels than a block has.
SIZES = [
    (1, 2, 1, ()),
    (1, 1, 3, (2,)),
    (3, 7, 13, ()),
    (2, 3, 40, (4, 4)),
    (2, 5, 3, (7, 7)),
    (1, 3, 2, (409,)),
    (2, 40, 72, (2,)),
    (1, 2, 2, (32, 40)),
]


@dtypes
@formats
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype) -> None:
    for variant, parts in (("resident", 1), ("cluster", 4)):
        check(problem(*size, dtype=dtype, memory_format=memory_format), variant, parts)


@dtypes
@formats
@pytest.mark.parametrize("size", [SIZES[4], SIZES[6]], ids=str)
def test_sizes_without_clusters(
    size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype
) -> None:
    for variant, parts in (("streaming", 1), ("split", 3), ("together", 3)):
        check(problem(*size, dtype=dtype, memory_format=memory_format), variant, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@pytest.mark.parametrize("parts", DEVICES["H100"].clusters)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters(schedule: Any, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    """Each size of cluster in every order of warps; the parts of 96 channels are not equal."""
    p = problem(1, 3, 24, (5, 8), dtype=dtype, memory_format=memory_format)
    check(p, "cluster", parts, schedule=schedule, threads=96)


@dtypes
@formats
@variants
@pytest.mark.parametrize("target", [80, 100])
def test_targets(target: int, variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    if variant == "cluster" and target < 90:
        pytest.skip("clusters came with sm_90")
    check(problem(2, 3, 16, (5, 6), dtype=dtype, memory_format=memory_format), variant, parts, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@variants
def test_same_bits_in_every_order(variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    p = problem(1, 5, 8, (9, 8), dtype=dtype, memory_format=memory_format)
    first = both(p, variant, parts, threads=64)
    for schedule in ("reversed", 1):
        for one, other in zip(first, both(p, variant, parts, threads=64, schedule=schedule), strict=True):
            for actual, expected in zip(one[:3], other[:3], strict=True):
                assert actual is not None and expected is not None
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@pytest.mark.parametrize("stacking", STACKINGS)
def test_stackings(stacking: str, memory_format: str, dtype: torch.dtype) -> None:
    for gate, bias, spatial in (("sigmoid", False, (4, 5)), ("identity", True, (3, 3))):
        p = problem(
            3, 4, 16, spatial, dtype=dtype, stacking=stacking, memory_format=memory_format, gate=gate, bias=bias
        )
        check(p, "cluster", 2)


@dtypes
@formats
@variants
def test_shared_input(variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    """An input that all tasks share has a task stride of 0: the kernels read it where it lies."""
    p = problem(3, 4, 16, (4, 6), dtype=dtype, stacking="task_axis", memory_format=memory_format)
    p = p._replace(x=p.x[:1].expand(p.x.shape))
    assert p.x.stride(0) == 0
    check(p, variant, parts)


def _shifted(x: Tensor, by: int) -> Tensor:
    memory = torch.empty(x.numel() + by, dtype=x.dtype)
    return memory.as_strided(x.shape, x.stride(), by).copy_(x)


@dtypes
@formats
@pytest.mark.parametrize("variant", ["streaming", "resident"])
def test_addresses(variant: str, memory_format: str, dtype: torch.dtype) -> None:
    """Inputs with gaps, and inputs that begin off 16 bytes: equally for all operands, or not."""
    wide = problem(2, 8, 16, (5, 9), dtype=dtype, memory_format=memory_format)
    gaps = wide._replace(x=wide.x[::2], dy=wide.dy[::2])
    x_off = wide._replace(x=_shifted(wide.x, 1))
    both_off = wide._replace(x=_shifted(wide.x, 1), dy=_shifted(wide.dy, 1))
    for p in (gaps, x_off, both_off):
        check(p, variant)


@formats
@variants
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_parameters_of_any_dtype(parameters: torch.dtype, variant: str, parts: int, memory_format: str) -> None:
    p = problem(2, 3, 8, (4, 4), dtype=torch.bfloat16, parameter_dtype=parameters, memory_format=memory_format)
    transposed = p._replace(weight=p.weight.T.contiguous().T)
    there = forward(transposed, variant, parts)
    assert_within(there.y, definition(p).y, FORWARD[torch.bfloat16])
    back = backward(p, there.mean, there.var, variant, parts)
    expected = definition(p)
    for actual, wanted in ((back.dweight, expected.dweight), (back.dbias, expected.dbias)):
        assert actual is not None and actual.dtype == parameters
        units = 1 if parameters in HALVES else 0
        assert_within(actual, wanted, Tolerance(1e-5, units), scale=4)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@formats
@pytest.mark.parametrize(("variant", "parts"), [("resident", 1), ("cluster", 2), ("together", 2)])
def test_partial_residency(variant: str, parts: int, memory_format: str, direction: str) -> None:
    """Of five steps of a block, none to all stay in shared memory; the rest is read again."""
    p = problem(1, 5, 4, (16, 16), dtype=torch.float32, memory_format=memory_format)
    there = forward(p, "streaming")
    for kept in (0, 64, 128, 192, 1 << 20):
        if direction == "forward":
            partly = forward(p, variant, parts, resident=kept, threads=64)
            assert_within(partly.y, definition(p).y, FORWARD[p.x.dtype])
        else:
            back = backward(p, there.mean, there.var, variant, parts, resident=kept, threads=64)
            assert back.dx is not None
            assert_within(back.dx, definition(p).dx, BACKWARD[p.x.dtype])


# ---- evaluation, and gradients that nobody asked for -------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_evaluation(gate: str, memory_format: str, dtype: torch.dtype) -> None:
    p = problem(3, 5, 16, (4, 5), dtype=dtype, memory_format=memory_format, gate=gate)
    mean, var = torch.randn(3, 16, dtype=p.weight.dtype), torch.rand(3, 16, dtype=p.weight.dtype) + 0.5
    wide = [tensor.double() for tensor in (p.x, p.weight, p.bias, mean, var) if tensor is not None]
    expected = defined.forward_eval(*wide, *p.options)
    for parts in (1, 3):
        there = forward(p, "evaluation", parts, given=(mean, var))
        assert_within(there.y, expected, FORWARD[dtype], scale=max(1.0, float(expected.abs().max()) / 4))
    wanted = defined.backward(p.dy.double(), wide[0], wide[1], wide[3], wide[4], *p.options, False, True, True, True)[
        :3
    ]
    for variant, parts in (("evaluation", 1), ("split", 3), ("cluster", 2)):
        back = backward(p, mean, var, variant, parts, training=False)
        for actual, exact, size in zip(back[:3], wanted, (3.0, 20.0, 20.0), strict=True):
            assert actual is not None
            assert_within(actual, exact, BACKWARD[dtype], scale=size)


@formats
def test_evaluation_gradient_does_not_look_at_x(memory_format: str) -> None:
    p = problem(memory_format=memory_format)
    p.x[0, 0, 0, 0] = float("nan")
    mean, var = torch.zeros_like(p.weight), torch.ones_like(p.weight)
    back = backward(p, mean, var, "evaluation", training=False)
    assert back.dx is not None and back.dx.isfinite().all()
    alone = backward(p, mean, var, "evaluation", 2, training=False, need=(True, False, False))
    assert alone.dx is not None
    assert_same_bits(alone.dx, back.dx)
    assert alone.reports[0].global_read.bytes < p.x.nbytes + 8 * 4 * p.weight.numel() * 3


@formats
@variants
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", [(True, False, False), (False, True, True), (True, True, False), (False, False, True)])
def test_needed_gradients_only(
    need: tuple[bool, bool, bool], training: bool, variant: str, parts: int, memory_format: str
) -> None:
    p = problem(2, 3, 8, (4, 5), dtype=torch.float32, memory_format=memory_format)
    expected = definition(p)
    mean, var = expected.mean.float(), expected.var.float()
    if not training:
        variant, parts = "evaluation", 1
    back = backward(p, mean, var, variant, parts, training=training, need=need)
    full = backward(p, mean, var, variant, parts, training=training)
    for actual, wanted, needed in zip(back[:3], full[:3], need, strict=True):
        assert (actual is not None) == needed
        if actual is not None and wanted is not None:
            assert_same_bits(actual, wanted)


# ---- awkward values ----------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("change", NONSTATIONARY.values(), ids=NONSTATIONARY)
def test_nonstationary_data(change: Any, memory_format: str, dtype: torch.dtype) -> None:
    for spatial, variant, parts in (((9, 10), "cluster", 2), ((24, 30), "streaming", 1)):
        p = problem(1, 6, 7, spatial, dtype=torch.float32, bias=False)
        p = p._replace(x=in_memory_format(change(p.x), "task_major", memory_format).to(dtype), dy=p.dy.to(dtype))
        assert_good_forward(p, forward(p, variant, parts))


@dtypes
@formats
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1e3])
def test_mean_far_from_zero(ratio: float, memory_format: str, dtype: torch.dtype) -> None:
    p = problem(2, 4, 3, (40, 41), dtype=dtype, memory_format=memory_format, mean=0.0, bias=False)
    p = p._replace(x=(p.x.double() + ratio).to(dtype))
    assert_good_forward(p, forward(p, "resident"))


def assert_good_forward(p: Problem, actual: Forward) -> None:
    """The promise of the CPU backend: see test_numerics."""
    dtype, expected = p.x.dtype, definition(p)
    assert_relative(actual.var, expected.var, STATISTICS[dtype] * (10 if dtype == torch.float64 else 1))
    deviation = torch.maximum(expected.mean.abs(), expected.var.sqrt())
    assert_within(actual.mean, expected.mean, Tolerance(STATISTICS[dtype], 0), deviation)
    ratio = float((expected.mean.abs() * torch.rsqrt(expected.var + p.eps)).max())
    size = max(1.0, float(expected.y.abs().max()) / 4)
    tolerance = Tolerance(5e-6 if ratio <= 1 else 2e-4, 0) if dtype == torch.float32 else FORWARD[dtype]
    assert_within(actual.y, expected.y, tolerance, size * (max(1.0, ratio) if dtype == torch.float64 else 1.0))


@dtypes
@formats
@variants
def test_constant_channels(variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    p = problem(2, 3, 8, (5, 5), dtype=dtype, memory_format=memory_format)
    assert p.bias is not None
    values = torch.tensor([0.0, -3e4, 0.1, 7.0]).to(dtype).repeat(2)
    p = p._replace(x=torch.empty_like(p.x).copy_(values[:, None, None].expand_as(p.x)))
    there, back = both(p, variant, parts)
    assert (there.var == 0).all()
    assert (there.mean == values).all()
    assert torch.equal(there.y, p.bias.repeat_interleave(3, dim=0)[..., None, None].to(dtype).expand_as(there.y))
    assert back.dx is not None
    assert_within(back.dx, definition(p).dx, BACKWARD[dtype], scale=300.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_over_the_whole_range(dtype: torch.dtype) -> None:
    weight = torch.cat((torch.linspace(-100, 100, 81), torch.tensor([-1e4, 1e4, 0.0, -0.0]))).to(dtype)[None]
    x = torch.randn(8, weight.shape[1], dtype=dtype)
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    p = Problem(torch.ones_like(x), torch.ones_like(x), weight, None, 1, "sigmoid", "task_major", eps=0.0)
    y = forward(p, "evaluation", given=(zeros, ones)).y[0]
    exact = torch.sigmoid(weight.double())[0]
    near = exact > 1e-37
    assert ((y.double() - exact).abs() <= 1e-6 * exact)[near].all()
    assert (y[~near] < 1e-36).all()
    slope = backward(p, zeros, ones, "evaluation", training=False).dweight
    assert slope is not None
    exact = 8 * (torch.sigmoid(weight.double()) * torch.sigmoid(-weight.double()))
    near = exact > 1e-36
    assert ((slope.double() - exact).abs() <= 1e-6 * exact)[near].all()


@formats
@variants
def test_non_finite_values_stay_in_their_channel(variant: str, parts: int, memory_format: str) -> None:
    p = problem(2, 3, 16, (5, 7), dtype=torch.float32, memory_format=memory_format)
    clean = forward(p, variant, parts)
    for value in (float("nan"), float("inf")):
        p.x[4, 8, 2, 3] = value
        there = forward(p, variant, parts)
        hit = torch.zeros(2, 16, dtype=torch.bool)
        hit[1, 8] = True
        everywhere = hit.repeat_interleave(3, dim=0)[..., None, None].expand_as(there.y)
        assert there.y[everywhere].isnan().all() and not there.mean[hit].isfinite().any()
        assert not there.var[hit].isfinite().any()
        assert torch.equal(there.y[~everywhere], clean.y[~everywhere]) and torch.equal(
            there.mean[~hit], clean.mean[~hit]
        )


# ---- sizes beyond 32 bits ----------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("variant", ["streaming", "resident"])
def test_offsets_beyond_32_bits(variant: Any, memory_format: str) -> None:
    """Tasks that lie more than 2^32 elements apart: two arrays, which the machine puts that far from each other."""
    p = problem(2, 2, 8, (4, 4), dtype=torch.bfloat16, memory_format=memory_format, stacking="task_axis", bias=False)
    x, y = p.x.clone(), torch.empty_like(p.x)
    mean, var = torch.empty(2, 8), torch.empty(2, 8)
    # In the machine's order of addresses; the second tasks take the places of pointers that a forward does not use.
    first, last = Out(y[0].clone()), Out(y[1].clone())
    pointers = [x[0].clone(), x[1].clone(), 0, first, 0, p.weight, 0, 0, 0, Out(mean), Out(var), last, 0, 0, 0, 0]
    apart = memory._SPACING // x.element_size()
    near = p.x.stride()[1:3] if memory_format == "contiguous" else (p.x.stride(1), 1)
    step = 1 if memory_format == "contiguous" else 8
    strides = Strides(apart, *near, step)
    operands = Operands(strides, None, strides._replace(t=4 * apart))
    family: Family = "rows" if memory_format == "contiguous" else "columns"
    work = Work(2, 2, 8, 16, 2, family, strides=operands)
    plan = rules.lay_out(work, DEVICES["H100"], variant, most_shared_bytes=1 << 16)
    numbers = rules.numbers(plan, plan.phases[0], True, (0, 8, 1, *(0,) * 9))
    struct = parameters(pointers, numbers, p.eps, 0.0)
    kernel = f"tsbn_forward_bf16_{plan.cut.access}"
    launch(ptx(), kernel, plan.programs, plan.threads, [struct], shared=plan.shared_bytes)
    got = torch.stack((first.array, last.array))
    assert_within(got, definition(p).y, FORWARD[torch.bfloat16])
