"""The epilogue of the CUDA C++ kernels in the PTX machine, against its definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_cases import SLOPE, Exact, case, check, check_gradients, exact
from cuda_machine import Epilogue, backward, counted, forward
from support.problems import DTYPES, FORMATS, STACKINGS, defined, in_double, in_memory_format, problem
from support.tolerances import FORWARD, Tolerance, assert_same_bits, assert_within

from tools.ptxvm import find_nvcc
from tsbn_kernels.backends.plan import Work
from tsbn_kernels.backends.plan.slots import pass_of
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)
variants = pytest.mark.parametrize(
    ("variant", "parts"), [("streaming", 1), ("resident", 1), ("cluster", 4), ("split", 3), ("together", 3)], ids=str
)


@dtypes
@formats
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, memory_format: str, dtype: torch.dtype) -> None:
    """Each with and without a residual, of an even size and of one whose runs do not fill slots."""
    for residual, spatial, variant, parts in ((True, (3, 5), "resident", 1), (False, (4, 4), "cluster", 2)):
        options = {"dtype": dtype, "memory_format": memory_format}
        p, epilogue = case(activation, residual, 2, 3, 16, spatial, **options)
        check(p, epilogue, variant, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
@variants
@pytest.mark.parametrize("size", [(2, 40, 72, (2,)), (3, 7, 13, ()), (1, 3, 2, (209,))], ids=str)
def test_sizes(size: Any, variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    p, epilogue = case("leaky_relu", True, *size, dtype=dtype, memory_format=memory_format)
    check(p, epilogue, variant, parts)


@formats
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("target", [80, 100])
def test_stackings(target: int, stacking: str, memory_format: str) -> None:
    for gate, bias, dtype in (("sigmoid", False, torch.float16), ("identity", True, torch.float32)):
        options = {"stacking": stacking, "memory_format": memory_format, "gate": gate, "bias": bias, "dtype": dtype}
        p, epilogue = case("silu", True, 2, 4, 16, (3, 3), **options)
        check(p, epilogue, "split", 3, target=target)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_alone(memory_format: str, dtype: torch.dtype) -> None:
    p, epilogue = case("none", True, 2, 5, 24, (3, 3), dtype=dtype, memory_format=memory_format)
    for variant, parts in (("resident", 1), ("cluster", 2)):
        there = forward(p, variant, parts, epilogue=epilogue)
        assert_within(there.y, exact(p, epilogue).y, FORWARD[dtype])


@formats
def test_operands_of_other_addresses(memory_format: str) -> None:
    """A residual with gaps, and one that begins off 16 bytes: scalar accesses, and the same results."""
    p, epilogue = case("relu", True, 2, 8, 16, (5, 4), memory_format=memory_format)
    assert epilogue.residual is not None
    memory = torch.zeros(epilogue.residual.numel() + 1)
    off = memory.as_strided(epilogue.residual.shape, epilogue.residual.stride(), 1).copy_(epilogue.residual)
    result = check(p, epilogue._replace(residual=off), "resident")
    assert result.plan.cut.access == "scalar"
    gaps = in_memory_format(epilogue.residual.repeat_interleave(2, 0), p.stacking, memory_format)[::2]
    check(p, epilogue._replace(residual=gaps), "cluster", 2)


@dtypes
@formats
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_evaluation(activation: str, memory_format: str, dtype: torch.dtype) -> None:
    p, epilogue = case(activation, True, 2, 3, 16, (4, 5), dtype=dtype, memory_format=memory_format)
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(2, 16, generator=generator) / 4, torch.rand(2, 16, generator=generator) + 0.5
    given = given[0].to(p.weight.dtype), given[1].to(p.weight.dtype)
    wanted = exact(p, epilogue, given)
    assert wanted.nearest_kink > 1e-6
    there = forward(p, "evaluation", 3, given=given, epilogue=epilogue)
    assert_within(there.y, wanted.y, FORWARD[dtype], max(1.0, float(wanted.y.abs().max()) / 4))
    every, nothing_summed = (True, True, True, True), (True, False, False, True)
    for variant, parts, need in (("evaluation", 1, every), ("cluster", 2, every), ("evaluation", 3, nothing_summed)):
        back = backward(p, *given, variant, parts, training=False, epilogue=epilogue, need=need)
        check_gradients(p, back, wanted)
        assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)


@formats
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", [need for need in itertools.product((True, False), repeat=4) if any(need)], ids=str)
def test_needed_gradients_only(need: tuple[bool, ...], training: bool, memory_format: str) -> None:
    p, epilogue = case("relu", True, 2, 3, 8, (4, 3), memory_format=memory_format)
    wanted = exact(p, epilogue)
    mean, var = wanted.mean.float(), wanted.var.float()
    single = not training or need == (False, False, False, True)
    back = backward(
        p, mean, var, "evaluation" if single else "resident", training=training, epilogue=epilogue, need=need
    )
    assert tuple(result is not None for result in back[:4]) == need
    check_gradients(p, back, wanted if training else exact(p, epilogue, (mean, var)))
    assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)


@dtypes
@formats
@variants
def test_inverse_leaky_relu(variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    """x holds the layer's output u = leaky_relu(v): v takes its place, and has the sign of u."""
    p = problem(2, 3, 16, (4, 5), dtype=dtype, memory_format=memory_format)
    p = p._replace(x=torch.where(p.x.abs() < 0.01, torch.ones_like(p.x), p.x), eps=0.0)
    wide = in_double(p)
    v = torch.where(wide.x > 0, wide.x, wide.x / SLOPE)
    g = torch.where(wide.x > 0, wide.dy, wide.dy * SLOPE)
    mean, var = defined.moments(v, p.num_tasks, p.stacking)
    gradients = defined.backward(g, v, wide.weight, mean, var, *p.options, True, True, True, True)[:3]
    narrow = (vector.to(reference.accumulate_dtype(dtype)) for vector in (mean, var))
    back = backward(p, *narrow, variant, parts, epilogue=Epilogue("inverse_leaky_relu", None, SLOPE))
    check_gradients(p, back, Exact(g, mean, var, *gradients, g, 1.0))


