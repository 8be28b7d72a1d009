"""Layer normalisation of mixed batches in Triton: interpreted, and as compiled for NVIDIA on the PTX machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_problems import LayerResults
from support.mixed import T
from support.mixed_layer import Call, call_of, check
from support.tolerances import assert_same_bits
from torch import Tensor

pytest.importorskip("triton")
from support import compiled
from support.interpreter import device, interpreted, passes

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.mixed_layer_norm import MixedLayerPlan, MixedLayerWork, fits, plan
from tsbn_kernels.backends.triton import mixed_layer_norm as backend
from tsbn_kernels.backends.triton import operator as find
from tsbn_kernels.definition import mixed_layer_norm as reference
from tsbn_kernels.definition.options import LayerNeeds
from tsbn_kernels.operator.mixed_layer_ops import eager_operators

TOY, WIDE = device(threads=64, multiprocessors=2), device(threads=64, multiprocessors=64)
SOME, MANY, ALL_OF_ONE = (3, 0, 5, 1), (6, 5, 24, 0), (0, 0, 9, 0)


def index_of(counts: tuple[int, ...]) -> Tensor:
    """The tasks of samples in a random order."""
    index = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]


def verify(call: Call) -> None:
    check(call, call.run(backend), call.in_double().run(reference))


CALLS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, bool]] = [
    (SOME, (), (7,), torch.float32, False),
    (MANY, (), (300,), torch.bfloat16, True),
    (ALL_OF_ONE, (3,), (4, 5), torch.float64, False),
    (SOME, (41,), (64,), torch.float16, False),  # several programs for a sample
    (MANY, (2,), (2500,), torch.float32, True),
]


@pytest.mark.parametrize("call", CALLS, ids=map(str, range(len(CALLS))))
def test_equals_the_definition(call: Any) -> None:
    counts, *how = call
    with interpreted(WIDE if call == CALLS[3] else TOY, overflow=True):
        verify(call_of(index_of(counts), *how))
        assert len(passes()) == 2


def test_plans_of_every_kind_are_reached() -> None:
    kinds = set()
    for counts, tokens, shape, *_ in CALLS:
        sizes = sum(counts), torch.Size(shape).numel(), torch.Size(tokens).numel()
        for toy in (TOY, WIDE):
            made = plan(MixedLayerWork(1, *sizes, 4, "columns", "backward", of_tasks=T), toy)
            kinds |= {("samples", made.block > 1), ("pieces", made.splits > 1), ("tiles", made.share > 1)}
    assert len(kinds) == 6


def test_no_order_of_the_samples_changes_a_bit() -> None:
    """Some samples of a task are equal in x, and differ in dy alone."""
    for tokens, shape, dtype in (((), (37,), torch.float32), ((3,), (5,), torch.bfloat16)):
        call = call_of(index_of(MANY), tokens, shape, dtype, rms=False)
        call.x[::2], residual = call.x[0].clone(), torch.zeros_like(call.x)
        call = call._replace(residual=residual)
        order = torch.randperm(len(call.index))
        with interpreted(TOY):
            here, there = call.run(backend), call.permuted(order).run(backend)
        for name, one, other in zip(LayerResults._fields, here, there, strict=True):
            if name in ("dweight", "dbias"):
                assert_same_bits(one, other)
            else:
                assert_same_bits(one.view(len(order), -1)[order], other.view(len(order), -1))


def test_gradients_that_are_not_needed() -> None:
    call = call_of(index_of(SOME), (2,), (5,), torch.float32, rms=False)
    with interpreted(TOY):
        everything = call.run(backend)
        saved = backend.LayerSaved(everything.s, call.weight, everything.mean, everything.rstd)
        for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            found = backend.mixed_layer_norm_backward(
                call.dy, call.ds, saved, call.index, LayerNeeds(*needs), call.options
            )
            for one, other, needed in zip(found, everything[4:], needs, strict=True):
                if needed and one is not None:
                    torch.testing.assert_close(one, other)
                assert (one is not None) == needed


def test_absent_tasks_may_hold_anything() -> None:
    call = call_of(index_of(SOME), (), (7,), torch.float32, rms=False)
    call.weight[1] = float("nan")
    with interpreted(TOY):
        found = call.run(backend)
    assert found.y.isfinite().all()
    assert not found.dweight[1].any()
    assert found.dweight[[0, 2, 3]].isfinite().all()


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any),
    st.integers(1, 8192),
    st.integers(1, 300),
    st.sampled_from(["H100", "A100", "MI300X"]),
)
def test_there_are_programs_for_every_mix(counts: list[int], channels: int, positions: int, gpu: str) -> None:
    work = MixedLayerWork(1, sum(counts), channels, positions, 2, "columns", "backward", of_tasks=len(counts))
    made = plan(work, DEVICES[gpu])
    assert made.blocks >= sum(-(-samples // made.block) for samples in counts)
    assert made.splits * made.share >= made.tiles
    assert made.tiles * made.tile[0] >= made.block * positions


def test_long_rows_are_gathered_for_the_kernels_of_equal_tasks() -> None:
    x = torch.empty(2, 8193)
    assert fits(x[:, 1:], x[:, 1:])
    assert not fits(x, x)
    assert find("mixed_layer_norm") is backend.mixed_layer_norm
    chosen = eager_operators("triton")
    with interpreted(device(threads=1024)), mock.patch.object(backend, "MixedLayerForward", side_effect=AssertionError):
        call = call_of(torch.tensor([1, 0]), (), (8193,), torch.float32, rms=True)
        check(call, call.run(chosen), call.in_double().run(reference))
        with pytest.raises(AssertionError):
            call_of(torch.tensor([1, 0]), (), (5,), torch.float32, rms=True).run(chosen)


# ---- the compiled code -----------------------------------------------------------------------------------------------


def run_compiled(call: Call, gpu: str, schedule: str | int) -> None:
    """Checks results and traffic of a call on a GPU whose programs have few threads.

    Activations move as planned; vectors, keys and sums at most so much, whatever the mix.
    """
    with compiled.machine(replace(DEVICES[gpu], multiprocessors=2, block_threads=256), schedule) as done:
        verify(call)
    reports = iter(done.reports)
    for one in done.plans:
        assert isinstance(one, MixedLayerPlan)
        made = [next(reports) for _ in range(one.launches)]
        for what, claimed in (("load", one.activation_bytes_read), ("store", one.activation_bytes_written)):
            assert sum(compiled.moved(r, what, True).bytes for r in made) == claimed, what
        assert sum(compiled.moved(r, "store", False).bytes for r in made) <= one.vector_bytes_written
    assert next(reports, None) is None


@pytest.mark.parametrize(
    ("gpu", "schedule", "counts", "tokens", "shape", "dtype"),
    [
        ("H100", "reversed", (9, 0, 40, 1), (), (72,), torch.bfloat16),
        ("A100", 3, (2, 0, 1, 0), (150,), (40,), torch.float32),  # several programs for a sample
    ],
)
def test_compiled(gpu: str, schedule: Any, counts: Any, tokens: Any, shape: Any, dtype: torch.dtype) -> None:
    run_compiled(call_of(index_of(counts), tokens, shape, dtype, rms=False), gpu, schedule)


MUTANTS = {
    "samples in the order of the batch": ("Place(sample, at.s,", "Place(at.n, at.s,", "race|write count|unwritten"),
    "a piece is left out": ("first = program % pieces * share\n", "first = share\n", "race|write count|unwritten"),
    "pieces leave all in one place": (
        "row_of(program, slab)",
        "row_of(program // pieces, slab)",
        "race|write count|out of bounds",
    ),
    "gates of another task": ("tl.load(tasks + place.n,", "0 * tl.load(tasks + place.n,", "out of bounds"),
    "a task begins where the first one does": ("tl.load(mix.block + slab.t) * pieces", "0 * pieces", "out of bounds"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("mixed_layer_norm", text, broken, tmp_path, monkeypatch)
    with pytest.raises((Violation, AssertionError), match=message):
        run_compiled(call_of(index_of((2, 0, 1, 0)), (150,), (40,), torch.float32, rms=False), "H100", "forward")
