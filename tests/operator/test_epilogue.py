"""The fused residual and activation: forward, backward, and what they write, against the definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.epilogues import (
    SLOPE,
    Call,
    assert_correct,
    assert_same_bits_for_every_number_of_threads,
    backward,
    forward,
    make_call,
    ops,
    run,
)
from support.problems import DTYPES, FORMATS, STACKINGS, defined, fill_cache_with_nan, in_memory_format, problem
from support.tolerances import BACKWARD, assert_same_bits, assert_within
from torch import Tensor

from tsbn_kernels.definition.activations import ACTIVATIONS, TABLE, as_module

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)
BOTH = (False, True)


@dtypes
@formats
def test_activations(memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """Each activation in training and evaluation, with a residual and without; stackings and gates take turns."""
    cases = list(itertools.product(("none", *ACTIVATIONS), BOTH, BOTH))
    native = kernels == "native"
    for index, (activation, residual, training) in enumerate(cases if native else cases[DTYPES.index(dtype) :: 4]):
        layout = {"memory_format": memory_format, "stacking": STACKINGS[index % 3]}
        options = {"dtype": dtype, "gate": ("sigmoid", "identity")[index % 2], "bias": index % 5 != 0, **layout}
        size = (3, 5, 19, (4, 5)) if native else (2, 3, 3, (5,))
        call = make_call(*size, activation=activation, residual=residual, training=training, seed=index, **options)
        assert_correct(call, run(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
def test_every_tail(kernels: str, memory_format: str, dtype: torch.dtype) -> None:
    """Each remainder of the widest vector and of four of them, in the family's inner dimension."""
    native = kernels == "native"
    for size in (*range(1, 36), 47, 63, 64, 65, 79, 127, 128, 129) if native else (1, 3, 16, 33):
        channels, positions = (2, size) if memory_format == "contiguous" else (size, 3)
        activation = ACTIVATIONS[size % len(ACTIVATIONS)]
        options = {"dtype": dtype, "memory_format": memory_format, "seed": size}
        call = make_call(1, 3, channels, (positions,), activation=activation, residual=True, **options)
        assert_correct(call, run(call))


@pytest.mark.parametrize("size", [(2, 3, 7, ()), (1, 1, 2, (4099,)), (2, 130, 2, (11,)), (9, 2, 1, (2, 2, 2))])
@formats
def test_sizes(size: tuple[int, int, int, tuple[int, ...]], memory_format: str, backend: str) -> None:
    if backend == "triton" and size[1] > 100:
        size = (1, 20, 2, (11,))
    for training in BOTH:
        call = make_call(*size, activation="gelu", residual=True, training=training, memory_format=memory_format)
        assert_correct(call, run(call))


@formats
@pytest.mark.parametrize("training", BOTH)
def test_subsets_of_gradients(training: bool, memory_format: str, backend: str) -> None:
    """What is not asked for is empty, and the rest has the bits that it has among all."""
    size = (2, 4, 5, (6,)) if backend == "native" else (1, 3, 2, (5,))
    options = {"residual": True, "training": training, "memory_format": memory_format}
    for activation in ("relu", "silu") if backend == "native" else ("leaky_relu",):
        call = make_call(*size, activation=activation, **options)
        _, *vectors = forward(call)
        everything = backward(call, *vectors)
        subsets = list(itertools.product(BOTH, repeat=4))
        for needs in subsets if backend == "native" else subsets[1::3]:
            for got, wanted, needed in zip(backward(call, *vectors, needs), everything, needs, strict=True):
                assert_same_bits(got, wanted if needed else wanted.new_empty(0))


