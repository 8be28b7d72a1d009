"""The fan-out of the CUDA C++ kernels in the PTX machine: one input, T outputs, and the sum of T gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_cases import case, check, check_gradients, exact
from cuda_machine import Epilogue, backward, counted, forward
from support.problems import DTYPES, FORMATS, STACKINGS
from support.tolerances import FORWARD, assert_same_bits, assert_within

from tools.ptxvm import find_nvcc
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.definition.activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("memory_format", FORMATS)
variants = pytest.mark.parametrize(
    ("variant", "parts"), [("streaming", 1), ("resident", 1), ("cluster", 2), ("split", 3), ("together", 3)], ids=str
)
SIZES = [(2, 2, 16, (4, 4)), (3, 3, 13, (3, 5)), (1, 7, 24, ()), (2, 1, 2, (209,)), (5, 20, 40, (2,))]


@dtypes
@formats
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: Any, memory_format: str, dtype: torch.dtype) -> None:
    p, epilogue = case("none", False, *size, shared=True, dtype=dtype, memory_format=memory_format)
    check(p, epilogue, "resident")
    p, epilogue = case("relu", True, *size, shared=True, dtype=dtype, memory_format=memory_format)
    check(p, epilogue, "split", 3)


@formats
@variants
@pytest.mark.parametrize(
    ("activation", "dtype"), [*zip(ACTIVATIONS, itertools.cycle((torch.float32, torch.bfloat16)), strict=False)]
)
def test_activations(activation: str, dtype: torch.dtype, variant: str, parts: int, memory_format: str) -> None:
    """Each activation in one dtype of the two; test_cuda_epilogue has all of them."""
    residual = activation != "gelu"
    p, epilogue = case(activation, residual, 3, 3, 8, (3, 4), shared=True, dtype=dtype, memory_format=memory_format)
    check(p, epilogue, variant, parts)


@formats
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("target", [80, 100])
def test_stackings(target: int, stacking: str, memory_format: str) -> None:
    for gate, bias, dtype in (("sigmoid", False, torch.float16), ("identity", True, torch.float32)):
        options = {"stacking": stacking, "memory_format": memory_format, "gate": gate, "bias": bias, "dtype": dtype}
        p, epilogue = case("relu", True, 3, 4, 16, (3, 3), shared=True, **options)
        check(p, epilogue, "split", 2, target=target)


@dtypes
@formats
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_evaluation(activation: str, memory_format: str, dtype: torch.dtype) -> None:
    """Each task has statistics of its own."""
    p, epilogue = case(activation, True, 3, 3, 16, (4, 5), shared=True, dtype=dtype, memory_format=memory_format)
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(3, 16, generator=generator) / 4, torch.rand(3, 16, generator=generator) + 0.5
    given = given[0].to(p.weight.dtype), given[1].to(p.weight.dtype)
    wanted = exact(p, epilogue, given)
    assert wanted.nearest_kink > 1e-6
    there = forward(p, "evaluation", 3, given=given, epilogue=epilogue)
    assert_within(there.y, wanted.y, FORWARD[dtype], max(1.0, float(wanted.y.abs().max()) / 4))
    all_of_them, nothing_summed = (True, True, True, activation != "none"), (True, False, False, activation != "none")
    for variant, parts, need in (
        ("evaluation", 1, all_of_them),
        ("split", 2, all_of_them),
        ("evaluation", 3, nothing_summed),
    ):
        back = backward(p, *given, variant, parts, training=False, epilogue=epilogue, need=need)
        check_gradients(p, back, wanted)
        assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)


@formats
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", [need for need in itertools.product((True, False), repeat=4) if any(need)], ids=str)
def test_needed_gradients_only(need: tuple[bool, ...], training: bool, memory_format: str) -> None:
    p, epilogue = case("relu", True, 2, 3, 8, (4, 3), shared=True, dtype=torch.bfloat16, memory_format=memory_format)
    wanted = exact(p, epilogue)
    mean, var = wanted.mean.float(), wanted.var.float()
    single = not training or need == (False, False, False, True)
    back = backward(
        p, mean, var, "evaluation" if single else "streaming", training=training, epilogue=epilogue, need=need
    )
    assert tuple(result is not None for result in back[:4]) == need
    check_gradients(p, back, wanted if training else exact(p, epilogue, (mean, var)))
    assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)


@formats
@pytest.mark.parametrize(("variant", "parts"), [("streaming", 1), ("split", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_order(dtype: torch.dtype, variant: str, parts: int, memory_format: str) -> None:
    p, epilogue = case("gelu", True, 2, 5, 8, (6, 8), shared=True, dtype=dtype, memory_format=memory_format)
    first = check(p, epilogue, variant, parts, threads=64)
    for schedule in ("reversed", 1):
        other = check(p, epilogue, variant, parts, threads=64, schedule=schedule)
        for actual, expected in zip(first[:4], other[:4], strict=True):
            assert actual is not None and expected is not None
            assert_same_bits(actual, expected)


@dtypes
@formats
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_bytes(activation: str, memory_format: str, dtype: torch.dtype) -> None:
    """Forward: x at most twice, and T outputs; backward: every dy once, x twice, h written and read once."""
    T = 4
    p, epilogue = case(activation, False, T, 4, 64, (8, 8), shared=True, dtype=dtype, memory_format=memory_format)
    vectors = p.weight.nbytes * 20
    for variant, parts, reads in (("streaming", 1, 2), ("resident", 1, 1), ("cluster", 2, 1), ("split", 2, 2)):
        there = forward(p, variant, parts, epilogue=epilogue)
        assert counted(there) == (there.plan.bytes_read, there.plan.bytes_written)
        assert 0 <= there.plan.bytes_read - reads * p.x.nbytes <= vectors + there.plan.partial_bytes * parts
        assert 0 <= there.plan.bytes_written - T * p.x.nbytes <= vectors + there.plan.partial_bytes
    h = p.x.numel() * (8 if dtype == torch.float64 else 4)
    for variant, parts in (("streaming", 1), ("split", 2)):
        need = (True, True, True, activation != "none")
        back = backward(p, there.mean, there.var, variant, parts, epilogue=epilogue, need=need)
        assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)
        rest = vectors + back.plan.partial_bytes * parts
        assert 0 <= back.plan.bytes_read - (T + 2) * p.x.nbytes - h <= rest
        assert 0 <= back.plan.bytes_written - (1 + T * need[3]) * p.x.nbytes - h <= rest


@dtypes
def test_bytes_of_rows_that_do_not_fill_slots(dtype: torch.dtype) -> None:
    p, epilogue = case("none", False, 3, 4, 16, (7, 7), shared=True, dtype=dtype)
    there = forward(p, "resident", epilogue=epilogue)
    back = backward(p, there.mean, there.var, "streaming")
    for result in (there, back):
        assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)


@pytest.mark.parametrize("family", ["rows", "columns"])
@pytest.mark.parametrize("tasks", [1, 2, 40, 1000])
@pytest.mark.parametrize("device", ["H100", "RTX4090"])
def test_plans(device: str, tasks: int, family: str) -> None:
    """Shared memory holds what a block keeps of each task, down to slabs of a few channels."""
    for direction in ("forward", "backward"):
        work = Work(tasks, 32, 64, 256, 2, family, direction, fan_out=True)  # type: ignore[arg-type]
        plan = rules.plan(work, DEVICES[device])
        assert plan.shared_bytes <= DEVICES[device].block_shared_memory
        assert plan.bytes_read + plan.bytes_written < work.activation_bytes * (1 + 7 / tasks) * 1.6


def test_too_many_tasks() -> None:
    with pytest.raises(ValueError, match="has no room for 65536 tasks"):
        rules.plan(Work(1 << 16, 2, 64, 1, 4, fan_out=True), DEVICES["H100"])


def test_nothing_of_a_backward_stays_on_chip() -> None:
    p, epilogue = case("none", False, 2, 2, 16, (4, 4), shared=True)
    wanted = exact(p, epilogue)
    with pytest.raises(ValueError, match="keeps nothing on chip"):
        backward(p, wanted.mean.float(), wanted.var.float(), "resident", epilogue=Epilogue())
