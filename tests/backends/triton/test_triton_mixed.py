"""The Triton kernels of mixed batches: in Triton's interpreter, and as compiled for NVIDIA on the PTX machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixed_calls import ALL_OF_ONE, MANY, SOME, Call
from support.tolerances import FORWARD, assert_same_bits, assert_within

pytest.importorskip("triton")
from support import compiled
from support.interpreter import device, interpreted, passes

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends.order import order_of, words_of
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.mixed import MixedPlan, MixedWork, plan, walks
from tsbn_kernels.backends.triton import mixed
from tsbn_kernels.backends.triton import operator as find
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import Needs, Running
from tsbn_kernels.operator.mixed_ops import eager_operators

TOY = device(threads=64, multiprocessors=2)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "shape", "options"),
    [
        (SOME, (5,), {"dtype": torch.bfloat16}),
        (MANY, (37,), {"activation": "relu"}),
        (ALL_OF_ONE, (5, 3), {"activation": "silu", "dtype": torch.float64}),
        (SOME, (5, 2, 3), {"memory_format": "channels_last", "activation": "gelu"}),
        (MANY, (2, 7), {"dtype": torch.float16, "mean": 100.0}),
    ],
)
def test_equals_the_definition(counts: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with interpreted(TOY, overflow=True):
        call = Call(counts, shape, **options)
        call.check(mixed)
        call.check(mixed, training=False)
        assert len(passes()) == 4


def test_no_order_of_the_samples_changes_a_bit() -> None:
    """Some samples of a task are equal in x, and differ in dy or the residual alone."""
    for call in (Call(MANY, (5,)), Call(MANY, (3, 2), torch.bfloat16, "silu")):
        call.x[::2] = call.x[0]
        order = torch.randperm(len(call.index))
        with interpreted(TOY):
            here, there = call.run(mixed), call.permuted(order).run(mixed)
        for one, other in zip((*here[0], *here[1]), (*there[0], *there[1]), strict=True):
            if one is not None and other is not None:
                assert_same_bits(one[order] if one.shape == call.x.shape else one, other)


def test_gradients_that_are_not_needed() -> None:
    call = Call(SOME, (5,), activation="relu")
    for training, needs in ((True, (False, False, True, False)), (False, (True, False, False, True))):
        call.needs = Needs(*needs)
        with interpreted(TOY):
            call.check(mixed, training)


def test_what_is_not_dense_is_read_where_it_lies() -> None:
    call = Call(SOME, (5, 3))
    assert words_of(call.x, columns=False).shape == (9, 1, 15)
    memory = torch.full((9, 3, 7), torch.nan)
    memory[:, :, 1:6] = call.x.transpose(1, 2)
    call.x = memory[:, :, 1:6].transpose(1, 2)
    words = words_of(call.x, columns=True)
    assert (words.shape, words.data_ptr()) == ((9, 3, 5), call.x.data_ptr())
    with interpreted(TOY):
        found, _ = call.run(mixed)
    exact, _ = call.run(reference)
    assert_within(found.y, exact.y, FORWARD[torch.float32])


def test_words_are_as_wide_as_samples_are_aligned() -> None:
    for values, offset, wide in ((8, 0, torch.int64), (6, 0, torch.int32), (8, 2, torch.int32), (7, 0, torch.int16)):
        x = torch.randn(5 * values + offset).to(torch.bfloat16)[offset:].view(5, values)
        assert words_of(x, columns=True).dtype == wide
        assert words_of(x, columns=True).data_ptr() == x.data_ptr()


# ---- plans -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any),
    st.integers(1, 200),
    st.sampled_from([(2, "columns", 64), (4, "columns", 32), (4, "rows", 32), (8, "rows", 16)]),
    st.data(),
)
def test_there_are_programs_for_every_mix(
    counts: list[int], channels: int, kind: tuple[int, Any, int], data: st.DataObject
) -> None:
    size, family, most = kind
    positions = data.draw(st.integers(1, most))
    made = plan(MixedWork(len(counts), sum(counts), channels, positions, size, family), DEVICES["H100"])
    assert made.block >= 1
    assert made.blocks >= sum(-(-samples // made.block) for samples in counts)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    keys = torch.randint(-9, 9, (len(index),))
    mix = order_of(index.flip(0), len(counts), keys, made.block, made.blocks)
    assert mix.task.shape == (made.blocks,)
    assert mix.order.sort().values.tolist() == list(range(len(index)))
    assert torch.equal(index.flip(0)[mix.order], index)
    for task, blocks in enumerate(-(-samples // made.block) for samples in counts):
        assert (mix.task == task).nonzero().flatten().tolist() == [int(mix.block[task]) + i for i in range(blocks)]
        own = mix.order[mix.sample[task] : mix.sample[task + 1]]
        assert keys[own].diff().ge(0).all()


def test_short_samples_have_kernels_of_their_own() -> None:
    sizes: tuple[tuple[tuple[int, ...], bool], ...] = (
        ((5, 3), True),
        ((5, 3, 8, 8), False),
        ((5, 3, 4, 8), True),
        ((0, 3), False),
    )
    for sample, short in sizes:
        assert walks(torch.empty(sample)) == short
    assert find("mixed_backward") is mixed.mixed_backward
    chosen = eager_operators("triton")
    with interpreted(TOY), mock.patch.object(mixed, "MixedForward", side_effect=AssertionError("walked")):
        call = Call(SOME, (5,))
        with pytest.raises(AssertionError, match="walked"):
            call.run(chosen)
        call = Call(MANY, (5,))
        operands = call.x, call.index, call.weight, call.bias, call.residual
        with pytest.raises(AssertionError, match="walked"):
            chosen.mixed_forward_tracked(*operands, Running(), call.options)
        call = Call(SOME, (2, 6, 6))
        y = call.run(chosen)[0].y
        assert_within(y, call.run(reference)[0].y, FORWARD[torch.float32])


# ---- the compiled code -----------------------------------------------------------------------------------------------


def run_compiled(call: Call, gpu: str, schedule: str | int) -> None:
    """Checks results and traffic of a call on a GPU whose programs have few threads.

    Activations move as planned; vectors, keys and sums at most so much, whatever the mix.
    """
    with compiled.machine(replace(DEVICES[gpu], multiprocessors=2, block_threads=256), schedule) as done:
        call.check(mixed)
    reports = iter(done.reports)
    for one in done.plans:
        assert isinstance(one, MixedPlan)
        made = [next(reports) for _ in range(one.launches)]
        for what, claimed in (("load", one.activation_bytes_read), ("store", one.activation_bytes_written)):
            assert sum(compiled.moved(r, what, True).bytes for r in made) == claimed
        assert sum(compiled.moved(r, "store", False).bytes for r in made) <= one.vector_bytes_written
        sectors = sum(compiled.moved(r, "load", False).sectors for r in made)  # each warp reads them, one or more
        assert sectors <= one.vector_bytes_read // one.work.parameter_size * one.warps
    assert next(reports, None) is None


@pytest.mark.parametrize(
    ("gpu", "schedule", "counts", "shape", "options"),
    [
        ("H100", "reversed", (9, 0, 40, 1), (72,), {"dtype": torch.bfloat16}),
        ("A100", 3, (3, 0, 20, 1), (5, 7), {"activation": "relu"}),
        ("B200", "forward", (0, 0, 11, 0), (19, 3), {"memory_format": "channels_last", "activation": "silu"}),
    ],
)
def test_compiled(gpu: str, schedule: str | int, counts: tuple[int, ...], shape: tuple[int, ...], options: Any) -> None:
    run_compiled(Call(counts, shape, **options), gpu, schedule)


def test_the_same_bits_whatever_runs_first() -> None:
    call = Call((9, 0, 40, 1), (40,), activation="relu")
    results = []
    for schedule in ("forward", "reversed", 5):
        with compiled.machine(replace(DEVICES["H100"], multiprocessors=2, block_threads=256), schedule):
            found, gradients = call.run(mixed)
        results.append((*found, *gradients))
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert one is not None
            assert other is not None
            assert_same_bits(one, other)


MUTANTS = {
    "a sample too many": ("(n < slab.N) & (s < slab.S)", "(n <= slab.N) & (s < slab.S)", "race|write count"),
    "blocks leave all in one place": ("row_of(first + block.number,", "row_of(first,", "race|write count|unwritten"),
    "a task begins where the first one does": ("tl.load(mix.sample + t) + before", "before", "race|write count"),
    "keys leave out the last words": ("inside = (n < N) & (i < inner)", "inside = (n < N) & (i < inner - 1)", "assert"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("mixed", text, broken, tmp_path, monkeypatch)
    call = Call((9, 0, 40, 1), (40,))
    with pytest.raises((Violation, AssertionError), match=message):
        run_compiled(call, "H100", "forward")
