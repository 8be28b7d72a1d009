"""Accuracy against the definition in float64 on the same rounded input, over sizes, layouts, and awkward values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.backends import BACKENDS, HAS_POOL
from support.nonstationary import NONSTATIONARY
from support.problems import (
    DTYPES,
    FORMATS,
    HALVES,
    STACKINGS,
    Problem,
    assert_matches_definition,
    defined,
    definition,
    fill_cache_with_nan,
    in_memory_format,
    problem,
    run,
)
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_relative, assert_within
from torch import Tensor

from benchmarks.timing.environment import available_bytes
from tsbn_kernels import memory

ops = torch.ops.tsbn
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)

# T, N, C, spatial: ones, primes, powers of two and one off, the tails of every vector width, long rows.
SIZES = [
    (1, 1, 1, (2,)),
    (1, 2, 1, ()),
    (1, 1, 3, (2, 2)),
    (2, 3, 1, (5, 5)),
    (3, 7, 13, ()),
    (2, 130, 17, ()),
    (2, 5, 63, (3,)),
    (2, 4, 64, (8, 8)),
    (2, 3, 65, (7,)),
    (3, 2, 5, (31, 33)),
    (2, 2, 3, (4096,)),
    (1, 3, 2, (4099,)),
    (1, 1, 2, (70001,)),
    (2, 300, 3, (11,)),
    (40, 2, 3, (2, 2, 2)),
]

# Interpreted programs take milliseconds each, and there is at least one for each task and channel of rows.
SMALL_SIZES = [
    *SIZES[:5],
    (1, 130, 17, ()),
    (1, 5, 9, (3,)),
    (2, 2, 3, (31, 33)),
    (1, 2, 2, (1024,)),
    (1, 3, 2, (1021,)),
    (2, 100, 2, (11,)),
    (9, 2, 1, (2, 2, 2)),
]
CHANNELS = {"native": 19, "triton": 3}


def cases(name: str, **values: list[object]) -> pytest.MarkDecorator:
    """Parametrises by the backend and by values that depend on it."""
    pairs = [(backend, value) for backend in BACKENDS for value in values[backend]]
    return pytest.mark.parametrize(("backend", name), pairs, ids=str, indirect=["backend"])


@dtypes
@formats
@cases("size", native=SIZES, triton=SMALL_SIZES)
def test_sizes(
    backend: str, size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype
) -> None:
    p = problem(*size, dtype=dtype, memory_format=memory_format)
    assert_matches_definition(p, run(p))


@dtypes
@formats
def test_every_tail(kernels: str, memory_format: str, dtype: torch.dtype) -> None:
    """Each remainder of the widest vector (16 values) and of four of them, in the family's inner dimension."""
    sizes = [*range(1, 36), 47, 48, 49, 63, 64, 65, 79, 127, 128, 129]
    for size in sizes if kernels == "native" else (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 65):
        channels, positions = (2, size) if memory_format == "contiguous" else (size, 3)
        p = problem(1, 2, channels, (positions,), dtype=dtype, memory_format=memory_format, seed=size)
        assert_matches_definition(p, run(p))


