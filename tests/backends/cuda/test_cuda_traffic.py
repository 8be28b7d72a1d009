"""The bytes that the machine counts are those that the plan claims, and accesses are whole cache lines."""

from __future__ import annotations

import re
from typing import Any

import cuda_machine
import pytest
import torch
from cuda_machine import Backward, backward, counted, forward
from support.problems import FORMATS, Problem, definition, problem

from tools.ptxvm import Out, Report, Struct, Violation, find_nvcc, launch

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

formats = pytest.mark.parametrize("memory_format", FORMATS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def case(memory_format: str, dtype: torch.dtype) -> Problem:
    return problem(2, 4, 64, (8, 16), dtype=dtype, memory_format=memory_format)


def backward_of(p: Problem, variant: str, parts: int, **options: int) -> Backward:
    statistics = definition(p)
    return backward(p, statistics.mean.float(), statistics.var.float(), variant, parts, **options)


@dtypes
@formats
@pytest.mark.parametrize(
    ("variant", "parts", "options"),
    [
        ("streaming", 1, {}),
        ("resident", 1, {}),
        *(("cluster", parts, {}) for parts in (2, 4, 8, 16)),
        ("split", 3, {}),
        ("together", 3, {}),
        ("together", 5, {"resident": 64, "threads": 64}),
        ("together", 3, {"most_lanes": 2}),
        ("resident", 1, {"resident": 64, "threads": 64}),
        ("cluster", 2, {"resident": 64, "threads": 64}),
    ],
    ids=str,
)
def test_claim(variant: str, parts: int, options: dict[str, int], memory_format: str, dtype: torch.dtype) -> None:
    p = case(memory_format, dtype)
    for result in (forward(p, variant, parts, **options), backward_of(p, variant, parts, **options)):
        assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)


@dtypes
@formats
@pytest.mark.parametrize(("variant", "parts"), [("resident", 1), ("cluster", 2), ("cluster", 8)])
def test_read_once(variant: str, parts: int, memory_format: str, dtype: torch.dtype) -> None:
    """One read and one write forward, two and one backward, beside the vectors of parameters and statistics."""
    p = case(memory_format, dtype)
    vectors = p.weight.nbytes * 3 * parts
    read, written = counted(forward(p, variant, parts))
    assert 0 <= read - p.x.nbytes <= vectors and 0 <= written - p.x.nbytes <= vectors
    read, written = counted(backward_of(p, variant, parts))
    assert 0 <= read - 2 * p.x.nbytes <= vectors and 0 <= written - p.x.nbytes <= vectors


@formats
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_second_launch_begins_at_the_end(
    direction: str, memory_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads first what the launch before it read last. The machine tells where memory is read that holds nothing."""
    p = problem(2, 1, 64, (16, 16), dtype=torch.bfloat16, memory_format=memory_format)
    found: list[int] = []
    x = cuda_machine.POINTERS.index("x")

    def note(code: str, kernel: str, blocks: int, threads: int, args: list[Struct], **options: Any) -> Report:
        empty = [Out(value.clone()) if k == x else value for k, value in enumerate(args[0].values)]
        with pytest.raises(Violation, match="unwritten read") as caught:
            launch(code, kernel, blocks, threads, [Struct(args[0].form, *empty)], **options)
        found.append(int(re.findall(r"bytes at byte (\d+) of", str(caught.value))[0]))
        return launch(code, kernel, blocks, threads, args, **options)

    monkeypatch.setattr(cuda_machine, "launch", note)
    if direction == "forward":
        forward(p, "split", 3, threads=64)
    else:
        backward_of(p, "split", 3, threads=64)
    first, second = found
    steps = 4 * 64 * 16  # bytes of four steps of a block
    assert first < steps and second >= p.x.nbytes - steps


@formats
def test_evaluation(memory_format: str) -> None:
    p = case(memory_format, torch.bfloat16)
    statistics = definition(p)
    mean, var = statistics.mean.float(), statistics.var.float()
    for result in (
        forward(p, "evaluation", 3, given=(mean, var)),
        backward(p, mean, var, "evaluation", 1, training=False),
        backward(p, mean, var, "cluster", 2, training=False),
        backward(p, mean, var, "evaluation", 2, training=False, need=(True, False, False)),
    ):
        assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)


@dtypes
@formats
def test_accesses_are_whole_lines(memory_format: str, dtype: torch.dtype) -> None:
    """A warp's 16-byte accesses move no sector twice: 16 of 32 bytes each; shared memory has no bank conflicts."""
    p = case(memory_format, dtype)
    for result in (forward(p, "cluster", 2), backward_of(p, "cluster", 2)):
        rows = [row for report in result.reports for row in report.rows if row.bytes and row.bytes == 16 * row.threads]
        outside = [row for row in rows if row.space == "global"]
        assert sum(row.bytes for row in outside) >= 2 * p.x.nbytes
        assert sum(row.sectors for row in outside) * 32 == sum(row.bytes for row in outside)
        inside = [row for row in rows if row.space == "shared" and row.bytes >= p.x.nbytes]
        assert sum(row.conflicts for row in inside) == 0


@dtypes
def test_rows_that_do_not_fill_slots(dtype: torch.dtype) -> None:
    """7 x 7 positions: whole slots are read as such, only the ends of a run element by element."""
    p = problem(2, 4, 16, (7, 7), dtype=dtype)
    result = forward(p, "resident")
    assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)
    wide = sum(r.bytes for r in result.reports[0].rows if r.space == "global" and r.bytes == 16 * r.threads > 0)
    assert wide > 2 * p.x.nbytes * 0.7
