"""Running statistics by the launch that computes the batch's: every plan in the interpreter, and what is launched."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import compiled
from support.mixed_calls import ALL_OF_ONE, MANY, SOME, Call
from support.problems import FORMATS, STACKINGS, problem

pytest.importorskip("triton")
from support.interpreter import device, interpreted, passes
from test_triton_compiled import SIZES, toy

from tools.ptxvm import Violation
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.triton import mixed, ops
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import mixed_batch_norm
from tsbn_kernels.definition.options import Options, Running

SMALL = [(3, 4, 2, (8,)), (2, 5, 3, (7,)), (2, 3, 2, (211,)), (3, 8, 2, (64,)), (2, 3, 37, (5,))]


def running(tasks: int, channels: int, momentum: float | None, rows: bool, dtype: torch.dtype) -> Running:
    """Statistics of one task more than there are where ``rows`` picks some."""
    made = torch.Generator().manual_seed(7)
    size = tasks + rows, channels
    mean, var = torch.randn(size, generator=made).to(dtype), torch.rand(size, generator=made).to(dtype)
    count = torch.arange(3, 3 + tasks + rows)
    return Running(mean, var, count, momentum, torch.arange(tasks, 0, -1) if rows else None)


def copied(given: Running) -> Running:
    return Running._make(v.clone() if isinstance(v, torch.Tensor) else v for v in given)


@pytest.mark.parametrize("fan_out", [False, True])
def test_every_plan_updates_what_the_reference_does(fan_out: bool) -> None:
    reached: set[Hashable] = set()
    kinds = product((0.1, None, 0.75), (False, True), (torch.float32, torch.bfloat16, torch.float64))
    rounds = zip(cycle(kinds), cycle(STACKINGS), strict=False)
    for (tasks, samples, channels, positions), memory_format in product(SMALL, FORMATS):
        for multiprocessors in (1, 8):
            (momentum, rows, dtype), stacking = next(rounds)
            p = problem(tasks, samples, channels, positions, stacking=stacking, memory_format=memory_format)
            options = Options(*p.options, fan_out=fan_out)
            x = problem(1, samples, channels, positions, memory_format=memory_format).x if fan_out else p.x
            got = running(tasks, channels, momentum, rows, dtype)
            wanted, before = copied(got), copied(got)
            with interpreted(device(threads=16, multiprocessors=multiprocessors)):
                found = ops.forward_tracked(x, p.weight, p.bias, None, got, options)
                reached.update((one.plan.variant, one.plan.work.family) for one in passes())
            exact = reference.forward_tracked(x, p.weight, p.bias, None, wanted, options)
            torch.testing.assert_close(found.y, exact.y)
            for one, defined, old in zip(got[:3], wanted[:3], before[:3], strict=True):
                assert isinstance(one, torch.Tensor)
                assert isinstance(defined, torch.Tensor)
                digits = {"rtol": 4e-7, "atol": 4e-7} if dtype == torch.float64 else {}  # those of a batch in float32
                torch.testing.assert_close(one, defined, **digits)
                assert isinstance(old, torch.Tensor)
                assert not torch.equal(one, old)
    variants = ("resident", "split") if fan_out else ("resident", "streaming", "split")
    assert reached >= set(product(variants, ("rows", "columns")))


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_some_statistics_alone(missing: tuple[int, ...]) -> None:
    p = problem(2, 3, 5, (4,))
    given = running(2, 5, 0.25, False, torch.float32)
    got = Running._make(None if k in missing else v for k, v in enumerate(given))
    wanted = copied(got)
    with interpreted(device(threads=16)):
        ops.forward_tracked(p.x, p.weight, p.bias, None, got, Options(*p.options))
    reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    torch.testing.assert_close([v for v in got if v is not None], [v for v in wanted if v is not None])


def test_float64_is_updated_with_all_digits() -> None:
    p = problem(2, 3, 5, (4,), dtype=torch.float64)
    got = running(2, 5, 0.1, False, torch.float64)
    wanted = copied(got)
    with interpreted(device(threads=16)):
        ops.forward_tracked(p.x, p.weight, p.bias, None, got, Options(*p.options))
    reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("counts", "shape", "dtype", "statistics"),
    [
        (MANY, (5,), torch.bfloat16, torch.float32),
        (SOME, (3, 2, 2), torch.float32, torch.bfloat16),
        (ALL_OF_ONE, (7, 3), torch.float64, torch.float64),
    ],
)
def test_tasks_of_a_mixed_batch(
    counts: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, statistics: torch.dtype, momentum: float | None
) -> None:
    """A task without a sample is left alone."""
    call = Call(counts, shape, dtype)
    operands = call.x, call.index, call.weight, call.bias, None
    got = running(len(counts), shape[0], momentum, False, statistics)
    wanted = copied(got)
    for _ in range(2):
        with interpreted(device(threads=16)):
            found = mixed.mixed_forward_tracked(*operands, got, call.options)
        mixed_batch_norm.track(wanted, found.mean, found.var, torch.tensor(counts), call.x[0, 0].numel())
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


def test_one_value_of_a_task_of_a_mixed_batch() -> None:
    call = Call((3, 1, 0, 2), (5,))
    with interpreted(device(threads=16)), pytest.raises(RuntimeError, match="Expected more than 1 value per task"):
        mixed.mixed_forward_tracked(call.x, call.index, call.weight, None, None, Running(), call.options)


# ---- as compiled -----------------------------------------------------------------------------------------------------

FORMS: list[Any] = [
    ("resident", "rows", False, None, 1),
    ("streaming", "rows", False, 0.3, "forward"),
    ("streaming", "columns", False, None, "reversed"),
    ("split", "rows", False, None, 2),
    ("resident", "columns", False, 0.3, 2),
    ("resident", "columns", True, None, "forward"),
    ("split", "columns", True, 0.3, 3),
]


def track_twice(variant: str, family: str, fan_out: bool, momentum: float | None, schedule: str | int) -> None:
    """Two batches of a layer in the PTX machine: the statistics are those of the reference."""
    shape: dict[str, Any] = {"memory_format": "contiguous" if family == "rows" else "channels_last"}
    size = SIZES[variant, family, False]
    tasks, samples, channels, spatial = size
    p, x = problem(*size, **shape), problem(1, samples, channels, spatial, **shape).x
    got, options = running(tasks, channels, momentum, True, torch.float32), Options(*p.options, fan_out=fan_out)
    wanted = copied(got)
    for order in (schedule, "forward"):
        with compiled.machine(toy(variant, "sm_90"), order) as done:
            found = ops.forward_tracked(x if fan_out else p.x, p.weight, p.bias, None, got, options)
        assert [plan.variant for plan in done.plans] == [variant]
        reference.track(wanted, found.mean, found.var, samples * math.prod(spatial))
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


@pytest.mark.parametrize(("variant", "family", "fan_out", "momentum", "schedule"), FORMS)
def test_nobody_reads_what_has_changed(
    variant: str, family: str, fan_out: bool, momentum: float | None, schedule: str | int
) -> None:
    track_twice(variant, family, fan_out, momentum, schedule)


def track_mixed(momentum: float | None, schedule: str | int) -> None:
    """Two mixed batches of a layer in the PTX machine, in more blocks of channels than one."""
    call = Call((9, 0, 4, 2), (150,), torch.bfloat16)
    operands = call.x, call.index, call.weight, None, None
    got = running(4, 150, momentum, False, torch.float32)
    wanted = copied(got)
    for order in (schedule, "forward"):
        with compiled.machine(replace(DEVICES["H100"], multiprocessors=2, block_threads=256), order):
            found = mixed.mixed_forward_tracked(*operands, got, call.options)
        mixed_batch_norm.track(wanted, found.mean, found.var, torch.tensor([9, 0, 4, 2]), 1)
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


@pytest.mark.parametrize(("momentum", "schedule"), [(0.3, "reversed"), (None, 2)])
def test_nobody_reads_what_has_changed_of_a_mixed_batch(momentum: float | None, schedule: str | int) -> None:
    track_mixed(momentum, schedule)


COUNTED = """    seen = tl.atomic_add(batches + slab.t, 1 << 32, sem="relaxed")
    last = (seen >> 32) % programs == programs - 1
    tl.atomic_add(batches + slab.t, 1 - (programs << 32), mask=last, sem="relaxed")