@dtypes
@formats
@pytest.mark.parametrize("training", BOTH)
def test_leaky_relu_inverted_on_load(training: bool, memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """The backward of y = leaky_relu(v) from y alone: weight, mean and variance are those that v is described by."""
    size = (3, 4, 19, (4, 5)) if kernels == "native" else (2, 3, 2, (5,))
    p = problem(*size, dtype=dtype, memory_format=memory_format)
    assert p.bias is not None
    var = torch.rand(p.weight.shape, dtype=p.weight.dtype) + 0.5
    options = (*p.options, training, True, True, True, None, None, "inverse_leaky_relu", SLOPE)
    got = ops.backward(p.dy, p.x, p.weight, p.bias, var, *options)
    wide = [tensor.double() for tensor in (p.dy, p.x, p.weight, p.bias, var)]
    for actual, wanted in zip(got, defined.backward(*wide, *options), strict=True):
        scale = max(1.0, float(wanted.abs().max())) * 4 if wanted.numel() else 1.0
        assert_within(actual, wanted, BACKWARD[dtype], scale)


# ---- values ------------------------------------------------------------------------------------------------------


def at(z: Tensor, activation: str, dy: Tensor) -> tuple[Tensor, Tensor]:
    """``act(z)`` and ``dy * act'(z)``: in evaluation with mean 0, variance 1 and weight 1, z is x."""
    zeros, ones = torch.zeros(1, 1, dtype=z.dtype), torch.ones(1, 1, dtype=z.dtype)
    options = (1, 0.0, "identity", "task_major")
    x, epilogue = z[None, None], (None, activation, SLOPE, False)
    y = ops.forward_eval(x, ones, None, zeros, ones, *options, *epilogue)
    flags = (False, False, False, False, None, *epilogue, True)
    *_, g = ops.backward(dy[None, None], x, ones, zeros, ones, *options, *flags)
    return y[0, 0], g[0, 0]


@pytest.mark.parametrize("activation", [name for name, row in TABLE.items() if row.kinks])
@dtypes
def test_kinks_and_infinities_as_in_pytorch(activation: str, dtype: torch.dtype, kernels: str) -> None:
    infinity = float("inf")
    values = [-0.0, 1.5, -1.5, infinity, -infinity, float("nan"), torch.finfo(dtype).tiny]
    z = torch.tensor([*values, *TABLE[activation].kinks] * 5, dtype=dtype, requires_grad=True)
    dy = torch.linspace(-3, 3, z.numel(), dtype=dtype)
    y, g = at(z.detach(), activation, dy)
    wanted = as_module(activation, SLOPE)(z)
    (gradient,) = torch.autograd.grad(wanted, z, dy)
    torch.testing.assert_close(y, wanted.detach(), rtol=0, atol=0, equal_nan=True)
    number = ~z.isnan()  # PyTorch itself passes NaN on in one of these derivatives and not in the other
    torch.testing.assert_close(g[number], gradient[number], rtol=0, atol=0)


@pytest.mark.parametrize("activation", [name for name, row in TABLE.items() if not row.kinks])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 4e-16)])
def test_smooth_activations_over_the_whole_range(
    activation: str, dtype: torch.dtype, bound: float, kernels: str
) -> None:
    """Errors relative to max(1, |z|); far out they end in zero and in z, without overflow."""
    z = torch.cat((torch.linspace(-30, 30, 3001), torch.logspace(0, 30, 61), -torch.logspace(0, 30, 61))).to(dtype)
    dy = torch.ones_like(z)
    y, g = at(z, activation, dy)
    exact = z.double().requires_grad_()
    wanted = as_module(activation, SLOPE)(exact)
    (gradient,) = torch.autograd.grad(wanted, exact, dy.double())
    size = z.double().abs().clamp_min(1)
    assert ((y.double() - wanted.detach()).abs() <= bound * size).all()
    assert ((g.double() - gradient).abs() <= 3 * bound * size.clamp_max(40)).all()
    nan, _ = at(torch.full((3,), float("nan"), dtype=dtype), activation, dy[:3])
    assert nan.isnan().all()
    top, _ = at(torch.full((3,), float("inf"), dtype=dtype), activation, dy[:3])
    assert (top == float("inf")).all()


@formats
def test_not_a_number_stays_in_its_channel(memory_format: str, backend: str) -> None:
    call = make_call(2, 4, 3, (5,), activation="relu", residual=True, memory_format=memory_format)
    clean, x = run(call), call.p.x.clone()
    x[5, 1, 2] = float("nan")
    got = run(call._replace(p=call.p._replace(x=x)))
    hit = torch.zeros(8, 3, 5, dtype=torch.bool)
    hit[4:, 1] = True
    assert got.y[hit].isnan().all()
    assert got.dx[hit].isnan().all()
    for tensor, wanted in ((got.y, clean.y), (got.dx, clean.dx), (got.dresidual, clean.dresidual)):
        assert torch.equal(tensor[~hit], wanted[~hit])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@pytest.mark.usefixtures("native")
def test_gradient_passes_where_the_output_is_positive(memory_format: str, dtype: torch.dtype) -> None:
    """Forward and backward compute z by one expression: they agree on its sign, however close to zero it is."""
    for size in ((2, 8, 33, (9, 9)), (1, 16, 2, (70, 70))):
        options = {"memory_format": memory_format, "dtype": dtype, "mean": 50.0, "bias": False}
        call = make_call(*size, activation="relu", away_from_kinks=False, **options)
        got = run(call)
        assert_same_bits(got.dresidual, torch.where(got.y > 0, call.p.dy, 0))


# ---- memory ------------------------------------------------------------------------------------------------------


