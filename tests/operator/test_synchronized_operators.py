"""The operators for a batch that is spread over processes: moments alone, and the gradient by given means."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.backends import threads
from support.epilogues import backward, forward, make_call, without_kinks
from support.problems import DTYPES, FORMATS, STACKINGS, defined, fill_cache_with_nan, in_memory_format
from support.synchronized_calls import assert_correct, gradient, moments, vectors
from support.tolerances import Tolerance, assert_same_bits, assert_within
from torch._subclasses import FakeTensorMode

from tsbn_kernels.backends.cuda import batch_norm as cuda
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.activations import ACTIVATIONS
from tsbn_kernels.operator.ops import flat

ops = torch.ops.tsbn
BOTH = (False, True)
formats = pytest.mark.parametrize("memory_format", FORMATS)


@pytest.mark.parametrize("dtype", DTYPES)
@formats
def test_equal_the_definition(memory_format: str, dtype: torch.dtype, kernels: str) -> None:
    """Each activation, with a residual and without, of separate inputs and a shared one, and each stacking."""
    native = kernels == "native"
    cases = list(itertools.product(("none", *ACTIVATIONS), BOTH, BOTH, STACKINGS))
    for index, (activation, residual, shared, stacking) in enumerate(cases):
        if not native and index % 12 != 3 * DTYPES.index(dtype) + index // 12 % 3:
            continue
        size = (3, 5, 19, (4, 5)) if native else (2, 3, 3, (5,))
        options = {"stacking": stacking, "memory_format": memory_format, "dtype": dtype, "seed": index}
        options |= {"gate": ("sigmoid", "identity")[index % 2], "bias": index % 5 != 0, "away_from_kinks": False}
        call = make_call(*size, activation=activation, residual=residual, shared=shared, training=False, **options)
        assert_correct(without_kinks(call, given=vectors(call)[:2]))


SIZES = [
    (1, 3, 5, (6, 7)),
    (40, 2, 3, (4, 4)),
    (3, 2, 33, ()),
    (5, 130, 17, ()),
    (2, 2, 3, (91, 93)),
    (3, 70, 2, (15, 15)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@formats
def test_sizes(size: tuple[int, int, int, tuple[int, ...]], memory_format: str, backend: str) -> None:
    T, N, C, spatial = size
    if backend == "triton":
        size = (min(T, 9), min(N, 20), min(C, 5), tuple(min(s, 33) for s in spatial))
    for shared in BOTH:
        options = {"shared": shared, "memory_format": memory_format, "stacking": STACKINGS[N % 3], "training": False}
        assert_correct(make_call(*size, activation="silu", residual=N % 2 == 0, **options))


@formats
@pytest.mark.parametrize("shared", BOTH)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_batchs_own_means_give_the_gradient_of_the_batch(activation: str, shared: bool, memory_format: str) -> None:
    call = make_call(
        3,
        4,
        5,
        (6, 7),
        activation=activation,
        residual=True,
        shared=shared,
        dtype=torch.float64,
        memory_format=memory_format,
    )
    _, mean, var = forward(call)
    dx, _, _, dresidual = backward(call, mean, var)
    for got, wanted in zip(moments(call), (mean, var), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    gates = reference.gate_values(call.p.weight, call.p.gate)
    by_gates = call._replace(p=call.p._replace(weight=gates, gate="identity"), given=(mean, var))
    _, dot, total, _ = backward(by_gates, mean, var, (False, True, True, False))
    count = call.p.dy.numel() // gates.numel()
    got_dx, got_dresidual = gradient(call, (mean, var, total / count, dot / count))
    torch.testing.assert_close(got_dx, dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_dresidual, dresidual, rtol=1e-12, atol=1e-12)


@formats
@pytest.mark.parametrize("shared", BOTH)
@pytest.mark.usefixtures("native")
def test_every_value_is_written(shared: bool, memory_format: str) -> None:
    """In memory that holds NaN; in parts that have the bits of each task alone."""
    for C, activation, dtype in ((16, "silu", torch.float32), (7, "relu", torch.bfloat16)):
        options = {"memory_format": memory_format, "dtype": dtype, "away_from_kinks": False, "training": False}
        call = make_call(4, 6, C, (61, 64), activation=activation, residual=True, shared=shared, **options)
        given = vectors(call)
        fill_cache_with_nan(call.p.dy, blocks=4)
        for result in gradient(call, given):
            assert result.isfinite().all()
        assert all(result.isfinite().all() for result in moments(call))


@formats
@pytest.mark.parametrize("size", [(8, 3, 33, (20, 21)), (1, 3, 2, (160, 170)), (2, 700, 1, (15, 15))], ids=str)
@pytest.mark.usefixtures("native")
def test_same_bits_for_every_number_of_threads(size: tuple[Any, ...], memory_format: str) -> None:
    for shared, dtype in itertools.product(BOTH, (torch.float32, torch.float16)):
        options = {"shared": shared, "memory_format": memory_format, "dtype": dtype, "training": False}
        call = make_call(*size, activation="silu", residual=True, **options)
        given, results = vectors(call), []
        for count in (1, 2, 3):
            with threads(count):
                results.append((*moments(call), *gradient(call, given)))
        for result in results[1:]:
            for got, wanted in zip(result, results[0], strict=True):
                assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend_name", ["native", "triton", "cuda"])
@pytest.mark.parametrize("shared", BOTH)
def test_nothing_of_nothing(shared: bool, backend_name: str) -> None:
    by: Any = ops
    if backend_name == "triton":
        pytest.importorskip("triton")
        from tsbn_kernels.backends.triton import ops as triton_operators

        by = flat(triton_operators)
    elif backend_name == "cuda":
        by = flat(cuda)
    for stacking in STACKINGS:
        call = make_call(2, 2, 3, (4,), activation="relu", shared=shared, stacking=stacking)
        dy = call.p.dy[:, :0] if stacking == "task_axis" else call.p.dy[:0]
        x = dy if not shared else call.p.x[:0]
        empty = call._replace(p=call.p._replace(x=x, dy=dy))
        mean, var = moments(empty, by)
        dx, dresidual = gradient(empty, vectors(call), by)
        assert mean.shape == var.shape == (2, 3)
        assert not mean.any() and not var.any()
        assert (dx.shape, dresidual.shape) == (x.shape, dy.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    for shared, memory_format in itertools.product(BOTH, FORMATS):
        call = make_call(
            2, 2, 3, (2, 2), activation="silu", residual=True, shared=shared, dtype=dtype, memory_format=memory_format
        )
        p = call.p
        torch.library.opcheck(ops.moments.default, (p.x, p.num_tasks, p.stacking, shared))
        arguments = p.dy, p.x, p.weight, *vectors(call), *p.options, p.bias, *call.epilogue
        for needed in BOTH:
            torch.library.opcheck(ops.input_gradient.default, (*arguments, needed))


def test_fake_outputs_of_strided_inputs() -> None:
    """Shapes, strides and dtypes of the real ones, where x is cut from a larger tensor."""
    for memory_format, shared in itertools.product(FORMATS, BOTH):
        call = make_call(2, 4, 5, (3, 2), activation="relu", shared=shared, memory_format=memory_format)
        call = call._replace(p=call.p._replace(x=torch.cat((call.p.x, call.p.x))[::2]))
        real = (*moments(call), *gradient(call, vectors(call)))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            p = call.p
            x, dy, weight = map(mode.from_tensor, (p.x, p.dy, p.weight))
            fake_call = call._replace(p=p._replace(x=x, dy=dy, weight=weight))
            fake = (*moments(fake_call), *gradient(fake_call, vectors(call)))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.usefixtures("native")
def test_bad_arguments_raise() -> None:
    x, w = torch.randn(4, 5, 3, 2), torch.zeros(2, 5)
    options = 2, 1e-5, "sigmoid", "task_major"
    calls = [
        lambda: ops.moments(x[:3], 2, "task_major"),
        lambda: ops.moments(x, 2, "TNC"),
        lambda: ops.moments(x.int(), 2, "task_major"),
        lambda: ops.moments(x, 0, "task_major", True),
        lambda: ops.input_gradient(x, x, w, w, w, w[0], w, *options),
        lambda: ops.input_gradient(x, x, w, w, w, w, w[:, :4], *options),
        lambda: ops.input_gradient(x.double(), x, w, w, w, w, w, *options),
        lambda: ops.input_gradient(x, x, w, w, w, w, w, *options, None, None, "inverse_leaky_relu", 0.1),
        lambda: ops.input_gradient(x, x, w, w, w, w, w, *options, None, None, "none", 0.0, False, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="tsbn: ") as raised:
            call()
        assert "INTERNAL" not in str(raised.value)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@formats
def test_joined_moments_lose_nothing(memory_format: str, offset: float, backend: str) -> None:
    """Parts of any size, an empty one too, and |mean| >> std."""
    whole = (torch.randn(300, 3, 20, dtype=torch.float64) + offset).float()
    parts = [in_memory_format(part, "task_major", memory_format) for part in whole.split([90, 2, 0, 208])]
    mean, var = (torch.stack(rows) for rows in zip(*(ops.moments(p, 1, "task_major") for p in parts), strict=True))
    counts = torch.tensor([20.0 * len(part) for part in parts], dtype=torch.float64)[:, None, None]
    for joined, exact in zip(
        reference.join_moments(mean, var, counts), defined.moments(whole, 1, "task_major"), strict=True
    ):
        assert_within(joined, exact, Tolerance(1e-6, 2))