"""
MUTANTS = {
    "no barrier before what other threads read is written": ("tl.debug_barrier()", ""),
    "the first channel counts what the others read": (
        COUNTED,
        """    seen = tl.load(batches + slab.t)
    tl.store(batches + slab.t, seen + 1, mask=slab.channel == 0)
""",
    ),
    "the last but one counts": ("== programs - 1", "== programs - 2"),
    "who has read is not taken off": ("1 - (programs << 32)", "1"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.break_kernel("running", *MUTANTS[name], tmp_path, monkeypatch)
    with pytest.raises((Violation, AssertionError)):
        track_twice(*FORMS[0])


MIXED_MUTANTS = {
    "a task without a sample is moved": (
        "if blocks > 0:\n        average, lost",
        "if blocks >= 0:\n        average, lost",
    ),
    "values are those of the batch": (
        "tl.load(mix.samples + slab.t), C, S)\n        before",
        "15, C, S)\n        before",
    ),
    "the row of another task": ("sampled = Slab(slab.t,", "sampled = Slab(slab.t * 0,"),
}


@pytest.mark.parametrize("name", MIXED_MUTANTS)
def test_mutants_of_mixed_batches_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.break_kernel("mixed", *MIXED_MUTANTS[name], tmp_path, monkeypatch)
    with pytest.raises((Violation, AssertionError)):
        track_mixed(0.3, "forward")
