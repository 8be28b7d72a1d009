"""Running statistics by the launch that computes the batch's: every form of the kernels, in the PTX machine."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
from cuda_cases import case
from cuda_machine import NO_EPILOGUE, Forward, counted, forward
from cuda_source import Broken
from obedient import obedient
from support.mixed_calls import Call
from support.problems import FORMATS, problem
from support.tolerances import assert_same_bits
from torch import Tensor

from tools.ptxvm import Violation, find_nvcc
from tsbn_kernels.backends import cuda
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import mixed_batch_norm
from tsbn_kernels.definition.options import Options, Running

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")


def running(tasks: int, channels: int, momentum: float | None, rows: bool, dtype: torch.dtype) -> Running:
    """Statistics of two tasks more than there are where ``rows`` picks some."""
    made = torch.Generator().manual_seed(7)
    size = tasks + 2 * rows, channels
    mean, var = torch.randn(size, generator=made).to(dtype), torch.rand(size, generator=made).to(dtype)
    picked = torch.randperm(size[0], generator=made)[:tasks]
    return Running(mean, var, torch.arange(2, 2 + size[0]), momentum, picked if rows else None)


def copied(given: Running) -> Running:
    return Running._make(v.clone() if isinstance(v, Tensor) else v for v in given)


def check(result: Forward, got: Running, before: Running, values: int) -> None:
    """Compares the statistics with those that the reference makes of the same batch; other rows stay as they are."""
    wanted = copied(before)
    reference.track(wanted, result.mean, result.var, values)
    for one, exact, old in zip(got[:3], wanted[:3], before[:3], strict=True):
        assert isinstance(one, Tensor) and isinstance(exact, Tensor) and isinstance(old, Tensor)
        close = {} if result.mean.dtype == torch.float64 or one.dtype != torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(one, exact, **close)
        changed = (one != old).view(len(old), -1).any(1).nonzero().flatten().tolist()
        assert changed == (list(range(len(old))) if got.rows is None else sorted(got.rows.tolist()))


# momentum, whether rows are picked, and the dtypes of running statistics and x, which go round with the forms
KINDS = (
    (0.1, False, torch.float32, torch.bfloat16),
    (None, True, torch.float32, torch.float32),
    (0.75, True, torch.bfloat16, torch.float32),
    (None, False, torch.float64, torch.float64),
    (1.0, True, torch.float64, torch.float32),
    (None, True, torch.float16, torch.bfloat16),
    (0.1, False, torch.float64, torch.float16),
)
FORMS = product((("streaming", 1), ("resident", 1), ("cluster", 4), ("split", 3)), (False, True), FORMATS)


@pytest.mark.parametrize(("form", "kind"), list(zip(FORMS, cycle(KINDS), strict=False)), ids=str)
def test_every_form(form: Any, kind: Any) -> None:
    """Plain, or the fan-out of one x with an activation: right, with the same bits and bytes in two orders of warps."""
    (variant, parts), fused, memory_format = form
    momentum, rows, dtype, x_dtype = kind
    T, N, C, positions = 3, 4, 24, 40
    shape: dict[str, Any] = {"dtype": x_dtype, "memory_format": memory_format}
    p, epilogue = problem(T, N, C, (5, 8), **shape), NO_EPILOGUE
    if fused:
        p, epilogue = case("relu", False, T, N, C, (5, 8), shared=True, **shape)
    before, found = running(T, C, momentum, rows, dtype), []
    for schedule in ("forward", 1):
        got = copied(before)
        result = forward(p, variant, parts, threads=64, schedule=schedule, running=got, epilogue=epilogue)
        check(result, got, before, N * positions)
        found.append(got)
        # Each channel reads its row; those of a task read the count by adding to it, and the last one adds once more.
        moved, counts = 2 * T * C * dtype.itemsize, 8 * T if momentum is not None else 8 * T * (C + 1)
        read = moved + 8 * T * C * rows + (counts if momentum is not None else 0)
        bytes_read, bytes_written = counted(result)
        assert bytes_read - result.plan.bytes_read == read
        assert bytes_written - result.plan.bytes_written == moved + counts
    for one, other in zip(*(got[:3] for got in found), strict=True):
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        assert_same_bits(one, other)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_some_statistics_alone(missing: tuple[int, ...]) -> None:
    p = problem(2, 3, 8, (4, 4))
    given = running(2, 8, 0.25, False, torch.float32)
    got = Running._make(None if k in missing else v for k, v in enumerate(given))
    wanted = copied(got)
    result = forward(p, "streaming", running=got)
    reference.track(wanted, result.mean, result.var, 48)
    torch.testing.assert_close([v for v in got if v is not None], [v for v in wanted if v is not None])


def test_the_operators_hand_on_what_they_are_given() -> None:
    """Those of mixed batches too: a task without a sample is left alone."""
    p, call = problem(3, 4, 8, (5,), stacking="sample_major"), Call((5, 0, 70, 2), (24,))
    operands = call.x, call.index, call.weight, call.bias, call.residual
    equal, mixed = running(3, 8, None, True, torch.float32), running(4, 24, None, False, torch.float32)
    wanted, exact = copied(equal), copied(mixed)
    with obedient():
        cuda.forward_tracked(p.x, p.weight, p.bias, None, equal, Options(*p.options))
        cuda.mixed_forward_tracked(*operands, mixed, call.options)
    reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    mixed_batch_norm.mixed_forward_tracked(*operands, exact, call.options)
    torch.testing.assert_close(list(equal[:3]), list(wanted[:3]))
    torch.testing.assert_close(list(mixed[:3]), list(exact[:3]))
    assert mixed.batches is not None
    assert mixed.batches.tolist() == [3, 3, 5, 6]


# ---- the proof can fail ----------------------------------------------------------------------------------------------

MUTANTS = {
    "the first channel counts what the others read": (
        "seen = atomicAdd(p.batches + row, one);",
        "seen = p.batches[row];\n  if (channel == 0) ++p.batches[row];",
    ),
    "who has read is not taken off": ("1 - channels * one", "1"),
    "the last but one counts": ("% channels == channels - 1", "% channels == channels - 2"),
    "the biased variance": ("var * (values / (values - A(1)))", "var"),
    "the row of another task": ("task : p.rows[task]", "task : p.rows[0]"),
    "every part of a slab tracks": (
        "p.second)[task * p.n.channels + channel] = var;\n",
        "p.second)[task * p.n.channels + channel] = var;\n      }\n      {\n",
    ),
    "the share of the other side": ("running + share * change", "batch - share * change"),
}
BROKEN = Broken(MUTANTS, "forward_bf16_rows")


def of_two_tasks(name: str | None) -> None:
    for momentum in (None, 0.25):
        before, p = running(2, 2, momentum, True, torch.float32), problem(2, 3, 2, (24, 32), dtype=torch.bfloat16)
        got = copied(before)
        check(forward(p, "cluster", 2, code=BROKEN[name], threads=64, running=got), got, before, 3 * 768)


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_mutants_are_caught(name: str | None) -> None:
    if name is None:
        of_two_tasks(None)
        return
    with pytest.raises((Violation, AssertionError)):
        of_two_tasks(name)