@formats
def test_operands_are_only_read(memory_format: str, backend: str) -> None:
    """A residual with gaps, and an x with others; nothing that is written lies in their memory."""
    T, N, C, spatial = (2, 3, 17, (5, 6)) if backend == "native" else (2, 2, 2, (2, 3))
    for activation in ("none", "leaky_relu"):
        call = make_call(T, N, C, spatial, activation=activation, residual=True, memory_format=memory_format)
        assert call.residual is not None
        operands = [
            in_memory_format(tensor.repeat_interleave(gaps, 0), "task_major", memory_format)
            for tensor, gaps in ((call.p.x, 2), (call.residual, 3), (call.p.dy, 1))
        ]
        x, residual, dy = operands[0][::2], operands[1][1::3], operands[2]
        call = call._replace(p=call.p._replace(x=x, dy=dy), residual=residual)
        before = [operand.clone() for operand in operands]
        got = run(call)
        assert_correct(call, got)
        for operand, wanted in zip(operands, before, strict=True):
            assert_same_bits(operand, wanted)
        memories = [tensor.untyped_storage().data_ptr() for tensor in (*operands, *got) if tensor.numel()]
        assert len(set(memories)) == len(memories)


# Rows off the cache lines, whole lines, and odd channels.
@pytest.mark.parametrize("size", [(2, (161, 161)), (32, (48, 48)), (131, (17, 17))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@pytest.mark.usefixtures("native")
def test_large_outputs(
    memory_format: str, dtype: torch.dtype, size: tuple[int, tuple[int, ...]], streamed: int
) -> None:
    """The bits of each task alone, which is too small to be streamed."""
    C, spatial = size
    N = -(-streamed // (2 * C * torch.Size(spatial).numel() * dtype.itemsize))
    layout = {"memory_format": memory_format, "dtype": dtype}
    for training, activation in ((True, "silu"), (False, "leaky_relu")):
        options = {"residual": True, "training": training, "away_from_kinks": False, **layout}
        call = make_call(2, N, C, spatial, activation=activation, **options)
        assert streamed <= call.p.x.nbytes < 2 * streamed
        fill_cache_with_nan(call.p.x, blocks=4)
        got = run(call)
        alone = [run(task_of(call, t, N)) for t in range(2)]
        for results, wanted in zip(got, zip(*alone, strict=True), strict=True):
            assert_same_bits(results, torch.cat(wanted))
        fill_cache_with_nan(call.p.x, blocks=2)
        *_, dresidual = backward(call, got.mean, got.var, (False, False, False, True))
        assert_same_bits(dresidual, got.dresidual)


def task_of(call: Call, t: int, N: int) -> Call:
    """The call of one of two tasks alone."""
    p, samples, row = call.p, slice(N * t, N * (t + 1)), slice(t, t + 1)
    assert p.bias is not None
    assert call.residual is not None
    given = None if call.given is None else (call.given[0][row], call.given[1][row])
    alone = p._replace(x=p.x[samples], dy=p.dy[samples], weight=p.weight[row], bias=p.bias[row], num_tasks=1)
    return call._replace(p=alone, residual=call.residual[samples], given=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@formats
@pytest.mark.parametrize("size", [(8, 3, 33, (20, 21)), (1, 3, 2, (160, 170)), (2, 700, 1, (15, 15))], ids=str)
@pytest.mark.usefixtures("native")
def test_same_bits_for_every_number_of_threads(
    size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype
) -> None:
    for training, activation in ((True, "silu"), (False, "relu")):
        options = {"training": training, "memory_format": memory_format, "dtype": dtype, "away_from_kinks": False}
        call = make_call(*size, activation=activation, residual=True, **options)
        assert_same_bits_for_every_number_of_threads(call)


# ---- limits ------------------------------------------------------------------------------------------------------


@formats
def test_nothing_of_nothing(memory_format: str, backend: str) -> None:
    for residual, training in itertools.product(BOTH, BOTH):
        call = make_call(2, 2, 3, (4,), residual=residual, training=training, memory_format=memory_format)
        p = call.p._replace(x=call.p.x[:0], dy=call.p.dy[:0])
        empty = run(call._replace(p=p, residual=None if call.residual is None else call.residual[:0]))
        assert empty.y.shape == empty.dx.shape == empty.dresidual.shape == p.x.shape
        assert (empty.dweight == 0).all()
        assert (empty.dbias == 0).all()


@pytest.mark.usefixtures("native")
def test_errors_of_the_native_operators() -> None:
    def fails(message: str, call: Call, by: Callable[[Call], object] = forward) -> None:
        with pytest.raises(RuntimeError, match=message):
            by(call)

    def gradients(call: Call) -> object:
        return backward(call, call.p.weight, call.p.weight.abs())

    call = make_call(2, 2, 3, (4, 5), residual=True)
    assert call.residual is not None
    fails("unknown activation 'swish'", call._replace(activation="swish"))
    fails("no forward of inverse_leaky_relu", call._replace(activation="inverse_leaky_relu", residual=None))
    fails("no residual", call._replace(activation="inverse_leaky_relu"), gradients)
    for by in (forward, gradients):
        fails("residual must have the shape", call._replace(residual=call.residual[:, :2]), by)
        fails("residual must have the shape", call._replace(residual=call.residual.double()), by)