@formats
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str, memory_format: str) -> None:
    """Where sigmoids and normal distributions run out of digits: no NaN, and the limits."""
    p, _ = case(activation, False, 1, 2, 16, (4, 4), memory_format=memory_format, gate="identity", bias=False)
    size = torch.tensor(
        [-1e30, -1e4, -90.0, -20.0, -6.0, -1.0, -1e-3, 1e-3, 1.0, 6.0, 20.0, 90.0, 1e4, 1e30, 3.0, -3.0]
    )
    p = p._replace(x=torch.ones_like(p.x), weight=size[None].clone(), eps=0.0)
    given = (torch.zeros(1, 16), torch.ones(1, 16))
    epilogue = Epilogue(activation, None, SLOPE)
    wanted = exact(p, epilogue, given)
    there = forward(p, "evaluation", given=given, epilogue=epilogue)
    per_channel = size.abs().clamp_min(1)[None, :, None, None]
    assert_within(there.y, wanted.y, Tolerance(3e-7, 0), per_channel)
    back = backward(p, *given, "evaluation", training=False, need=(False, False, False, True), epilogue=epilogue)
    assert back.dresidual is not None
    assert_within(back.dresidual, wanted.dresidual, Tolerance(1e-6, 0), p.dy.double().abs().clamp_min(1))


@formats
@variants
def test_same_bits_in_every_order(variant: str, parts: int, memory_format: str) -> None:
    p, epilogue = case("gelu", True, 1, 5, 8, (6, 8), dtype=torch.bfloat16, memory_format=memory_format)
    first = check(p, epilogue, variant, parts, threads=64)
    for schedule in ("reversed", 1):
        other = check(p, epilogue, variant, parts, threads=64, schedule=schedule)
        for actual, expected in zip(first[:4], other[:4], strict=True):
            assert actual is not None and expected is not None
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@formats
@pytest.mark.parametrize(
    ("variant", "parts", "options"),
    [
        ("streaming", 1, {}),
        ("resident", 1, {}),
        ("cluster", 8, {}),
        ("split", 3, {}),
        ("resident", 1, {"resident": 64, "threads": 64}),
    ],
    ids=str,
)
def test_bytes(variant: str, parts: int, options: dict[str, int], memory_format: str, dtype: torch.dtype) -> None:
    """A residual is read once forward; backward x, dy and the residual are kept alike."""
    p, epilogue = case("relu", True, 2, 4, 64, (8, 8), dtype=dtype, memory_format=memory_format)
    there = forward(p, variant, parts, epilogue=epilogue, **options)
    back = backward(
        p, there.mean, there.var, variant, parts, epilogue=epilogue, need=(True, True, True, True), **options
    )
    for result in (there, back):
        assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)
    if variant in ("resident", "cluster") and not options:
        vectors = p.weight.nbytes * 4 * parts
        assert 0 <= counted(there)[0] - 2 * p.x.nbytes <= vectors
        assert 0 <= counted(back)[0] - 3 * p.x.nbytes <= vectors
        assert 0 <= counted(back)[1] - 2 * p.x.nbytes <= vectors


def test_kernels_without_an_epilogue_are_the_plain_ones() -> None:
    p = problem()
    assert pass_of(Work(3, 4, 5, 42, 4, direction="backward")) == "backward"
    assert forward(p, "streaming", epilogue=Epilogue()).plan == forward(p, "streaming").plan