@dtypes
@formats
@pytest.mark.parametrize("stacking", STACKINGS)
def test_stackings(stacking: str, memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    layout = {"stacking": stacking, "memory_format": memory_format}
    for gate, bias in (("sigmoid", False), ("identity", True)):
        p = problem(3, 5, CHANNELS[kernels], (4, 5), dtype=dtype, gate=gate, bias=bias, **layout)
        assert_matches_definition(p, run(p))


@dtypes
@formats
@cases("size", native=[(300, 11), (1000, 3), (3000, 2), (100, 49), (4, 1024)], triton=[(300, 11), (1000, 3)])
def test_many_short_rows(size: tuple[int, int], memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Sums must not become one long chain of float32 additions where each row is only a vector's tail.

    Half inputs are the harder ones: their differences to a shift share their last bits, so that additions round all in
    one direction.
    """
    for seed in range(4 if backend == "native" else 1):
        N, S = size
        C = 3 if backend == "native" else 1
        p = problem(2, N, C, (S,), dtype=dtype, memory_format=memory_format, mean=3.0, seed=seed)
        expected = definition(p)
        _, mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
        assert_relative(var, expected.var, STATISTICS[dtype])
        deviation = torch.maximum(expected.mean.abs(), expected.var.sqrt())
        assert_within(mean, expected.mean, Tolerance(STATISTICS[dtype], 0), deviation)


STREAMED = [
    (16, (65, 65)),  # misaligned rows
    (32, (48, 48)),  # whole cache lines
    (131, (17, 17)),  # channels that are no whole cache lines
    (512, (8, 8)),
    (1, (260, 261)),
]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [*((dtype, STREAMED[0]) for dtype in DTYPES), *((d, s) for s in STREAMED[1:] for d in (DTYPES[0], DTYPES[3]))],
    ids=str,
)
@formats
def test_large_outputs(
    memory_format: str, dtype: torch.dtype, size: tuple[int, tuple[int, ...]], streamed: int
) -> None:
    C, spatial = size
    N = -(-streamed // (2 * C * torch.Size(spatial).numel() * dtype.itemsize))
    p = problem(2, N, C, spatial, dtype=dtype, memory_format=memory_format)
    assert streamed <= p.x.nbytes < 2 * streamed
    fill_cache_with_nan(p.x)
    results = run(p)
    assert_matches_definition(p, results)
    if HAS_POOL:
        assert results.y.data_ptr() % (2 << 20) == 0  # a block of the pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
def test_large_inputs_with_gaps(memory_format: str, dtype: torch.dtype, streamed: int) -> None:
    """Every second sample of a batch, and inputs that start off a cache line."""
    wide = problem(2, 12, 16, (65, 65), dtype=dtype, memory_format=memory_format)
    p = wide._replace(x=wide.x[::2], dy=wide.dy[::2])
    assert p.x.numel() * dtype.itemsize >= streamed
    fill_cache_with_nan(p.x)
    assert_matches_definition(p, run(p))
    memory = torch.empty(wide.x.numel() + 3, dtype=dtype)
    shifted = wide._replace(x=memory.as_strided(wide.x.shape, wide.x.stride(), 3).copy_(wide.x))
    assert_matches_definition(shifted, run(shifted))


@dtypes
@formats
@pytest.mark.parametrize("ratio", [0.0, 1.0, 30.0, 1e3])
def test_mean_far_from_zero(ratio: float, memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """The promise: fp32 y within 5e-6 for |mean| / std up to 1, 2e-4 up to 1e3; statistics 1e-6; halves one unit."""
    for C, spatial in ((9, (7, 11)), (3, (80, 81))) if kernels == "native" else ((2, (7, 11)), (1, (17, 18))):
        p = problem(2, 8, C, spatial, dtype=dtype, memory_format=memory_format, mean=0.0, bias=False)
        p = p._replace(x=(p.x.double() + ratio).to(dtype))
        expected = definition(p)
        y, mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
        tolerance = Tolerance(5e-6 if ratio <= 1 else 2e-4, 0) if dtype == torch.float32 else FORWARD[dtype]
        scale = max(1.0, ratio) if dtype == torch.float64 else 1.0
        assert_within(y, expected.y, tolerance, scale)
        assert_relative(var, expected.var, STATISTICS[dtype] * (max(1.0, ratio) if dtype == torch.float64 else 1.0))
        deviation = torch.maximum(expected.mean.abs(), expected.var.sqrt())
        assert_within(mean, expected.mean, Tolerance(STATISTICS[dtype], 0), deviation)


@dtypes
@formats
@pytest.mark.parametrize("change", NONSTATIONARY.values(), ids=NONSTATIONARY)
def test_nonstationary_data(
    change: Callable[[Tensor], Tensor], memory_format: str, dtype: torch.dtype, backend: str
) -> None:
    """A shift taken from the first values, or one for the whole batch, would lose digits here."""
    for C, spatial in ((7, (9, 10)), (7, (80, 90))) if backend == "native" else ((2, (20, 20)),):
        p = problem(1, 6, C, spatial, dtype=torch.float32, bias=False)
        x = in_memory_format(change(p.x), "task_major", memory_format).to(dtype)
        p = p._replace(x=x, dy=p.dy.to(dtype))
        expected = definition(p)
        y, mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
        assert_relative(var, expected.var, STATISTICS[dtype] * (10 if dtype == torch.float64 else 1))
        deviation = torch.maximum(expected.mean.abs(), expected.var.sqrt())
        assert_within(mean, expected.mean, Tolerance(STATISTICS[dtype], 0), deviation)
        ratio = float((expected.mean.abs() * torch.rsqrt(expected.var + p.eps)).max())
        size = max(1.0, float(expected.y.abs().max()) / 4)  # an outlier is many standard deviations away
        tolerance = Tolerance(5e-6 if ratio <= 1 else 2e-4, 0) if dtype == torch.float32 else FORWARD[dtype]
        assert_within(y, expected.y, tolerance, size * (max(1.0, ratio) if dtype == torch.float64 else 1.0))


@dtypes
@formats
@pytest.mark.parametrize("value", [0.0, 7.25, -3e4])
def test_constant_input(value: float, memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Variance is exactly 0, y exactly the bias, and every gradient finite."""
    p = problem(2, 3, CHANNELS[backend], (5, 5), dtype=dtype, memory_format=memory_format)
    assert p.bias is not None
    p = p._replace(x=torch.full_like(p.x, value))
    y, mean, var, *gradients = run(p)
    assert (var == 0).all()
    assert (mean == p.x[0, 0, 0, 0]).all()
    bias = p.bias.repeat_interleave(3, dim=0)[..., None, None].to(dtype).expand_as(y)
    assert torch.equal(y, bias)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert_within(gradients[0], definition(p).dx, BACKWARD[dtype], scale=300.0)  # gate / sqrt(eps)


@dtypes
@formats
def test_tiny_values(memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Subnormal inputs: y is (nearly) the bias, nothing traps, nothing is lost in the mean."""
    p = problem(2, 4, CHANNELS[backend], (4, 4), dtype=dtype, memory_format=memory_format)
    p = p._replace(x=(p.x * torch.finfo(dtype).smallest_normal / 8).to(dtype))
    expected = definition(p)
    y, mean, _ = ops.forward_training(p.x, p.weight, p.bias, *p.options)
    assert_within(y, expected.y, FORWARD[dtype])
    assert_within(mean, expected.mean, Tolerance(1e-3, 0), scale=float(p.x.abs().max().double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@formats
def test_huge_values(memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Squares of 1e17 fit in float32: so do variances."""
    p = problem(2, 4, 5, (6, 6), dtype=dtype, memory_format=memory_format, bias=False)
    p = p._replace(x=p.x * 1e17)
    expected = definition(p)
    y, _, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
    assert_relative(var, expected.var, STATISTICS[dtype])
    assert_within(y, expected.y, FORWARD[dtype], scale=2)


@pytest.mark.parametrize("dtype", HALVES)
@formats
def test_largest_halves(memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Sums of the largest fp16 values, and of bf16 values that it could not hold, do not overflow."""
    p = problem(1, 4, CHANNELS[backend], (16, 16), dtype=dtype, memory_format=memory_format)
    largest = 6e4 if dtype == torch.float16 else 1e15
    p = p._replace(x=(p.x.sign() * largest).to(dtype))
    assert_within(run(p).y, definition(p).y, FORWARD[dtype])


@dtypes
@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@cases("place", native=["first", "last", "middle"], triton=["last"])
def test_non_finite_values_stay_in_their_channel(
    place: str, value: float, memory_format: str, dtype: torch.dtype, backend: str
) -> None:
    C = CHANNELS[backend]
    p = problem(3, 4, C, (5, 7), dtype=dtype, memory_format=memory_format)
    n, h, w = {"first": (4, 0, 0), "last": (7, 4, 6), "middle": (5, 2, 3)}[place]
    clean = run(p)
    x = p.x.clone()
    x[n, C // 2, h, w] = value
    y, mean, var, dx, dweight, dbias = run(p._replace(x=x))
    hit = torch.zeros(3, C, dtype=torch.bool)
    hit[1, C // 2] = True
    everywhere = hit.repeat_interleave(4, dim=0)[..., None, None].expand_as(y)
    assert y[everywhere].isnan().all()
    assert dx[everywhere].isnan().all()
    assert not mean[hit].isfinite().any()
    assert not var[hit].isfinite().any()
    assert dweight[hit].isnan().all()
    for got, wanted in zip((y, dx), (clean.y, clean.dx), strict=True):
        assert torch.equal(got[~everywhere], wanted[~everywhere])
    for vector, wanted in ((mean, clean.mean), (var, clean.var), (dweight, clean.dweight), (dbias, clean.dbias)):
        assert torch.equal(vector[~hit], wanted[~hit])


@formats
def test_evaluation_gradient_does_not_look_at_x(memory_format: str, backend: str) -> None:
    """In evaluation dx = gate * rstd * dy: a NaN in x stays out of it."""
    p = problem(memory_format=memory_format)
    x = p.x.clone()
    x[0, 0, 0, 0] = float("nan")
    mean, var = torch.zeros_like(p.weight), torch.ones_like(p.weight)
    dx, _, dbias, _ = ops.backward(p.dy, x, p.weight, mean, var, *p.options, False, True, True, True)
    assert dx.isfinite().all()
    assert dbias.isfinite().all()


@dtypes
@formats
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_evaluation(gate: str, memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    C = CHANNELS[kernels]
    p = problem(3, 5, C, (4, 5), dtype=dtype, memory_format=memory_format, gate=gate)
    mean, var = torch.randn(3, C).double(), torch.rand(3, C).double() + 0.5
    wide = [tensor.double() for tensor in (p.x, p.weight, p.bias, p.dy) if tensor is not None]
    statistics = [tensor.to(p.weight.dtype) for tensor in (mean, var)]
    rounded = [tensor.double() for tensor in statistics]
    y = ops.forward_eval(p.x, p.weight, p.bias, *statistics, *p.options)
    expected = defined.forward_eval(*wide[:3], *rounded, *p.options)
    assert_within(y, expected, FORWARD[dtype], scale=max(1.0, float(expected.abs().max()) / 4))
    flags = (False, True, True, True)
    got = ops.backward(p.dy, p.x, p.weight, *statistics, *p.options, *flags)
    wanted = defined.backward(wide[3], wide[0], wide[1], *rounded, *p.options, *flags)
    for actual, exact, size in zip(got[:3], wanted[:3], (3.0, 20.0, 20.0), strict=True):
        assert_within(actual, exact, BACKWARD[dtype], scale=size)


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(available_bytes(torch.device("cpu")) < 10 << 30, reason="takes 4 GiB")
@formats
def test_more_elements_than_32_bits_count(memory_format: str) -> None:
    """Every sample is the same memory, and so is that of dy: only the output is large."""
    N, C, S = 2**11 + 1, 64, 2**14  # 2**31 + 2**20 elements
    x, dy = (in_memory_format(torch.randn(1, C, S, 1).bfloat16(), "task_major", memory_format) for _ in range(2))
    vectors = torch.randn(1, C), None, torch.randn(1, C), torch.rand(1, C) + 0.5
    options = 1, 1e-5, "sigmoid", "task_major"
    try:
        many, gradients = (tensor.expand(N, C, S, 1) for tensor in (x, dy))
        for found, one in zip(ops.moments(many, 1, "task_major"), ops.moments(x, 1, "task_major"), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6)
        y, one = ops.forward_eval(many, *vectors, *options), ops.forward_eval(x, *vectors, *options)
        assert all(torch.equal(y[sample], one[0]) for sample in (0, N // 2, N - 1))
        del y
        weight, _, *statistics = vectors
        flags = False, True, False, False
        dx, *_ = ops.backward(gradients, many, weight, *statistics, *options, *flags)
        one, *_ = ops.backward(dy, x, weight, *statistics, *options, *flags)
        assert all(torch.equal(dx[sample], one[0]) for sample in (0, N // 2, N - 1))
        del dx
    finally:
        memory.empty_cache()


@pytest.mark.parametrize("dtype", HALVES)
@formats
def test_outputs_are_rounded_to_nearest_even(memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """With x = 1, mean = 0, var = 1 and eps = 0, y is the weight rounded to the dtype: exactly PyTorch's rounding."""
    finfo = torch.finfo(dtype)
    halfway = [1 + finfo.eps * k / 2 for k in range(-3, 4)]
    smallest = [finfo.smallest_normal * k for k in (1, 0.75, 0.126, finfo.eps, finfo.eps * 1.5, finfo.eps / 2)]
    special = [*halfway, *smallest, finfo.max * (1 + finfo.eps / 8), finfo.max * (1 + finfo.eps), torch.inf, torch.nan]
    any_bits = torch.randint(-(2**31), 2**31, (500 if kernels == "native" else 20,), dtype=torch.int64).int()
    weight = torch.cat((torch.tensor(special), -torch.tensor(special), any_bits.view(torch.float32)))[None]
    x = in_memory_format(torch.ones(2, weight.shape[1], 3, 7, dtype=dtype), "task_major", memory_format)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    y = ops.forward_eval(x, weight, None, mean, var, 1, 0.0, "identity", "task_major")
    torch.testing.assert_close(y, weight.to(dtype)[..., None, None].expand_as(y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_over_the_whole_range(dtype: torch.dtype, kernels: str) -> None:
    """The sigmoid and its slope keep their digits from -100 to 100: no cancellation in 1 - s, no overflow in exp."""
    weight = torch.cat((torch.linspace(-100, 100, 801), torch.tensor([-1e4, 1e4, 0.0, -0.0]))).to(dtype)[None]
    x = torch.randn(8, weight.shape[1], dtype=dtype)
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    options = (1, 0.0, "sigmoid", "task_major")
    y = ops.forward_eval(torch.ones_like(x), weight, None, zeros, ones, *options)[0]
    exact = torch.sigmoid(weight.double())[0]
    near = exact > 1e-37  # below that float32 is subnormal; zero is as good
    assert_relative(y[near], exact[near], 3 * torch.finfo(dtype).eps)
    assert (y[~near] <= 2e-37).all()
    dy = torch.ones_like(x)
    _, dweight, *_ = ops.backward(dy, torch.ones_like(x), weight, zeros, ones, *options, False, False, True, False)
    slope = (torch.sigmoid(weight.double()) * torch.sigmoid(-weight.double()))[0]
    near = slope > 1e-37
    assert_relative(dweight[0][near], 8 * slope[near], 6 * torch.finfo(dtype).eps)
    assert dweight.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps: float, backend: str) -> None:
    p = problem()._replace(eps=eps)
    assert_matches_definition(p, run(p))


@dtypes
@formats
def test_small_outputs_are_written_whole(memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """Memory that malloc reuses holds what was there: NaN first, then other numbers; no result changes."""
    p = problem(2, 3, CHANNELS[backend], (5, 6), dtype=dtype, memory_format=memory_format)
    expected = [tensor.clone() for tensor in run(p)]
    for value in (float("nan"), -1.0):
        left_behind = [torch.full_like(tensor, value) for tensor in expected for _ in range(4)]
        del left_behind
        for got, wanted in zip(run(p), expected, strict=True):
            assert torch.equal(got, wanted)


@formats
def test_vectors_in_the_pool_are_written_whole(memory_format: str) -> None:
    """So many channels that the [T, C] outputs come from the pool, too."""
    p = problem(1, 4, 1 << 18, (), dtype=torch.float32, memory_format=memory_format)
    fill_cache_with_nan(p.x.expand(4, -1, -1).reshape(16, -1), blocks=2)
    results: Problem | tuple[Tensor, ...] = run(p)
    for got, wanted in zip(results, definition(p), strict=True):
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
