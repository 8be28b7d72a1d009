"""The same bits on every run, for every number of threads, and with or without streaming stores."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from support.backends import threads
from support.layer_problems import layer_problem
from support.layer_problems import run as run_layer
from support.problems import DTYPES, FORMATS, Problem, problem, run
from support.processes import python_output
from support.tolerances import assert_same_bits
from torch import Tensor

# T, N, C, spatial; the first has many groups (one thread takes a whole one), the others few, each in several chunks.
SCHEDULES = {
    "many groups": (8, 3, 33, (20, 21)),
    "few groups, long rows": (1, 3, 2, (160, 170)),
    "few groups, many samples": (2, 700, 1, (15, 15)),
    "a small input": (2, 3, 5, (4, 4)),
}


def evaluate(p: Problem) -> tuple[Tensor, ...]:
    mean, var = torch.zeros_like(p.weight), torch.ones_like(p.weight)
    y = torch.ops.tsbn.forward_eval(p.x, p.weight, p.bias, mean, var, *p.options)
    flags = (False, True, True, True)
    return y, *torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, *flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", SCHEDULES.values(), ids=SCHEDULES)
def test_same_bits_for_every_number_of_threads(
    size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype
) -> None:
    p = problem(*size, dtype=dtype, memory_format=memory_format)
    results = []
    for count in (1, 2, 3, 4, 1, 2):
        with threads(count):
            results.append((*run(p), *evaluate(p)))
    for first, second in pairwise(results):
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("size", [(8, 300, 65), (1, 1000, 300), (2, 40, 8192), (1, 70000, 3)])
def test_same_bits_of_layer_norm_for_every_number_of_threads(size: tuple[int, int, int], fan_out: bool) -> None:
    T, rows, D = size
    p = layer_problem(T, rows, (), (D,), dtype=torch.bfloat16, fan_out=fan_out)
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            results.append(run_layer(p))
    for first, second in pairwise(results):
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_of_a_task_do_not_depend_on_the_others(memory_format: str) -> None:
    """One task alone gives the bits that it gives among many."""
    p = problem(8, 3, 33, (20, 21), memory_format=memory_format)
    everything = run(p)
    assert p.bias is not None
    t = 5
    samples = slice(3 * t, 3 * t + 3)
    alone = run(
        p._replace(x=p.x[samples], dy=p.dy[samples], weight=p.weight[t : t + 1], bias=p.bias[t : t + 1], num_tasks=1)
    )
    for got, wanted in zip((alone.y, alone.dx), (everything.y, everything.dx), strict=True):
        assert_same_bits(got, wanted[samples])
    for vector, wanted in zip((*alone[1:3], *alone[4:]), (*everything[1:3], *everything[4:]), strict=True):
        assert_same_bits(vector, wanted[t : t + 1])


@pytest.mark.parametrize("stacking", ["sample_major", "task_axis"])
def test_same_bits_for_every_stacking(stacking: str, backend: str) -> None:
    C = 7 if backend == "native" else 2
    task_major = run(problem(3, 4, C, (9, 11)))
    other = run(problem(3, 4, C, (9, 11), stacking=stacking))
    assert_same_bits(other.mean, task_major.mean)
    assert_same_bits(other.dweight, task_major.dweight)


STREAMING = """
import hashlib, torch
from support.layer_problems import layer_problem, run as run_layer
from support.problems import problem, run
def show(results, *names):
    digest = hashlib.sha256()
    for tensor in results:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print(*names, digest.hexdigest())
for dtype in (torch.float32, torch.bfloat16):
    rows = (9 << 20) // (3 * 192 * dtype.itemsize)
    show(run_layer(layer_problem(3, rows, (), (192,), dtype=dtype)), "rows", 192, dtype)
for memory_format in ("contiguous", "channels_last"):
    for C, side in ((16, 65), (64, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            N = -(-(8 << 20) // (2 * C * side * side * dtype.itemsize))
            show(run(problem(2, N, C, (side, side), dtype=dtype, memory_format=memory_format)), memory_format, C, dtype)
"""


@pytest.mark.usefixtures("native")
def test_same_bits_in_another_process_with_and_without_streaming() -> None:
    streamed, plain = (python_output(STREAMING, TSBN_STREAMING=value) for value in ("1", "0"))
    assert streamed == plain
    assert streamed.count("\n") == 10
    assert len(hashlib.sha256().hexdigest()) == len(streamed.split()[3])
